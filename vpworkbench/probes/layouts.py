"""Which tokens of a model are visual, which are real, and where on the image each visual token is.

Image tokens among the words are found by their ids, and their places by `vpworkbench.probes.places`. `LAYOUTS` lists
the models that lay out the sequence in another way. Boxes are x0, y0, x1, y1 as shares of the image that the model
receives, after its processor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.boxes import grid_boxes
from vpworkbench.probes.attention import run_model, unchanged
from vpworkbench.probes.formula import Modalities, both_modalities
from vpworkbench.probes.model_parts import config_of
from vpworkbench.probes.places import Asked, Tiles, find_places, runs, tile_boxes

Inputs = Mapping[str, Any]


class ModalityMasks(NamedTuple):
    """The modality and the place of each token of a batch, over the sequence that the model's attention runs on."""

    vision: Tensor  # bool (example, token): visual tokens
    tokens: Tensor  # bool (example, token): real (non-padding) tokens
    boxes: Tensor  # (example, token, 4): nan where a token has no place on an image (words, queries, separators)
    image: Tensor  # int64 (example, token): which of the inputs' images, counted over the batch; -1 elsewhere
    other: Tensor  # bool (example, token): tokens of a third modality (audio), in neither of the two
    note: str = ""  # why visual tokens have no place
    frame: Tensor | None = None  # int64 (example, token): step of time in its video, from 0; -1 elsewhere
    second: Tensor | None = None  # (example, token): when that step begins; nan where the inputs do not say

    @property
    def placed(self) -> Tensor:
        """Visual tokens that have a place on their image, bool (example, token)."""
        return self.vision & ~self.boxes.isnan().any(dim=-1)

    @property
    def language(self) -> Tensor:
        """Real tokens that are neither visual nor of a third modality, bool (example, token)."""
        return self.tokens & ~self.vision & ~self.other


def modality_masks(model: nn.Module, inputs: Inputs, *, tiles: Tiles = None, grid: Any = None) -> ModalityMasks:
    """Masks and boxes for a model in `LAYOUTS`, or any other whose configuration names the id of its image tokens.

    Where no boxes are found, `note` says why.

    Parameters
    ----------
    inputs : mapping
        Keyword arguments of the model's forward, as its processor makes them.
    tiles : sequence of (rows, columns), optional
        For each image, the tiles that the processor cut it into; needed where the inputs do not show it (InternVL).
    grid : (rows, columns) or sequence of them, optional
        The grid of visual tokens, of all images or of each, where nothing shows it.
    """
    _check_mapping(inputs)
    config = config_of(model)
    kind = getattr(getattr(model, "settings", None), "architecture", "") or getattr(config, "model_type", "")
    if kind in LAYOUTS and grid is None:
        return LAYOUTS[kind](model, inputs)
    positions = inputs.get("image_embeds_position_mask")
    if positions is None and not any(_named_ids(config, name) for name in ("image", "video")):
        across = next((name for name, _ in model.named_modules() if _ACROSS.search(name)), None)
        raise ValueError(
            f"the layout of {type(model).__name__} (model_type {kind!r}) is not known here: its configuration names no "
            "image_token_id, and it is none of "
            f"{', '.join(sorted(LAYOUTS))}. Build `vision` and `tokens`, bool (example, token), yourself"
            + (f". If the image is only keys of a cross attention ({across}), no flow is defined" if across else "")
        )
    return _among_words(model, inputs, tiles, grid)


def modalities_of(
    model: nn.Module, inputs: Inputs, vision: Tensor, tokens: Tensor, language: Tensor | None
) -> Modalities:
    """As `both_modalities`; by default language is every real token that is not visual, nor of a third modality.

    A ValueError if the inputs mark an image that they do not hold: the model would read placeholders in its place.
    """
    _check_mapping(inputs)
    ids, heard = inputs.get("input_ids"), _named_ids(config_of(model), "audio")
    if torch.is_tensor(ids) and not any(torch.is_tensor(one) and one.is_floating_point() for one in inputs.values()):
        seen = [number for kind in ("image", "video") for number in _named_ids(config_of(model), kind)]
        if count := int(_at(ids, seen).sum()):
            raise ValueError(
                f"input_ids hold {count} image tokens, but no pixels come with them: give all that the processor "
                "returned"
            )
    if language is None and heard and torch.is_tensor(ids) and ids.shape == tokens.shape:
        language = tokens & ~(vision | _at(ids, heard)).to(tokens.device)
    return both_modalities(vision, tokens, language)


def _check_mapping(inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise TypeError(f"inputs is a {kind}: give the keyword arguments of the model's forward, as a processor does")


REGIONS_SIDE = 32
"""Side of the grid into which free boxes are drawn."""


def painted(values: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Rasterise a value of each token onto a grid of side x side cells.

    Parameters
    ----------
    values : Tensor, (..., token)
    boxes : Tensor, (..., token, 4)
        Shares of the image; nan for words.

    Returns
    -------
    Tensor, (..., side, side)
        The largest value among the boxes that contain the centre of a cell; 0 where none does.
    """
    centre = (torch.arange(side, device=boxes.device) + 0.5) / side
    x0, y0, x1, y1 = (edge[..., None] for edge in boxes.unbind(-1))
    within_rows = (centre >= y0) & (centre < y1)
    within_columns = (centre >= x0) & (centre < x1)
    inside = within_rows[..., :, None] & within_columns[..., None, :]  # ... token row column
    return torch.where(inside, values[..., None, None], 0).amax(dim=-3)


# ------------------------------------------------------------------------------- images as tokens among the words

_ACROSS = re.compile(r"cross_?att|enc(oder)?_?(dec|attn)", flags=re.IGNORECASE)
_ID_NAMES = ("{}_token_id", "{}_token_index", "{}_patch_id")


def _named_ids(config: Any, kind: str) -> list[int]:
    """Ids of the tokens of one kind, as the configuration or a part of it names them."""
    parts = (config, *(part for name, part in getattr(config, "__dict__", {}).items() if name.endswith("_config")))
    for part in parts:
        found = [getattr(part, name.format(kind), None) for name in _ID_NAMES]
        if numbers := [number for number in dict.fromkeys(found) if isinstance(number, int)]:
            return numbers
    return []


def _at(ids: Tensor, numbers: list[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(numbers, device=ids.device))


def _among_words(model: nn.Module, inputs: Inputs, tiles: Tiles, grid: Any) -> ModalityMasks:
    """Images and videos are tokens among the words, marked by their ids or by a mask that is an input."""
    config, real = config_of(model), _real(inputs)
    masks = {kind: _at(_ids(inputs), _named_ids(config, kind)) for kind in ("image", "video")}
    if inputs.get("image_embeds_position_mask") is not None:
        masks["image"] = inputs["image_embeds_position_mask"].bool()
    found = {kind: find_places(Asked(model, config, inputs, kind, mask), grid, tiles) for kind, mask in masks.items()}
    vision = masks["image"] | masks["video"]
    boxes = torch.full((*vision.shape, 4), torch.nan, device=vision.device)
    image = torch.full(vision.shape, -1, dtype=torch.long, device=vision.device)
    count = 0
    for kind, mask in masks.items():
        lengths = torch.tensor([len(one) for one in found[kind].images], dtype=torch.long)
        if len(lengths):
            boxes[mask] = torch.cat(found[kind].images).to(boxes)
        else:  # the runs of tokens separate the images
            lengths = torch.tensor([end - begin for row in mask for begin, end in runs(row)], dtype=torch.long)
        image[mask] = (count + torch.arange(len(lengths)).repeat_interleave(lengths)).to(image)
        count += len(lengths)
    note = "; ".join(part.note for part in found.values() if part.note)
    other = _at(_ids(inputs), _named_ids(config, "audio")) & ~vision
    times = _times(inputs, masks["video"], found["video"].images)
    return ModalityMasks(vision, real, boxes, image, other, note, *times)


def _times(inputs: Inputs, video: Tensor, frames: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """`frame` and `second` of `ModalityMasks`, from the grids of the videos and the seconds between their steps."""
    grids = inputs.get("video_grid_thw")
    steps = torch.zeros(0) if grids is None else torch.as_tensor(grids)[:, 0].cpu()
    pace = next((pace for pace in (1, 2) if int((-(-steps // pace)).sum()) == len(frames) > 0), None)
    if pace is None:  # no video, or no grid
        return None, None
    steps, lengths = -(-steps // pace), torch.tensor([len(one) for one in frames])
    number = torch.cat([torch.arange(count) for count in steps.tolist()])
    between = inputs.get("second_per_grid_ts")
    between = torch.full((len(steps),), torch.nan) if between is None else torch.as_tensor(between).float().cpu() * pace
    frame = torch.full(video.shape, -1, device=video.device)
    second = torch.full(video.shape, torch.nan, device=video.device)
    frame[video] = number.repeat_interleave(lengths).to(frame)
    second[video] = (number * between.repeat_interleave(steps)).repeat_interleave(lengths).to(second)
    return frame, second


def _real(inputs: Inputs) -> Tensor:
    """The 2-D attention mask; all tokens where there is none."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(_ids(inputs), dtype=torch.bool)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}: pass the plain one, (example, token)")
    if mask.shape != _ids(inputs).shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but input_ids are {tuple(_ids(inputs).shape)}")
    return mask.bool()


def _ids(inputs: Inputs) -> Tensor:
    if not torch.is_tensor(inputs.get("input_ids")):
        raise ValueError("inputs hold no input_ids, which mark the image tokens: build `vision` and `tokens` yourself")
    if inputs["input_ids"].ndim != 2:
        raise ValueError(f"input_ids are {tuple(inputs['input_ids'].shape)}: give a batch, (example, token)")
    return inputs["input_ids"]


def _written_tiles(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """Idefics3, SmolVLM: each tile is a run of image tokens after one that names its row and column, `<row_1_col_2>`.

    A line break follows each row of tiles, so a longer gap between two runs ends a row. The last run of an image is the
    whole image, and follows the same token everywhere.
    """
    masks = _among_words(model, inputs, None, None)  # each tile as an image of its own
    places: list[Tensor] = []
    for row, image, boxes in zip(_ids(inputs), masks.image, masks.boxes, strict=True):
        every = runs(image >= 0)
        cut: list[tuple[int, int]] = []  # the runs of the tiles of this image
        for begin, end in every:
            if row[begin - 1] != row[every[-1][0] - 1]:
                cut.append((begin, end))
                continue
            rows = sum(after[0] - before[1] > 2 for before, after in pairwise([*cut, (begin, end)]))
            columns, rest = divmod(len(cut), max(rows, 1))
            if rest:
                raise ValueError(f"input_ids hold an image of {len(cut)} tiles in {rows} rows, not a grid of tiles")
            one = boxes[begin:end]
            grid = len(one[:, 1].unique()), len(one[:, 0].unique())
            places.append(tile_boxes(rows, columns, grid, whole=True) if cut else one)
            cut = []
    masks.boxes[masks.vision] = torch.cat(places).to(masks.boxes)
    lengths = torch.tensor([len(one) for one in places])
    masks.image[masks.vision] = torch.arange(len(places)).repeat_interleave(lengths).to(masks.image)
    return masks


# ----------------------------------------------------------------------------------------- words, then the image


def _side_by_side(
    inputs: Inputs, boxes: Tensor, *, real: Tensor | None = None, image_first: bool = False, extra: int = 0
) -> ModalityMasks:
    """Words and one image for each example in one sequence.

    Parameters
    ----------
    boxes : Tensor, shape (example, vision, 4)
    real : Tensor, shape (example, vision), optional
        True, or 1, at visual tokens that are not padding.
    extra : int
        Tokens in front that belong to neither words nor image (a class token of the fusion).
    """
    ids, words = _ids(inputs), _real(inputs)
    examples, count = boxes.shape[:2]
    real = (torch.ones(examples, count) if real is None else real).to(ids.device).bool()
    image = torch.arange(examples, device=ids.device)[:, None].expand(-1, count)
    nowhere = torch.full((*words.shape, 4), torch.nan, device=ids.device)

    def joined(of_words: Tensor, of_image: Tensor, in_front: float) -> Tensor:
        front = of_words.new_full((examples, extra, *of_words.shape[2:]), in_front)
        return torch.cat([front, *((of_image, of_words) if image_first else (of_words, of_image))], dim=1)

    return ModalityMasks(
        vision=joined(torch.zeros_like(words), torch.ones_like(real), False),
        tokens=joined(words, real, True),
        boxes=joined(nowhere, boxes.to(nowhere), torch.nan),
        image=joined(torch.full_like(ids, -1), torch.where(real, image, -1), -1),
        other=torch.zeros(examples, extra + words.shape[1] + count, dtype=torch.bool, device=ids.device),
    )


def _ours(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """This package's own: words, then the grid of visual tokens, or regions with their boxes."""
    words, visual = inputs["words"], model.settings.visual
    given = {"input_ids": words, "attention_mask": inputs["word_tokens"]}
    if visual.kind.on_grid:
        return _side_by_side(given, grid_boxes(visual.grid, visual.grid).expand(len(words), -1, -1))
    seen = model.visual(inputs["images"])
    return _side_by_side(given, seen.boxes, real=seen.tokens)


def _regions(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """Words, then regions: LXMERT receives their boxes (`visual_pos`), VisualBERT does not."""
    boxes = inputs.get("visual_pos")
    if boxes is None:
        boxes = torch.full((*inputs["visual_embeds"].shape[:2], 4), torch.nan)
    return _side_by_side(inputs, boxes, real=inputs.get("visual_attention_mask"))


def _with_class_token(inputs: Inputs, patch: int) -> Tensor:
    """The tower's class token, with the whole image as its box, then the grid; (example, vision, 4)."""
    examples, _, height, width = inputs["pixel_values"].shape
    return torch.cat([grid_boxes(1, 1), grid_boxes(height // patch, width // patch)]).expand(examples, -1, -1)


def _flava(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """FLAVA's multimodal encoder: a class token of its own, the image with its class token, the words."""
    boxes = _with_class_token(inputs, model.config.image_config.patch_size)
    own = int(model.config.multimodal_config.use_cls_token)
    return _side_by_side(inputs, boxes, image_first=True, extra=own)


def _git(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """GIT: the image with its class token, then the words."""
    return _side_by_side(inputs, _with_class_token(inputs, model.config.vision_config.patch_size), image_first=True)


def _florence2(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """Florence-2: tokens among the words; the mean of an image's grid, whose box is the whole image, then the grid."""
    masks = _among_words(model, inputs, None, None)
    boxes = _with_class_token(inputs, prod(config_of(model).vision_config.patch_stride))
    masks.boxes[masks.vision] = boxes.flatten(0, 1).to(masks.boxes)
    return masks._replace(note="")


def _bridgetower(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """BridgeTower: two streams, the words and the image with its class token."""
    return _side_by_side(inputs, _with_class_token(inputs, model.config.vision_config.patch_size))


# ----------------------------------------------------------------------------------------- patches in a random order


class ShuffledPatches:
    """Where the class token and the patches of ViLT lie in one forward; None for other models."""

    placed: Tensor | None = None  # example vision 4; nan at padding
    real: Tensor | None = None  # example vision

    def boxes(self, tokens: int) -> Tensor | None:
        """Boxes of the whole sequence, (example, token, 4): the words come first."""
        if self.placed is None:
            return None
        words = self.placed.new_full((len(self.placed), tokens - self.placed.shape[1], 4), torch.nan)
        return torch.cat([words, self.placed], dim=1)


@contextmanager
def patches_recorded(model: nn.Module) -> Iterator[ShuffledPatches]:
    """In the block, record the order of ViLT's patches: it draws a new one in every forward, in eval mode too."""
    shuffled = ShuffledPatches()
    changed = [module for module in model.modules() if type(module).__name__ == "ViltEmbeddings"]

    def visual_embed(embed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        features, mask, (patches, (rows, columns)) = embed(*args, **kwargs)
        shuffled.real, corner = mask.bool(), patches.flip(-1)  # x, y
        of_image = corner.masked_fill(~shuffled.real[:, 1:, None], 0)
        size = of_image.amax(dim=1, keepdim=True) + 1  # a narrower image is padded
        boxes = torch.cat([corner / size, (corner + 1) / size], dim=-1)
        whole = grid_boxes(1, 1).to(boxes).expand(len(boxes), 1, 4)
        shuffled.placed = torch.cat([whole, boxes], dim=1).masked_fill(~shuffled.real[..., None], torch.nan)
        return features, mask, (patches, (rows, columns))

    for module in changed:
        module.visual_embed = partial(visual_embed, module.visual_embed)
    try:
        yield shuffled
    finally:
        for module in changed:
            del module.visual_embed


def _vilt(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """ViLT: words, a class token, patches in the order that a forward draws from this random state."""
    with patches_recorded(model) as shuffled, unchanged(model), torch.no_grad():
        run_model(model, inputs)
    if shuffled.placed is None:
        raise ValueError(f"{type(model).__name__} embedded no pixel_values: pass `vision` and `tokens` yourself")
    return _side_by_side(inputs, shuffled.placed, real=shuffled.real)


LAYOUTS: dict[str, Callable[[nn.Module, Inputs], ModalityMasks]] = {
    "vpworkbench": _ours,
    "florence2": _florence2,
    "idefics3": _written_tiles,
    "smolvlm": _written_tiles,
    "vilt": _vilt,
    "visual_bert": _regions,
    "lxmert": _regions,
    "flava": _flava,
    "bridgetower": _bridgetower,
    "git": _git,
}
"""`model_type` of a configuration -> the layout of a model that no rule of `places` covers."""
