"""Several processes on one training run: each takes its share of every step, gradients are added once a step.

`torchrun` and `accelerate launch` start them; accelerate gives each its index and its device. The model needs no
wrapper: losses are sums divided by the counts of the whole step, so the added gradients are those of one process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, distributed, nn

from vpworkbench.errors import RunError
from vpworkbench.system import on_signal


@dataclass(frozen=True)
class Processes:
    """The index of this process among those that share a run; by default it is the only one."""

    device: torch.device
    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.index == 0

    def add_up(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes, computed on the host, so that no GPU waits."""
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
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        self.add_up({"here": 1})


def join(device: torch.device) -> Processes:
    """Join the processes that `torchrun` or `accelerate launch` started, if this is one of them."""
    if not launched():
        return Processes(device)
    from accelerate import PartialState

    if not distributed.is_initialized():  # gloo beside nccl, as counts are added on the host
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)  # otherwise its threads would abort the interpreter's end
    state = PartialState(cpu=device.type == "cpu")
    own = state.device if device.type == "cuda" else device  # not cpu:0, which safetensors refuses
    return Processes(own, state.process_index, state.num_processes)


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(count: int, folder: Path) -> None:
    """Train the run of a folder in `count` processes, and wait for them; they receive Ctrl-C and SIGTERM too.

    Nothing is done for a count of 1, or where a launcher has started this process.
    """
    if count == 1 or launched():
        return
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {count} -m vpworkbench.cli train"
    command = [sys.executable, *torchrun.split(), folder.parent.name, "--name", folder.name]
    received: list[signal.Signals] = []
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=_end_with_parent, stderr=subprocess.PIPE, bufsize=0
    )

    def pass_on(number: signal.Signals) -> None:
        received.append(number)
        process.send_signal(number)

    with on_signal(pass_on):
        first = _first_error(process.stderr)
        code = process.wait()
    if received:
        raise KeyboardInterrupt(received[0], "training stopped; the same call resumes it")
    if code:
        raise RunError(f"training in {count} processes ended with code {code}: {first or 'see their messages above'}")


def _first_error(messages: IO[bytes]) -> str:
    """Pass all messages of the processes on, and return the first error that one of them ended with.

    Torchrun prints pages of its own after it.
    """
    seen, first = b"", None
    while chunk := messages.read(1 << 16):
        os.write(2, chunk)
        seen = (seen + chunk)[-(1 << 17) :] if first is None else b""
        first = first or re.search(rb"(?<![\w ])error: (.*)[\r\n]", seen)  # a progress bar may stand before it
    return first[1].decode(errors="replace") if first else ""


def _end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when its parent ends, even if the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
