"""Which records a step holds, and batches that move and split as one."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vpworkbench.data.steps import ImageBatch, Sampler, TensorBatch

RECORDS = [SimpleNamespace(id=f"r{number}") for number in range(10)]


def orders(seed: int, epochs: int) -> list[list[int]]:
    return [np.random.default_rng((seed, epoch)).permutation(10).tolist() for epoch in range(epochs)]


def test_permutations_follow_one_another_so_that_every_epoch_shows_each_record_once():
    sampler = Sampler(RECORDS, 4, seed=(7,), distinct=False)
    rows = [row for step in range(5) for row in sampler.rows(step)]
    assert rows == [row for order in orders(7, 2) for row in order]


def test_no_step_holds_a_record_twice():
    """At an epoch's end a step takes its rest from the start of the same permutation."""
    first, second, third = orders(7, 3)
    sampler = Sampler(RECORDS, 4, seed=(7,))
    assert [sampler.rows(step) for step in range(6)] == [
        first[0:4], first[4:8], first[8:] + first[:2], second[2:6], second[6:], third[:4],
    ]  # fmt: skip


@pytest.mark.parametrize("distinct", [True, False])
def test_a_step_is_known_by_its_records_and_their_ids(distinct):
    sampler = Sampler(RECORDS, 25, seed=(1, 2), distinct=distinct)
    assert sampler.steps_per_epoch == 0.4 and len(sampler[3]) == 25
    assert [record.id for record in sampler[3]] == sampler.ids(3) == [f"r{row}" for row in sampler.rows(3)]


@dataclass(frozen=True)
class Named(ImageBatch):
    names: Tensor


def test_a_batch_of_images_splits_with_its_rows():
    batch = Named(torch.arange(6).view(6, 1, 1, 1), torch.tensor([0, 0, 1, 3, 3, 3, 5]), torch.arange(7))
    one, two, three = batch.micro_batches(3)
    assert [part.images.flatten().tolist() for part in (one, two, three)] == [[0, 1], [2, 3], [4, 5]]
    assert [part.image_index.tolist() for part in (one, two, three)] == [[0, 0, 1], [1, 1, 1], [1]]
    assert [part.names.tolist() for part in (one, two, three)] == [[0, 1, 2], [3, 4, 5], [6]]


@dataclass(frozen=True)
class Nested(TensorBatch):
    pair: tuple[Tensor, ...]
    flags: Tensor


def test_tensors_in_tuples_move_too():
    batch = Nested((torch.ones(3), torch.zeros(2)), torch.ones(1)).to("meta")
    assert [part.device.type for part in (*batch.pair, batch.flags)] == ["meta"] * 3
