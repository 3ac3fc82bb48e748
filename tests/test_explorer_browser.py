"""The explorer in real pages: what the page shows after a click, a key, a file, in JupyterLab and Notebook 7."""

from __future__ import annotations

import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import (  # fixtures are found by name in the module
    Jupyter,
    browser,
    idle,
    jupyter,
    no_sideways_scrolling,
    notebook,
    open_notebook,
    screenshots,
)
from PIL import Image

pytestmark = pytest.mark.browser
__all__ = ["browser", "jupyter", "screenshots"]

EVIL = '<img src=x onerror="window.hacked = true">'
WIDGETS = f"""
import numpy as np
from IPython.display import display
from vpworkbench.explorer.widgets import Copy, Drop, Maps, Panels, Reader

evil = {EVIL!r}
edges = np.linspace(0, 1, 13)
boxes = [[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(12) for x in range(12)]
picture = np.full((120, 120, 3), 1.0)
shade = lambda token: np.exp(-np.abs(np.arange(144) - token) / 5)
values = lambda token: [np.zeros(144), shade(token), shade(token) > 0.5]
panels = Panels(label="Masks " + evil, image=picture, boxes=boxes, values=values(0), width=900,
                kinds=["plain", "shade", "mask"], captions=["image", evil, "mask"], picked=0)
told = lambda token: {{"values": values(token), "captions": ["image", evil, f"kernel: {{token}}"]}}
panels.observe(lambda change: panels.update(**told(change.new)), "picked")
words = ["[CLS]", "a", "red", "ball", evil]
reader = Reader(label="Words", image=picture, boxes=boxes, words=words, width=900,
                looks=np.full((5, 144), 0.5 / 144), reads=np.eye(144, 5) * 0.4)
reader.observe(lambda change: reader.update(label=f"pinned {{change.new}}"), "pinned")
maps = Maps(label="Heads", values=np.arange(24.0).reshape(2, 3, 4), names=["one", "two"], row_name="layer",
            column_name="head", count_from=1, width=700)
maps.observe(lambda change: maps.update(label=f"picked {{change.new}}"), "picked")
drop = Drop(label="Image", limit_mib=0.01)
drop.observe(lambda change: drop.update(message=f"{{drop.file_name}}: {{len(drop.file)}} bytes"), "count")
copy = Copy(label="Code", text="ex.pick(token=3)  # " + evil)
for part in (panels, reader, maps, drop, copy):
    display(part)
"""


@pytest.fixture(scope="module")
def lab(browser: Any, jupyter: Jupyter) -> Iterator[Any]:
    """JupyterLab with one of each widget."""
    page = open_notebook(browser, jupyter, notebook(jupyter, "widgets.ipynb", WIDGETS))
    page.wait_for_selector(".vpw-copy[data-drawn]:not([data-drawn='0'])")
    idle(page)
    yield page
    page.context.close()


@pytest.fixture
def answered(lab: Any) -> Callable[[str, Callable[[], object]], None]:
    """Do something, then wait until the kernel's answer is drawn on this widget."""

    def wait(widget: str, act: Callable[[], object]) -> None:
        version = int(lab.locator(widget).get_attribute("data-version"))
        act()
        lab.wait_for_selector(f"{widget}[data-version='{version + 1}']")

    return wait


def pixels(page: Any, selector: str, place: int = 0) -> np.ndarray:
    """What a canvas holds, (row, column, 4)."""
    script = """canvas => [canvas.width, canvas.height,
        Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)]"""
    width, height, data = page.locator(selector).nth(place).evaluate(script)
    return np.array(data, dtype=np.uint8).reshape(height, width, 4)


def brightest_cell(page: Any, place: int) -> tuple[int, int]:
    """(row, column) of the cell of a 12 x 12 grid that is brightest at its centre."""
    canvas = pixels(page, ".vpw-panels canvas", place)[..., :3].sum(-1)
    at = ((np.arange(12) + 0.5) / 12 * len(canvas)).astype(int)
    row, column = np.unravel_index(canvas[np.ix_(at, at)].argmax(), (12, 12))
    return int(row), int(column)


def cell(stage: Any, row: int, column: int, rows: int = 12, columns: int = 12) -> dict[str, float]:
    """Where a cell lies on the screen, from the corner of its stage."""
    box = stage.bounding_box()
    return {"x": (column + 0.5) / columns * box["width"], "y": (row + 0.5) / rows * box["height"]}


def test_a_click_reaches_the_kernel_and_its_answer_the_page(lab: Any, answered: Any) -> None:
    stage = lab.locator(".vpw-panels .vpw-stage").nth(0)
    answered(".vpw-panels", lambda: stage.click(position=cell(stage, 4, 7)))
    assert lab.locator(".vpw-panels figcaption").nth(2).text_content() == "kernel: 55"  # 4 x 12 + 7
    assert brightest_cell(lab, 1) == (4, 7)
    mark = lab.locator(".vpw-panels .vpw-picked").nth(1).bounding_box()
    second = lab.locator(".vpw-panels .vpw-stage").nth(1).bounding_box()
    assert mark["x"] - second["x"] == pytest.approx(7 / 12 * second["width"], abs=1)
    assert mark["y"] - second["y"] == pytest.approx(4 / 12 * second["height"], abs=1)


def test_hover_tells_numbers_without_the_kernel(lab: Any) -> None:
    version = lab.locator(".vpw-panels").get_attribute("data-version")
    stage = lab.locator(".vpw-panels .vpw-stage").nth(1)
    stage.hover(position=cell(stage, 0, 3))
    assert "token 3 (row 1, column 4)" in lab.locator(".vpw-panels .vpw-tip").text_content()
    assert "seen" in lab.locator(".vpw-panels .vpw-status").text_content()
    assert lab.locator(".vpw-panels").get_attribute("data-version") == version


def test_keys_move_and_pick(lab: Any, answered: Any) -> None:
    stage = lab.locator(".vpw-panels .vpw-stage").nth(0)
    stage.click(position=cell(stage, 1, 1))
    lab.wait_for_function("document.querySelectorAll('.vpw-panels figcaption')[2].textContent === 'kernel: 13'")
    lab.mouse.move(0, 0)
    stage.focus()
    lab.keyboard.press("ArrowLeft")  # to what is picked
    lab.keyboard.press("ArrowDown")
    lab.keyboard.press("ArrowRight")
    answered(".vpw-panels", lambda: lab.keyboard.press("Enter"))
    assert lab.locator(".vpw-panels figcaption").nth(2).text_content() == "kernel: 26"
    assert lab.locator(".jp-Notebook").get_attribute("class").count("jp-mod-editMode") == 0  # Enter was ours


def test_words_and_patches_are_linked(lab: Any, answered: Any, screenshots: Path) -> None:
    status, word = lab.locator(".vpw-reader .vpw-status"), lab.locator(".vpw-word").nth(3)
    word.hover()
    assert status.text_content().startswith("“ball” looks 50.0% at the image")
    assert "vpw-framed" in word.get_attribute("class")
    stage = lab.locator(".vpw-reader .vpw-stage")
    stage.hover(position=cell(stage, 0, 3))
    assert status.text_content() == "token 3 (row 1, column 4) reads the words by 40.0%; most “ball”: 40.0%"
    assert word.evaluate("element => element.style.backgroundColor") == "rgba(28, 130, 196, 0.75)"
    answered(".vpw-reader", word.click)
    assert lab.locator(".vpw-reader .vpw-title").text_content() == "pinned 3"
    stage.hover(position=cell(stage, 2, 2))
    assert status.text_content() == "“ball” looks at token 26 (row 3, column 3): 0.3%"
    lab.screenshot(path=screenshots / "reader-pinned.png")
    answered(".vpw-reader", lambda: lab.locator(".vpw-sentence").press("Escape"))
    assert lab.locator(".vpw-reader .vpw-title").text_content() == "pinned -1"


def test_maps_pick_a_row_and_a_column(lab: Any, answered: Any) -> None:
    stage = lab.locator(".vpw-maps .vpw-stage").nth(1)
    stage.hover(position=cell(stage, 2, 1, 3, 4))
    assert lab.locator(".vpw-maps .vpw-tip").text_content() == "layer 3, head 2 · one: 9 · two: 21"
    answered(".vpw-maps", lambda: stage.click(position=cell(stage, 2, 1, 3, 4)))
    assert lab.locator(".vpw-maps .vpw-title").text_content() == "picked [2, 1]"
    colours = pixels(lab, ".vpw-maps .vpw-stage canvas")
    assert colours.shape == (3, 4, 4)
    assert colours[0, 0].tolist() == [0, 34, 78, 255] and colours[2, 3].tolist() == [254, 232, 56, 255]  # Cividis' ends


def test_files_are_sent_or_refused(lab: Any, answered: Any, tmp_path: Path) -> None:
    small, large = tmp_path / f"{EVIL.replace('/', '')}.png", tmp_path / "large.png"
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"x" * 20_000)
    status = lab.locator(".vpw-drop .vpw-status")
    lab.locator(".vpw-drop input").set_input_files(large)
    lab.wait_for_function("document.querySelector('.vpw-drop .vpw-status').textContent.includes('at most 0.01 MiB')")
    answered(".vpw-drop", lambda: lab.locator(".vpw-drop input").set_input_files(small))
    assert status.text_content() == f"{small.name}: 100 bytes"


def test_text_from_data_stays_text(lab: Any, screenshots: Path) -> None:
    assert lab.locator(".vpw-panels figcaption").nth(1).text_content() == EVIL
    assert lab.locator(".vpw-word").nth(4).text_content() == EVIL
    assert lab.locator(".vpw img").count() == 0
    assert lab.evaluate("window.hacked") is None
    assert lab.failures == []
    lab.screenshot(path=screenshots / "widgets-light.png")


@pytest.mark.parametrize("widget", ["panels", "reader", "maps"])
def test_pictures_and_numbers_are_saved_in_the_page(lab: Any, widget: str, tmp_path: Path) -> None:
    kept = {}
    for name in ("PNG", "SVG", "CSV"):
        with lab.expect_download() as download:
            lab.locator(f".vpw-{widget} .vpw-tools button", has_text=name).click()
        kept[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(kept[name])
    box = lab.locator(f".vpw-{widget}").bounding_box()
    with Image.open(kept["PNG"]) as picture:
        assert picture.size[0] == pytest.approx(2 * box["width"], abs=3)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # not blank
    drawing = xml.etree.ElementTree.parse(kept["SVG"]).getroot()
    images = drawing.findall("{*}image")
    assert len(images) >= 1 and all(image.get("href").startswith("data:image/png") for image in images)
    rows = kept["CSV"].read_text().splitlines()
    assert len(rows) == 1 + {"panels": 144, "reader": 2 * 5 * 144, "maps": 24}[widget]


def test_widgets_fit_beside_the_file_browser(lab: Any) -> None:
    assert no_sideways_scrolling(lab)


def test_the_dark_theme_is_readable(lab: Any, screenshots: Path) -> None:
    lab.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    lab.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    lab.wait_for_function("getComputedStyle(document.querySelector('.vpw-title')).color.includes('255, 255, 255')")
    for widget in ("panels", "reader", "maps", "copy"):
        lab.locator(f".vpw-{widget}").scroll_into_view_if_needed()
        lab.screenshot(path=screenshots / f"dark-{widget}.png")
