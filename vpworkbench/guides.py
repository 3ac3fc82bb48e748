"""What ranks visual tokens for masks besides the parser itself: another, frozen model, or the true objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from timm.models import is_model, is_model_in_modules
from torch import Tensor, nn

from vpworkbench.boxes import attention_in, features_in, grid_boxes
from vpworkbench.data.batches import Guide
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import ImageCache, Pixels, visual_input
from vpworkbench.data.objects import boxed_objects, objects_of_pictures
from vpworkbench.data.records import Picture
from vpworkbench.errors import CheckpointError, DataError, SettingsError
from vpworkbench.losses import Select
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_visual
from vpworkbench.probes.masks import nearest_by_features, objects_first
from vpworkbench.runs import Run
from vpworkbench.settings import MaskSettings, PretrainSettings, VisualSettings
from vpworkbench.subjects import load_run

SOURCE_PX = 224
"""Side of the images that a `mask.source` sees, or the nearest that its tokens and the family's tile alike."""
CNNS = {"efficientnet-lite0": "tf_efficientnet_lite0"}  # packages with a CNN of timm; others have a ViT


def mask_guide(
    settings: PretrainSettings,
    pictures: Sequence[Picture],
    run: Run | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Guide | None:
    """What ranks the tokens of these pictures, as `mask.mode` and `mask.source` say; None: the model itself.

    The folder of `run` keeps the scores of a source, so that each image is seen once. A `SettingsError` or
    `CheckpointError` if there is no such source, or it has no attention to give; a `DataError` if the objects of none
    of the pictures are known.
    """
    mask, visual = settings.mask, settings.visual
    if mask.mode == "object":
        if not any(picture.has_objects for picture in pictures):
            raise DataError(
                f"{', '.join(settings.data.sets)}: mask.mode 'object' needs pictures whose objects are known: "
                "generated scenes, or COCO captions beside their instances_*.json"
            )
        return TrueObjects(visual)
    if not mask.source:
        return None
    guide = Source(open_source(mask, visual).to(device), mask, visual)
    if run is None:
        return guide
    key = f"{mask.model_dump_json()} {visual.model_dump_json()}"
    options = {"both_ways": settings.data.flip, "what": "asking mask.source", "progress": run.progress}
    kept = ImageCache(run.folder, [one.image for one in pictures], guide.stack, key, **options)
    return KeptScores(kept, guide.select)


@dataclass(frozen=True)
class TrueObjects(Guide):
    """The tokens of the true object under the pick, then the nearest; the objects of a grid are looked up once."""

    visual: VisualSettings
    select: Select = "row"
    known: dict[ImageFile, Tensor] = field(default_factory=dict)

    def stack(self, images: Sequence[Picture], mirrored: np.ndarray | None = None) -> Tensor:
        if not self.visual.kind.on_grid:
            boxes, real = _boxes_of(images, self.visual)
            return _without_padding(objects_first(boxed_objects(images, boxes), boxes), real)
        grid = self.visual.grid
        for picture in images:
            if picture.image not in self.known:
                self.known[picture.image] = objects_of_pictures([picture], grid)[0]
        objects = torch.stack([self.known[picture.image] for picture in images]).view(-1, grid, grid)
        if mirrored is not None:
            objects[torch.from_numpy(mirrored)] = objects[torch.from_numpy(mirrored)].flip(-1)
        return objects_first(objects.flatten(1), grid_boxes(grid, grid)).float()


@dataclass(frozen=True)
class Source(Guide):
    """Attention or features of a frozen model, brought over to the tokens of the family by their areas."""

    model: nn.Module
    mask: MaskSettings
    visual: VisualSettings  # of the family that is masked

    @property
    def select(self) -> Select:
        return self.mask.select if self.mask.mode == "attention" else "row"

    @torch.no_grad()
    def stack(self, images: Sequence[Picture | ImageFile], mirrored: np.ndarray | None = None) -> Tensor:
        settings = self.model.settings
        found = self.model(Pixels(settings.image_px).stack(images, mirrored).to(next(self.model.parameters()).device))
        given = grid_boxes(settings.grid, settings.grid).double()
        if self.visual.kind.on_grid:
            boxes, real = grid_boxes(self.visual.grid, self.visual.grid).expand(len(images), -1, -1), None
        else:
            boxes, real = _boxes_of(images, self.visual)
        if self.mask.mode == "attention":
            scores = attention_in(boxes.double(), found.parsing.float().mean(dim=1).cpu(), given)
        else:
            scores = nearest_by_features(features_in(boxes.double(), found.features.float().cpu(), given))
        return scores.float() if real is None else _without_padding(scores, real)


@dataclass(frozen=True)
class KeptScores(Guide):
    """Scores that were computed before."""

    kept: ImageCache
    select: Select

    def stack(self, images: Sequence[Picture], mirrored: np.ndarray | None = None) -> Tensor:
        return self.kept.stack(images, mirrored)


@lru_cache(maxsize=2)
def open_source(mask: MaskSettings, visual: VisualSettings) -> nn.Module:
    """The frozen visual side that `mask.source` names, in evaluation mode.

    It is a checkpoint or run of ours, a CNN or ViT of timm, or weights for the ViT that `visual.vit` names.
    """
    ours = _visual_of_ours(mask.source)
    model = build_visual(source_settings(mask.source, visual)) if ours is None else ours
    kind = model.settings.kind
    if not kind.on_grid or (mask.mode == "attention" and not kind.parsing):
        lack = "attention; use mask.mode 'similar', or name a ViT" if kind.on_grid else "grid; name a ViT or a CNN"
        raise SettingsError(f"mask.source {mask.source!r}: visual family {model.settings.family!r} has no {lack}")
    if ours is None:
        start_visual(model, mask.source, preset="")
    return model.eval().requires_grad_(False)


def _visual_of_ours(source: str) -> nn.Module | None:
    """The visual side of a checkpoint folder, or of a pre-training run by folder or name; None if there is none."""
    folder = Path(source).expanduser()
    if (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        return VisualParsingModel.from_pretrained(folder).visual
    try:
        return load_run(source)[0].visual
    except CheckpointError:
        return None


def source_settings(name: str, visual: VisualSettings) -> VisualSettings:
    """Family and size of the network with a name; its tokens and those of `visual` tile the image alike."""
    cnn = CNNS.get(name, name)
    if is_model(cnn) and not is_model_in_modules(cnn.split(".")[0], ["vision_transformer", "deit"]):
        network, step = {"family": "grid", "backbone": cnn, "stride": 32}, 32
    else:
        network = {"family": "vit", "vit": name if is_model(name) else visual.vit, "merge": 1}
        step = visual.model_copy(update=network).vit_patch_px
    tile = step * (visual.grid if visual.kind.on_grid else 1)
    return VisualSettings(image_px=tile * max(1, round(SOURCE_PX / tile)), **network)


def _boxes_of(images: Sequence[Picture | ImageFile], visual: VisualSettings) -> tuple[Tensor, Tensor]:
    """Boxes of the regions of images, (image, region, 4), and which are real, bool (image, region)."""
    packed = visual_input(visual).stack(images)
    return packed[..., visual.region_width : visual.region_width + 4], packed[..., -1] > 0


def _without_padding(scores: Tensor, real: Tensor) -> Tensor:
    both = real[:, :, None] & real[:, None, :]
    return scores.float().masked_fill(~both, -torch.inf)
