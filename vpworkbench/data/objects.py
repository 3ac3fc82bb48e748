"""Which object of a picture lies under each visual token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vpworkbench.data.records import Picture
from vpworkbench.probes.masks import object_tokens


def token_objects(pictures: Sequence[Picture], grid: int) -> torch.Tensor:
    """The object that most of each token's pixels show; int64 (image, vision), 0 at background and in photographs."""
    rows = [torch.from_numpy(picture.object_map()) if picture.scene else torch.zeros(grid, grid, dtype=torch.uint8)
            for picture in pictures]  # fmt: skip
    return torch.stack([object_tokens(row, (grid, grid)) for row in rows])


def pick_objects(objects: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Uniform numbers whose largest lies on an object where the image has one; (image, vision)."""
    noise = torch.rand(objects.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where((objects > 0) | ~(objects > 0).any(dim=1, keepdim=True), noise + 1, noise) / 2
