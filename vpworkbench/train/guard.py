"""What stops training: losses that are not finite or explode, full memory, killed workers; each with its remedy."""

from __future__ import annotations

import contextlib
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vpworkbench.data.steps import Sampler
from vpworkbench.errors import DataError, TrainingError, first_line
from vpworkbench.runs import Run
from vpworkbench.settings import PRESETS, TrainSettings
from vpworkbench.system import write_atomically

EXPLODED = 10.0  # times the loss in the first line of `metrics.jsonl`
OUT_OF_MEMORY = "out of memory|can't allocate|allocate memory|could not create a primitive"  # CUDA, torch, oneDNN


class LossGuard:
    """Follows the loss of every step on the device, so that no step waits for it; judges it where a line is logged."""

    def __init__(self, run: Run, sampler: Sampler, weights: Mapping[str, float], device: torch.device) -> None:
        self.run, self.sampler, self.weights = run, sampler, weights
        self.worst = torch.full((), -torch.inf, dtype=torch.float64, device=device)
        self.worst_step = torch.zeros((), dtype=torch.int64, device=device)
        lines = run.metrics()
        self.first = self._size(lines.iloc[0].to_dict()) if len(lines) else None

    def note(self, step: int, means: Mapping[str, Tensor], gradient_norm: Tensor) -> None:
        """Remember the step of the largest loss; one that is not finite counts as the largest."""
        size = self._size(means).double() + 0 * gradient_norm
        size = torch.where(size.isfinite(), size, torch.inf)
        self.worst_step = torch.where(size > self.worst, step, self.worst_step)
        self.worst = torch.maximum(size, self.worst)

    def check(self, done: int, means: Mapping[str, float] | None = None) -> None:
        """Raise a `TrainingError` if a loss since the last line is not finite, or if `means`, a line's, exploded."""
        if self.worst == torch.inf:
            bad = [name for name, value in (means or {}).items() if not math.isfinite(value)]
            raise self._error(f"{', '.join(bad) or 'loss'} not finite", done, means)
        if means:
            size = self._size(means)
            self.first = size if self.first is None else self.first
            if size > EXPLODED * self.first:
                times = f"{size / self.first:.0f} times the first"
                raise self._error(f"the loss exploded: {size:.3g}, {times},", done, means)
            self.worst.fill_(-torch.inf)

    def _error(self, fault: str, done: int, means: Mapping[str, float] | None) -> TrainingError:
        """The error that names the worst step, whose records are written to `bad_batch.json`."""
        step, path = int(self.worst_step), self.run.folder / "bad_batch.json"
        state = {"step": step, "losses": means, "records": self.sampler.ids(step)}
        write_atomically(path, json.dumps(state, indent=2, default=str) + "\n")
        return TrainingError(
            f"{fault} at step {step} (noticed at {done}); its records are in {path}; the last checkpoint in "
            f"{self.run.folder / 'checkpoint'} is good: lower optim.lr_fusion and optim.lr_visual, or check the data"
        )

    def _size(self, means: Mapping[str, Any]) -> Any:
        return sum(weight * abs(means[name]) for name, weight in self.weights.items() if name in means)


@contextlib.contextmanager
def memory_advice(train: TrainSettings, attempt: Callable[[int], None]) -> Iterator[None]:
    """If memory runs out in the block, raise a `TrainingError` that names the accumulation that fits.

    `attempt(count)` computes the gradients of one of `count` micro-batches.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = _message_if_memory(error)
    presets = ", ".join(PRESETS)
    remedy = f"even one image does not fit: set train.gradient_checkpointing, or take a smaller preset ({presets})"
    for count in (count for count in range(train.accumulate + 1, train.images + 1) if train.images % count == 0):
        try:
            attempt(count)
        except (MemoryError, RuntimeError) as error:
            _message_if_memory(error)
        else:
            remedy = f"train.accumulate {count} fits (now {train.accumulate}; the same update in smaller parts)"
            break
    raise TrainingError(f"out of memory with {train.images // train.accumulate} images at once: {remedy} [{message}]")


def _message_if_memory(error: MemoryError | RuntimeError) -> str:
    """The first line of an out-of-memory error, whose frames are cleared as they hold the memory; others are raised."""
    if not (isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))):
        raise error
    traceback.clear_frames(error.__traceback__)
    return first_line(error)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Explain a killed worker, which torch reports at any line of the main process.

    A worker's own `DataError`, which torch wraps in its traceback, is raised as it was.
    """
    try:
        yield
    except DataError as error:
        caught = re.match(r"Caught (\w+) in DataLoader worker", str(error))  # a DataError, or a kind of it
        if not caught:
            raise
        raise DataError(str(error).rpartition(f"{caught[1]}: ")[2].strip()) from None
    except RuntimeError as error:
        killed = re.search(r"DataLoader worker \(pid.*", str(error))
        if not killed:
            raise
        raise TrainingError(
            f"{killed[0]} The system ended a process that prepares batches, most often because memory was full: lower "
            "data.workers or give the job more memory; the same call resumes"
        ) from error
