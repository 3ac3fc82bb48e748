"""One engine for all training: optimiser steps with accumulation, checkpoints, exact resume.

Randomness of a step is a pure function of (seed, step): the batch comes from `Steps[step]`, dropout is re-seeded at
each step. A resumed run therefore ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.errors import DataError, SettingsError, TrainingError
from vpworkbench.runs import Run
from vpworkbench.settings import PRESETS, OptimSettings, TrainSettings
from vpworkbench.system import on_signal, write_atomically
from vpworkbench.train.checkpoints import Checkpoints
from vpworkbench.train.processes import Processes, join

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)  # transformers renames it
EXPLODED = 10.0
"""A loss is taken for exploded at so many times its value in the first line of `metrics.jsonl`."""
OUT_OF_MEMORY = "out of memory|can't allocate|allocate memory|could not create a primitive"
"""What torch says, by CUDA, by its CPU allocator and by oneDNN, where there is no memory left."""


class Stopped(KeyboardInterrupt):
    """Training that was asked to stop, after its checkpoint was written; its first argument is the signal."""

    def __str__(self) -> str:
        return self.args[1]


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

    sampler: Sampler

    def __getitem__(self, step: int) -> TensorBatch: ...


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
        fused=next(model.parameters()).is_cuda or None,  # one kernel; on a CPU its sums would come in another order
    )


def accumulate_gradients(
    model: nn.Module, objective: Objective, batch: Any, count: int, autocast: Any, processes: Processes | None = None
) -> dict[str, Tensor]:
    """Gradients of one optimiser step over `count` micro-batches; the mean losses, detached.

    Each loss is divided by its count over the whole step, so the micro-batches' own counts do not matter. With several
    processes `batch` is the share of this one, and so are the losses: they add up to the means. What is counted is
    counted on the host, before a micro-batch goes to the model's device.
    """
    processes = processes or Processes(next(model.parameters()).device)
    counts = processes.add_up(objective.counts(batch))
    means: dict[str, Tensor] = {}
    for micro in batch.micro_batches(count):
        with autocast():
            sums = objective.losses(model, micro.to(processes.device))
        terms = {name: value / max(counts[name], 1) for name, value in sums.items()}
        sum(objective.weights[name] * term for name, term in terms.items()).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.detach()
    processes.add_gradients(model)
    for module in model.modules():
        if hasattr(module, "update_codes"):  # what learns from the tokens of a step by averages: a visual dictionary
            module.update_codes(processes)
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
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
) -> int:
    """Train to the last step, from the last checkpoint in the run folder if there is one; the number of steps.

    Writes `metrics.jsonl`, `checkpoint/step-*/` every `checkpoint_every` steps and the final weights to `checkpoint/`.
    Ctrl-C and SIGTERM end the step, write a checkpoint and raise `Stopped`. Under `torchrun` or `accelerate launch`
    the processes share each step.

    Parameters
    ----------
    probe
        Called every `train.probe_every` steps; its numbers are logged, and `held_out_loss` decides what is best.

    Raises
    ------
    SettingsError
        If the device is not there, or the processes do not divide the images of a step.
    TrainingError
        If the loss is not finite or explodes, memory runs out, or a worker is killed.
    Stopped
        If it was asked to stop.
    """
    processes = join(pick_device(train.device))
    if train.images % processes.count:
        raise SettingsError(f"train.images {train.images} must be a multiple of the {processes.count} processes")
    total = total_steps(train, batches.sampler.steps_per_epoch)
    model.to(processes.device).train()
    optimiser = build_optimiser(model, optim)
    checkpoints = Checkpoints(run.folder / "checkpoint", train.keep_last)
    micro_batches = max(1, train.accumulate // processes.count)
    autocast = _autocast(processes.device, train.bf16)
    stop: list[signal.Signals] = []
    with contextlib.ExitStack() as around:
        if processes.is_main:
            around.enter_context(run.writing())
            checkpoints.clean()
        done, window = checkpoints.load(model, optimiser, processes.device)
        processes.wait()
        if done == total:  # a run that broke off behind its training
            model.eval()
            return total
        if processes.is_main:
            run.truncate_metrics(done)
        else:
            window = {}  # of all processes: one goes on with it
        guard = Guard(run, batches, objective.weights, processes.device)
        log = around.enter_context(_logged(run, train.tracker)) if processes.is_main else None
        around.enter_context(_deterministic(processes.device))
        around.enter_context(_as_asked(model, train))
        around.enter_context(_explained_workers())
        around.enter_context(on_signal(stop.append))
        bar = around.enter_context(
            tqdm(total=total, initial=done, desc=what, unit="step", smoothing=0.05, disable=not processes.is_main)
        )
        started, seen = time.perf_counter(), 0
        for step, batch in _stream(batches, done, total, workers, processes):
            torch.manual_seed(seed * 1_000_003 + step + (processes.index << 40))
            factor = learning_rate_factor(step, total, optim)
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * factor
            with _explained_memory(model, objective, batch, train, autocast, processes):
                means = accumulate_gradients(model, objective, batch, micro_batches, autocast, processes)
            norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            guard.see(step, means, norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            means["gradient_norm"] = norm / processes.count  # a sum over the processes, as the losses are
            window = {name: window.get(name, 0) + value.double() for name, value in means.items()}
            done, seen = step + 1, seen + 1
            if done % train.log_every == 0 or done == total:
                since = done % train.log_every or train.log_every
                values = processes.add_up({name: float(value) / since for name, value in window.items()})
                guard.check(done, values)
                step_s = (time.perf_counter() - started) / seen
                if log:
                    values |= objective.watch(model, batch.to(processes.device))
                    if probe and train.probe_every and done % train.probe_every == 0:
                        values |= probe(model)
                        if train.keep_best:
                            checkpoints.save_if_best(model, done, values["held_out_loss"])
                    log(done, **values, lr_share=factor, step_s=step_s)
                window, started, seen = {}, time.perf_counter(), 0
            bar.update()
            if processes.is_main:
                run.progress(what, done, total)
            stopping = processes.add_up({"stop": len(stop)})["stop"] and done < total
            if stopping or (train.checkpoint_every and done % train.checkpoint_every == 0 and done < total):
                guard.check(done)
                sums = processes.add_up({name: float(value) for name, value in window.items()})
                if processes.is_main:
                    checkpoints.save(model, optimiser, done, sums)
            if stopping:
                number = stop[0] if stop else signal.SIGTERM  # another process got it
                raise Stopped(number, f"{what} stopped after step {done} of {total}; the same call resumes from there")
        if processes.is_main:
            checkpoints.finish(model.eval(), total)
        processes.wait()
        if stop:
            raise Stopped(stop[0], f"{what} is done, and stopped as it was asked to; the same call goes on behind it")
    return total


class Guard:
    """Watches over every step without waiting for the device: what is wrong is seen where a line is logged."""

    def __init__(self, run: Run, batches: Steps, weights: Mapping[str, float], device: torch.device) -> None:
        self.run, self.batches, self.weights = run, batches, weights
        self.worst = torch.full((), -torch.inf, dtype=torch.float64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        lines = run.metrics()
        self.first = self._size(lines.iloc[0].to_dict()) if len(lines) else None

    def see(self, step: int, means: Mapping[str, Tensor], norm: Tensor) -> None:
        """Remember the step of the largest loss; one that is not finite is the largest of all."""
        size = self._size(means).double() + 0 * norm
        size = torch.where(size.isfinite(), size, torch.inf)
        self.step = torch.where(size > self.worst, step, self.step)
        self.worst = torch.maximum(size, self.worst)

    def check(self, done: int, means: Mapping[str, float] | None = None) -> None:
        """Stop a run whose loss is not finite or has exploded; `bad_batch.json` tells of the worst step.

        Raises
        ------
        TrainingError
            Naming the step, and the file.
        """
        size = self._size(means) if means else 0.0
        self.first = size if means and self.first is None else self.first
        finite = bool(self.worst.isfinite() | (self.worst == -torch.inf))
        if finite and not (means and size > EXPLODED * self.first):
            if means:
                self.worst.fill_(-torch.inf)
            return
        step, path = int(self.step), self.run.folder / "bad_batch.json"
        state = {"step": step, "losses": means, "records": self.batches.sampler.ids(step)}
        write_atomically(path, json.dumps(state, indent=2, default=str) + "\n")
        bad = ", ".join(name for name, value in (means or {}).items() if value != value or abs(value) == torch.inf)
        what = f"{bad or 'loss'} not finite"
        if finite:
            what = f"the loss exploded: {size:.3g}, {size / self.first:.0f} times the first,"
        raise TrainingError(
            f"{what} at step {step} (seen at {done}); its records: {path}; the last checkpoint in "
            f"{self.run.folder / 'checkpoint'} is good: lower optim.lr_fusion / optim.lr_visual, or look at the data"
        )

    def _size(self, means: Mapping[str, Any]) -> Any:
        return sum(weight * abs(means[name]) for name, weight in self.weights.items() if name in means)


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


@contextlib.contextmanager
def _as_asked(model: nn.Module, train: TrainSettings) -> Iterator[None]:
    """Compiled, and with gradient checkpointing, while it trains; afterwards the model is a plain one again."""
    networks = [module for module in model.modules() if hasattr(module, "set_grad_checkpointing")]  # timm's
    berts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    parts = [module for name, module in model.named_modules() if name.split(".")[-1] in ("visual", "fusion")]
    compiled = parts if train.compile else []
    try:
        for module in compiled:
            module.compile()
        if train.gradient_checkpointing:
            for network in networks:
                network.set_grad_checkpointing(True)
            for bert in berts:
                getattr(bert, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        yield
    finally:
        for module in compiled:
            module._compiled_call_impl = None
        if train.gradient_checkpointing:
            for network in networks:
                network.set_grad_checkpointing(False)
            for bert in berts:
                getattr(bert, f"{CHECKPOINTING}_disable")()


@dataclass
class _Shares(Dataset):
    """What this process takes of each step."""

    batches: Steps
    processes: Processes

    def __getitem__(self, step: int) -> Any:
        if self.processes.count == 1:
            return self.batches[step]
        if hasattr(self.batches, "share"):  # decodes the images of its share alone
            return self.batches.share(step, self.processes.index, self.processes.count)
        return self.processes.share(self.batches[step])


def _stream(batches: Steps, done: int, total: int, workers: int, processes: Processes) -> Iterator[tuple[int, Any]]:
    """Batches in order from step `done`; prepared ahead by worker processes."""
    loader = DataLoader(
        _Shares(batches, processes), batch_size=None, sampler=range(done, total), num_workers=workers,
        pin_memory=processes.device.type == "cuda", worker_init_fn=_leave_interrupts,
    )  # fmt: skip
    yield from zip(range(done, total), loader, strict=True)


@contextlib.contextmanager
def _explained_workers() -> Iterator[None]:
    """Say what a killed worker means; torch tells of it by an exception at whatever line the main process is.

    A `DataError` of a worker, whose text torch hides behind its traceback, is raised as it was.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught DataError in DataLoader worker"):
            raise
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if not (told := re.search(r"DataLoader worker \(pid.*", str(error))):
            raise
        raise TrainingError(
            f"{told[0]} A process that prepares batches was ended by the system, most often for want of memory: lower "
            "data.workers, or give the job more; the same call resumes"
        ) from error


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the main one stops in good order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(re.search(OUT_OF_MEMORY, str(error)))


@contextlib.contextmanager
def _explained_memory(
    model: nn.Module, objective: Objective, batch: Any, train: TrainSettings, autocast: Any, processes: Processes
) -> Iterator[None]:
    """Where memory runs out, say which accumulation fits: each is tried with one micro-batch."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0]
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    fitting = None
    for count in (n for n in range(train.accumulate + 1, train.images + 1) if train.images % n == 0):
        model.zero_grad(set_to_none=True)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with autocast():
                micro = batch.micro_batches(max(1, count // processes.count))[0]
                sum(objective.losses(model, micro.to(processes.device)).values()).backward()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            continue
        fitting = count
        break
    remedy = (
        f"train.accumulate {fitting} fits (now {train.accumulate}; the same update in smaller parts)" if fitting else
        f"not even one image fits: set train.gradient_checkpointing, or take a smaller preset ({', '.join(PRESETS)})"
    )  # fmt: skip
    raise TrainingError(f"out of memory with {train.images // train.accumulate} images at once: {remedy} [{message}]")


@contextlib.contextmanager
def _logged(run: Run, tracker: str) -> Iterator[Callable[..., None]]:
    """A function that writes a line of metrics, and gives it to one of accelerate's trackers."""
    if not tracker:
        yield run.log
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if tracker not in map(str, get_available_trackers()):
        raise SettingsError(f"train.tracker: {tracker} is not installed (pip install {tracker})")
    PartialState()  # trackers ask it which process is the main one
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    where = {"logging_dir": run.folder} if kind.requires_logging_directory else {"dir": str(run.folder)}
    sink = kind(run.folder.name if tracker == "wandb" else tracker, **where)
    sink.start()

    def log(step: int, **values: float) -> None:
        run.log(step, **values)
        sink.log(values, step=step)

    try:
        yield log
    finally:
        sink.finish()
