"""Which tokens of a model are visual, which are real, and where on the image each visual token is.

One function for each way of laying out images in the sequence; `LAYOUTS` lists the model families of each. Boxes are
x0, y0, x1, y1 as shares of the image that the model receives, after its processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import run_model, unchanged

Inputs = Mapping[str, Any]
Tiles = Sequence[tuple[int, int]] | None


class ModalityMasks(NamedTuple):
    """The modality and the place of each token of a batch, over the sequence that the model's attention runs on.

    Attributes
    ----------
    vision, tokens : BoolTensor, shape (example, token)
        Visual tokens; real (non-padding) tokens.
    boxes : Tensor, shape (example, token, 4)
        nan where a token has no place on an image (words, learned queries, separators of rows).
    image : LongTensor, shape (example, token)
        Which of the inputs' images, counted over the batch, a token belongs to; -1 elsewhere.
    """

    vision: Tensor
    tokens: Tensor
    boxes: Tensor
    image: Tensor


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
    kind = _model_type(model)
    if kind in LAYOUTS:
        return LAYOUTS[kind](model, inputs, tiles)
    if _image_ids(model.config) and torch.is_tensor(inputs.get("input_ids")):
        return _without_boxes(model, inputs)
    raise ValueError(
        f"the layout of {type(model).__name__} (model_type {kind!r}) is not known here; known are "
        f"{', '.join(sorted(LAYOUTS))}. Build `vision` and `tokens`, bool (example, token), yourself"
    )


def grid_boxes(rows: int, columns: int, within: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """Boxes of a grid, row by row, inside a part of the image; (rows * columns, 4)."""
    left, top, right, bottom = within
    y = torch.linspace(top, bottom, rows + 1)
    x = torch.linspace(left, right, columns + 1)
    y0, x0 = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
    y1, x1 = torch.meshgrid(y[1:], x[1:], indexing="ij")
    return torch.stack([x0, y0, x1, y1], dim=-1).flatten(0, 1)


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


def tile_boxes(rows: int, columns: int, grid: tuple[int, int], *, thumbnail: bool) -> Tensor:
    """Boxes of an image cut into tiles with a grid each, row by row, then those of a thumbnail of the whole image."""
    tiles = [grid_boxes(*grid, tuple(tile.tolist())) for tile in grid_boxes(rows, columns)]
    return torch.cat([*tiles, grid_boxes(*grid)] if thumbnail else tiles)


# ------------------------------------------------------------------------------- images as tokens among the words


def _laid_out(inputs: Inputs, vision: Tensor, images: Sequence[Tensor], source: str) -> ModalityMasks:
    """Give the boxes of all images, in their order, to the visual tokens, in theirs."""
    boxes = torch.full((*vision.shape, 4), torch.nan, device=vision.device)
    image = torch.full(vision.shape, -1, dtype=torch.long, device=vision.device)
    made, places = sum(map(len, images)), int(vision.sum())
    if made != places:
        raise ValueError(
            f"input_ids hold {places} visual tokens, but {source} makes {made} from {len(images)} images: take ids and "
            "images from one call of the processor"
        )
    if images:
        boxes[vision] = torch.cat(list(images)).to(boxes)
        numbers = torch.arange(len(images)).repeat_interleave(torch.tensor([len(one) for one in images]))
        image[vision] = numbers.to(image)
    return ModalityMasks(vision, _real(inputs, vision), boxes, image)


def _real(inputs: Inputs, vision: Tensor) -> Tensor:
    """The 2-D attention mask; all tokens where there is none."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(vision)
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


def _pixels(inputs: Inputs) -> Tensor:
    return inputs["pixel_values"]


def _patches(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """Rows and columns of patches of the vision tower."""
    size = model.config.vision_config.patch_size
    patch = size if isinstance(size, Sequence) else (size, size)
    return _pixels(inputs).shape[-2] // patch[0], _pixels(inputs).shape[-1] // patch[1]


def _whole_grid(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """LLaVA, PaliGemma: every image is a grid of patches, row by row."""
    boxes = grid_boxes(*_patches(model, inputs))
    if getattr(model.config, "vision_feature_select_strategy", "") == "full":
        boxes = torch.cat([grid_boxes(1, 1), boxes])  # the tower's class token
    images = [boxes] * len(_pixels(inputs))
    return _laid_out(inputs, _placeholder(model, inputs), images, "a grid of patches")


def _pooled_grid(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Gemma 3: the grid is pooled to a fixed number of tokens."""
    side = round(model.config.mm_tokens_per_image**0.5)
    images = [grid_boxes(side, side)] * len(_pixels(inputs))
    return _laid_out(inputs, _placeholder(model, inputs), images, "mm_tokens_per_image")


def _codes(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Chameleon: the code book halves each side once at every level but the first."""
    levels = len(model.config.vq_config.channel_multiplier) - 1
    rows, columns = (side // 2**levels for side in _pixels(inputs).shape[-2:])
    images = [grid_boxes(rows, columns)] * len(_pixels(inputs))
    return _laid_out(inputs, _placeholder(model, inputs), images, "the code book")


def _merged_grids(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """Qwen-VL: frames x rows x columns of patches, merged 2 x 2; images and videos have ids of their own."""
    merge = model.config.vision_config.spatial_merge_size
    ids, parts, count = _ids(inputs), [], 0
    for kind in ("image", "video"):
        grids = inputs.get(f"{kind}_grid_thw")
        frames = [
            grid_boxes(rows // merge, columns // merge)
            for times, rows, columns in ([] if grids is None else grids.tolist())
            for _ in range(times)
        ]
        vision = ids == getattr(model.config, f"{kind}_token_id")
        part = _laid_out(inputs, vision, frames, f"{kind}_grid_thw")
        parts.append(part._replace(image=torch.where(vision, part.image + count, -1)))
        count += len(frames)
    images, videos = parts
    return ModalityMasks(
        images.vision | videos.vision,
        images.tokens,
        torch.where(videos.vision[..., None], videos.boxes, images.boxes),
        torch.maximum(images.image, videos.image),
    )


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
    scale = model.config.scale_factor
    rows, columns = (side // scale for side in _patches(model, inputs))
    images: list[Tensor] = []
    for row, places in zip(ids, vision, strict=True):
        runs = _runs(places)
        cut: list[tuple[int, int]] = []  # the runs of the tiles of this image
        for begin, end in runs:
            if row[begin - 1] != row[runs[-1][0] - 1]:
                cut.append((begin, end))
                continue
            ends = sum(after[0] - before[1] > 2 for before, after in pairwise([*cut, (begin, end)]))
            if len(cut) % max(ends, 1):
                raise ValueError(f"input_ids hold an image of {len(cut)} tiles in {ends} rows, not a grid of tiles")
            tiled = [tile_boxes(ends, len(cut) // ends, (rows, columns), thumbnail=False)] if cut else []
            images.append(torch.cat([*tiled, grid_boxes(rows, columns)]))
            cut = []
    return _laid_out(inputs, vision, images, "each tile")


def _tiles_in_a_row(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """InternVL: all tiles of an image in one run, then the thumbnail; only its processor knows the rows and columns."""
    scale = model.config.downsample_ratio
    rows, columns = (round(side * scale) for side in _patches(model, inputs))
    vision = _placeholder(model, inputs)
    lengths = [end - begin for row in vision for begin, end in _runs(row)]
    counts = [length // (rows * columns) for length in lengths]
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
        images.append(tile_boxes(down, across, (rows, columns), thumbnail=count > down * across))
    return _laid_out(inputs, vision, images, "each tile")


def _without_boxes(model: nn.Module, inputs: Inputs) -> ModalityMasks:
    """Any other model that marks its image tokens by an id."""
    vision = torch.isin(_ids(inputs), torch.tensor(_image_ids(model.config), device=_ids(inputs).device))
    boxes = torch.full((*vision.shape, 4), torch.nan, device=vision.device)
    return ModalityMasks(vision, _real(inputs, vision), boxes, torch.where(vision, 0, -1))


# ----------------------------------------------------------------------------------------- words, then the image


def _side_by_side(
    inputs: Inputs, boxes: Tensor, *, real: Tensor | None = None, image_first: bool = False, extra: int = 0
) -> ModalityMasks:
    """Words and one image for each example in one sequence.

    Parameters
    ----------
    boxes : Tensor, shape (example, vision, 4)
    real : BoolTensor, shape (example, vision), optional
        Visual tokens that are not padding.
    extra : int
        Tokens in front that belong to neither words nor image (a class token of the fusion).
    """
    ids = _ids(inputs)
    examples, count = boxes.shape[:2]
    mask = inputs.get("attention_mask")
    words = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    real = torch.ones(examples, count, dtype=torch.bool) if real is None else real
    real = real.to(ids.device)
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
    if not visual.kind.on_grid:
        seen = model.visual(inputs["images"])
        return _side_by_side(given, seen.boxes, real=seen.tokens)
    grid = visual.grid
    return _side_by_side(given, grid_boxes(grid, grid).expand(len(words), -1, -1))


def _regions(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """VisualBERT: words, then regions, whose boxes the model does not receive."""
    features = inputs["visual_embeds"]
    boxes = torch.full((*features.shape[:2], 4), torch.nan)
    real = inputs.get("visual_attention_mask")
    return _side_by_side(inputs, boxes, real=None if real is None else real.bool())


def _placed_regions(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """LXMERT: words, then regions with their boxes (`visual_pos`)."""
    real = inputs.get("visual_attention_mask")
    return _side_by_side(inputs, inputs["visual_pos"], real=None if real is None else real.bool())


def _with_class_token(inputs: Inputs, patch: int) -> Tensor:
    """The tower's class token, with the whole image as its box, then the grid; (example, vision, 4)."""
    rows, columns = (side // patch for side in _pixels(inputs).shape[-2:])
    boxes = torch.cat([grid_boxes(1, 1), grid_boxes(rows, columns)])
    return boxes.expand(len(_pixels(inputs)), -1, -1)


def _flava(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """FLAVA's multimodal encoder: a class token of its own, the image with its class token, the words."""
    config = model.config
    boxes = _with_class_token(inputs, config.image_config.patch_size)
    own = int(config.multimodal_config.use_cls_token)
    return _side_by_side(inputs, boxes, image_first=True, extra=own)


def _bridgetower(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """BridgeTower: two streams, the words and the image with its class token."""
    return _side_by_side(inputs, _with_class_token(inputs, model.config.vision_config.patch_size))


# ----------------------------------------------------------------------------------------- patches in a random order


class ShuffledPatches:
    """The order that ViLT drew for its patches in one forward."""

    def __init__(self) -> None:
        self.order: list[tuple[Tensor, Tensor, tuple[int, int]]] = []  # (patch row and column, mask, grid)

    def boxes(self, tokens: int) -> Tensor:
        """(example, token, 4): nan at the words, the whole image at the class token."""
        (patches, mask, (rows, columns)), *_ = self.order
        size = torch.tensor([columns, rows], device=patches.device)
        corner = patches.flip(-1)  # x, y
        boxes = torch.cat([corner / size, (corner + 1) / size], dim=-1)
        whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)
        placed = torch.cat([whole, boxes], dim=1).masked_fill(~mask.bool()[..., None], torch.nan)
        words = boxes.new_full((len(boxes), tokens - placed.shape[1], 4), torch.nan)
        return torch.cat([words, placed], dim=1)


@contextmanager
def patches_recorded(model: nn.Module) -> Iterator[ShuffledPatches]:
    """In the block, record the order of ViLT's patches: it draws a new one in every forward, in eval mode too."""
    shuffled = ShuffledPatches()
    changed = [module for module in model.modules() if type(module).__name__ == "ViltEmbeddings"]
    for module in changed:
        module.visual_embed = _recorded(module.visual_embed, shuffled)
    try:
        yield shuffled
    finally:
        for module in changed:
            del module.visual_embed


def _recorded(embed: Callable[..., Any], shuffled: ShuffledPatches) -> Callable[..., Any]:
    def visual_embed(*args: Any, **kwargs: Any) -> Any:
        features, mask, (patches, grid) = embed(*args, **kwargs)
        shuffled.order.append((patches, mask, grid))
        return features, mask, (patches, grid)

    return visual_embed


def _vilt(model: nn.Module, inputs: Inputs, tiles: Tiles) -> ModalityMasks:
    """ViLT: words, a class token, patches in the order that a forward draws from this random state."""
    with patches_recorded(model) as shuffled, unchanged(model), torch.no_grad():
        run_model(model, inputs)
    if not shuffled.order:
        raise ValueError(f"{type(model).__name__} embedded no pixel_values: pass `vision` and `tokens` yourself")
    mask = shuffled.order[0][1].bool()
    return _side_by_side(inputs, shuffled.boxes(mask.shape[1]), real=mask)


def _model_type(model: nn.Module) -> str:
    settings = getattr(model, "settings", None)
    return getattr(settings, "architecture", "") or getattr(getattr(model, "config", None), "model_type", "")


Layout = Callable[[nn.Module, Inputs, Tiles], ModalityMasks]

LAYOUTS: dict[str, Layout] = {
    "vpworkbench": _ours,
    "llava": _whole_grid,
    "vipllava": _whole_grid,
    "paligemma": _whole_grid,
    "qwen2_vl": _merged_grids,
    "qwen2_5_vl": _merged_grids,
    "qwen3_vl": _merged_grids,
    "idefics3": _written_tiles,
    "smolvlm": _written_tiles,
    "internvl": _tiles_in_a_row,
    "gemma3": _pooled_grid,
    "chameleon": _codes,
    "vilt": _vilt,
    "visual_bert": _regions,
    "lxmert": _placed_regions,
    "flava": _flava,
    "bridgetower": _bridgetower,
}
"""`model_type` of a configuration -> the layout of that family."""
