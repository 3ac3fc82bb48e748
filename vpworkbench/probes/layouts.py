"""Which tokens of a model are visual, which are real, and where on the image each visual token is.

One function for each way of laying out images in the sequence; `LAYOUTS` lists the model families of each. Boxes are
x0, y0, x1, y1 as shares of the image that the model receives, after its processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.boxes import grid_boxes
from vpworkbench.probes.attention import run_model, unchanged

Inputs = Mapping[str, Any]
Tiles = Sequence[tuple[int, int]] | None


class ModalityMasks(NamedTuple):
    """The modality and the place of each token of a batch, over the sequence that the model's attention runs on."""

    vision: Tensor  # bool (example, token): visual tokens
    tokens: Tensor  # bool (example, token): real (non-padding) tokens
    boxes: (
        Tensor  # (example, token, 4): nan where a token has no place on an image (words, learned queries, separators)
    )
    image: Tensor  # int64 (example, token): which of the inputs' images, counted over the batch; -1 elsewhere


def modality_masks(model: nn.Module, inputs: Inputs, *, tiles: Tiles = None) -> ModalityMasks:
    """Masks and boxes for the inputs of a family in `LAYOUTS`.

    Any other model whose configuration names the id of its image tokens gets masks without boxes.

    Parameters
    ----------
    inputs : mapping
        Keyword arguments of the model's forward, as its processor makes them.
    tiles : sequence of (rows, columns), optional
        For each image, the tiles that the processor cut it into; needed only for InternVL, whose inputs do not show it.
    """
    config = getattr(model, "config", None)
    kind = getattr(getattr(model, "settings", None), "architecture", "") or getattr(config, "model_type", "")
    if kind in LAYOUTS:
        return LAYOUTS[kind](model, inputs, tiles)
    if _image_ids(config):
        return _without_boxes(model, inputs)
    raise ValueError(
        f"the layout of {type(model).__name__} (model_type {kind!r}) is not known here; known are "
        f"{', '.join(sorted(LAYOUTS))}. Build `vision` and `tokens`, bool (example, token), yourself"
    )


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


def _laid_out(inputs: Inputs, *kinds: tuple[Tensor, Sequence[Tensor]]) -> ModalityMasks:
    """Give the boxes of images, in their order, to the visual tokens, in theirs.

    Each of `kinds` has the tokens of one kind of images, bool (example, token), and the boxes of each image.
    """
    shape, device = kinds[0][0].shape, kinds[0][0].device
    boxes = torch.full((*shape, 4), torch.nan, device=device)
    image = torch.full(shape, -1, dtype=torch.long, device=device)
    count = 0
    for vision, images in kinds:
        lengths = torch.tensor([len(one) for one in images], dtype=torch.long)
        made, places = int(lengths.sum()), int(vision.sum())
        if made != places:
            raise ValueError(
                f"input_ids hold {places} visual tokens, but {len(images)} images of this size make {made}: take ids "
                "and images from one call of the processor"
            )
        if images:
            boxes[vision] = torch.cat(list(images)).to(boxes)
            image[vision] = (count + torch.arange(len(images)).repeat_interleave(lengths)).to(image)
        count += len(images)
    vision = image >= 0
    return ModalityMasks(vision, _real(inputs), boxes, image)


def _real(inputs: Inputs) -> Tensor:
    """The 2-D attention mask; all tokens where there is none."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(_ids(inputs), dtype=torch.bool)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}: pass the plain one, (example, token)")
    return mask.bool()


def _ids(inputs: Inputs) -> Tensor:
    if not torch.is_tensor(inputs.get("input_ids")):
        raise ValueError("inputs hold no input_ids, which mark the image tokens: build `vision` and `tokens` yourself")
    return inputs["input_ids"]


def _image_ids(config: Any) -> list[int]:
    named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id"))
    return [number for number in dict.fromkeys(named) if number is not None]


def _placeholder(model: nn.Module, inputs: Inputs) -> Tensor:
    """bool (example, token): True at the id of an image token."""
    return _ids(inputs) == _image_ids(model.config)[0]


def _alike(boxes_of: Callable[..., Tensor], model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Every image has the boxes `boxes_of(model, inputs)`."""
    images = [boxes_of(model, inputs)] * len(inputs["pixel_values"])
    return _laid_out(inputs, (_placeholder(model, inputs), images))


def _patches(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """Rows and columns of patches of the vision tower."""
    size = model.config.vision_config.patch_size
    rows, columns = size if isinstance(size, Sequence) else (size, size)
    height, width = inputs["pixel_values"].shape[-2:]
    return height // rows, width // columns


def _patch_grid(model: nn.Module, inputs: Inputs) -> Tensor:
    """LLaVA, PaliGemma: patches, row by row; perhaps after the tower's class token."""
    boxes = grid_boxes(*_patches(model, inputs))
    full = getattr(model.config, "vision_feature_select_strategy", "") == "full"
    return torch.cat([grid_boxes(1, 1), boxes]) if full else boxes


def _pooled_grid(model: nn.Module, inputs: Inputs) -> Tensor:
    """Gemma 3: the grid is pooled to a fixed number of tokens."""
    side = round(model.config.mm_tokens_per_image**0.5)
    return grid_boxes(side, side)


def _code_grid(model: nn.Module, inputs: Inputs) -> Tensor:
    """Chameleon: the code book halves each side once at every level but the first."""
    levels = len(model.config.vq_config.channel_multiplier) - 1
    return grid_boxes(*(side // 2**levels for side in inputs["pixel_values"].shape[-2:]))


def _merged_grids(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Qwen-VL: frames x rows x columns of patches, merged 2 x 2; images and videos have ids of their own."""
    merge = model.config.vision_config.spatial_merge_size
    kinds = []
    for kind in ("image", "video"):
        grids = inputs.get(f"{kind}_grid_thw")
        frames = [
            grid_boxes(rows // merge, columns // merge)
            for times, rows, columns in ([] if grids is None else grids.tolist())
            for _ in range(times)
        ]
        kinds.append((_ids(inputs) == getattr(model.config, f"{kind}_token_id"), frames))
    return _laid_out(inputs, *kinds)


def _tile_boxes(rows: int, columns: int, grid: tuple[int, int], *, whole: bool) -> Tensor:
    """Boxes of an image cut into tiles with a grid each, row by row; then those of the whole image, if it follows."""
    tiles = [grid_boxes(*grid, tuple(tile.tolist())) for tile in grid_boxes(rows, columns)]
    return torch.cat([*tiles, grid_boxes(*grid)] if whole else tiles)


def _runs(row: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each run of True; row : BoolTensor, shape (token,)."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _written_tiles(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Idefics3, SmolVLM: each tile is a run of image tokens after one that names its row and column, `<row_1_col_2>`.

    A line break follows each row of tiles, so a longer gap between two runs ends a row. The last run of an image is the
    whole image, and follows the same token everywhere.
    """
    ids, vision = _ids(inputs), _placeholder(model, inputs)
    grid = tuple(side // model.config.scale_factor for side in _patches(model, inputs))
    images: list[Tensor] = []
    for row, places in zip(ids, vision, strict=True):
        runs = _runs(places)
        cut: list[tuple[int, int]] = []  # the runs of the tiles of this image
        for begin, end in runs:
            if row[begin - 1] != row[runs[-1][0] - 1]:
                cut.append((begin, end))
                continue
            rows = sum(after[0] - before[1] > 2 for before, after in pairwise([*cut, (begin, end)]))
            columns, rest = divmod(len(cut), max(rows, 1))
            if rest:
                raise ValueError(f"input_ids hold an image of {len(cut)} tiles in {rows} rows, not a grid of tiles")
            images.append(_tile_boxes(rows, columns, grid, whole=True))
            cut = []
    return _laid_out(inputs, (vision, images))


def _tiles_in_a_row(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """InternVL: all tiles of an image in one run, then the thumbnail; only its processor knows the rows and columns."""
    rows, columns = (round(side * model.config.downsample_ratio) for side in _patches(model, inputs))
    vision = _placeholder(model, inputs)
    counts = [(end - begin) // (rows * columns) for row in vision for begin, end in _runs(row)]
    if tiles is None and any(count > 1 for count in counts):
        raise ValueError(
            f"images of {counts} tiles: pass tiles=[(rows, columns), ...] for the {len(counts)} images, as the "
            "processor cut them (see its get_optimal_tiled_canvas)"
        )
    cuts = tiles or [(1, 1)] * len(counts)
    if len(cuts) != len(counts):
        raise ValueError(f"tiles has {len(cuts)} entries for {len(counts)} images")
    images = []
    for (down, across), count in zip(cuts, counts, strict=True):
        if count not in (down * across, down * across + 1):
            raise ValueError(f"tiles: {down} x {across} is not the {count} tiles of an image")
        images.append(_tile_boxes(down, across, (rows, columns), whole=count > down * across))
    return _laid_out(inputs, (vision, images))


def _without_boxes(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """Any other model that marks its image tokens by an id."""
    vision = torch.isin(_ids(inputs), torch.tensor(_image_ids(model.config), device=_ids(inputs).device))
    boxes = torch.full((*vision.shape, 4), torch.nan, device=vision.device)
    return ModalityMasks(vision, _real(inputs), boxes, torch.where(vision, 0, -1))


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
    )


def _ours(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """This package's own: words, then the grid of visual tokens, or regions with their boxes."""
    words, visual = inputs["words"], model.settings.visual
    given = {"input_ids": words, "attention_mask": inputs["word_tokens"]}
    if visual.kind.on_grid:
        return _side_by_side(given, grid_boxes(visual.grid, visual.grid).expand(len(words), -1, -1))
    seen = model.visual(inputs["images"])
    return _side_by_side(given, seen.boxes, real=seen.tokens)


def _regions(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Words, then regions: LXMERT receives their boxes (`visual_pos`), VisualBERT does not."""
    boxes = inputs.get("visual_pos")
    if boxes is None:
        boxes = torch.full((*inputs["visual_embeds"].shape[:2], 4), torch.nan)
    return _side_by_side(inputs, boxes, real=inputs.get("visual_attention_mask"))


def _with_class_token(inputs: Inputs, patch: int) -> Tensor:
    """The tower's class token, with the whole image as its box, then the grid; (example, vision, 4)."""
    examples, _, height, width = inputs["pixel_values"].shape
    return torch.cat([grid_boxes(1, 1), grid_boxes(height // patch, width // patch)]).expand(examples, -1, -1)


def _flava(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """FLAVA's multimodal encoder: a class token of its own, the image with its class token, the words."""
    boxes = _with_class_token(inputs, model.config.image_config.patch_size)
    own = int(model.config.multimodal_config.use_cls_token)
    return _side_by_side(inputs, boxes, image_first=True, extra=own)


def _bridgetower(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
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
        size = torch.tensor([columns, rows], device=patches.device)
        corner = patches.flip(-1)  # x, y
        boxes = torch.cat([corner / size, (corner + 1) / size], dim=-1)
        whole = grid_boxes(1, 1).to(boxes).expand(len(boxes), 1, 4)
        shuffled.real = mask.bool()
        shuffled.placed = torch.cat([whole, boxes], dim=1).masked_fill(~shuffled.real[..., None], torch.nan)
        return features, mask, (patches, (rows, columns))

    for module in changed:
        module.visual_embed = partial(visual_embed, module.visual_embed)
    try:
        yield shuffled
    finally:
        for module in changed:
            del module.visual_embed


def _vilt(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """ViLT: words, a class token, patches in the order that a forward draws from this random state."""
    with patches_recorded(model) as shuffled, unchanged(model), torch.no_grad():
        run_model(model, inputs)
    if shuffled.placed is None:
        raise ValueError(f"{type(model).__name__} embedded no pixel_values: pass `vision` and `tokens` yourself")
    return _side_by_side(inputs, shuffled.placed, real=shuffled.real)


Layout = Callable[[nn.Module, Inputs, Tiles], ModalityMasks]

LAYOUTS: dict[str, Layout] = {
    "vpworkbench": _ours,
    "llava": partial(_alike, _patch_grid),
    "vipllava": partial(_alike, _patch_grid),
    "paligemma": partial(_alike, _patch_grid),
    "gemma3": partial(_alike, _pooled_grid),
    "chameleon": partial(_alike, _code_grid),
    "qwen2_vl": _merged_grids,
    "qwen2_5_vl": _merged_grids,
    "qwen3_vl": _merged_grids,
    "idefics3": _written_tiles,
    "smolvlm": _written_tiles,
    "internvl": _tiles_in_a_row,
    "vilt": _vilt,
    "visual_bert": _regions,
    "lxmert": _regions,
    "flava": _flava,
    "bridgetower": _bridgetower,
}
"""`model_type` of a configuration -> the layout of that family."""
