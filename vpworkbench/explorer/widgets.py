"""The explorer's own widgets: small canvases in the page, fed with slices of data by the kernel.

Each class holds the traits that Python and the page share; an ES module of the same name in `static/` draws them.
Arrays travel as little-endian float32, several traits in one message (`update`); hovering never asks the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

STATIC = Path(__file__).with_name("static")


@cache
def module(name: str) -> str:
    """One ES module: the code that all widgets share, then that of one widget (anywidget takes a single text)."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in ("shared.js", f"{name}.js"))


class Numbers(traitlets.Bytes):
    """An array as the page reads it: little-endian float32, last axis fastest; a trait `shape` keeps its shape."""

    def validate(self, widget: Drawn, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if widget.has_trait("shape"):
            widget.shape = list(np.shape(value))
        return np.ascontiguousarray(value, dtype="<f4").tobytes()


class Drawn(anywidget.AnyWidget):
    """Base of all widgets; `label` is the title and `alt` the content in words, both for screen readers too."""

    _css = (STATIC / "style.css").read_text(encoding="utf-8")
    label = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int(640).tag(sync=True)  # pixels; narrower on a narrower page
    version = traitlets.Int().tag(sync=True)  # counts updates; the page has it as data-version once they are drawn

    def update(self, **traits: Any) -> None:
        """Set several traits, arrays as arrays, and send them in one message."""
        with self.hold_sync():
            for name, value in traits.items():
                self.set_trait(name, value)
            self.version += 1

    def state(self) -> dict[str, Any]:
        """What a page without a kernel needs: the module and the values of the traits."""
        names = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names())
        traits = {name: getattr(self, name) for name in sorted(names) if not name.startswith("_")}
        return {"name": type(self).__name__, "esm": self._esm, "traits": traits}

    def close(self) -> None:
        """Take the widget off the page and free its arrays."""
        super().close()
        for name, trait in self.traits().items():
            if isinstance(trait, traitlets.Bytes):
                self.set_trait(name, b"")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r})"


class OnImage(Drawn):
    """Base of widgets that draw an image, encoded such as a PNG, and its tokens."""

    image = traitlets.Bytes().tag(sync=True)
    boxes = Numbers().tag(sync=True)  # (token, 4), x0 y0 x1 y1 as shares of the image; the pointer hits the smallest
    on_grid = traitlets.Bool(True).tag(sync=True)  # False draws boxes as boxes, even if they look like a grid


class Panels(OnImage):
    """Copies of one image side by side, each with values of its tokens drawn on top.

    Kinds are "plain" (grid only), "shade" (darker for small values, relative to the panel's largest) and "mask" (1:
    hidden).
    """

    _esm = module("panels")
    values = Numbers().tag(sync=True)  # (panel, token)
    kinds = traitlets.List(traitlets.Enum(("plain", "shade", "mask"))).tag(sync=True)  # of panels
    captions = traitlets.List(traitlets.Unicode()).tag(sync=True)  # of panels
    picked = traitlets.Int(-1).tag(sync=True)  # token, -1 for none; a click or Enter in the page sets it too
    outlined = traitlets.List(traitlets.Int()).tag(sync=True)  # tokens with one line around them


class Reader(OnImage):
    """An image beside a sentence: a word shows where it looks, a patch shows which words it reads.

    A click in the page pins a place in the sequence: words first, then patches.
    """

    _esm = module("reader")
    words = traitlets.List(traitlets.Unicode()).tag(sync=True)
    looks_blocked = traitlets.Bool().tag(sync=True)  # all of them: hatched
    reads_blocked = traitlets.Bool().tag(sync=True)
    looks = Numbers().tag(sync=True)  # (word, token): attention of each word to each patch
    reads = Numbers().tag(sync=True)  # (token, word): attention of each patch to each word
    pinned = traitlets.Int(-1).tag(sync=True)  # -1 for none


class AnswerWords(OnImage):
    """The words of an answer beside one or two images: a word shows where it looked, a click pins up to two."""

    _esm = module("answerwords")
    words = traitlets.List(traitlets.Unicode()).tag(sync=True)
    notes = traitlets.List(traitlets.Unicode()).tag(sync=True)  # what the status line says about each word
    looks = Numbers().tag(sync=True)  # (word, token): attention of each word to each visual token
    shares = Numbers().tag(sync=True)  # (word,): the bar under each word;
    nulls = Numbers().tag(sync=True)  # (word,): its line
    sinks = traitlets.List(traitlets.Int()).tag(sync=True)  # tokens that are hatched
    skip_sinks = traitlets.Bool().tag(sync=True)  # leaves them out of the colour scale
    pinned = traitlets.List(traitlets.Int()).tag(sync=True)  # words, at most two


class Maps(Drawn):
    """Matrices side by side with one shared pick and one colour scale."""

    _esm = module("maps")
    values = Numbers().tag(sync=True)  # (map, row, column); nan is transparent
    shape = traitlets.List(traitlets.Int(), [0, 0, 0]).tag(sync=True)  # of the values
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)  # of maps
    row_name = traitlets.Unicode("row").tag(sync=True)
    column_name = traitlets.Unicode("column").tag(sync=True)
    count_from = traitlets.Int().tag(sync=True)  # number of the first row and column in labels
    splits = traitlets.List(traitlets.Int()).tag(sync=True)  # rows and columns at which a modality begins: a line
    hatched = traitlets.List(traitlets.List(traitlets.Int())).tag(sync=True)  # map, first row and column, those after
    picked = traitlets.List(traitlets.Int()).tag(sync=True)  # [row, column], [] for none; a click sets it too
    low = traitlets.List(traitlets.Float()).tag(sync=True)  # ends of the colour scale of each map;
    high = traitlets.List(traitlets.Float()).tag(sync=True)  # [] for the range of its values
    percent = traitlets.Bool().tag(sync=True)  # True if values are shares


class Drop(Drawn):
    """A place to choose or drop an image; the page refuses files that are too large. Observe `count`."""

    _esm = module("drop")
    # A page's bytes arrive as a memoryview; without echo_update=False the file would be sent back.
    file = traitlets.Bytes().tag(sync=True, echo_update=False, from_json=lambda value, widget: bytes(value))
    file_name = traitlets.Unicode().tag(sync=True)
    count = traitlets.Int().tag(sync=True)  # of files so far
    limit_mib = traitlets.Float(8).tag(sync=True)  # Jupyter's connection accepts 10 MiB in one message
    message = traitlets.Unicode().tag(sync=True)  # the kernel's answer


class Table(Drawn):
    """A small table of plain text: `names` of the columns, and `rows` with one text for each column."""

    _esm = module("table")
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)


class Chart(Drawn):
    """Title of the plotly figure below it, with buttons that save the figure as PNG, SVG and CSV."""

    _esm = module("chart")


class Copy(Drawn):
    """Code, with a button that copies it."""

    _esm = module("copy")
    text = traitlets.Unicode().tag(sync=True)


class Save(Drawn):
    """A button: the kernel writes a file and the browser saves it.

    `write` writes the file and returns its path; the page shows the message of an exception.
    """

    _esm = module("save")

    def __init__(self, write: Callable[[], Path], **traits: Any) -> None:
        super().__init__(**traits)
        self._write = write
        self.on_msg(self._send_file)

    def _send_file(self, widget: Drawn, request: dict[str, Any], buffers: list[memoryview]) -> None:
        try:
            file = self._write()
            content = file.read_bytes()
        except Exception as error:
            self.send({"failed": str(error) or type(error).__name__})
            raise
        self.send({"name": file.name, "type": guess_type(file.name)[0]}, [content])
