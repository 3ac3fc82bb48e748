"""Several processes on one training run: each takes its share of every step, gradients are added once a step.

`torchrun` and `accelerate launch` start them; accelerate tells each its place and its device. No wrapper around the
model is needed: losses are sums divided by the counts of the whole step, so adding gradients gives the very update
of one process, and a step of many micro-batches has nothing to gain from adding them earlier.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vpworkbench.errors import RunError
from vpworkbench.system import on_signal


@dataclass(frozen=True)
class Processes:
    """Place of this process among those of a run; the default is to be alone."""

    device: torch.device
    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes the run's files."""
        return self.index == 0

    def share(self, batch: Any) -> Any:
        """This process's part of the batch of a whole step."""
        return batch if self.count == 1 else batch.micro_batches(self.count)[self.index]

    def add_up(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes; on the host, so that no GPU waits."""
        if self.count == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        distributed.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def add_gradients(self, model: nn.Module) -> None:
        """Add the gradients of all processes, in place, in one message."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(joined)
        for gradient, added in zip(gradients, joined.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(added.view_as(gradient))

    def add(self, tensor: Tensor) -> None:
        """Add a tensor up over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            self.add_up({"here": 1})


def join(device: torch.device) -> Processes:
    """Join the others that `torchrun` or `accelerate launch` started; alone where there are none."""
    if not launched():
        return Processes(device)
    from accelerate import PartialState

    if not distributed.is_initialized():  # gloo beside nccl: counts are added on the host
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    state = PartialState(cpu=device.type == "cpu")
    own = state.device if device.type == "cuda" else device  # not cpu:0, which safetensors refuses
    return Processes(own, state.process_index, state.num_processes)


def _leave() -> None:
    """End the group before the interpreter: its threads, still running then, would abort the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(count: int, notebook: str, name: str) -> None:
    """Train a run that is opened already in `count` processes, and wait; Ctrl-C and SIGTERM are passed on.

    Raises
    ------
    RunError
        If one of them fails.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        "-m", "vpworkbench.cli", "train", notebook, "--name", name,
    ]  # fmt: skip
    asked: list[signal.Signals] = []
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)

    def pass_on(number: signal.Signals) -> None:
        asked.append(number)
        process.send_signal(number)

    with on_signal(pass_on):
        code = process.wait()
    if asked:
        raise KeyboardInterrupt(asked[0], "training stopped; the same call resumes")
    if code:
        raise RunError(f"training in {count} processes ended with code {code}: see what they printed above")


def _end_with_parent() -> None:
    """Linux sends SIGTERM when the parent is gone, be it killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
