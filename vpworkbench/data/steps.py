"""What all training data share: which records a step holds, and batches that move and split as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class Sampler:
    """The records of each training step, in the order of one permutation for each epoch.

    A pure function of seed and step: a resumed run sees the same batches as one that was never stopped.

    Parameters
    ----------
    size : int
        Records in a step.
    seed : tuple of int
        Seed of the permutations; the number of the epoch is appended to it.
    distinct : bool
        Says how a step continues at the end of an epoch. True: at the start of the same permutation, so that no step
        holds a record twice. False: with the next permutation, so that every epoch shows each record once.
    """

    def __init__(self, records: Sequence[Any], size: int, *, seed: tuple[int, ...], distinct: bool = True) -> None:
        self.records, self.size, self.seed, self.distinct = records, size, seed, distinct

    @property
    def steps_per_epoch(self) -> float:
        return len(self.records) / self.size

    def rows(self, step: int) -> list[int]:
        """Places of a step's records in the whole set."""
        total, start = len(self.records), step * self.size
        rows = []
        for place in range(start, start + self.size):
            epoch = (start if self.distinct else place) // total
            rows.append(int(_permutation(total, *self.seed, epoch)[place % total]))
        return rows

    def __getitem__(self, step: int) -> list[Any]:
        return [self.records[row] for row in self.rows(step)]

    def ids(self, step: int) -> list[str]:
        """Ids of a step's records."""
        return [record.id for record in self[step]]


@lru_cache(maxsize=8)
def _permutation(total: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(total)


@dataclass(frozen=True)
class TensorBatch:
    """The tensors of one step (or tuples of tensors), as the fields of a dataclass."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device; the host does not wait if the batch lies in pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in memory from which a GPU copies while the host continues."""
        return self._each(Tensor.pin_memory)

    def micro_batches(self, count: int) -> Sequence[Self]:
        """Split into `count` parts; every field has one row per example."""
        parts = zip(*(getattr(self, field.name).chunk(count) for field in fields(self)), strict=True)
        return [type(self)(*part) for part in parts]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(tuple(map(change, one)) if isinstance(one, tuple) else change(one) for one in values))


@dataclass(frozen=True)
class ImageBatch(TensorBatch):
    """Images, and rows that refer to them in image order; every further field has one entry per row.

    Attributes
    ----------
    images : uint8 Tensor, (image, 3, height, width)
    image_index : int64 Tensor, (row,)
        Place in `images` of each row's image.
    """

    images: Tensor
    image_index: Tensor

    def micro_batches(self, count: int) -> Sequence[Self]:
        """Split into `count` parts of equal numbers of images, each with its rows."""
        return [self.of_images(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(self.images)).chunk(count)]

    def of_images(self, start: int, stop: int) -> Self:
        """Images `start` to `stop` (not included), with their rows."""
        rows = (self.image_index >= start) & (self.image_index < stop)
        index, *rest = (getattr(self, field.name)[rows] for field in fields(self) if field.name != "images")
        return type(self)(self.images[start:stop], index - start, *rest)
