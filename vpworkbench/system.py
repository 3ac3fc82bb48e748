"""What the operating system gives: signals, locks, files written as a whole, imports without the collector."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vpworkbench.errors import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_signal(heed: Callable[[signal.Signals], None]) -> Iterator[None]:
    """In the block the first SIGINT or SIGTERM is given to `heed`; a second one acts as it would have without.

    Outside the main thread, where Python gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _: object) -> None:
        restore()
        heed(signal.Signals(number))

    for number in SIGNALS:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def held(lock: Path, *, patience_s: float) -> Iterator[None]:
    """Hold a lock, which the system releases when its process ends in whatever way; the file tells who has it.

    Raises
    ------
    RunError
        If another process still holds it after `patience_s`.
    """
    with open(lock, "a+", encoding="utf-8") as file:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    file.seek(0)
                    raise RunError(
                        f"{lock.parent}: process {file.read().strip() or '?'} works on this run; wait for it, or end it"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file as a whole or not at all; `durable` also waits until the disk has it."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp made it private
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection while modules are imported: a third of the time that transformers and timm take.

    They make a million objects that stay, and the collector walks them again and again as they grow.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
