"""Patching: exact where all or nothing is copied, and equal to a plain implementation in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probes.tiny_models import FAMILIES
from torch.nn import functional

import vpworkbench as vpw
from vpworkbench.data.inputs import prepare
from vpworkbench.probes import Patched, each_token, modality_masks, patch
from vpworkbench.probes.layers import TWO_STREAMS
from vpworkbench.probes.readouts import match_log_odds

TWO_STREAM_FAMILIES = ("lxmert", "bridgetower")
IMAGES = ("pixel_values", "visual_embeds")  # arguments that hold an image


@pytest.fixture
def runs(model, scenes):
    """Three texts with their images, and with other images; the first has the same image in both."""
    texts = [scene.captions[0] for scene in scenes[:3]]
    clean = prepare(model, scenes[:3], texts)
    return clean, prepare(model, [scenes[0], *scenes[5:7]], texts)


def groups_of(inputs) -> dict[str, torch.Tensor]:
    return {
        "all": torch.ones_like(inputs.tokens),
        "none": torch.zeros_like(inputs.tokens),
        "image": inputs.vision,
        "words": ~inputs.vision,
    }


def bert_layer(layer, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A layer of BERT as printed, with explicit attention."""
    inner = layer.attention.self
    query, key, value = (
        part(states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
        for part in (inner.query, inner.key, inner.value)
    )
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    states = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + states)
    grown = functional.gelu(layer.intermediate.dense(states))
    return layer.output.LayerNorm(layer.output.dense(grown) + states)


def naive_patch(model, clean, corrupt, layer: int, places: torch.Tensor) -> torch.Tensor:
    """Both runs layer by layer; in front of one layer the states at `places` are exchanged."""
    first, states = (model(**inputs.forward).hidden[0] for inputs in (clean, corrupt))
    for number, block in enumerate(model.fusion.bert.encoder.layer):
        if number == layer:
            states = torch.where(places[..., None], first, states)
        first, states = (bert_layer(block, part, clean.tokens) for part in (first, states))
    unmatched, matched = model.itm(states[:, 0]).unbind(dim=1)
    return matched - unmatched


def test_it_equals_a_plain_implementation_in_float64(model, runs):
    model.double()
    clean, corrupt = runs
    groups = groups_of(clean) | {
        "some": torch.rand(clean.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    }
    found = patch(model, clean.forward, corrupt.forward, match_log_odds(model), groups)
    assert found.groups == tuple(groups) and found.patched.shape == (3, 2, 5)
    with torch.no_grad():
        for layer in range(2):
            for number, places in enumerate(groups.values()):
                expected = naive_patch(model, clean, corrupt, layer, places)
                torch.testing.assert_close(found.patched[:, layer, number], expected, rtol=0, atol=1e-10)
    lost = found.clean - found.corrupt
    for example in (1, 2):
        share = (found.patched[example] - found.corrupt[example]) / lost[example]
        torch.testing.assert_close(found.restored[example], share)


def test_at_the_first_layer_what_differs_restores_all_and_the_rest_nothing(model, runs):
    clean, corrupt = runs
    found = patch(model, clean.forward, corrupt.forward, match_log_odds(model), groups_of(clean))
    everything, nothing, image, words = found.restored[1:].unbind(dim=2)  # each (example, layer)
    assert (everything == 1).all() and (nothing == 0).all()  # in every layer
    assert (image[:, 0] == 1).all() and (words[:, 0] == 0).all()
    assert (image[:, 1] != 1).all() and (words[:, 1] != 0).all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TWO_STREAM_FAMILIES])
def test_all_states_restore_everything_in_every_family(name):
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.model.eval()
    masks = modality_masks(family.model, family.inputs)
    image = next(key for key in IMAGES if key in family.inputs)
    ids = family.inputs["input_ids"].clone()
    ids[:, -1 if (ids[:, -1] > 0).all() else 1] = 3  # Gemma 3 starts with a projection of the image that is zero
    corrupt = family.inputs | {image: 0.9 * family.inputs[image].flip(-1), "input_ids": ids}
    everything = torch.ones_like(masks.tokens)

    def readout(outputs) -> torch.Tensor:
        found = getattr(outputs, "multimodal_embeddings", None)
        return (outputs[0] if found is None else found)[:, -1, :20].sum(dim=1)

    groups = {"all": everything, "none": ~everything}
    found = patch(family.model, family.inputs, corrupt, readout, groups)
    assert found.without_difference == 0
    assert (found.restored[:, :, 1] == 0).all()
    layers = slice(1 if name == "qwen3_vl" else 0, None)  # the image is also added after Qwen3-VL's first layer
    assert (found.restored[:, layers, 0] == 1).all()
    assert name != "qwen3_vl" or (found.restored[:, 0, 0] != 1).all()


@pytest.mark.parametrize("name", TWO_STREAM_FAMILIES)
def test_two_streams_are_refused_in_one_line(name):
    family = FAMILIES[name]()
    with pytest.raises(ValueError, match="has two streams of states: this probe needs one joint sequence") as refused:
        patch(family.model, family.inputs, family.inputs, lambda outputs: None, {"all": torch.ones(2, 2).bool()})
    assert "\n" not in str(refused.value)
    assert sum(not streams.joined for streams in TWO_STREAMS.values()) == len(TWO_STREAM_FAMILIES)


def test_a_pair_without_difference_is_counted_and_left_out(model, runs):
    clean, corrupt = runs
    found = patch(model, clean.forward, corrupt.forward, match_log_odds(model), groups_of(clean))
    assert found.without_difference == 1 and found.restored[0].isnan().all()
    interval = found.interval()
    weights = (found.clean - found.corrupt).abs().numpy()[1:, None, None]
    expected = (weights * found.restored[1:].numpy()).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(interval.mean, expected, atol=1e-12)
    assert (interval.count == 2).all() and (interval.mean[:, 0] == 1).all() and (interval.mean[:, 1] == 0).all()
    assert (interval.low <= interval.mean).all() and (interval.mean <= interval.high).all()
    same = patch(model, clean.forward, clean.forward, match_log_odds(model), groups_of(clean))
    assert same.without_difference == 3 and np.isnan(same.interval().mean).all()
    by_chance = Patched(("a",), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([[[1.5]], [[1.5]]]))
    assert by_chance.restored[0].isnan().all() and by_chance.interval().mean == 0.5


def test_an_example_does_not_depend_on_the_others(model, scenes):
    texts = [scene.captions[0] for scene in scenes[:3]]
    clean, corrupt = (prepare(model, some, texts) for some in (scenes[:3], scenes[5:8]))
    found = patch(model, clean.forward, corrupt.forward, match_log_odds(model), groups_of(clean))
    alone = prepare(model, scenes[1:2], texts[1:2]), prepare(model, scenes[6:7], texts[1:2])
    one = patch(model, alone[0].forward, alone[1].forward, match_log_odds(model), groups_of(alone[0]))
    torch.testing.assert_close(found.restored[1:2], one.restored, rtol=1e-4, atol=1e-4)


def test_a_map_has_one_group_for_each_real_token(model, scenes):
    texts = [scenes[0].captions[0]]
    clean, corrupt = (prepare(model, [scene], texts) for scene in scenes[:2])
    places = each_token(clean.tokens)
    assert list(places) == [str(place) for place in range(clean.tokens.shape[1])]
    assert torch.equal(torch.stack(list(places.values()))[:, 0], torch.eye(len(places), dtype=torch.bool))
    found = patch(model, clean.forward, corrupt.forward, match_log_odds(model), places)
    assert found.restored.shape == (1, 2, len(places))
    assert (found.restored[0, 0, ~clean.vision[0]] == 0).all() and (found.restored[0, 0, clean.vision[0]] != 0).all()
    padded = clean.tokens.clone()
    padded[0, 3] = False
    assert "3" not in each_token(padded) and len(each_token(padded)) == len(places) - 1


def test_the_model_is_left_as_it_was(model, runs):
    clean, corrupt = runs
    model(**clean.forward)  # the visual side keeps its last attention
    before = [dict(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()

    def broken(outputs) -> torch.Tensor:
        raise RuntimeError("no number")

    patch(model, clean.forward, corrupt.forward, match_log_odds(model), groups_of(clean))
    with pytest.raises(RuntimeError, match="no number"):
        patch(model, clean.forward, corrupt.forward, broken, groups_of(clean))
    assert torch.equal(torch.get_rng_state(), state)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_bad_input_is_one_clear_error(model, runs, scenes):
    clean, corrupt = runs
    odds, groups = match_log_odds(model), groups_of(clean)
    with pytest.raises(ValueError, match="needs a group of tokens"):
        vpw.patch(model, clean.forward, corrupt.forward, odds, {})
    with pytest.raises(ValueError, match=r"group 'words' is torch.bool \(2, .*must be bool \(example, token\)"):
        vpw.patch(model, clean.forward, corrupt.forward, odds, groups | {"words": groups["words"][:2]})
    with pytest.raises(ValueError, match="group 'all' is torch.int64"):
        vpw.patch(model, clean.forward, corrupt.forward, odds, {"all": groups["all"].long()})
    with pytest.raises(ValueError, match="0 stacks of layers that match"):
        vpw.patch(model, clean.forward, corrupt.forward, odds, {"all": groups["all"][:, 1:]})
    with pytest.raises(ValueError, match="read-out gives a tensor"):
        vpw.patch(model, clean.forward, corrupt.forward, lambda joint: joint.cls, groups)
    longer = prepare(model, scenes[:3], ["a red ball " * 12] * 3)
    with pytest.raises(ValueError, match="in the corrupt one: give both inputs as many examples and tokens"):
        vpw.patch(model, clean.forward, longer.forward, odds, groups)
    layers = model.fusion.bert.encoder.layer
    layers[1] = layers[0]
    with pytest.raises(ValueError, match="layers .* times in one forward: this probe needs each of them once"):
        vpw.patch(model, clean.forward, corrupt.forward, odds, groups)
