"""Every image-text class of the installed transformers: flow and answers against its own eager attention, boxes and
knock-out against its pixels.

The rows of docs/models.md are these results. A dozen classes of different kinds in the fast set, all in the slow one.
`python tests/probes/test_any_model.py` prints the table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from probes.any_config import CLASSES
from probes.any_model import build_model, inputs_of
from probes.tiny_models import Numbers

from vpworkbench.answers import read_answer, teacher_forced
from vpworkbench.probes import InterModalityFlow, ModalityMasks, check, inter_modality_flow, knock_out, modality_masks
from vpworkbench.probes.attention import AttentionCall, intercept_attention, unchanged

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
FAST = "llava_next fuyu mllama minicpmv4_6 minimax_m3_vl hy_v4_vl qwen3_5 idefics2 glm5_next lfm2_vl inkling2".split()
BY_CONVOLUTIONS = {"apertus1p5", "chameleon", "emu3", "fast_vlm", "gemma3n"}
"""Group norms or chains of convolutions in their towers let every token see every pixel."""
EAGER = {"phi4_multimodal": {"": "eager"}}
"""Its vision tower is causal in sdpa and not in eager: only the decoder can be compared."""
ROUNDED = {"diffusion_gemma": 3e-5, "gemma4_unified": 6e-5}
"""Their scores are not scaled, so rounding of the states changes a row of the last layer by 1.3e-5 and 3e-5."""
WITHOUT = {"evolla": "no image: it reads proteins", "udop": "its words carry the patches of the image that they lie on"}
REASONS = {
    "answers in a decoder|other lengths: model.decoder": "the answer is in a sequence of its own",
    "each token predicts the next one": "predicts no words",
    "only keys of a cross attention": "the image is only in the keys of a cross attention",
    "is not known here": "its configuration names no id of image tokens",
    "no attention layer|built sequences of other lengths": "attention outside transformers' interface",
    "runs again": "several passes in one forward",
    "caps its scores": "soft-capped scores",
    "never lets one modality": "its mask keeps the modalities apart",
    "learned queries": "learned queries have no place",
    "pass tiles": "with `tiles=[(rows, columns), ...]`",
    "pass grid": "with `grid=(rows, columns)`",
}


class Result(NamedTuple):
    """A row of the table in docs/models.md."""

    kind: str
    flow: str
    boxes: str = ""
    blocked: str = ""
    answers: str = ""

    def __str__(self) -> str:
        return f"| `{self.kind}` | {self.flow} | {self.boxes} | {self.blocked} | {self.answers} |"


def reason(text: object) -> str:
    return next((words for pattern, words in REASONS.items() if re.search(pattern, str(text))), str(text)[:80])


def result(kind: str) -> Result:
    """Build a class, probe it and compare; an AssertionError where the probe is wrong without saying so."""
    if kind in WITHOUT:
        return Result(kind, WITHOUT[kind])
    model = build_model(kind)
    try:
        modality_masks(model, {})  # without inputs: only what the configuration says
    except (ValueError, KeyError) as error:
        marked = "image_embeds_position_mask" in signature(model.forward).parameters  # by an input
        if "is not known here" in str(error) and not marked:
            return Result(kind, reason(error))
    inputs = inputs_of(model)
    masks = modality_masks(model, inputs)
    assert masks.vision.any(dim=1).all()
    try:
        flow = inter_modality_flow(model, inputs, masks.vision, masks.tokens, rows=picked_rows(masks))
    except ValueError as error:
        return Result(kind, reason(error))
    check(model, inputs, masks.vision, masks.tokens, examples=2)  # raises where outputs differ
    difference = largest_difference(flow, eager_maps(model, inputs, flow.layers), masks)
    assert difference <= ROUNDED.get(kind, 1e-5)
    boxes = "yes" if masks.placed.any() else reason(masks.note)
    assert boxes != "yes" or kind in BY_CONVOLUTIONS or boxes_are_right(model, inputs, masks, flow.layers)
    blocked = what_words_read_of_a_blocked_image(model, inputs, masks, flow)
    return Result(kind, "exact" + _hybrid(flow), boxes, blocked, answer_maps(model, inputs, blocked))


def _hybrid(flow: InterModalityFlow) -> str:
    if any("conv" in name for name in flow.uncounted):
        return ", besides convolutions"
    layers = len(flow.layers) + len(flow.uncounted)
    return f" in {len(flow.layers)} of {layers} layers, the others are linear" if flow.uncounted else ""


def what_words_read_of_a_blocked_image(
    model: nn.Module, inputs: dict, masks: ModalityMasks, flow: InterModalityFlow
) -> str:
    """Nothing ("exact"), if exchanged pixels change the last word by exactly 0.0 once no word attends to the image."""
    pairs = (masks.tokens & ~masks.vision)[:, :, None] & masks.vision[:, None]
    plain, other = (
        knock_out(model, given, masks.vision, masks.tokens, last_word, language=masks.language, way=pairs, spans="from")
        for given in (inputs, exchanged(inputs))
    )
    assert not plain.before.equal(other.before)  # or the pixels change nothing anyway
    change = ((plain.after - other.after)[:, 0] / plain.after[:, 0]).abs().max()
    # Experts take other numbers of tokens with another image, and that changes how all sums are rounded.
    experts = any(type(part).__name__.endswith("Experts") for part in model.modules())
    if change <= (1e-6 if experts else 0):
        return "to rounding" if experts else "exact"
    return next(words for words, is_so in CARRIERS.items() if is_so(model, inputs, flow))


CARRIERS: dict[str, Callable[[nn.Module, dict, InterModalityFlow], bool]] = {
    "other parts carry the image": lambda model, inputs, flow: bool(flow.uncounted),
    "its choice of keys depends on the image": lambda model, inputs, flow: any(
        type(part).__name__.endswith("Indexer") for part in model.modules()
    ),
    "its decoder reads the image too": lambda model, inputs, flow: (
        "decoder_input_ids" in inputs or model.config.is_encoder_decoder
    ),
    "its actions read the image too": lambda model, inputs, flow: "state" in inputs,
}
"""How an image still reaches the last word -> whether a model has it."""


def exchanged(inputs: dict) -> dict:
    """The same inputs with other pixels."""
    return {name: _other(value) if _is_pixels(name, value) else value for name, value in inputs.items()}


def _is_pixels(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and name.endswith(("pixel_values", "flattened_patches"))


def _other(pixels: Tensor) -> Tensor:
    return torch.where(pixels < 1, 1 - pixels, pixels)  # flattened patches begin with their row and column, from 1


def last_word(outputs: Any) -> Tensor:
    """A number that depends on all that a model puts out at its last place, (example,)."""
    found = next(value for value in outputs.values() if torch.is_tensor(value) and value.ndim > 1 and len(value) == 2)
    return found.clamp(min=-1e4).flatten(2).abs()[:, -1].sum(dim=-1)


WORDS = [71, 72, 73]


def answer_maps(model: nn.Module, inputs: dict, blocked: str) -> str:
    """Rows of an answer's words against the eager run; other pixels of a blocked image change them by 0.0."""
    one = first_example(inputs)
    try:
        answer, other = (read_answer(model, given, WORDS, Numbers()) for given in (one, exchanged(one)))
    except ValueError as error:
        return reason(error)
    maps = eager_maps(model, teacher_forced(model, one, WORDS), answer.layers)
    rows = torch.stack([weights[0, :, -len(WORDS) - 1 : -1].transpose(0, 1) for weights in maps], dim=1)
    assert float((answer.attention - rows).abs().max()) <= ROUNDED.get(model.config.model_type, 1e-5)
    if blocked in ("exact", "to rounding"):
        allowed = 0 if blocked == "exact" else 1e-5
        torch.testing.assert_close(answer.blocked, other.blocked, rtol=0, atol=allowed)
    return "exact"


def first_example(inputs: dict) -> dict:
    """The inputs of the first of two examples; its image has 16 of 40 patches where they are in one list."""
    counts = {name: 16 if len(value) == 40 else max(1, len(value) // 2) for name, value in inputs.items()}
    one = {name: value[: counts[name]] for name, value in inputs.items()}
    if "target_sizes" in inputs:  # side by side
        one["pixel_values"] = inputs["pixel_values"][..., : 32 * 8]
    return one


def picked_rows(masks: ModalityMasks) -> Tensor:
    """The first visual token and the last real one, (example, picked)."""
    last = [int(real.nonzero().max()) for real in masks.tokens]
    return torch.stack([masks.vision.int().argmax(dim=1), torch.tensor(last)], dim=1)


def eager_maps(model: nn.Module, inputs: dict, layers: tuple[str, ...]) -> list[Tensor]:
    """Softmax weights that the layers give back in eager mode, (example, head, query, key)."""
    maps: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: maps.__setitem__(name, output[1])
        )
        for name in layers
    ]
    with torch.no_grad(), unchanged(model):
        model.set_attn_implementation(EAGER.get(model.config.model_type, "eager"))
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [maps[name] for name in layers]


def largest_difference(flow: InterModalityFlow, maps: list[Tensor], masks: ModalityMasks) -> float:
    """Eq. 2-6 as printed, in float64, against `flow`: all spans, both examples, one of them padded on the left.

    The picked rows of each layer too, and those rolled out from the input.
    """
    length, every, picked = masks.vision.shape[1], torch.arange(2)[:, None], picked_rows(masks)
    rows = torch.stack([weights[every, :, picked].transpose(1, 2) for weights in maps], dim=1)
    worst = float((flow.rows - rows).abs().max())
    for first, last in combinations_with_replacement(range(len(maps)), 2):
        product = torch.eye(length, dtype=torch.float64).expand(2, -1, -1)
        for weights in maps[first : last + 1]:
            product = (torch.eye(length, dtype=torch.float64) + weights.double().mean(dim=1)) / 2 @ product
        if first == 0:
            worst = max(worst, float((flow.rows_from_input[:, last] - product[every, picked]).abs().max()))
        for example, matrix in enumerate(product):
            seen, read = masks.vision[example] & masks.tokens[example], masks.language[example]
            across = matrix[seen][:, read].sum() + matrix[read][:, seen].sum()
            share = across / (across + matrix[seen][:, seen].sum() + matrix[read][:, read].sum())
            worst = max(worst, float(abs(flow.flow[example, first, last] - share)))
    return worst


def boxes_are_right(model: nn.Module, inputs: dict, masks: ModalityMasks, layers: tuple[str, ...]) -> bool:
    """Other pixels in a part of an image change the tokens whose boxes lie there, and hardly any others.

    Tokens of the vision tower attend to themselves only meanwhile, so that what a token holds is from its own place.
    """
    plain = entering(model, inputs, layers)
    for image, part, changed in changed_pixels(inputs):
        placed = masks.placed & (masks.image == image)
        change = (entering(model, changed, layers) - plain).abs().sum(dim=-1)[placed]
        corners = masks.boxes[placed]
        centre = (corners[:, :2] + corners[:, 2:]) / 2
        inside = (centre > torch.tensor(part[:2])).all(dim=-1) & (centre < torch.tensor(part[2:])).all(dim=-1)
        # A tiny tower may end in a scale of zero: then no pixel changes anything.
        seen = change.any() and inside.any() and not inside.all()
        if seen and not change[inside].mean() > 3 * change[~inside].mean():
            return False
    return True


TOP, LEFT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 0.5, 1.0)


def changed_pixels(inputs: dict) -> Iterator[tuple[int, tuple[float, ...], dict]]:
    """An image, a part of it (x0 y0 x1 y1), and the inputs with other pixels there."""
    pixels = inputs["pixel_values"]

    def with_others(*where) -> dict:
        other = pixels.clone()
        other[where] = 1 - other[where]
        return inputs | {"pixel_values": other}

    everything = slice(None)
    if len({"image_grid_thw", "image_grid_hw"} & set(inputs)):  # patches of 16 and 24, the top rows first
        count = len(pixels) // 40
        yield 1, TOP, with_others(slice(16 * count, 28 * count))
    elif "target_sizes" in inputs:  # 8 x 4 patches side by side after 32 others
        yield 1, TOP, with_others(..., slice(32 * 8, 48 * 8))
    elif pixels.ndim == 3:  # patches of each image, perhaps padded
        real = int(inputs["pixel_attention_mask"][1].sum()) if "pixel_attention_mask" in inputs else pixels.shape[1]
        yield 1, TOP, with_others(1, slice(0, real // 2))
    elif pixels.ndim == 4 or pixels.shape[1] == 1:
        half = slice(0, pixels.shape[-1] // 2)
        yield 0, TOP, with_others(0, ..., half, everything)
        yield 0, LEFT, with_others(0, ..., half)


def entering(model: nn.Module, inputs: dict, layers: tuple[str, ...]) -> Tensor:
    """The states that enter the decoder's first block, while all other layers attend to themselves only."""
    found: list[Tensor] = []
    first = re.sub(r"\.\d+\..*", ".0", layers[0])

    def keep(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def handler(call: AttentionCall) -> Tensor:
        if call.name in layers or call.lengths[1] != call.lengths[2]:
            return call.output()
        heads = call.query.shape[1] // call.value.shape[1]
        return call.value.repeat_interleave(heads, dim=1).transpose(1, 2).contiguous()

    with intercept_attention(model, handler):
        hook = model.get_submodule(first).register_forward_pre_hook(keep, with_kwargs=True)
        model(**inputs)
        hook.remove()
    return found[0]


@pytest.mark.parametrize("kind", FAST)
def test_a_class_is_probed_exactly_or_refused_with_the_documented_reason(kind):
    assert str(result(kind)) in DOCS.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in FAST])
def test_every_other_class_too(kind):
    assert str(result(kind)) in DOCS.read_text()


def test_the_table_has_every_class():
    rows = re.findall(r"^\| `([^`]+)` \|", DOCS.read_text(), flags=re.M)
    assert sorted(rows) == sorted({*CLASSES, "model_type"})


if __name__ == "__main__":
    for kind in sys.argv[1:] or sorted(CLASSES):
        try:
            print(result(kind), flush=True)
        except Exception as error:  # noqa: BLE001
            print(f"| `{kind}` | WRONG: {type(error).__name__} {str(error)[:200]!r} | | | |", flush=True)
