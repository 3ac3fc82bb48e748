"""The explorer's own widgets: small canvases in the page, fed with slices of data by the kernel.

Each class holds the traits that Python and the page share; an ES module of the same name in `static/` draws them.
Arrays travel as little-endian float32, several traits in one message (`update`); hovering never asks the kernel.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from PIL import Image

STATIC = Path(__file__).with_name("static")
CORNERS = "x0 y0 x1 y1"


@cache
def module(name: str) -> str:
    """One ES module: the code that all widgets share, then that of one widget (anywidget takes a single text)."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in ("shared.js", f"{name}.js"))


@cache
def stylesheet() -> str:
    return (STATIC / "style.css").read_text(encoding="utf-8")


def encoded(image: object) -> bytes:
    """An image as the page takes it: encoded bytes unchanged, a PIL image or an array as PNG.

    Parameters
    ----------
    image : bytes, PIL.Image.Image or array, shape (row, column) or (row, column, 3)
        Arrays hold uint8, or floats in [0, 1].
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3):
            raise ValueError(f"image has shape {pixels.shape}; expected (row, column) or (row, column, 3)")
        if pixels.dtype != np.uint8:
            pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def packed(array: object) -> bytes:
    """Numbers as the page reads them: little-endian float32, last axis fastest."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


class Drawn(anywidget.AnyWidget):
    """Base of all widgets: a label, a width, and one message for each update.

    Attributes
    ----------
    label : str
        Title, also read out by screen readers.
    alt : str
        The content in words.
    width : int
        Pixels; narrower on a narrower page.
    version : int
        Counts updates; the page shows it as `data-version` once they are drawn.
    """

    _css = stylesheet()
    label = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int(640).tag(sync=True)
    version = traitlets.Int().tag(sync=True)

    _converters: dict[str, Callable[[Any], bytes]] = {}
    _axes: dict[str, tuple[str, ...]] = {}  # of arrays and lists; axes of one name have one size
    _optional: tuple[str, ...] = ()  # those that may be empty

    def __init__(self, **traits: Any) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        super().__init__(**self._converted(traits))

    def update(self, **traits: Any) -> None:
        """Set several traits, arrays as arrays, and send them in one message.

        A trait that does not exist, or arrays that do not fit together, raise a ValueError and change nothing.
        """
        converted = self._converted(traits)
        with self.hold_sync():
            for name, value in converted.items():
                setattr(self, name, value)
            self.version += 1

    def state(self) -> dict[str, Any]:
        """What a page without a kernel needs: the module, the styles and the values of the traits."""
        traits = {name: getattr(self, name) for name in self._own()}
        return {"name": type(self).__name__, "esm": self._esm, "css": self._css, "traits": traits}

    def close(self) -> None:
        """Take the widget off the page and free its arrays."""
        super().close()
        for name in self._converters:
            self.set_trait(name, b"")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r})"

    def _converted(self, traits: dict[str, Any]) -> dict[str, Any]:
        """The traits with their arrays checked and turned into bytes."""
        unknown = sorted(set(traits) - set(self.trait_names(sync=True)))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}; it has {', '.join(self._own())}")
        self._shapes = self._checked_shapes(traits)
        converters = {name: convert for name, convert in self._converters.items() if name in traits}
        return traits | {name: convert(traits[name]) for name, convert in converters.items()}

    def _checked_shapes(self, traits: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of arrays and lists, given now or earlier, once axes of one name have one size."""
        kind, sizes = type(self).__name__, {CORNERS: 4}
        shapes = self._shapes | {name: np.shape(traits[name]) for name in self._axes if name in traits}
        for name, axes in self._axes.items():
            shape = shapes.get(name, tuple(4 if axis == CORNERS else 0 for axis in axes))
            if name in self._optional and not shape[0]:
                continue
            if len(shape) != len(axes):
                raise ValueError(f"{kind}.{name} has shape {shape}; expected ({', '.join(axes)})")
            wanted = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=True))
            if shape != wanted:
                raise ValueError(f"{kind}.{name} has shape {shape}; expected ({', '.join(axes)}) = {wanted}")
        return shapes

    def _own(self) -> list[str]:
        """Names of the traits that the page shares, without those that every widget has."""
        names = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names())
        return sorted(name for name in names if not name.startswith("_"))


class Panels(Drawn):
    """Copies of one image side by side, each with values of its tokens drawn on top.

    Parameters
    ----------
    image : bytes or array, see `encoded`
    boxes : array, shape (token, 4)
        x0 y0 x1 y1 as shares of the image; where boxes overlap, the smallest is picked.
    on_grid : bool
        False draws boxes as boxes, even if they look like a grid.
    values : array, shape (panel, token)
    kinds : list of str
        For each panel "plain" (grid only), "shade" (darker for small values, relative to the panel's largest) or
        "mask" (1: hidden).
    captions : list of str
    picked : int
        Token, -1 for none; a click or Enter in the page sets it too.
    """

    _esm = module("panels")
    image = traitlets.Bytes().tag(sync=True)
    boxes = traitlets.Bytes().tag(sync=True)
    on_grid = traitlets.Bool(True).tag(sync=True)
    values = traitlets.Bytes().tag(sync=True)
    kinds = traitlets.List(traitlets.Enum(("plain", "shade", "mask"))).tag(sync=True)
    captions = traitlets.List(traitlets.Unicode()).tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)

    _converters = {"image": encoded, "boxes": packed, "values": packed}
    _axes = {"kinds": ("panel",), "captions": ("panel",), "boxes": ("token", CORNERS), "values": ("panel", "token")}


class Reader(Drawn):
    """An image beside a sentence: a word shows where it looks, a patch shows which words it reads.

    Parameters
    ----------
    image : bytes or array, see `encoded`
    boxes : array, shape (patch, 4)
        x0 y0 x1 y1 as shares of the image.
    on_grid : bool
        See `Panels`.
    words : list of str
    looks : array, shape (word, patch)
        Attention of each word to each patch.
    reads : array, shape (patch, word)
        Attention of each patch to each word.
    pinned : int
        Place in the sequence: words first, then patches, -1 for none; a click in the page sets it too.
    """

    _esm = module("reader")
    image = traitlets.Bytes().tag(sync=True)
    boxes = traitlets.Bytes().tag(sync=True)
    on_grid = traitlets.Bool(True).tag(sync=True)
    words = traitlets.List(traitlets.Unicode()).tag(sync=True)
    looks = traitlets.Bytes().tag(sync=True)
    reads = traitlets.Bytes().tag(sync=True)
    pinned = traitlets.Int(-1).tag(sync=True)

    _converters = {"image": encoded, "boxes": packed, "looks": packed, "reads": packed}
    _axes = {"words": ("word",), "boxes": ("patch", CORNERS), "looks": ("word", "patch"), "reads": ("patch", "word")}


class Maps(Drawn):
    """Matrices side by side with one shared pick and one colour scale.

    Parameters
    ----------
    values : array, shape (map, row, column)
        nan is transparent.
    names : list of str
    row_name, column_name : str
    count_from : int
        Number of the first row and column in labels.
    splits : list of int
        Rows and columns before which a line is drawn: where a modality begins.
    picked : list of int
        [row, column], or [] for none; a click or Enter in the page sets it too.
    low, high : list of float
        Range of the colours of each map; [] for the range of its values.
    percent : bool
        True if values are shares, shown in percent.
    """

    _esm = module("maps")
    values = traitlets.Bytes().tag(sync=True)
    shape = traitlets.List(traitlets.Int(), [0, 0, 0], minlen=3, maxlen=3).tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    row_name = traitlets.Unicode("row").tag(sync=True)
    column_name = traitlets.Unicode("column").tag(sync=True)
    count_from = traitlets.Int().tag(sync=True)
    splits = traitlets.List(traitlets.Int()).tag(sync=True)
    picked = traitlets.List(traitlets.Int()).tag(sync=True)
    low = traitlets.List(traitlets.Float()).tag(sync=True)
    high = traitlets.List(traitlets.Float()).tag(sync=True)
    percent = traitlets.Bool().tag(sync=True)

    _converters = {"values": packed}
    _axes = {"values": ("map", "row", "column"), "names": ("map",), "low": ("map",), "high": ("map",)}
    _optional = ("low", "high")

    def _converted(self, traits: dict[str, Any]) -> dict[str, Any]:
        if "shape" in traits:
            raise ValueError("Maps.shape follows from values: leave it out")
        converted = super()._converted(traits)
        return converted | ({"shape": list(self._shapes["values"])} if "values" in traits else {})


class Drop(Drawn):
    """A place to choose or drop an image; the page refuses files that are too large.

    Attributes
    ----------
    file, file_name : bytes, str
        The last file.
    count : int
        Increases with each file; observe this trait.
    limit_mib : float
        Jupyter's connection accepts 10 MiB in one message.
    message : str
        The kernel's answer.
    """

    _esm = module("drop")
    # A page's bytes arrive as a memoryview; without echo_update=False the file would be sent back.
    file = traitlets.Bytes().tag(sync=True, echo_update=False, from_json=lambda value, widget: bytes(value))
    file_name = traitlets.Unicode().tag(sync=True)
    count = traitlets.Int().tag(sync=True)
    limit_mib = traitlets.Float(8).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)

    _converters = {"file": bytes}


class Table(Drawn):
    """A small table of plain text: `names` of the columns, and `rows` with one text for each column."""

    _esm = module("table")
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)

    _axes = {"names": ("column",), "rows": ("row", "column")}
    _optional = ("rows",)


class Chart(Drawn):
    """Title of the plotly figure below it, with buttons that save the figure as PNG, SVG and CSV."""

    _esm = module("chart")


class Copy(Drawn):
    """Code, with a button that copies it."""

    _esm = module("copy")
    text = traitlets.Unicode().tag(sync=True)


class Save(Drawn):
    """A button: the kernel writes a file and the browser saves it.

    Parameters
    ----------
    write : callable
        Writes the file and returns its Path; the page shows the message of an exception.
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
