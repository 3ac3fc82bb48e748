"""The explorer's widgets without a page: conversions, one message per update, what they hold and free."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from traitlets import TraitError

from vpworkbench.explorer.parts import IMAGE_PX, encoded
from vpworkbench.explorer.widgets import STATIC, Copy, Drawn, Drop, Maps, OnImage, Panels, Reader, Table, module

BOXES = [[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.25, 0.25, 0.75, 0.75]]  # two tokens and one that overlaps both


def panels(**traits: Any) -> Panels:
    given = {"boxes": BOXES, "values": [[0, 1, 2], [1, 0, 0]], "kinds": ["shade", "mask"], "captions": ["a", "b"]}
    return Panels(**(given | traits))


def reader(**traits: Any) -> Reader:
    given = {"boxes": BOXES, "words": ["a", "ball"], "looks": np.ones((2, 3)), "reads": np.ones((3, 2))}
    return Reader(**(given | traits))


@pytest.mark.parametrize("dtype", ["float64", ">f4", "int64", "bool"])
def test_arrays_travel_as_little_endian_floats(dtype: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    assert np.frombuffer(panels(values=values).values, "<f4").tolist() == [0, 1, 1, 1, 0, 0]


def test_arrays_are_told_by_their_meaning_not_their_memory() -> None:
    columns_first = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert np.frombuffer(panels(values=columns_first).values, "<f4").tolist() == [0, 1, 2, 3, 4, 5]


def test_small_images_become_png_and_large_ones_small_jpeg() -> None:
    with Image.open(io.BytesIO(encoded(np.full((4, 6, 3), 255, np.uint8)))) as image:
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (6, 4), (255, 255, 255))
    with Image.open(io.BytesIO(encoded(np.zeros((300, 2 * IMAGE_PX, 3), np.uint8)))) as image:
        assert (image.format, image.size) == ("JPEG", (IMAGE_PX, 150))


def test_an_update_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    widget, sent = panels(), []
    monkeypatch.setattr(widget, "_send", lambda message, buffers=None: sent.append((message, buffers)))
    widget.update(values=np.zeros((2, 3)), captions=["c", "d"], picked=2)
    (message, buffers), *others = sent
    assert not others
    assert message["state"] == {"captions": ["c", "d"], "picked": 2, "version": 1}
    assert message["buffer_paths"] == [["values"]] and bytes(buffers[0]) == bytes(24)


@pytest.mark.parametrize("change, message", [({"valeus": 3}, "valeus"), ({"kinds": ["shade", "dark"]}, "dark")])
def test_unknown_traits_and_kinds_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraitError, match=message):
        panels().update(**change)


def test_maps_know_their_shape() -> None:
    widget = Maps(values=np.zeros((2, 3, 4)), names=["a", "b"])
    assert widget.shape == [2, 3, 4]
    widget.update(values=np.full((1, 5, 5), np.nan), names=["a"])
    assert widget.shape == [1, 5, 5]
    assert np.isnan(np.frombuffer(widget.values, "<f4")).all()  # nan travels: it is drawn transparent


def test_a_page_sets_what_it_picks() -> None:
    picked = []
    widget, upload = panels(), Drop()
    widget.observe(lambda change: picked.append(change.new), "picked")
    widget.set_state({"picked": 2})  # as a message of the page does
    upload.set_state({"file": memoryview(b"abc"), "file_name": "a.png", "count": 1})
    assert picked == [2]
    assert upload.file == b"abc"


@pytest.mark.parametrize("widget", [panels, reader, Maps, Drop, Copy, Table])
def test_a_state_holds_what_a_page_needs(widget: Any) -> None:
    state = widget(label="Name").state()
    assert state["traits"]["label"] == "Name" and state["traits"]["version"] == 0
    assert "export default widget(" in state["esm"]
    assert not any(name.startswith("_") or name == "layout" for name in state["traits"])


def test_names_are_stable_and_closing_frees_the_arrays() -> None:
    widget = panels(label="Masks", image=encoded(np.ones((4, 4, 3), np.uint8)))
    assert repr(widget) == repr(panels(label="Masks")) == "Panels('Masks')"
    widget.close()
    assert not (widget.image or widget.boxes or widget.values)


def test_modules_are_small_and_take_no_markup() -> None:
    texts = {path.name: path.read_text() for path in STATIC.glob("*.js")}
    names = {cls.__name__.lower() for base in (Drawn, OnImage) for cls in base.__subclasses__()} - {"onimage"}
    assert {f"{name}.js" for name in names} | {"shared.js", "page.js"} == set(texts)
    for name, text in texts.items():
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write"))
        assert len(text) < 20_000, name
    assert all(len(module(name)) < 30_000 for name in names)


def test_the_colours_are_cividis() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    table = (matplotlib.colormaps["cividis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    assert base64.b64encode(table.tobytes()).decode() in module("maps")
