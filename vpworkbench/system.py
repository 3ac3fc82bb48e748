"""What the operating system provides: signals, locks, complete files."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vpworkbench.errors import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_signal(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within the block, pass the first SIGINT or SIGTERM to `handle`; a second one acts as usual.

    Python delivers signals to the main thread; in any other thread this does nothing.
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
        handle(signal.Signals(number))

    for number in SIGNALS:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def lock(path: Path, *, patience_s: float) -> Iterator[None]:
    """Hold a lock file within the block; the system releases it however the process ends.

    If another process still holds it after `patience_s`, a `RunError` names that process.
    """
    holder = path.with_suffix(".holder")  # filelock may empty or remove its own file
    try:
        locked = FileLock(path).acquire(timeout=patience_s, poll_interval=0.1)
    except Timeout:
        process = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
        raise RunError(f"{path.parent}: in use by process {process}; wait for it or end it") from None
    with locked:
        holder.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield


@contextlib.contextmanager
def draft(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `path` when the block ends without an error.

    Readers see the old content of `path` or the new, never a part of it, whenever the process is killed; a killed
    writer leaves a folder `.writing-<name>-*` beside it. `durable` waits until the disk has everything. An existing
    folder is not replaced unless it is empty.
    """
    with tempfile.TemporaryDirectory(prefix=f".writing-{path.name}-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        yield written
        if durable:
            for place in (*written.rglob("*"), written):
                _flush(place)
        os.replace(written, path)
        if durable:
            _flush(path.parent)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file completely or not at all; see `draft`."""
    with draft(path, durable=durable) as file:
        file.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Wait until the disk has a file or a folder's list of names."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Import modules without the garbage collector, which takes a third of the time of transformers and timm.

    They create a million objects that stay, and the collector walks through all of them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
