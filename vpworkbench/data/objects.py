"""Which object of a picture lies under each visual token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpworkbench.data.records import Picture
from vpworkbench.probes.masks import ON_OBJECT, objects_of_tokens


def objects_of_pictures(pictures: Sequence[Picture], grid: int, *, share: float = ON_OBJECT) -> Tensor:
    """`objects_of_tokens` of each picture, int64 (image, vision); 0 for background and in pictures without objects."""
    nothing = torch.zeros(grid, grid, dtype=torch.uint8)
    maps = [torch.from_numpy(picture.object_map()) if picture.scene else nothing for picture in pictures]
    return torch.stack([objects_of_tokens(object_map, grid, share) for object_map in maps])


def noise_on_objects(objects: Tensor, *, seed: int = 0) -> Tensor:
    """Uniform numbers (image, vision) whose largest is on an object where the image has one: that token is picked."""
    noise = torch.rand(objects.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where((objects > 0) | ~(objects > 0).any(dim=1, keepdim=True), noise + 1, noise) / 2
