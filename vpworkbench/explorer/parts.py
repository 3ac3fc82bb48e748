"""What the views share: a moment's patience, sentences in the page, a picture as the page takes it."""

from __future__ import annotations

import asyncio
import html
import io
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH = 800  # pixels: fits beside the file browser of a 1280-pixel JupyterLab, inside a tab
SHOWN_PX = 480  # largest side of an image in the page


class Later:
    """Runs the last of several calls once no other came for a moment; at once where no event loop runs.

    For work that takes longer than a click may: the page has its slice first.
    """

    def __init__(self, wait_s: float = 0.35) -> None:
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
            self._waiting = None


class Note(ipywidgets.HTML):
    """A sentence of ours or of an error, never markup."""

    def __init__(self, text: str = "", *, role: str = "status") -> None:
        super().__init__()
        self.add_class(f"vpw-note-{role}")
        self.say(text)

    def say(self, *lines: str) -> None:
        self.value = "<br>".join(html.escape(line) for line in lines)

    @property
    def text(self) -> str:
        return html.unescape(self.value.replace("<br>", "\n"))


def unheard() -> None:
    """What a view calls as it changes, before an explorer listens (`view.changed = ...`)."""


def shown_image(image: NDArray[np.uint8]) -> bytes:
    """PNG, small ones with their pixels enlarged evenly; JPEG where a PNG would be large."""
    picture = Image.fromarray(image)
    picture.thumbnail((SHOWN_PX, SHOWN_PX))
    stream = io.BytesIO()
    if max(picture.size) <= 160:
        picture.save(stream, "PNG")
    else:
        picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def row(*children: ipywidgets.Widget) -> ipywidgets.HBox:
    """Controls side by side, in a new line where the page is narrow."""
    return ipywidgets.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 14px"})


def column(*children: ipywidgets.Widget) -> ipywidgets.VBox:
    return ipywidgets.VBox(children, layout={"max_width": f"{WIDTH}px", "overflow": "hidden"})


def heads_of(count: int) -> Sequence[tuple[str, int]]:
    """What a choice of heads offers; -1 is their mean, as a dropdown shows None as if nothing were chosen."""
    return (("mean of heads", -1), *((f"head {head + 1}", head) for head in range(count)))
