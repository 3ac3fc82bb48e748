"""Which object of a picture lies under each visual token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpworkbench.data.records import Picture
from vpworkbench.probes.masks import ON_OBJECT, ON_PHOTOGRAPH, objects_of_boxes, objects_of_tokens


def objects_of_pictures(pictures: Sequence[Picture], grid: int, *, share: float | None = None) -> Tensor:
    """`objects_of_tokens` of each picture, int64 (image, vision); 0 for background and in pictures without objects.

    By default a token of a photograph is on an object that covers half of it, one of a scene on an object that covers a
    fifth.
    """
    return torch.stack([objects_of_tokens(_map_of(one), grid, share or covered_share(one)) for one in pictures])


def boxed_objects(pictures: Sequence[Picture], boxes: Tensor) -> Tensor:
    """The object in each box, by the same rule; boxes (image, token, 4) -> int64 (image, token)."""
    pairs = zip(pictures, boxes, strict=True)
    return torch.stack([objects_of_boxes(_map_of(one), some, covered_share(one)) for one, some in pairs])


def covered_share(picture: Picture) -> float:
    """Share of a token that an object must cover: less for the small things of scenes than for those of photographs."""
    return ON_OBJECT if picture.scene else ON_PHOTOGRAPH


def _map_of(picture: Picture) -> Tensor:
    return torch.from_numpy(picture.object_map()) if picture.has_objects else torch.zeros(96, 96, dtype=torch.uint8)


def noise_on_objects(objects: Tensor, *, seed: int = 0) -> Tensor:
    """Uniform numbers (image, vision) whose largest is on an object where the image has one: that token is picked.

    The others have numbers of their own, so a random mask by these falls anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    picking, others = (torch.rand(objects.shape, generator=generator) for _ in range(2))
    allowed = (objects > 0) | ~(objects > 0).any(dim=1, keepdim=True)
    return others.scatter(1, picking.where(allowed, -1.0).argmax(dim=1, keepdim=True), 1.0)
