"""The explorer's own widgets: small canvases in the page, fed with slices by the kernel.

Each class holds the traits that Python and the page share; its drawing is an ES module of the same name in `static/`.
Arrays travel as little-endian float32, several traits in one message (`update`); hover never asks the kernel.
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
from numpy.typing import NDArray
from PIL import Image

STATIC = Path(__file__).with_name("static")


@cache
def module(name: str) -> str:
    """One ES module: what all widgets share, then what one draws (anywidget takes a single text)."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in ("shared.js", f"{name}.js"))


@cache
def stylesheet() -> str:
    return (STATIC / "style.css").read_text(encoding="utf-8")


def encoded(image: object) -> bytes:
    """An image as the page takes it: encoded bytes as they are, a PIL image or an array as PNG.

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
    """Numbers as the page reads them: float32, little-endian, last axis fastest."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


class Drawn(anywidget.AnyWidget):
    """What all widgets share: a name, a width, and one message per update.

    Attributes
    ----------
    label : str
        Title, also read out by screen readers.
    alt : str
        What is seen, in words.
    width : int
        Pixels; narrower where the page is narrower.
    version : int
        Counts updates; the page shows it as `data-version` once they are drawn.
    """

    _css = stylesheet()
    label = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int(640).tag(sync=True)
    version = traitlets.Int().tag(sync=True)

    _converters: dict[str, Callable[[Any], bytes]] = {}
    _axes: dict[str, int] = {}  # arrays: how many axes

    def __init__(self, **traits: Any) -> None:
        super().__init__(**self._converted(traits))

    def update(self, **traits: Any) -> None:
        """Set several traits, arrays as arrays, and send them in one message.

        Raises
        ------
        ValueError
            If a trait does not exist, or the arrays do not fit each other; nothing is changed then.
        """
        converted = self._converted(traits)
        with self.hold_sync():
            for name, value in converted.items():
                setattr(self, name, value)
            self.version += 1

    def state(self) -> dict[str, Any]:
        """What a page without a kernel needs: the class's module and styles, the traits with their values."""
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
        """Arrays checked and turned into bytes; the rest as it is."""
        name = type(self).__name__
        unknown = sorted(set(traits) - set(self.trait_names(sync=True)))
        if unknown:
            raise ValueError(f"{name} has no {', '.join(unknown)}; it has {', '.join(self._own())}")
        converted = dict(traits)
        for key, axes in self._axes.items():
            if key in traits:
                converted[key] = _checked(f"{name}.{key}", traits[key], axes)
        self._check(converted)
        for key, convert in self._converters.items():
            if key in converted:
                converted[key] = convert(converted[key])
        return converted

    def _own(self) -> list[str]:
        """Names of the traits that the page shares, without what every widget has."""
        names = set(self.trait_names(sync=True)) - set(anywidget.AnyWidget.class_trait_names())
        return sorted(name for name in names if not name.startswith("_"))

    def _check(self, traits: dict[str, Any]) -> None:
        """Refuse traits that do not fit each other; those that are not given stay as they are."""

    def _floats(self, traits: dict[str, Any], name: str) -> int:
        """How many numbers an array has, given now or earlier."""
        return traits[name].size if name in traits else len(getattr(self, name)) // 4


def _checked(name: str, value: object, axes: int) -> NDArray[np.float32]:
    array = np.asarray(value, dtype=np.float32)
    if array.ndim != axes:
        raise ValueError(f"{name} has shape {array.shape}; expected {axes} axes")
    return array


def _check_boxes(traits: dict[str, Any]) -> None:
    if "boxes" in traits and traits["boxes"].shape[1] != 4:
        raise ValueError(f"boxes has shape {traits['boxes'].shape}; expected (token, 4): x0 y0 x1 y1 as shares")


class Panels(Drawn):
    """Copies of one image side by side, values of its tokens drawn over each.

    Parameters
    ----------
    image : bytes or array, see `encoded`
    boxes : array, shape (token, 4)
        x0 y0 x1 y1 as shares of the image; where boxes overlap the smallest is hit.
    on_grid : bool
        False: boxes are drawn as boxes, even those that look like a grid.
    values : array, shape (panel, token)
    kinds : list of str
        Per panel: "plain" (grid only), "shade" (darker where the value is small beside the panel's largest) or
        "mask" (1: hidden).
    captions : list of str, per panel
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
    _axes = {"boxes": 2, "values": 2}

    def _check(self, traits: dict[str, Any]) -> None:
        _check_boxes(traits)
        panels, tokens = len(traits.get("kinds", self.kinds)), self._floats(traits, "boxes") // 4
        if self._floats(traits, "values") != panels * tokens:
            raise ValueError(f"Panels.values must be (panel, token) = ({panels}, {tokens}) as kinds and boxes say")
        if len(traits.get("captions", self.captions)) != panels:
            raise ValueError(f"Panels.captions must name each of the {panels} panels in kinds")


class Reader(Drawn):
    """An image beside a sentence: a word shows where it looks, a patch which words it reads.

    Parameters
    ----------
    image : bytes or array, see `encoded`
    boxes : array, shape (patch, 4)
        x0 y0 x1 y1 as shares of the image.
    on_grid : bool
        As of `Panels`.
    words : list of str
    looks : array, shape (word, patch)
        Attention of each word to each patch.
    reads : array, shape (patch, word)
        Attention of each patch to each word.
    pinned : int
        Place in the sequence: 0 ... words - 1 is a word, what follows a patch, -1 none; a click in the page sets it
        too.
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
    _axes = {"boxes": 2, "looks": 2, "reads": 2}

    def _check(self, traits: dict[str, Any]) -> None:
        _check_boxes(traits)
        words, patches = len(traits.get("words", self.words)), self._floats(traits, "boxes") // 4
        if self._floats(traits, "looks") != words * patches:
            raise ValueError(f"Reader.looks must be (word, patch) = ({words}, {patches}) as words and boxes say")
        if self._floats(traits, "reads") != words * patches:
            raise ValueError(f"Reader.reads must be (patch, word) = ({patches}, {words}) as boxes and words say")


class Maps(Drawn):
    """Matrices side by side with one shared pick, in even steps of one colour scale.

    Parameters
    ----------
    values : array, shape (map, row, column)
        nan: not there, drawn transparent.
    names : list of str, per map
    row_name, column_name : str
    count_from : int
        Number that the first row and column carry in labels.
    splits : list of int
        Lines are drawn before these rows and columns: where a modality begins.
    picked : list of int
        [row, column], or [] for none; a click or Enter in the page sets it too.
    low, high : list of float, per map
        Range of colours; [] for that of each map's values.
    percent : bool
        Values are shares, told in percent.
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
    _axes = {"values": 3}

    def _converted(self, traits: dict[str, Any]) -> dict[str, Any]:
        if "shape" in traits:
            raise ValueError("Maps.shape follows from values: leave it out")
        converted = super()._converted(traits)
        if "values" in traits:
            converted["shape"] = list(np.shape(traits["values"]))
        return converted

    def _check(self, traits: dict[str, Any]) -> None:
        maps = len(traits["values"]) if "values" in traits else self.shape[0]
        for name, needed in (("names", True), ("low", False), ("high", False)):
            given = traits.get(name, getattr(self, name))
            if len(given) != maps and (needed or given):
                raise ValueError(f"Maps.{name} must have one entry for each of the {maps} maps, not {len(given)}")


class Drop(Drawn):
    """An image is chosen, or dropped here; what is too large is refused in the page.

    Attributes
    ----------
    file, file_name : bytes, str
        The last file.
    count : int
        Increases with each file: observe this one.
    limit_mib : float
        Jupyter's connection takes 10 MiB in one message.
    message : str
        The kernel's answer, shown as text.
    """

    _esm = module("drop")
    # A page's bytes arrive as a memoryview; echoed, the file would travel back.
    file = traitlets.Bytes().tag(sync=True, echo_update=False, from_json=lambda value, widget: bytes(value))
    file_name = traitlets.Unicode().tag(sync=True)
    count = traitlets.Int().tag(sync=True)
    limit_mib = traitlets.Float(8).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)

    _converters = {"file": bytes}


class Table(Drawn):
    """A small table, its text as it is.

    Parameters
    ----------
    names : list of str, per column
    rows : list of list of str
        One text for each column.
    """

    _esm = module("table")
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)

    def _check(self, traits: dict[str, Any]) -> None:
        columns = len(traits.get("names", self.names))
        if any(len(cells) != columns for cells in traits.get("rows", self.rows)):
            raise ValueError(f"Table.rows must have one text for each of the {columns} columns in names")


class Chart(Drawn):
    """Title of the plotly figure beside it in the page, with buttons that save it: PNG, SVG, and its numbers as CSV."""

    _esm = module("chart")


class Copy(Drawn):
    """Code to take along, with a button that copies it."""

    _esm = module("copy")
    text = traitlets.Unicode().tag(sync=True)


class Save(Drawn):
    """A button that has the kernel write a file, which the browser then keeps.

    Parameters
    ----------
    write : callable
        () -> Path of the file; what it raises is told in the page.
    """

    _esm = module("save")

    def __init__(self, write: Callable[[], Path], **traits: Any) -> None:
        super().__init__(**traits)
        self._write = write
        self.on_msg(self._asked)

    def _asked(self, widget: Drawn, asked: dict[str, Any], buffers: list[memoryview]) -> None:
        try:
            file = self._write()
            content = file.read_bytes()
        except Exception as error:
            self.send({"failed": str(error) or type(error).__name__})
            raise
        self.send({"name": file.name, "type": guess_type(file.name)[0]}, [content])
