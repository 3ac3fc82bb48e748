"""One engine for all training: optimiser steps with accumulation, checkpoints, exact resume.

Randomness of a step is a pure function of (seed, step): the batch comes from `Steps[step]`, dropout is re-seeded at
each step. A resumed run therefore ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vpworkbench.config import OptimSettings, SettingsError, TrainSettings
from vpworkbench.runs import Run, write_atomically

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says at which step and what to do."""


class Objective(Protocol):
    """What is trained: losses as sums, what each is divided by, and what is watched."""

    weights: Mapping[str, float]

    def counts(self, batch: Any) -> dict[str, int]:
        """How many things each loss is a mean over, in the batch of a whole optimiser step."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums over a micro-batch, by name."""

    def watch(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Numbers that are logged and not trained on."""


class Steps(Protocol):
    """Batches by step."""

    steps_per_epoch: float

    def __getitem__(self, step: int) -> Any: ...


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one.

    Raises
    ------
    SettingsError
        If CUDA is asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("train.device: 'cuda' asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def total_steps(train: TrainSettings, steps_per_epoch: float) -> int:
    """Optimiser steps of the whole run."""
    return train.steps or max(1, round(train.epochs * steps_per_epoch))


def learning_rate_factor(step: int, total: int, optim: OptimSettings) -> float:
    """Linear warm-up, then x decay at each of the given shares of the run (paper Sec. 4.1)."""
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    return warm * optim.decay ** sum(step >= share * total for share in optim.decay_at)


def build_optimiser(model: nn.Module, optim: OptimSettings) -> torch.optim.AdamW:
    """AdamW with the visual side and the rest apart, and no decay of biases, norms and position-bias tables."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or "relative_position_bias_table" in name
        groups.setdefault((name.startswith(("visual.", "base.visual.")), kept), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "rate": optim.lr_visual if visual else optim.lr_fusion,
                "weight_decay": 0.0 if kept else optim.weight_decay,
            }
            for (visual, kept), parameters in groups.items()
        ],
        lr=optim.lr_fusion,
    )


def accumulate_gradients(
    model: nn.Module, objective: Objective, batch: Any, count: int, autocast: Any
) -> dict[str, Tensor]:
    """Gradients of one optimiser step over `count` micro-batches; the mean losses, detached.

    Each loss is divided by its count over the whole step, so the micro-batches' own counts do not matter.
    """
    counts = objective.counts(batch)
    means: dict[str, Tensor] = {}
    for micro in batch.micro_batches(count):
        with autocast():
            sums = objective.losses(model, micro)
        terms = {name: value / max(counts[name], 1) for name, value in sums.items()}
        sum(objective.weights[name] * term for name, term in terms.items()).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.detach()
    return means


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Steps,
    run: Run,
    *,
    optim: OptimSettings,
    train: TrainSettings,
    seed: int,
    workers: int = 0,
    what: str = "training",
) -> int:
    """Train to the last step, from the last checkpoint in the run folder if there is one; the number of steps.

    Writes `metrics.jsonl`, `checkpoint/step-*/` every `checkpoint_every` steps (the last one is kept) and the final
    weights to `checkpoint/`.

    Raises
    ------
    SettingsError
        If the device is not there.
    TrainingError
        If the loss is not finite.
    """
    device = pick_device(train.device)
    total = total_steps(train, batches.steps_per_epoch)
    model.to(device).train()
    optimiser = build_optimiser(model, optim)
    done, window = _resume(run, model, optimiser, device)
    autocast = _autocast(device, train.bf16)
    started, seen = time.perf_counter(), 0
    with _deterministic(device), tqdm(total=total, initial=done, desc=what, unit="step", smoothing=0.05) as bar:
        for step, batch in _stream(batches, done, total, workers):
            batch = batch.to(device)
            torch.manual_seed(seed * 1_000_003 + step)
            factor = learning_rate_factor(step, total, optim)
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * factor
            means = accumulate_gradients(model, objective, batch, train.accumulate, autocast)
            means["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            window = {name: window.get(name, 0) + value.double() for name, value in means.items()}
            done, seen = step + 1, seen + 1
            if done % train.log_every == 0 or done == total:
                since = done % train.log_every or train.log_every
                _log(run, model, objective, batch, done, {name: value / since for name, value in window.items()},
                     lr_share=factor, step_s=(time.perf_counter() - started) / seen)  # fmt: skip
                window, started, seen = {}, time.perf_counter(), 0
            bar.update()
            run.progress(what, done, total)
            if train.checkpoint_every and done % train.checkpoint_every == 0 and done < total:
                _save(run, model, optimiser, done, window)
    _save_final(run, model, total)
    return total


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU, gradients of indexed tensors are added in a fixed order: else no two runs agree to the last bit."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _autocast(device: torch.device, bf16: bool) -> Any:
    if not bf16:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _stream(batches: Steps, done: int, total: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Batches in order from step `done`; prepared ahead by worker processes."""
    loader = DataLoader(batches, batch_size=None, sampler=range(done, total), num_workers=workers)
    yield from zip(range(done, total), loader, strict=True)


def _log(
    run: Run, model: nn.Module, objective: Objective, batch: Any, step: int, means: dict[str, Tensor], **more: float
) -> None:
    values = {name: float(value) for name, value in means.items()}
    bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    if bad:
        raise TrainingError(
            f"{', '.join(bad)} not finite within the steps up to {step}; the last checkpoint in "
            f"{run.folder / 'checkpoint'} is good: lower optim.lr_fusion / optim.lr_visual, or look at the data"
        )
    run.log(step, **values, **objective.watch(model, batch), **more)


def _save_final(run: Run, model: nn.Module, step: int) -> None:
    """The final weights; `progress.json` behind them says that they are whole."""
    folder = run.folder / "checkpoint"
    model.eval().save_pretrained(folder)
    write_atomically(folder / "progress.json", json.dumps({"step": step}))
    _drop_checkpoints(run, keep=None)


def _save(run: Run, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, window: dict[str, Tensor]) -> None:
    """Write to a temporary folder, flush, rename; then drop the one before."""
    folder = run.folder / "checkpoint" / f"step-{step:06d}"
    temporary = folder.with_name(f".writing-{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        state = optimiser.state_dict()["state"]
        tensors = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
        save_file(
            {name: value.contiguous().cpu() for name, value in tensors.items()}, temporary / "optimiser.safetensors"
        )
        progress = {"step": step, "window": {name: float(value) for name, value in window.items()}}
        (temporary / "progress.json").write_text(json.dumps(progress))
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"{folder}: checkpoint not written ({error}); free space there, then run the same call again"
        ) from error
    _drop_checkpoints(run, keep=folder)


def _drop_checkpoints(run: Run, keep: Path | None) -> None:
    for folder in (run.folder / "checkpoint").glob("step-*"):
        if folder != keep:
            shutil.rmtree(folder)


def _resume(
    run: Run, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[int, dict[str, Tensor]]:
    """Load the last checkpoint, if any; the steps done and the sums that the next line of metrics begins with."""
    final = run.folder / "checkpoint"
    if (final / "progress.json").exists():
        model.load_state_dict(load_file(final / "model.safetensors", device=str(device)))
        return json.loads((final / "progress.json").read_text())["step"], {}
    found = sorted(final.glob("step-*"))
    if not found:
        run.truncate_metrics(0)
        return 0, {}
    folder = found[-1]
    progress = json.loads((folder / "progress.json").read_text())
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        index, entry = name.split(".")
        state.setdefault(int(index), {})[entry] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    run.truncate_metrics(progress["step"])
    log.info("resumed from %s", folder)
    window = {
        name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in progress["window"].items()
    }
    return progress["step"], window
