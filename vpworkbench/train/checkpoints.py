"""Checkpoints of a run: written beside their place, flushed, renamed, so that the last good one survives anything.

`checkpoint/` holds `step-*/` while a run trains (weights, optimiser, progress), `best-*/` where asked for, and at the
end the final weights themselves. All tensors are safetensors: nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpworkbench.errors import RunError
from vpworkbench.system import write_atomically

log = logging.getLogger(__name__)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What reading a file that was cut off, damaged or removed comes to."""


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    folder : Path
        The run's `checkpoint/`.
    keep_last : int
        How many are kept; the final weights count as one.
    """

    def __init__(self, folder: Path, keep_last: int = 1) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, window: dict[str, Tensor]) -> None:
        """Everything that the next step needs, in `step-<step>/`; then drop the oldest.

        Parameters
        ----------
        window
            Sums that the next line of metrics begins with.

        Raises
        ------
        RunError
            Where it cannot be written; the checkpoints before it are untouched.
        """
        progress = {"step": step, "window": {name: float(value) for name, value in window.items()}}
        folder = self.folder / f"step-{step:06d}"
        with self._draft(folder) as draft:
            model.save_pretrained(draft)
            state = optimiser.state_dict()["state"]
            tensors = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
            save_file(
                {name: value.contiguous().cpu() for name, value in tensors.items()}, draft / "optimiser.safetensors"
            )
            (draft / "progress.json").write_text(json.dumps(progress))
        found = self._found("step")
        _drop([later for later in found if _number(later) > step], 0)  # they could not be read
        _drop([earlier for earlier in found if _number(earlier) <= step], self.keep_last)

    def save_if_best(self, model: nn.Module, step: int, held_out_loss: float) -> None:
        """The weights in `best-<step>/`, where none before reached a held-out loss as low."""
        found = self._found("best")
        lowest = _held_out_loss(found[-1]) if found else float("inf")
        if held_out_loss < lowest:
            with self._draft(self.folder / f"best-{step:06d}") as draft:
                model.save_pretrained(draft)
                (draft / "progress.json").write_text(json.dumps({"step": step, "held_out_loss": held_out_loss}))
            _drop(self._found("best"), 1)

    def finish(self, model: nn.Module, step: int) -> None:
        """The final weights, in `checkpoint/` itself; `progress.json` behind them says that they are whole."""
        with self._draft(self.folder) as draft:
            model.save_pretrained(draft)
        write_atomically(self.folder / "progress.json", json.dumps({"step": step}))
        _drop(self._found("step"), self.keep_last - 1)

    def load(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
    ) -> tuple[int, dict[str, Tensor]]:
        """The final weights, or the last whole checkpoint: the steps done (0: there is none) and `window` of `save`.

        Raises
        ------
        RunError
            If there are checkpoints and none can be read, or the final weights cannot.
        """
        final = False
        if (self.folder / "progress.json").exists():
            try:
                return _load_final(self.folder, model, device), {}
            except UNREADABLE as error:
                final = True
                log.warning("%s: the final weights are not whole (%s); trying the last step", self.folder, error)
        steps = self._found("step")
        for folder in reversed(steps):
            try:
                return _load(folder, model, optimiser, device)
            except UNREADABLE as error:
                log.warning("%s: not whole (%s); trying the one before", folder, error)
        if steps or final:
            raise RunError(f"{self.folder}: no checkpoint can be read; delete that folder to train from the start")
        return 0, {}

    def clean(self) -> None:
        """Remove what killed writers left; for the one writer of the run."""
        for left in self.folder.glob(".writing-*"):
            shutil.rmtree(left)

    @contextmanager
    def _draft(self, place: Path) -> Iterator[Path]:
        """A folder to write to, that becomes `place` as a whole, when the disk has all of it; of `checkpoint/` itself,
        which is there, the files are renamed one by one."""
        draft = self.folder / f".writing-{place.name}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            for file in draft.iterdir():
                _flush(file)
            _flush(draft)
            if place == self.folder:
                for file in draft.iterdir():
                    os.replace(file, place / file.name)
                draft.rmdir()
            else:
                shutil.rmtree(place, ignore_errors=True)  # one that could not be read
                os.replace(draft, place)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise RunError(
                f"{place}: checkpoint not written ({error}); free space there, then run the same call again"
            ) from error

    def _found(self, kind: str) -> list[Path]:
        """`step-*` or `best-*`, oldest first; a copy that somebody put there, of another name, is left alone."""
        numbers = {folder: folder.name.partition("-")[2] for folder in self.folder.glob(f"{kind}-*")}
        return sorted((folder for folder, number in numbers.items() if number.isdecimal()), key=_number)


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write `model.safetensors` of any module."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder) / "model.safetensors")


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _load_final(folder: Path, model: nn.Module, device: torch.device) -> int:
    step = int(json.loads((folder / "progress.json").read_text())["step"])
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    return step


def _drop(folders: list[Path], keep: int) -> None:
    for folder in folders[: max(0, len(folders) - keep)]:
        shutil.rmtree(folder)


def _load(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[int, dict[str, Any]]:
    progress = json.loads((folder / "progress.json").read_text())
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        index, entry = name.split(".")
        state.setdefault(int(index), {})[entry] = value
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    log.info("resumed from %s", folder)
    window = {
        name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in progress["window"].items()
    }
    return progress["step"], window


def _held_out_loss(folder: Path) -> float:
    """Of the best weights; infinite where they are damaged: any others are better."""
    try:
        return float(json.loads((folder / "progress.json").read_text())["held_out_loss"])
    except UNREADABLE as error:
        log.warning("%s: not whole (%s); the next weights take its place", folder, error)
        return float("inf")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
