"""Knock-out: exact for every family, equal to a plain implementation in float64, and what it says of the shipped model.

The plain implementation replaces the eager attention of transformers' models by the formula as printed.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import narrow_model
from probes.tiny_models import FAMILIES, TEXT, llava, lxmert
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import vpworkbench as vpw
from vpworkbench.data.inputs import prepare
from vpworkbench.probes import attention_blocked, hidden_states, inter_modality_flow, knock_out, modality_masks
from vpworkbench.probes.attention import unchanged
from vpworkbench.probes.knock_out import Blocker
from vpworkbench.settings.families import FAMILIES as OURS
from vpworkbench.stats import bootstrap_interval, paired_interval
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel

LAYERS, HEADS, LENGTH = 3, 4, 13
ENCODER = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
ENCODER["initializer_range"] = 0.1  # of 0.5, the plain float32 pass would itself round by more than 1e-5
TINY = ENCODER | dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, attn_implementation="sdpa")
DECODER = TINY | dict(num_key_value_heads=2, head_dim=8)


def states_of(outputs) -> torch.Tensor:
    """The joint sequence that a model puts out, (example, token, channel)."""
    if hasattr(outputs, "language_output"):  # LXMERT
        return torch.cat([outputs.language_output, outputs.vision_output], dim=1)
    if hasattr(outputs, "text_features"):  # BridgeTower
        return torch.cat([outputs.text_features, outputs.image_features], dim=1)
    for name in ("logits", "multimodal_embeddings", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)
    return outputs.hidden[-1]  # ours


class Kept:
    """A read-out that keeps the outputs of every pass."""

    def __init__(self) -> None:
        self.passes = []

    def __call__(self, outputs) -> torch.Tensor:
        self.passes.append(outputs)
        return torch.zeros(len(states_of(outputs)))


def plain_and_blocked(model, inputs, vision, tokens, way) -> list[torch.Tensor]:
    """States without anything blocked, and with the way blocked in all layers."""
    kept, layers = Kept(), {"lxmert": 4, "git": 4, "bridgetower": 2, None: 2}  # None: ours
    spans = [(0, layers.get(getattr(getattr(model, "config", None), "model_type", None), 3) - 1)]
    assert len(knock_out(model, inputs, vision, tokens, kept, way=way, spans=spans).layers) == spans[0][1] + 1
    return [states_of(outputs) for outputs in kept.passes]


def assert_blocked_from_another(model, inputs, exchanged, vision, tokens):
    """With a way blocked in all layers no bit of what was exchanged comes through; unblocked, it does."""
    here = {"text_to_vision": tokens & ~vision, "vision_to_text": tokens & vision}
    for way, others in exchanged.items():
        one, other = (plain_and_blocked(model, given, vision, tokens, way) for given in (inputs, inputs | others))
        change = [(first - second).abs()[here[way]].max().item() for first, second in zip(one, other, strict=True)]
        assert change[0] > 1e-6 and change[1] == 0.0, way


WITHOUT_A_DECODER = sorted({*FAMILIES} - {"florence2"})  # its last states are the decoder's, not those probed


@pytest.mark.parametrize("name", WITHOUT_A_DECODER)
def test_blocked_everywhere_the_other_modality_changes_no_bit(name):
    torch.manual_seed(0)
    model, inputs, _ = FAMILIES[name]()
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter)  # the projection of the image in Gemma 3
    masks = modality_masks(model, inputs)
    images = {key: value for key, value in inputs.items() if key in ("pixel_values", "visual_embeds", "visual_feats")}
    ids = inputs["input_ids"]
    text = {"input_ids": torch.where((ids > 0) & (ids < 79), ids % 78 + 1, ids)}  # 0 is padding, from 79 on are marks
    mirrored = {key: value.flip(-1) for key, value in images.items()}
    exchanged = {"text_to_vision": mirrored, "vision_to_text": text}
    if name == "git":
        del exchanged["vision_to_text"]  # its image precedes the words and never reads them
    assert_blocked_from_another(model, inputs, exchanged, masks.vision, masks.tokens)


@pytest.mark.parametrize("name", OURS)
def test_blocked_everywhere_the_other_modality_changes_no_bit_of_our_families(name, scenes):
    sizes = {"regions": {"regions": 6, "region_width": 12, "region_files": "."}, "vit": {"vit": "vit_tiny_patch16_224"}}
    model = narrow_model(scenes, family=name, **sizes.get(name, {}))
    generator = torch.Generator().manual_seed(0)
    if OURS[name].pixels:
        side = model.settings.visual.image_px
        images = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    else:
        images = torch.rand(2, 6, 12 + 5, generator=generator)
        images[..., -1], images[1, 4:] = 1, 0  # the second has fewer regions
    inputs = model.prepare(images, ["a red square", "two blue circles left of a square"])
    words = inputs.forward["words"]
    real = inputs.forward["word_tokens"] & (words > 10)
    text = {"words": torch.where(real, words.flip(0).clamp(min=11) % 40 + 11, words)}
    mirrored = {"images": torch.cat([images[..., :12].flip(-1), images[..., 12:]], dim=-1)}
    exchanged = {"text_to_vision": mirrored, "vision_to_text": text}
    assert_blocked_from_another(model, inputs.forward, exchanged, inputs.vision, inputs.tokens)


# --------------------------------------------------------------------------- against a plain implementation in float64

MODELS = {
    "bidirectional": (lambda: BertModel(BertConfig(**TINY)), modeling_bert),
    "causal, grouped queries": (lambda: LlamaModel(LlamaConfig(**DECODER)), modeling_llama),
    "sliding window": (lambda: MistralModel(MistralConfig(**DECODER, sliding_window=6)), modeling_mistral),
}


@pytest.fixture(params=MODELS)
def built(request):
    torch.manual_seed(0)
    build, code = MODELS[request.param]
    return build().eval(), code


def batch(padding: str = "right"):
    """Three examples: 3 words, 5 visual tokens, words; the middle one is not padded."""
    ids = torch.randint(1, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = torch.ones(3, LENGTH, dtype=torch.bool)
    if padding == "right":
        tokens[0, 11:], tokens[2, 9:] = False, False
    elif padding == "left":
        tokens[0, :1], tokens[2, :2] = False, False
    vision = ((torch.arange(LENGTH) >= 3) & (torch.arange(LENGTH) < 8)).expand(3, -1)
    return {"input_ids": ids, "attention_mask": tokens.long()}, vision, tokens


def pairs_of(way, vision, tokens):
    """Pairs that a way blocks, (example, query, key), written out."""
    words, image = tokens & ~vision, tokens & vision
    there = words[:, :, None] * image[:, None, :]
    back = image[:, :, None] * words[:, None, :]
    return {"text_to_vision": there, "vision_to_text": back, "both": there + back}[way]


def naive(monkeypatch, model, code, inputs, vision, tokens, *, pairs, span, heads, replace):
    """The last states, in float64, with the formula printed out; pairs: bool (example, query, key)."""
    layer = -1

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **options):
        nonlocal layer
        layer += 1
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        scores = scores.masked_fill(scores < -1e30, -torch.inf)
        plain = scores.softmax(dim=-1).nan_to_num()
        if not span[0] <= layer <= span[1]:
            return (plain @ value).transpose(1, 2), plain
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        blocked[:, heads] = pairs[:, None].expand(-1, len(heads), -1, -1)
        if replace == "mask":
            weights = scores.masked_fill(blocked, -torch.inf).softmax(dim=-1).nan_to_num()
            return (weights @ value).transpose(1, 2), weights
        of_words, of_image = (value.transpose(1, 2)[tokens & kind].mean(dim=0)[:, None] for kind in (~vision, vision))
        instead = torch.where(vision[:, None, :, None], of_image, of_words)
        output = (plain * ~blocked) @ value + (plain * blocked) @ instead
        return output.transpose(1, 2), plain

    monkeypatch.setattr(code, "eager_attention_forward", attend)
    model.set_attn_implementation("eager")
    states = model.double()(**inputs).last_hidden_state
    model.float().set_attn_implementation("sdpa")
    monkeypatch.undo()
    return states.detach()


@pytest.mark.parametrize("replace", ["mask", "mean"])
@pytest.mark.parametrize(
    "way, span, heads, padding",
    [
        ("text_to_vision", (0, 2), None, "right"),
        ("vision_to_text", (1, 1), [2], "left"),
        ("both", (1, 2), [3, 0], "right"),
        ("text_to_vision", (2, 2), [1], "none"),
        ("both", (0, 0), None, "none"),
    ],
)
def test_it_equals_the_formula_in_float64(built, monkeypatch, way, span, heads, padding, replace):
    model, code = built
    inputs, vision, tokens = batch(padding)
    chosen = range(HEADS) if heads is None else heads
    given = dict(pairs=pairs_of(way, vision, tokens), heads=list(chosen), replace=replace)
    expected = [
        naive(monkeypatch, model, code, inputs, vision, tokens, span=blocked, **given)[tokens]
        for blocked in ((9, 9), span)
    ]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for dtype, error in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        kept = Kept()
        knock_out(model.to(dtype), inputs, vision, tokens, kept, way=way, spans=[span], heads=heads, replace=replace)
        for outputs, wanted in zip(kept.passes, expected, strict=True):
            found = outputs.last_hidden_state[tokens].double()
            torch.testing.assert_close(found, wanted, atol=error, rtol=0)


def test_a_mask_of_pairs_is_a_way_of_its_own(built, monkeypatch):
    """Also one that empties a query: it then reads nothing."""
    model, code = built
    inputs, vision, tokens = batch()
    pairs = torch.rand(3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.4
    pairs[1, 6] = True
    given = dict(pairs=pairs, span=(0, 1), heads=list(range(HEADS)), replace="mask")
    expected = naive(monkeypatch, model, code, inputs, vision, tokens, **given)
    kept = Kept()
    knock_out(model.double(), inputs, vision, tokens, kept, way=pairs, spans=[(0, 1)])
    torch.testing.assert_close(kept.passes[1].last_hidden_state[tokens], expected[tokens], atol=1e-9, rtol=0)


def first_token(outputs) -> torch.Tensor:
    return states_of(outputs)[:, 0, 5]


def last_token(outputs) -> torch.Tensor:
    return states_of(outputs)[:, 8, 5]


def test_where_nothing_is_blocked_no_bit_changes(built):
    """Layers before the span; layers that block none of the pairs; and the model itself."""
    model, _ = built
    inputs, vision, tokens = batch()
    kept, before = Kept(), model(**inputs, output_hidden_states=True)
    knock_out(model, inputs | {"output_hidden_states": True}, vision, tokens, kept, spans=[(2, 2)])
    for one, other in zip(kept.passes[0].hidden_states, before.hidden_states, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(kept.passes[1].hidden_states[:3], before.hidden_states[:3], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(kept.passes[1].hidden_states[3], before.hidden_states[3])
    assert torch.equal(model(**inputs).last_hidden_state, before.last_hidden_state)


def test_layers_of_two_streams_that_cross_nothing_have_no_effect():
    """LXMERT: a layer across, then a layer of each stream alone."""
    torch.manual_seed(0)
    model, inputs, _ = lxmert()
    masks = modality_masks(model.eval(), inputs)
    knocked = knock_out(model, inputs, masks.vision, masks.tokens, first_token)
    assert (knocked.effect[:, [1, 3]] == 0).all() and (knocked.effect[:, [0, 2]].abs() > 1e-4).all()


def test_spans_by_name_and_by_hand(built):
    model, _ = built
    inputs, vision, tokens = batch()
    run = partial(knock_out, model, inputs, vision, tokens, last_token)
    every = run(spans="triangle")
    assert every.spans == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)) and len(every.layers) == LAYERS
    assert every.before.equal(last_token(model(**inputs)).double())
    assert every.effect.equal(every.before[:, None] - every.after)
    named = {"single": [(0, 0), (1, 1), (2, 2)], "from": [(0, 2), (1, 2), (2, 2)], "to": [(0, 0), (0, 1), (0, 2)]}
    for name, spans in named.items():
        for one in (run(spans=name), run(spans=spans)):
            assert list(one.spans) == spans
            assert one.after.equal(every.after[:, [every.spans.index(span) for span in spans]])
    square = every.triangle
    assert square.shape == (3, LAYERS, LAYERS) and square[:, 1, 2].equal(every.effect[:, 4])
    assert square[:, *torch.tril_indices(LAYERS, LAYERS, -1)].isnan().all()


def test_controls_block_as_many_pairs_where_the_layer_allows_it(built, monkeypatch):
    model, _ = built
    inputs, vision, tokens = batch()
    used = []
    keep = Blocker.__init__

    def spy(self, choice, sets, blocked, *rest):
        used.append(blocked)
        keep(self, choice, sets, blocked, *rest)

    monkeypatch.setattr(Blocker, "__init__", spy)
    run = partial(knock_out, model, inputs, vision, tokens, last_token, spans=[(0, 2)], controls=3)
    knocked = run(seed=5)
    *drawn, real = used
    model.set_attn_implementation("eager")
    attention = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, maps in enumerate(attention):
        allowed = (maps > 0).any(dim=1) & tokens[:, None] & tokens[:, :, None]
        assert real[layer].equal(pairs_of("text_to_vision", vision, tokens) & allowed)
        for draw in drawn:
            assert draw[layer].sum(dim=-1).equal(real[layer].sum(dim=-1)) and not (draw[layer] & ~allowed).any()
        assert not any(one[layer].equal(other[layer]) for one, other in pairwise([*drawn, real]))
    assert knocked.controls.shape == (3, 3, 1) and knocked.controls.equal(run(seed=5).controls)
    assert not knocked.controls.equal(run(seed=6).controls)
    assert run(controls=0).controls is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "vilt", "visual_bert"])
def test_other_probes_see_the_blocked_model(name, attention):
    """Through the interface of transformers and in a module of its own; afterwards the model is as before."""
    torch.manual_seed(0)
    model, inputs, _ = FAMILIES[name]()
    if name != "vilt" or attention == "sdpa":  # ViLT has only its own attention
        model.eval().set_attn_implementation(attention)
    masks = modality_masks(model.eval(), inputs)
    sets, kept = (masks.vision, masks.tokens), Kept()
    before = inter_modality_flow(model, inputs, *sets)
    knock_out(model, inputs, *sets, kept, spans=[(0, 1)])
    with attention_blocked(model, inputs, *sets, span=(0, 1)):
        with unchanged(model):
            found = model(**inputs)
        flow = inter_modality_flow(model, inputs, *sets)
        states = hidden_states(model, inputs, tokens=masks.tokens)
    torch.testing.assert_close(states_of(found), states_of(kept.passes[1]))
    assert states[1].shape == states[0].shape
    assert flow.text_to_vision[:, :2, :2].nan_to_num().abs().max() < 1e-7
    torch.testing.assert_close(flow.flow[:, 0, 0], flow.vision_to_text[:, 0, 0])
    assert (flow.text_to_vision[:, 2, 2] > 0).all()
    again = inter_modality_flow(model, inputs, *sets)
    assert again.flow.nan_to_num().equal(before.flow.nan_to_num())


def test_streams_apart_cannot_be_blocked_for_other_probes():
    model, inputs, _ = lxmert()
    masks = modality_masks(model.eval(), inputs)
    with pytest.raises(ValueError, match="LxmertModel has two streams of states: only knock_out can block"):
        with attention_blocked(model, inputs, masks.vision, masks.tokens, span=(0, 0)):
            pass


def test_layers_that_share_a_module_cannot_be_blocked_for_other_probes():
    model = AlbertModel(AlbertConfig(**TINY, embedding_size=16)).eval()
    vision = torch.arange(8)[None] > 4
    inputs = {"input_ids": torch.arange(8)[None]}
    with (
        pytest.raises(ValueError, match="layers of AlbertModel share one module: only knock_out"),
        attention_blocked(model, inputs, vision, torch.ones_like(vision), span=(0, 0)),
    ):
        pass


def test_intervals_are_over_examples_and_paired(built):
    model, _ = built
    knocked = knock_out(model, *batch(), last_token, controls=2)
    for one, values in (
        (knocked.interval(seed=3), knocked.before[:, None] - knocked.after),
        (knocked.interval(seed=3, over_controls=True), knocked.controls.mean(dim=0) - knocked.after),
    ):
        for part, expected in zip(one, bootstrap_interval(values.numpy(), 3), strict=True):
            assert part.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="no controls; call knock_out with controls=n"):
        knock_out(model, *batch(), last_token).interval(over_controls=True)


def test_no_attention_matrix_of_floats_is_stored():
    torch.manual_seed(0)
    length = 1024
    bert = BertModel(BertConfig(**TINY, max_position_embeddings=length)).eval()
    inputs = {"input_ids": torch.ones(1, length, dtype=torch.long)}
    vision = torch.arange(length)[None] > 100
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        knock_out(bert, inputs, vision, torch.ones_like(vision), first_token, spans=[(0, 2)])
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= length**2 * 4  # one additive mask of the fused kernel; the maps of a layer take four times that


# -------------------------------------------------------------------------------------------------------- read-outs


def test_read_outs_of_our_model(model, scenes):
    readouts = vpw.readouts
    texts = ["a [MASK] square", "a square left of a [MASK] circle and a [MASK]"]
    inputs = prepare(model, scenes[:2], texts)
    joint = model(**inputs.forward)
    odds = readouts.match_log_odds(model)(joint)
    torch.testing.assert_close(odds.sigmoid(), model.itm(joint.cls).softmax(dim=-1)[:, 1])
    logits = torch.stack([joint.hidden[-1][0, 2], joint.hidden[-1][1, 6]])  # after [CLS]
    ids = model.tokenizer.convert_tokens_to_ids(["red", "blue"])
    expected = model.word_logits(logits).softmax(dim=-1)[[0, 1], ids].log().double()
    torch.testing.assert_close(readouts.masked_word(model, inputs.forward, ["red", "blue"])(joint), expected)
    for task, function in (("vqa", torch.sigmoid), ("snli-ve", partial(torch.softmax, dim=-1))):
        answering = TaskModel(model, TASKS[task], ("no", "yes", "maybe")).eval()
        expected = function(answering.head(joint.cls))[[0, 1], [1, 0]].log().double()
        torch.testing.assert_close(readouts.task_answer(answering, ["yes", "no"])(joint), expected)
    for words, match in ((["red", "rouge"], "'rouge': not among the words"), (["red"], "1 words .* for 2 examples")):
        with pytest.raises(ValueError, match=match):
            readouts.masked_word(model, inputs.forward, words)
    with pytest.raises(ValueError, match=r"texts \[0\] have no \[MASK\]"):
        readouts.masked_word(model, prepare(model, scenes[:1], ["a square"]).forward, ["red"])
    with pytest.raises(ValueError, match="'perhaps': not among the answers"):
        readouts.task_answer(answering, ["yes", "perhaps"])
    with pytest.raises(ValueError, match="nlvr2 answers from two passes"):
        readouts.task_answer(TaskModel(model, TASKS["nlvr2"], ("False", "True")), ["True"])


def test_next_tokens_are_those_of_the_models_own_loss():
    torch.manual_seed(0)
    model, inputs, _ = llava()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    outputs = model.eval()(**inputs, labels=labels)
    read = vpw.readouts.next_tokens(labels)
    torch.testing.assert_close(-read(outputs).mean() / 2, outputs.loss.double())  # two tokens in each example
    masks = modality_masks(model, inputs)
    knocked = knock_out(model, inputs, masks.vision, masks.tokens, read)
    torch.testing.assert_close(knocked.before, read(outputs).detach())
    assert (knocked.effect[:, :-1].abs() > 1e-6).all()
    with pytest.raises(ValueError, match="both must cover the same sequence"):
        vpw.readouts.next_tokens(labels[:, 1:])(outputs)
    with pytest.raises(ValueError, match=r"examples \[0, 1\] have no token to score"):
        vpw.readouts.next_tokens(torch.full_like(labels, -100))


def test_the_shipped_model_without_its_image():
    """Held-out scenes: ITM is at chance, and masked words are guessed hardly better than with another image."""
    subject = vpw.load()
    scenes = vpw.held_out(subject.data, images=32)
    texts = [scene.captions[0] for scene in scenes]
    colours = [re.search(r"\b(red|green|blue|yellow|white|black|cyan|pink|orange|purple)\b", text)[0] for text in texts]
    hidden = [text.replace(colour, "[MASK]", 1) for text, colour in zip(texts, colours, strict=True)]

    def blocked(pictures, texts, readout, *more):
        inputs = subject.prepare(pictures, texts)
        read = readout(subject.base, *((inputs.forward, *more) if more else ()))
        return vpw.knock_out(subject.model, inputs.forward, inputs.vision, inputs.tokens, read, spans=[(0, 2)])

    others = scenes[1:] + scenes[:1]
    own, other = (blocked(pictures, texts, vpw.readouts.match_log_odds) for pictures in (scenes, others))
    assert own.after.equal(other.after)
    before, after = (
        bootstrap_interval(torch.cat([true.flatten() > 0, false.flatten() < 0]).numpy())
        for true, false in ((own.before, other.before), (own.after, other.after))
    )
    assert before.low > 0.5 and after.low <= 0.5 <= after.high
    own, other = (blocked(pictures, hidden, vpw.readouts.masked_word, colours) for pictures in (scenes, others))
    assert own.after.equal(other.after)
    lost = paired_interval(own.before.exp(), own.after[:, 0].exp())
    level = paired_interval(own.after[:, 0].exp(), other.before.exp())
    assert lost.low > 0.5 and 0 <= level.mean < 0.1


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**TINY)).eval()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"spans": [(0, 3)]}, r"\(0, 3\) is no span: give the first and the last layer, from 0 to 2"),
        ({"spans": [(2, 1)]}, r"\(2, 1\) is no span"),
        ({"spans": [1]}, "1 is no span"),
        ({"spans": []}, "is no span"),
        ({"spans": "all"}, "'all' is not known; known are single, from, to, triangle"),
        ({"way": "sideways"}, "'sideways' is not known; known are text_to_vision, vision_to_text, both"),
        ({"replace": "zero"}, "'zero' is not known; known are mask, mean"),
        ({"way": torch.ones(3, 13, 9, dtype=torch.bool)}, r"`way` is torch.bool \(3, 13, 9\): a mask .*\(3, 13, 13\)"),
        ({"way": torch.ones(3, 13, 13)}, "`way` is torch.float32"),
        ({"way": torch.zeros(3, 13, 13, dtype=torch.bool)}, r"way mask: in examples \[0, 1, 2\] .* nothing can be"),
        ({"heads": [4]}, r"heads are \[4\]: name query heads of the layers, from 0 to 3"),
        ({"heads": [-1]}, "heads are"),
        ({"heads": []}, "heads are"),
        ({"language": torch.ones(3, 13, dtype=torch.bool)}, "overlap"),
        ({"layers": "decoder"}, "layers='decoder'"),
    ],
)
def test_bad_options_are_one_clear_error(bert, options, match):
    with pytest.raises(ValueError, match=match):
        knock_out(bert, *batch(), first_token, **options)


@pytest.mark.parametrize(
    "readout, match",
    [
        (lambda outputs: outputs.last_hidden_state, r"gives a tensor \(3, 13, 32\); it must give one number for each"),
        (lambda outputs: first_token(outputs).mean(), r"gives a tensor \(\)"),
        (lambda outputs: first_token(outputs).tolist(), "gives list"),
        (lambda outputs: torch.tensor([0.0, torch.nan, torch.inf]), r"nan or infinite in examples \[1, 2\]"),
    ],
)
def test_a_read_out_gives_a_finite_number_for_each_example(bert, readout, match):
    with pytest.raises(ValueError, match=match):
        knock_out(bert, *batch(), readout)


def test_ways_without_pairs():
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(**DECODER)).eval()
    inputs, vision, tokens = batch()
    vision = vision.roll(-3, dims=1)  # the image first
    with pytest.raises(ValueError, match=r"way vision_to_text: in examples \[0, 1, 2\] .* causal decoder"):
        knock_out(llama, inputs, vision, tokens, last_token, way="vision_to_text")
    knock_out(llama, inputs, vision, tokens, last_token, way="both", spans=[(0, 0)])
    apart = torch.eye(LENGTH, dtype=torch.bool).expand(3, 1, -1, -1)  # modalities that never meet
    with pytest.raises(ValueError, match="nothing can be blocked"):
        knock_out(llama, inputs | {"attention_mask": apart}, vision, tokens, last_token)


def test_vilt_keeps_the_order_of_its_patches_in_all_passes():
    """What only the image reads in the last layer leaves the words as they are."""
    torch.manual_seed(0)
    model, inputs, _ = FAMILIES["vilt"]()
    masks = modality_masks(model.eval(), inputs)
    state = torch.get_rng_state()
    kept = Kept()
    knock_out(model, inputs, masks.vision, masks.tokens, kept, way="vision_to_text", spans=[(2, 2)])
    one, other = (outputs.last_hidden_state[:, :7] for outputs in kept.passes)
    torch.testing.assert_close(one[masks.tokens[:, :7]], other[masks.tokens[:, :7]])
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_of_another_length_are_refused():
    torch.manual_seed(0)
    model, inputs, _ = llava()
    masks = modality_masks(model.eval(), inputs)
    with pytest.raises(ValueError, match="`vision` has 14 tokens"):
        knock_out(model, inputs, masks.vision[:, 1:], masks.tokens[:, 1:], first_token)
