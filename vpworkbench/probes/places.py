"""Where on its image each visual token lies, from what a model and its inputs say; no model's name is asked for.

Boxes are x0, y0, x1, y1 as shares of an image. Each rule looks at one kind of input (grids of patches, sizes of images,
pixels) and is taken only if its images make exactly as many tokens as `input_ids` hold.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.boxes import grid_boxes
from vpworkbench.probes.model_parts import decoder_of

Inputs = Mapping[str, Any]
Sides = tuple[int, int, int]
"""Frames, rows and columns of an image, before its tokens are merged."""
Tiles = Sequence[tuple[int, int]] | None
"""Rows and columns of the tiles that the processor cut each image into."""


def tile_boxes(rows: int, columns: int, grid: tuple[int, int], *, whole: bool) -> Tensor:
    """Boxes of an image cut into tiles with a grid each, row by row; then those of the whole image, if it follows."""
    tiles = [grid_boxes(*grid, tuple(tile.tolist())) for tile in grid_boxes(rows, columns)]
    return torch.cat([*tiles, grid_boxes(*grid)] if whole else tiles)


class Places(NamedTuple):
    """Boxes of each image or frame in the order of the tokens, (token, 4), nan at separators; or why there are none."""

    images: list[Tensor]
    note: str = ""


class Asked(NamedTuple):
    """What a rule gets: one kind of visual tokens, `image` or `video`."""

    model: nn.Module
    config: Any
    inputs: Inputs
    kind: str
    vision: Tensor  # bool (example, token): tokens of this kind

    @property
    def count(self) -> int:
        return int(self.vision.sum())

    def straddled(self, images: list[Tensor]) -> bool:
        """Whether an image would begin in one example and end in the next: then it is not what the tokens are."""
        starts = torch.tensor([0, *map(len, images)]).cumsum(dim=0)
        return not torch.isin(self.vision.sum(dim=1).cumsum(dim=0).cpu(), starts).all()

    @property
    def pixels(self) -> Any:
        return self.inputs.get("pixel_values" if self.kind == "image" else "pixel_values_videos")


def find_places(asked: Asked, grid: Any = None, tiles: Tiles = None) -> Places:
    """Boxes of the images of one kind; `grid` is what the user knows: (rows, columns), or one for each image."""
    if not asked.count:
        return Places([])
    if grid is not None:
        return _given(asked, grid)
    if query := learned_queries(asked.model):
        return Places([], f"image tokens are learned queries ({query}) that read the whole image: they have no place")
    for rule in RULES:
        images = rule(asked)
        if images and not asked.straddled(images):
            return tiled(images, asked, tiles) if rule is _pixel_grids else Places(images)
    return Places([], f"{asked.count} {asked.kind} tokens fit no grid that the inputs show: pass grid=(rows, columns)")


def learned_queries(model: nn.Module) -> str | None:
    """Name of a learned query of a resampler or Q-Former before the decoder, by the usual names of such a parameter."""
    decoder = decoder_of(model)
    usual = re.compile(r"(latent_?)?(query|queries|latents)(_tokens|_embeds|_\d+)?")
    for name, module in model.named_modules():
        if decoder and name.startswith(decoder):
            continue
        own = [name.split(".")[-1]] if isinstance(module, nn.Embedding) else module._parameters
        for parameter in own:
            if usual.fullmatch(parameter):
                return f"{name}.{parameter}"
    return None


# ---------------------------------------------------------------------------------------------- tokens of one image


class Arrangement(NamedTuple):
    """Separators among the tokens of a grid; they have no place."""

    before: int
    line_end: int
    after: int

    def boxes(self, rows: int, columns: int) -> Tensor:
        """(separators + rows * columns, 4)."""
        nowhere = torch.full((1, 1, 4), torch.nan)
        grid = grid_boxes(rows, columns).view(rows, columns, 4)
        lines = torch.cat([grid, nowhere.expand(rows, self.line_end, 4)], dim=1).flatten(0, 1)
        return torch.cat([nowhere[0].expand(self.before, 4), lines, nowhere[0].expand(self.after, 4)])

    def tokens(self, rows: int, columns: int) -> int:
        return self.before + rows * (columns + self.line_end) + self.after


ARRANGEMENTS = (Arrangement(0, 0, 0), Arrangement(0, 1, 0), Arrangement(0, 1, 1), Arrangement(1, 1, 1))


def solve(
    sides: Sequence[Sides],
    count: int,
    step: int = 1,
    front: int = 0,
    arrangements: Sequence[Arrangement] = ARRANGEMENTS,
) -> list[Tensor]:
    """Boxes of each frame, if one way of merging all images makes `count` tokens; else nothing.

    `step` is the smallest unit that is merged (pixels of a patch), `front` tokens of the whole image precede each grid.
    """
    smallest = min((min(rows, columns) for _, rows, columns in sides), default=0)
    merges = range(step, smallest + 1, step)
    exact = [merge for merge in merges if all(side % merge == 0 for one in sides for side in one[1:])]
    before = grid_boxes(1, 1).expand(front, 4)
    for arrangement, merge, pace in product(arrangements, dict.fromkeys([*exact, *merges]), (1, 2)):
        grids = [(-(-frames // pace), rows // merge, columns // merge) for frames, rows, columns in sides]
        if sum(frames * (front + arrangement.tokens(*grid)) for frames, *grid in grids) == count:
            made = [torch.cat([before, arrangement.boxes(*grid)]) for _, *grid in grids]
            return [boxes for boxes, (frames, *_) in zip(made, grids, strict=True) for _ in range(frames)]
    return []


# ------------------------------------------------------------------------------------------------------------ rules


def _given(asked: Asked, grid: Any) -> Places:
    if _is_pair(grid):
        grid = [grid] * max(1, asked.count // (grid[0] * grid[1]))
    _check_pairs("grid", grid)
    images = [grid_boxes(*shape) for shape in grid]
    made = sum(map(len, images))
    if made != asked.count:
        raise ValueError(f"grid={grid} makes {made} tokens, but input_ids hold {asked.count} {asked.kind} tokens")
    return Places(images)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(one, int) and one > 0 for one in value)


def _check_pairs(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(map(_is_pair, value)):
        raise ValueError(f"{name}={value!r}: give (rows, columns) for each image, as a list")


def _patch_grids(asked: Asked) -> list[Tensor]:
    """Rows and columns of patches of each image are an input."""
    names = {
        "image": ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes"),
        "video": ("video_grid_thw", "target_sizes_videos"),
    }
    found = next((asked.inputs[name] for name in names[asked.kind] if asked.inputs.get(name) is not None), None)
    if found is None:
        return []
    sides = torch.as_tensor(found).reshape(-1, torch.as_tensor(found).shape[-1]).tolist()
    return solve([(1, *one)[-3:] for one in sides], asked.count)


def _two_views(asked: Asked) -> list[Tensor]:
    """The whole image, then its crops joined to one grid: rows and columns of both are an input."""
    grids = asked.inputs.get("image_grids")
    if grids is None or asked.kind != "image":
        return []
    images = [torch.cat([grid_boxes(*one[:2]), grid_boxes(*one[2:])]) for one in torch.as_tensor(grids).tolist()]
    return images if sum(map(len, images)) == asked.count else []


def _patch_positions(asked: Asked) -> list[Tensor]:
    """x and y of each patch are an input, (image, patch, 2); negative at padding."""
    positions = asked.inputs.get(f"{asked.kind}_position_ids")
    if not torch.is_tensor(positions) or positions.shape[-1] != 2:
        return []
    most = positions.flatten(0, -3).amax(dim=1) + 1
    return solve([(1, rows, columns) for columns, rows in most.tolist()], asked.count)


def _packed_tiles(asked: Asked) -> list[Tensor]:
    """A model that packs the features of tiles by a method of its own packs their boxes in the same way."""
    pack = next((part for part in asked.model.modules() if hasattr(part, "image_newline")), None)
    pack = getattr(pack, "pack_image_features", None)
    sizes, points = asked.inputs.get("image_sizes"), getattr(asked.config, "image_grid_pinpoints", None)
    if pack is None or sizes is None or points is None or asked.kind != "image":
        return []
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    tower = asked.config.vision_config
    side = tower.image_size // tower.patch_size
    cuts = [get_anyres_image_grid_shape(size, points, tower.image_size) for size in sizes.tolist()]
    tiles = [
        torch.cat([grid_boxes(side, side), tile_boxes(*cut, (side, side), whole=False)]).view(-1, side * side, 4)
        for cut in cuts
    ]
    given = {
        "image_features": tiles,
        "image_sizes": sizes.cpu(),
        "image_newline": torch.full((4,), torch.nan),
        "vision_feature_select_strategy": getattr(asked.config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": getattr(asked.config, "vision_aspect_ratio", None),
    }
    taken = {name: value for name, value in given.items() if name in inspect.signature(pack).parameters}
    packed = pack(**taken)
    packed = packed[0] if isinstance(packed, tuple) else packed
    images = list(packed) if not torch.is_tensor(packed) else [packed]
    if sum(map(len, images)) != asked.count:
        return []
    return [torch.cat([image[: side * side], _stretched(image[side * side :])]) for image in images]


def _stretched(boxes: Tensor) -> Tensor:
    """Boxes of the part of a canvas that an image fills, as shares of the image."""
    corners = boxes.nan_to_num(posinf=0, nan=torch.inf).view(-1, 2, 2)[:, 0].amin(dim=0)
    ends = boxes.nan_to_num(nan=-torch.inf).view(-1, 2, 2)[:, 1].amax(dim=0)
    return ((boxes.view(-1, 2, 2) - corners) / (ends - corners)).view(-1, 4)


def _patch_side(asked: Asked) -> int:
    """Pixels of a patch's side; 1 if the configuration does not say."""
    tower = getattr(asked.config, "vision_config", None)
    size = getattr(tower, "patch_size", None)
    size = size[0] if isinstance(size, Sequence) and size else size
    return size if isinstance(size, int) else 1


def _image_sizes(asked: Asked) -> list[Tensor]:
    """Images of several sizes, padded to one: their sizes in pixels are an input."""
    sizes, pixels = asked.inputs.get("image_sizes"), asked.pixels
    if sizes is None or not torch.is_tensor(pixels) or pixels.ndim != 4 or len(sizes) != len(pixels):
        return []
    sides = [(1, *size) for size in torch.as_tensor(sizes).tolist()]
    return solve(sides, asked.count, _patch_side(asked))


def _pixel_grids(asked: Asked) -> list[Tensor]:
    """Every image, tile or frame has as many tokens as its pixels say."""
    pixels = asked.pixels
    if not torch.is_tensor(pixels) or pixels.ndim not in (4, 5):
        return []
    frames = pixels.flatten(0, -4)
    real = frames.flatten(1).any(dim=1).sum() if pixels.ndim == 5 else len(frames)  # tiles of zeros are padding
    sides = [(1, *pixels.shape[-2:])] * int(real)
    # A tower that pools by convolutions may end on no whole patch: then only a plain grid counts.
    plain, step = ARRANGEMENTS[:1], _patch_side(asked)
    ways = [(step, 0, ARRANGEMENTS), (1, 0, plain)]
    if getattr(asked.config, "vision_feature_select_strategy", "") == "full":  # with the class token, if there is one
        ways = [(step, 1, plain), (1, 1, plain), *ways]
    return next((images for way in ways if (images := solve(sides, asked.count, *way))), [])


def _lines(asked: Asked) -> list[Tensor]:
    """Patches in a list, rows in `input_ids`: each is a run of image tokens, and one other token ends it."""
    if torch.is_tensor(asked.pixels) and asked.pixels.ndim != 3:
        return []
    images: list[Tensor] = []
    for row in asked.vision:
        lines: list[tuple[int, int]] = []
        for begin, end in [*runs(row), (len(row) + 2, 0)]:
            if lines and begin != lines[-1][1] + 1:
                if len(lines) == 1 or len({last - first for first, last in lines}) > 1:
                    return []
                images.append(grid_boxes(len(lines), lines[0][1] - lines[0][0]))
                lines = []
            lines.append((begin, end))
    return images


RULES: tuple[Callable[[Asked], list[Tensor]], ...] = (
    _patch_grids,
    _two_views,
    _patch_positions,
    _packed_tiles,
    _image_sizes,
    _pixel_grids,
    _lines,
)


def runs(row: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each run of True; row : BoolTensor, shape (token,)."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def tiled(images: list[Tensor], asked: Asked, tiles: Tiles) -> Places:
    """Tiles that follow each other in one run of tokens, joined to the image that they were cut from.

    `tiles` has the rows and columns of each run; the whole image may follow its tiles.
    """
    lengths = [end - begin for row in asked.vision for begin, end in runs(row)]
    each = len(images[0]) if images else 0
    counts = [length // each for length in lengths] if each else []
    if max(counts, default=0) <= 1 or any(length % each for length in lengths) or asked.kind != "image":
        return Places(images)
    grid = len(images[0][:, 1].unique()), len(images[0][:, 0].unique())
    if tiles is None:
        ask = f"pass tiles=[(rows, columns), ...] for the {len(counts)} images, or grid={grid} if these are images"
        return Places([], f"images of {counts} tiles: {ask}")
    _check_pairs("tiles", tiles)
    if len(tiles) != len(counts):
        raise ValueError(f"tiles has {len(tiles)} entries for {len(counts)} images")
    joined = []
    for (down, across), count in zip(tiles, counts, strict=True):
        if count not in (down * across, down * across + 1):
            raise ValueError(f"tiles: {down} x {across} is not the {count} tiles of an image")
        joined.append(tile_boxes(down, across, grid, whole=count > down * across))
    return Places(joined)
