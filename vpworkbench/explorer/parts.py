"""What the views share: their common interface, status lines, delayed work, and images as the page takes them."""

from __future__ import annotations

import asyncio
import html
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ipywidgets
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from vpworkbench.explorer.page import Section
from vpworkbench.explorer.readings import Reading

WIDTH = 800  # pixels: fits beside the file browser of a 1280-pixel JupyterLab, inside a tab
IMAGE_PX = 480  # longest side of an image in the page


class View(ABC):
    """One tab of the explorer: `widget` shows `readings`, one for each model."""

    title = ""

    def __init__(self) -> None:
        self.widget = column()
        self.readings: list[Reading] = []
        self.changed: Callable[[], None] = lambda: None  # called after the user has changed what is shown
        self._is_quiet = False

    @abstractmethod
    def show(self, readings: Sequence[Reading]) -> None:
        """Show new readings; what the user has chosen stays if it still exists."""

    def code(self) -> str:
        """The call that recreates the view; empty if there is none."""
        return ""

    @abstractmethod
    def section(self) -> Section:
        """The view on a saved page."""

    @abstractmethod
    def tables(self) -> dict[str, pd.DataFrame]:
        """The numbers of the view, by name."""

    def close(self) -> None:
        """Take the view off the page and free what it holds."""
        self.readings = []
        for part in vars(self).values():
            if isinstance(part, ipywidgets.Widget):
                close_all(part)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block, controls that change redraw nothing."""
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False


def close_all(widget: ipywidgets.Widget) -> None:
    """Close a widget and all that is in it, with layouts and styles, which ipywidgets would keep forever."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if isinstance(part, ipywidgets.Widget):
            part.close()


class Delayed:
    """Runs the last of several calls once no other has come for a moment; at once if no event loop runs.

    For work that takes longer than a click may take: the page gets its slice first.
    """

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        self._waiting: asyncio.TimerHandle | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        self.cancel()
        try:
            self._waiting = asyncio.get_running_loop().call_later(self.wait_s, work)
        except RuntimeError:
            work()

    def cancel(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()


class StatusText(ipywidgets.HTML):
    """Plain sentences, for example of an error; never markup."""

    def set(self, *lines: str) -> None:
        self.value = "<br>".join(html.escape(line) for line in lines)

    @property
    def text(self) -> str:
        return html.unescape(self.value.replace("<br>", "\n"))


def encoded(image: NDArray[np.uint8]) -> bytes:
    """PNG of a small image, which keeps its pixels sharp; JPEG of a large one, of which a PNG would be large too."""
    picture = Image.fromarray(image)
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    stream = io.BytesIO()
    picture.save(stream, "PNG" if max(picture.size) <= 160 else "JPEG", quality=90)
    return stream.getvalue()


def image_traits(reading: Reading) -> dict[str, object]:
    """The traits by which a widget draws the image of a reading and its visual tokens."""
    return {"image": encoded(reading.image), "boxes": reading.boxes, "on_grid": reading.on_grid}


def row(*children: ipywidgets.Widget) -> ipywidgets.HBox:
    """Controls side by side; they wrap on a narrow page."""
    return ipywidgets.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 14px"})


def column(*children: ipywidgets.Widget) -> ipywidgets.VBox:
    return ipywidgets.VBox(children, layout={"max_width": f"{WIDTH}px", "overflow": "hidden"})
