"""COCO's instance masks: which object is visible at each pixel of a photograph (`instances_*.json`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from vpworkbench.data.files import decode_json, faults_at, read_text
from vpworkbench.data.readers import Id, checked
from vpworkbench.errors import DataError


class _Image(BaseModel):
    id: Id
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class _Instance(BaseModel):
    id: Id
    image_id: Id
    category_id: int
    segmentation: list[list[float]] | dict[str, Any]
    iscrowd: int = 0


class _File(NamedTuple):
    sizes: dict[int, tuple[int, int]]  # height and width of each image
    instances: dict[int, list[dict[str, Any]]]  # as parsed, by image
    categories: dict[int, str]


@dataclass(frozen=True, slots=True)
class InstanceMasks:
    """The outlined objects of one photograph. The file is parsed when the first of its photographs is asked for."""

    file: Path
    image_id: int

    def object_map(self) -> np.ndarray:
        """uint8 (height, width): i + 1 where object i is visible, 0 in the background; small objects lie on large ones.

        Crowds, which outline many things at once, are background. The objects are in the order of `names`. A
        `DataError` names an annotation that lies outside the image, or cannot be decoded.
        """
        sizes = _read(self.file).sizes
        if self.image_id not in sizes:
            raise DataError(f"{self.file}: no image {self.image_id}, which has captions; take the files of one release")
        height, width = sizes[self.image_id]
        drawn = np.zeros((height, width), dtype=np.uint8)
        masks = [self._mask(instance, height, width) for instance in self._instances()]
        for number in sorted(range(len(masks)), key=lambda number: -int(masks[number].sum())):
            drawn[masks[number]] = number + 1
        return drawn

    def names(self) -> list[str]:
        """The category of each object."""
        categories = _read(self.file).categories
        return [categories.get(instance.category_id, str(instance.category_id)) for instance in self._instances()]

    def _instances(self) -> list[_Instance]:
        found = []
        for raw in _read(self.file).instances.get(self.image_id, []):
            with faults_at(f"{self.file}: annotation {raw.get('id')}"):
                found.append(checked(_Instance, raw))
        return [instance for instance in found if not instance.iscrowd][:255]

    def _mask(self, instance: _Instance, height: int, width: int) -> np.ndarray:
        """bool (height, width), decoded by COCO's own tools."""
        try:
            from pycocotools import mask as coco
        except ImportError:
            raise DataError(f"{self.file}: instance masks need the extra `photos`: pip install pycocotools") from None
        outline, where = instance.segmentation, f"{self.file}: annotation {instance.id}"
        try:
            if isinstance(outline, list):
                points = np.concatenate([np.asarray(polygon).reshape(-1, 2) for polygon in outline])
                if points.min() < -1 or (points.max(axis=0) > (width + 1, height + 1)).any():
                    raise ValueError(f"a polygon leaves the image of {width} x {height} pixels")
                encoded = coco.merge(coco.frPyObjects(outline, height, width))
            elif list(outline["size"]) != [height, width]:
                raise ValueError(f"a mask of {outline['size']} for an image of {[height, width]}, height and width")
            else:
                counts = outline["counts"]
                encoded = coco.frPyObjects(outline, height, width) if isinstance(counts, list) else outline
            return coco.decode(encoded).astype(bool)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{where}: {error}; correct or drop it") from None


@lru_cache(maxsize=4)
def _read(file: Path) -> _File:
    """The images, objects and categories of a file; what is wrong with one object shows when it is drawn."""
    content, _ = decode_json(read_text(file), str(file))
    instances: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        sizes = {image.id: (image.height, image.width) for image in map(_Image.model_validate, content["images"])}
        for raw in content["annotations"]:
            instances[int(raw["image_id"])].append(raw)
        categories = {category["id"]: category["name"] for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: not COCO's instances ({error}); fetch the annotations again") from None
    return _File(sizes, instances, categories)


def instances_beside(captions: Path) -> Path | None:
    """The file of instances of the same images as a file of captions, if it lies beside it."""
    file = captions.with_name(captions.name.replace("captions_", "instances_", 1))
    return file if file != captions and file.exists() else None
