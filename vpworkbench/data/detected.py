"""Regions of photographs, found by a detector of torchvision: boxes, classes, scores and pooled features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import names_below
from vpworkbench.data.images import ImageFile
from vpworkbench.data.regions import IMAGE_SUFFIX, read_npz, write_regions
from vpworkbench.errors import CheckpointError, DataError, SettingsError, first_line
from vpworkbench.model.published import read_weights
from vpworkbench.settings import nearest
from vpworkbench.system import write_atomically

MOST_REGIONS = 36
"""Regions of an image: as many as VisualBERT and LXMERT read."""


class Detected(NamedTuple):
    """Regions of one image, the surest first; an image without any has one, all of it, of class 0 and score 0."""

    features: Tensor  # (region, channel): what the detector classifies
    boxes: Tensor  # (region, 4): x0 y0 x1 y1 in pixels
    classes: Tensor  # int64 (region,): as the detector counts them
    scores: Tensor  # (region,)


def detect_regions(photos: str, folder: Path, *, detector: str, weights: str = "") -> dict[str, float]:
    """Write one npz for each photograph; a repeated call keeps existing files and makes the others.

    Parameters
    ----------
    photos : str
        A captioned set, or a folder of images.
    folder : Path
        For `visual.region_files`; its `config.json` states the detector and the width of features.
    detector, weights : str
        See `open_detector`.

    Returns
    -------
    dict
        `images`, and `regions`, their mean number.
    """
    images = photographs(photos)
    model = open_detector(detector, weights)
    width = model.roi_heads.box_predictor.cls_score.in_features
    settings = {"photos": photos, "detector": detector, "weights": weights, "width": width}
    config, text = folder / "config.json", json.dumps({"settings": settings}, indent=2) + "\n"
    is_other = config.read_bytes() != text.encode() if config.exists() else folder.exists() and any(folder.iterdir())
    if is_other:
        raise DataError(f"{folder}: holds other regions, or something else; choose another folder")
    files: dict[Path, ImageFile] = {}
    for image in images:
        file = (folder / image.name).with_suffix(".npz")
        if file in files:
            raise DataError(f"{image} and {files[file]}: their regions would share {file.name}; rename one of them")
        files[file] = image
    folder.mkdir(parents=True, exist_ok=True)
    if not config.exists():
        write_atomically(config, text)
    counts = []
    for file, image in tqdm(files.items(), desc="finding regions", unit="image"):
        if not file.exists():
            pixels = image.pixels()
            found = detect(model, pixels)
            more = {"classes": found.classes.numpy(), "scores": found.scores.numpy()}
            write_regions(file, found.features.numpy(), found.boxes.numpy(), pixels.shape[1::-1], **more)
        counts.append(len(read_npz(file).boxes))
    return {"images": len(images), "regions": float(np.mean(counts))}


def photographs(photos: str) -> list[ImageFile]:
    """The images of a captioned set, or of a folder without annotations; `DataError` if there are none."""
    place = Path(photos).expanduser()
    try:
        found: Sequence[ImageFile] = [picture.image for picture in read_pictures(place)]
    except DataError:
        if not place.is_dir():
            raise
        found = [ImageFile(place, name) for name in names_below(place) if IMAGE_SUFFIX.search(name)]
        if not found:
            raise
    return list(dict.fromkeys(found))


def open_detector(name: str, weights: str = "") -> nn.Module:
    """A Faster R-CNN of torchvision, in evaluation mode.

    Parameters
    ----------
    name : str
        Such as `fasterrcnn_resnet50_fpn_v2`.
    weights : str
        A file of weights; empty: those that torchvision publishes for it, from its cache or its site.

    Raises
    ------
    SettingsError
        If torchvision has no such detector of regions.
    CheckpointError
        If the weights are not available, or belong to another network.
    """
    from torchvision import models  # takes a second: only where regions are detected

    known = [one for one in models.list_models(models.detection) if one.startswith("fasterrcnn")]
    if name not in known:
        raise SettingsError(f"detector {name!r}: no Faster R-CNN of torchvision{nearest(name, known)}; known: {known}")
    if weights:
        tensors = read_weights(Path(weights).expanduser())
        classes = tensors.get("roi_heads.box_predictor.cls_score.bias", torch.zeros(91))
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=len(classes))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{weights}: not the weights of {name} ({first_line(error)})") from None
        return model.eval()
    published = models.get_model_weights(name).DEFAULT
    try:
        return models.get_model(name, weights=published).eval()
    except OSError as error:
        raise CheckpointError(
            f"detector {name!r}: its weights are not in the cache, and not available ({first_line(error)}); fetch "
            f"{published.url}, and give the file as --weights"
        ) from None


@torch.no_grad()
def detect(model: nn.Module, pixels: np.ndarray) -> Detected:
    """Regions of one image, uint8 (height, width, 3), at most `MOST_REGIONS`."""
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    shown, _ = model.transform([image])
    maps = model.backbone(shown.tensors)
    proposals, _ = model.rpn(shown, maps)
    found = model.roi_heads(maps, proposals, shown.image_sizes)[0][0]
    boxes, classes, scores = (found[name][:MOST_REGIONS] for name in ("boxes", "labels", "scores"))
    if not len(boxes):
        height, width = shown.image_sizes[0]
        boxes, classes, scores = torch.tensor([[0.0, 0.0, width, height]]), torch.zeros(1).long(), torch.zeros(1)
    heads = model.roi_heads
    features = heads.box_head(heads.box_roi_pool(maps, [boxes], shown.image_sizes))
    placed = model.transform.postprocess([{"boxes": boxes}], shown.image_sizes, [pixels.shape[:2]])[0]["boxes"]
    return Detected(features.flatten(1), placed, classes, scores)
