"""Asked to stop: Ctrl-C, and SIGTERM, which Slurm and container runtimes send before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

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
