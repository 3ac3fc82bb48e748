"""One engine for all training: optimiser steps with accumulation, checkpoints, exact resume.

The randomness of a step is a pure function of seed and step: its batch is `batches[step]`, and dropout is seeded at
each step. A resumed run therefore ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.errors import SettingsError
from vpworkbench.losses import Objective
from vpworkbench.runs import Run
from vpworkbench.settings import OptimSettings, TrainSettings
from vpworkbench.system import on_signal
from vpworkbench.train.checkpoints import Checkpoints
from vpworkbench.train.guard import LossGuard, memory_advice, worker_errors
from vpworkbench.train.processes import Processes, join


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and its checkpoint is written; the arguments are the signal and a message."""

    def __str__(self) -> str:
        return self.args[1]


class Steps(Protocol):
    """Batches by step; `share(step, index, count)`, if defined, loads only one of `count` equal parts."""

    sampler: Sampler

    def __getitem__(self, step: int) -> TensorBatch: ...


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
    """Train to the last step, from the last checkpoint of the run if there is one; returns the number of steps.

    Writes `metrics.jsonl`, `checkpoint/step-*/` every `checkpoint_every` steps and the final weights to `checkpoint/`.
    Under `torchrun` or `accelerate launch` the processes share each step.

    A `TrainingError` if a loss is not finite or explodes, memory runs out, or a worker is killed; `Stopped` after
    Ctrl-C or SIGTERM, once the step is done and its checkpoint written.
    """
    processes = join(pick_device(train.device))
    if train.images % processes.count:
        raise SettingsError(f"train.images {train.images} must be a multiple of the {processes.count} processes")
    model.to(processes.device).train()
    training = _Training(model, objective, batches, run, optim, train, seed, processes, what)
    with run.writing() if processes.is_main else contextlib.nullcontext():
        training.resume()
        if training.done < training.total:
            training.run_to_end(workers)
        model.eval()
    return training.total


@dataclass
class _Training:
    """A run of training: its parts, and how far it is."""

    model: nn.Module
    objective: Objective
    batches: Steps
    run: Run
    optim: OptimSettings
    train: TrainSettings
    seed: int
    processes: Processes
    what: str

    def __post_init__(self) -> None:
        self.total = self.train.steps or max(1, round(self.train.epochs * self.batches.sampler.steps_per_epoch))
        self.optimiser = build_optimiser(self.model, self.optim)
        self.checkpoints = Checkpoints(self.run.folder / "checkpoint", self.train.keep_last)
        precision = partial(bfloat16, self.processes.device.type) if self.train.bf16 else contextlib.nullcontext
        self.autocast: Callable[[], Any] = precision

    def resume(self) -> None:
        """Load the last checkpoint, and drop the lines of metrics that come after it."""
        main = self.processes.is_main
        if main:
            self.checkpoints.clean()
        self.done, sums = self.checkpoints.load(self.model, self.optimiser, self.processes.device)
        self.processes.wait()
        if main and self.done < self.total:  # a complete run is left as it is
            self.run.truncate_metrics(self.done)
        self.sums = sums if main else {}  # since the last line of metrics; the checkpoint has those of all processes
        self.guard = LossGuard(self.run, self.batches.sampler, self.objective.weights, self.processes.device)

    def run_to_end(self, workers: int) -> None:
        """All steps that are left, then the final weights; `Stopped` if a signal comes before."""
        main, what = self.processes.is_main, self.what
        stop: list[signal.Signals] = []
        shown = {"desc": what, "unit": "step", "smoothing": 0.05, "disable": not main}
        with contextlib.ExitStack() as stack:
            write_line = stack.enter_context(_metrics_writer(self.run, self.train.tracker)) if main else None
            stack.enter_context(_deterministic(self.processes.device))
            stack.enter_context(speed_options(self.model, self.train))
            stack.enter_context(worker_errors())
            stack.enter_context(on_signal(stop.append))
            self.started_s, self.timed = time.perf_counter(), 0
            for batch in tqdm(self._batches_left(workers), total=self.total, initial=self.done, **shown):
                self.update(batch)
                if self.done % self.train.log_every == 0 or self.done == self.total:
                    self.log(batch, write_line)
                if main:
                    self.run.progress(what, self.done, self.total)
                self.save_or_stop(stop)
            if main:
                self.checkpoints.finish(self.model.eval(), self.total)
            self.processes.wait()
            if stop:
                raise Stopped(stop[0], f"{what} is done, and was asked to stop; the same call continues after it")

    def update(self, batch: TensorBatch) -> None:
        """One optimiser step."""
        step = self.done
        torch.manual_seed(self.seed * 1_000_003 + step + (self.processes.index << 40))
        self.lr_share = learning_rate_factor(step, self.total, self.optim)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * self.lr_share
        with memory_advice(self.train, partial(self._try_micro_batch, batch)):
            count = max(1, self.train.accumulate // self.processes.count)
            means = accumulate_gradients(self.model, self.objective, batch, count, self.autocast, self.processes)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.guard.note(step, means, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        means["gradient_norm"] = norm / self.processes.count  # added up over the processes, as the losses are
        self.sums = {name: self.sums.get(name, 0) + value.double() for name, value in means.items()}
        self.done, self.timed = step + 1, self.timed + 1

    def log(self, batch: TensorBatch, write_line: Callable[..., None] | None) -> None:
        """Check the losses since the last line of metrics, and write the next line (the main process does)."""
        steps = self.done % self.train.log_every or self.train.log_every
        values = self.processes.add_up({name: float(value) / steps for name, value in self.sums.items()})
        self.guard.check(self.done, values)
        step_s = (time.perf_counter() - self.started_s) / self.timed
        if write_line:
            self.model.eval()
            with torch.no_grad():
                values |= self.objective.watch(self.model, batch.to(self.processes.device))
                if self.train.probe_every and self.done % self.train.probe_every == 0:
                    values |= self.objective.probe(self.model)
            self.model.train()
            if self.train.keep_best and "held_out_loss" in values:
                self.checkpoints.save_if_best(self.model, self.done, values["held_out_loss"])
            write_line(self.done, **values, lr_share=self.lr_share, step_s=step_s)
        self.sums, self.started_s, self.timed = {}, time.perf_counter(), 0

    def save_or_stop(self, stop: list[signal.Signals]) -> None:
        """Write a checkpoint where one is due or a process got a signal; then raise `Stopped` for the signal."""
        stopping = self.processes.add_up({"stop": len(stop)})["stop"]
        every = self.train.checkpoint_every
        if self.done == self.total or not (stopping or (every and self.done % every == 0)):
            return
        self.guard.check(self.done)
        sums = self.processes.add_up({name: float(value) for name, value in self.sums.items()})
        if self.processes.is_main:
            self.checkpoints.save(self.model, self.optimiser, self.done, sums)
        if stopping:
            number = stop[0] if stop else signal.SIGTERM  # another process got it
            message = f"{self.what} stopped after step {self.done} of {self.total}; the same call resumes it"
            raise Stopped(number, message)

    def _batches_left(self, workers: int) -> DataLoader:
        """The batches of the remaining steps, which worker processes prepare ahead."""
        return DataLoader(
            range(self.total),
            batch_size=None,
            sampler=range(self.done, self.total),
            collate_fn=partial(_share_of_step, self.batches, self.processes),
            num_workers=workers,
            pin_memory=self.processes.device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    def _try_micro_batch(self, batch: TensorBatch, accumulate: int) -> None:
        """Gradients of one micro-batch, to see whether it fits into memory."""
        self.model.zero_grad(set_to_none=True)
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        with self.autocast():
            micro = batch.micro_batches(max(1, accumulate // self.processes.count))[0]
            sum(self.objective.losses(self.model, micro.to(self.processes.device)).values()).backward()


# ------------------------------------------------------------------------------------------- the parts of a step


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` takes a GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("train.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def learning_rate_factor(step: int, total: int, optim: OptimSettings) -> float:
    """Linear warm-up; then times `decay` at the shares `decay_at` of the run (paper Sec. 4.1), or linear to 0."""
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    if optim.decay_at == "linear":
        return min(warm, (total - step) / max(1, total - optim.warmup))
    return warm * optim.decay ** sum(step >= share * total for share in optim.decay_at)


def build_optimiser(model: nn.Module, optim: OptimSettings) -> torch.optim.AdamW:
    """AdamW with a rate of its own for the visual side, and no decay of biases, norms and position-bias tables.

    A frozen visual side has no state in it.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        undecayed = parameter.ndim < 2 or "relative_position_bias_table" in name
        groups.setdefault((name.startswith(("visual.", "base.visual.")), undecayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "rate": optim.lr_visual if visual else optim.lr_fusion,
                "weight_decay": 0.0 if undecayed else optim.weight_decay,
            }
            for (visual, undecayed), parameters in groups.items()
        ],
        lr=optim.lr_fusion,
        fused=True,  # one kernel: a step of `tiny` takes 4% less time
    )


def accumulate_gradients(
    model: nn.Module,
    objective: Objective,
    batch: TensorBatch,
    count: int,
    autocast: Callable[[], Any],
    processes: Processes | None = None,
) -> dict[str, Tensor]:
    """Gradients of one optimiser step over `count` micro-batches; returns the mean losses, detached.

    Each loss is divided by its count over the whole step, so the counts of single micro-batches do not matter. With
    several processes `batch` is this one's share, and so are the losses: they add up to the means. Items are counted on
    the host, before a micro-batch goes to the device.
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
        if hasattr(module, "update_codes"):  # a visual dictionary learns by moving averages
            module.update_codes(processes)
    return means


def _share_of_step(batches: Steps, processes: Processes, step: int) -> TensorBatch:
    """What this process computes of a step."""
    if processes.count == 1:
        return batches[step]
    if hasattr(batches, "share"):
        return batches.share(step, processes.index, processes.count)
    return batches[step].micro_batches(processes.count)[processes.index]


def _start_worker(_: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the main one, which stops in good order.

    A worker never collects what it inherited: torch complains where one frees the loader of an earlier training.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()


# --------------------------------------------------------------------------------------- conditions of the training


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU, add gradients of indexed tensors in a fixed order: otherwise no two runs agree to the last bit."""
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


@contextlib.contextmanager
def bfloat16(device: str) -> Iterator[None]:
    """Autocast of a forward pass. On a CPU attention is computed by plain products there.

    The backward pass of the fused kernel is slow in bfloat16: it made a step of `tiny` slower than in float32.
    """
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, dtype=torch.bfloat16), attention:
        yield


@contextlib.contextmanager
def speed_options(model: nn.Module, train: TrainSettings) -> Iterator[None]:
    """Compile the model and checkpoint its activations if the settings say so; afterwards it is a plain one again."""
    parts = [module for name, module in model.named_modules() if name.split(".")[-1] in ("visual", "fusion")]
    with contextlib.ExitStack() as undo:
        for module in parts if train.compile else ():
            module.compile()
            undo.callback(setattr, module, "_compiled_call_impl", None)
        if train.gradient_checkpointing:
            _checkpoint_activations(model, True)
            undo.callback(_checkpoint_activations, model, False)
        yield


def _checkpoint_activations(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(on)
        if isinstance(module, PreTrainedModel):
            # transformers 5.10 says "gradient" where 5.24 says "activation"
            kind = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
            if on:
                getattr(module, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            else:
                getattr(module, f"{kind}_checkpointing_disable")()


@contextlib.contextmanager
def _metrics_writer(run: Run, tracker: str) -> Iterator[Callable[..., None]]:
    """A function that writes a line of metrics, also to one of accelerate's trackers if one is named."""
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

    def write_line(step: int, **values: float) -> None:
        run.log(step, **values)
        sink.log(values, step=step)

    try:
        yield write_line
    finally:
        sink.finish()
