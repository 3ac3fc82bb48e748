"""Checkpoints of a run, each written completely or not at all, so that a good one survives any interruption.

`checkpoint/` holds `step-*/` while a run trains (weights, optimiser, progress), `best-*/` on request, and at the end
the final weights themselves. All tensors are safetensors: nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vpworkbench.errors import RunError
from vpworkbench.model.model import save_tensors
from vpworkbench.system import draft, write_atomically

log = logging.getLogger(__name__)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What reading a truncated, damaged or missing file can raise."""
WEIGHTS, OPTIMISER, PROGRESS = "model.safetensors", "optimiser.safetensors", "progress.json"
FINAL = ".final"


class Checkpoints:
    """The checkpoints of one run in `folder`; the last `keep_last` are kept, and the final weights count as one."""

    def __init__(self, folder: Path, keep_last: int = 1) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, sums: Mapping[str, float]) -> None:
        """Write everything that the next step needs to `step-<step>/`, then drop the oldest checkpoints.

        `sums` are those of the unfinished line of metrics. Earlier checkpoints stay if this one cannot be written.
        """
        with self._draft(f"step-{step:06d}") as folder:
            _save_weights(model, folder)
            state = optimiser.state_dict()["state"]
            tensors = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
            save_tensors(tensors, folder / OPTIMISER)
            (folder / PROGRESS).write_text(json.dumps({"step": step, "sums": dict(sums)}))
        found = self._found("step")
        _drop([later for later in found if _number(later) > step], 0)  # these could not be read
        _drop([earlier for earlier in found if _number(earlier) <= step], self.keep_last)

    def save_if_best(self, model: nn.Module, step: int, held_out_loss: float) -> None:
        """Write the weights to `best-<step>/` if no earlier held-out loss was as low."""
        lowest = float("inf")
        for folder in self._found("best")[-1:]:
            try:
                lowest = float(json.loads((folder / PROGRESS).read_text())["held_out_loss"])
            except UNREADABLE as error:
                log.warning("%s: cannot be read (%s); the next weights replace it", folder, error)
        if held_out_loss < lowest:
            with self._draft(f"best-{step:06d}") as folder:
                _save_weights(model, folder)
                (folder / PROGRESS).write_text(json.dumps({"step": step, "held_out_loss": held_out_loss}))
            _drop(self._found("best"), 1)

    def finish(self, model: nn.Module, step: int) -> None:
        """Write the final weights to `checkpoint/` itself; `progress.json` comes last and marks them as complete."""
        with self._draft(FINAL) as folder:
            _save_weights(model, folder)
        for file in (self.folder / FINAL).iterdir():
            os.replace(file, self.folder / file.name)
        (self.folder / FINAL).rmdir()
        write_atomically(self.folder / PROGRESS, json.dumps({"step": step}))
        _drop(self._found("step"), self.keep_last - 1)

    def load(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
    ) -> tuple[int, dict[str, Tensor]]:
        """Load the final weights or the last readable checkpoint; returns its step (0 if there is none) and its `sums`.

        A `RunError` if there are checkpoints but none can be read.
        """
        found = self._found("step")
        if (self.folder / PROGRESS).exists():
            found.append(self.folder)
        for folder in reversed(found):
            try:
                return _load(folder, model, None if folder == self.folder else optimiser, device)
            except UNREADABLE as error:
                log.warning("%s: cannot be read (%s); trying the one before", folder, error)
        if found:
            raise RunError(f"{self.folder}: no checkpoint can be read; delete that folder to train from the start")
        return 0, {}

    def clean(self) -> None:
        """Remove what killed writers left; only for the one writer of the run."""
        for remains in (*self.folder.glob(".writing-*"), *self.folder.glob(FINAL)):
            shutil.rmtree(remains)

    @contextmanager
    def _draft(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes `checkpoint/<name>` when it is complete."""
        place = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)  # one that could not be read
            with draft(place) as folder:
                folder.mkdir()
                yield folder
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{place}: checkpoint not written ({error}); free space there, then run the same call again"
            ) from error

    def _found(self, kind: str) -> list[Path]:
        """`step-*` or `best-*`, oldest first; ignores copies under other names, such as `step-old`."""
        folders = self.folder.glob(f"{kind}-*")
        return sorted((folder for folder in folders if folder.name[len(kind) + 1 :].isdecimal()), key=_number)


def _save_weights(model: nn.Module, folder: Path) -> None:
    """What rebuilds the model, if it can write it; otherwise its weights only."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_tensors(model.state_dict(), folder / WEIGHTS)


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _drop(folders: list[Path], keep: int) -> None:
    for folder in folders[: max(0, len(folders) - keep)]:
        shutil.rmtree(folder)


def _load(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None, device: torch.device
) -> tuple[int, dict[str, Tensor]]:
    """Step and `sums`; final weights, which come without an optimiser, have no `sums`."""
    progress = json.loads((folder / PROGRESS).read_text())
    if optimiser is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / OPTIMISER).items():
            index, entry = name.split(".")
            state.setdefault(int(index), {})[entry] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        log.info("resuming from %s", folder)
    model.load_state_dict(load_file(folder / WEIGHTS, device=str(device)))
    saved = progress["sums"] if optimiser is not None else {}
    sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in saved.items()}
    return int(progress["step"]), sums


def is_trained(run_folder: Path) -> bool:
    """Whether the run has its final weights."""
    return (run_folder / "checkpoint" / PROGRESS).exists()
