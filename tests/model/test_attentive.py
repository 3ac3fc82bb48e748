"""SCAN, MAC and EVE-Image against their papers' formulas, one pair and one step at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vpworkbench.model.attentive import EveImage, Mac, Scan, stacked_attention

WORDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 5, 0, 0]])
REAL = WORDS > 0
SEEN = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def inputs(images: int = 2, sides: int | None = None):
    generator = torch.Generator().manual_seed(0)
    shape = (images, 6, 10) if sides is None else (images, sides, 6, 10)
    vision = torch.randn(shape, generator=generator, dtype=torch.float64)
    return vision, SEEN if sides is None else SEEN[:, None].expand(-1, sides, -1)


def built(kind, *args, **options):
    torch.manual_seed(1)
    return kind(10, 12, *args, width=8, **options).double().eval()


def naive_similarity(queries, contexts, sharpness):
    """Lee et al. 2018, Eq. 1 to 5: one image and one text."""
    cosine = [[float_cosine(q, c) for c in contexts] for q in queries]
    positive = [[value.clamp(min=0) for value in row] for row in cosine]
    norms = [
        torch.stack([row[c] for row in positive]).square().sum().clamp(min=1e-8).sqrt() for c in range(len(contexts))
    ]
    found = []
    for query, row in zip(queries, positive, strict=True):
        weights = torch.stack([sharpness * value / norm for value, norm in zip(row, norms, strict=True)]).softmax(0)
        found.append(float_cosine(query, (weights[:, None] * contexts).sum(0)))
    return torch.stack(found).mean()


def float_cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def test_scan_is_the_printed_formula_with_its_gradients():
    model, (vision, seen) = built(Scan), inputs()
    vision.requires_grad_()
    found = model(vision, seen, WORDS, REAL)
    wanted = []
    for image in range(2):
        regions = torch.nn.functional.normalize(model.image(vision[image][seen[image]]), dim=-1)
        for text in range(2):
            both = model.read(model.embed(WORDS[text][REAL[text]])[None])[0][0]
            words = torch.nn.functional.normalize((both[:, :8] + both[:, 8:]) / 2, dim=-1)
            wanted.append((naive_similarity(words, regions, 9.0) + naive_similarity(regions, words, 4.0)) / 2)
    wanted = torch.stack(wanted).view(2, 2)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(2, 2, dtype=torch.float64)
    parts = [vision, *model.parameters()]
    ours, theirs = (torch.autograd.grad((weights * one).sum(), parts) for one in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_scan_of_identical_sets_is_one_and_gradients_of_no_overlap_are_finite():
    one = torch.eye(3, dtype=torch.float64)[None]
    real = torch.ones(1, 3, dtype=torch.bool)
    assert stacked_attention(one, one, real, real, sharpness=1e3).item() == pytest.approx(1)
    queries = one.clone().requires_grad_()
    stacked_attention(queries, -one, real, real, sharpness=9.0).sum().backward()
    assert queries.grad.isfinite().all()


def naive_mac(model, vision, words):
    """Hudson and Manning 2018, Sec. 3: control (c1 to c2.3), read (r1 to r3), write (w1), one text."""
    outputs, (state, _) = model.read(model.embed(words)[None])
    outputs, question = outputs[0], state.flatten()
    base = torch.cat([model.image(tokens) + model.sides.weight[side] for side, tokens in enumerate(vision)])
    control, memory = model.first
    for step in model.question:
        asked = model.control(torch.cat([control, step(question)]))
        scores = torch.cat([model.control_weight(asked * word) for word in outputs])
        control = sum(weight * word for weight, word in zip(scores.softmax(0), outputs, strict=True))
        read = []
        for token in base:
            interaction = model.memory(memory) * model.knowledge(token)
            read.append(model.read_weight(control * model.related(torch.cat([interaction, token]))))
        retrieved = sum(weight * token for weight, token in zip(torch.cat(read).softmax(0), base, strict=True))
        memory = model.write(torch.cat([retrieved, memory]))
    return model.out(torch.cat([question, memory]))


def naive_eve(model, vision, words):
    """Attention within words and within regions, a GRU over the words, then from the text to the regions."""

    def within(part, states):
        rows = []
        for state in states:
            scores = torch.stack([part.query(state) @ part.key(other) / math.sqrt(8) for other in states]).softmax(0)
            rows.append(state + sum(weight * other for weight, other in zip(scores, states, strict=True)))
        return torch.stack(rows)

    text = model.read(within(model.within_text, model.embed(words))[None])[1].flatten()
    regions = within(model.within_image, torch.cat([model.image(tokens).relu() for tokens in vision]))
    scores = torch.stack([model.text_query(text) @ model.image_key(one) / math.sqrt(8) for one in regions]).softmax(0)
    grounded = sum(weight * one for weight, one in zip(scores, regions, strict=True))
    return model.out(torch.cat([text, grounded]))


@pytest.mark.parametrize("kind, naive, options, sides",
                         [(Mac, naive_mac, {"steps": 3}, 2), (EveImage, naive_eve, {}, 1)])  # fmt: skip
def test_mac_and_eve_are_the_written_out_formulas_with_their_gradients(kind, naive, options, sides):
    model, (vision, seen) = built(kind, 3, **options), inputs(sides=sides)
    vision.requires_grad_()
    found = model(vision, seen, WORDS, REAL)
    rows = [
        naive(model, [side[real] for side, real in zip(vision[row], seen[row], strict=True)], WORDS[row][REAL[row]])
        for row in range(2)
    ]
    wanted = torch.stack(rows)
    torch.testing.assert_close(found, wanted)
    parts = [vision, *model.parameters()]
    weights = torch.randn(2, 3, dtype=torch.float64)
    options = {"allow_unused": True, "materialize_grads": True}
    ours, theirs = (torch.autograd.grad((weights * one).sum(), parts, **options) for one in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert sum(bool(gradient.any()) for gradient in ours) >= len(ours) - 3  # biases before a softmax change nothing
