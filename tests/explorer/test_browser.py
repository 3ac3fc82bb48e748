"""The explorer in real pages: what the page shows after a click, a key, a file, in JupyterLab and Notebook 7."""

from __future__ import annotations

import base64
import io
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from explorer.browser import (  # fixtures are found by name in the module
    ROOT,
    SIZE,
    WAIT_MS,
    Jupyter,
    browser,
    finished,
    jupyter,
    no_sideways_scrolling,
    notebook,
    open_notebook,
    saved,
    screenshots,
    with_parameters,
)
from PIL import Image
from probes.tiny_models import llava_with_processor

import vpworkbench as vpw
from vpworkbench.data.records import Picture
from vpworkbench.explorer.parts import encoded as encoded_picture
from vpworkbench.explorer.widgets import STATIC
from vpworkbench.studies.examples import encoded
from vpworkbench.subjects import load_run

pytestmark = pytest.mark.browser
__all__ = ["browser", "jupyter", "screenshots"]

EVIL = '<img src=x onerror="window.hacked = true">'
WIDGETS = f"""
import numpy as np
from IPython.display import display
from vpworkbench.explorer.parts import encoded
from vpworkbench.explorer.widgets import Copy, Drop, Maps, Panels, Reader, Table

evil = {EVIL!r}
edges = np.linspace(0, 1, 13)
boxes = [[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(12) for x in range(12)]
picture = encoded(np.full((120, 120, 3), 255, np.uint8))
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
table = Table(label="Told", names=["mask", evil], rows=[["attention", evil], ["random", "0.3, or so"]], width=700)
for part in (panels, reader, maps, drop, table, copy):
    display(part)
"""


@pytest.fixture(scope="module")
def lab(browser: Any, jupyter: Jupyter) -> Iterator[Any]:
    """JupyterLab with one of each widget."""
    page = open_notebook(browser, jupyter, notebook(jupyter, "widgets.ipynb", WIDGETS))
    page.wait_for_selector(".vpw-copy:not([data-drawn='0'])")
    assert finished(page) == []
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
    address = page.locator(selector).nth(place).evaluate("canvas => canvas.toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


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
    assert "mask: hidden" in lab.locator(".vpw-panels .vpw-status").text_content().replace("kernel: 55", "mask")
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


def test_a_slow_picture_is_not_drawn_over_a_newer_one(lab: Any) -> None:
    shared = (STATIC / "shared.js").read_text(encoding="utf-8")
    slow, newer = (list(encoded_picture(np.zeros((side, side, 3), np.uint8))) for side in (400, 20))
    widths = lab.evaluate(
        f"""async ([slow, newer]) => {{
            {shared}
            let now = new DataView(new Uint8Array(slow).buffer);
            const picture = decoder({{ get: () => now }}, "image");
            const draws = [picture()];
            now = new DataView(new Uint8Array(newer).buffer);
            draws.push(picture());
            return (await Promise.all(draws)).map((bitmap) => bitmap.width);
        }}""",
        [slow, newer],
    )
    assert widths == [20, 20]


def test_text_from_data_stays_text(lab: Any, screenshots: Path) -> None:
    assert lab.locator(".vpw-panels figcaption").nth(1).text_content() == EVIL
    assert lab.locator(".vpw-word").nth(4).text_content() == EVIL
    assert lab.locator(".vpw img").count() == 0
    assert lab.evaluate("window.hacked") is None
    assert lab.failures == []
    lab.screenshot(path=screenshots / "widgets-light.png")


@pytest.mark.parametrize("widget", ["panels", "reader", "maps", "table"])
def test_pictures_and_numbers_are_saved_in_the_page(lab: Any, widget: str, tmp_path: Path) -> None:
    kept = {}
    for name in ("PNG", "SVG", "CSV"):
        download = saved(lab, lab.locator(f".vpw-{widget} .vpw-tools button", has_text=name))
        kept[name] = tmp_path / download.suggested_filename
        download.save_as(kept[name])
    box = lab.locator(f".vpw-{widget}").bounding_box()
    with Image.open(kept["PNG"]) as picture:
        assert picture.size[0] == pytest.approx(2 * box["width"], abs=3)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # not blank
    drawing = xml.etree.ElementTree.parse(kept["SVG"]).getroot()
    images = drawing.findall("{*}image")
    assert bool(images) == (widget != "table") and all(
        image.get("href").startswith("data:image/png") for image in images
    )
    rows = kept["CSV"].read_text().splitlines()
    assert len(rows) == 1 + {"panels": 144, "reader": 2 * 5 * 144, "maps": 24, "table": 2}[widget]


def test_widgets_fit_beside_the_file_browser(lab: Any) -> None:
    assert no_sideways_scrolling(lab)


def test_the_dark_theme_is_readable(lab: Any, screenshots: Path) -> None:
    lab.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    lab.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    lab.wait_for_function("getComputedStyle(document.querySelector('.vpw-title')).color.includes('255, 255, 255')")
    for widget in ("panels", "reader", "maps", "table", "copy"):
        lab.locator(f".vpw-{widget}").scroll_into_view_if_needed()
        lab.screenshot(path=screenshots / f"dark-{widget}.png")


# ---- the explorer itself, in its notebook

TABS = ["Masks", "Words and patches", "Flow", "Try it"]


def opened_explorer(browser: Any, jupyter: Jupyter, scenes: Path, place: str) -> Any:
    stored = ROOT / "notebooks" / "05_explore_masks.ipynb"
    name = with_parameters(jupyter, stored, f"{place}.ipynb", data=str(scenes), name=place)
    page = open_notebook(browser, jupyter, name, place=place)
    assert finished(page) == []
    page.locator(".vpw-explorer").scroll_into_view_if_needed()
    page.wait_for_selector(".vpw-explorer .vpw-panels:not([data-drawn='0'])")
    return page


@pytest.fixture(scope="module")
def explorer(browser: Any, jupyter: Jupyter, scenes_folder: Path) -> Iterator[Any]:
    """05_explore_masks in JupyterLab, run to its end."""
    page = opened_explorer(browser, jupyter, scenes_folder, "lab")
    yield page
    page.context.close()


def tab(page: Any, name: str) -> None:
    page.locator(".vpw-explorer .lm-TabBar-tab", has_text=name).click()


def drawn(page: Any, widget: str, act: Callable[[], object]) -> None:
    """Do something, then wait until new data are on the widget."""
    place = page.locator(f".vpw-explorer {widget}").first
    version = int(place.get_attribute("data-version"))
    act()
    page.wait_for_function(
        "([widget, version]) => document.querySelector(`.vpw-explorer ${widget}`).dataset.version > version",
        arg=[widget, version],
    )


def hidden_cells(page: Any, panel: int, side: int = 6, plain: int = 0) -> set[tuple[int, int]]:
    """Cells of a mask panel that differ from the plain image, told by their centres."""
    seen, masked = (
        pixels(page, ".vpw-explorer .vpw-panels canvas", place)[..., :3].astype(int) for place in (plain, panel)
    )
    at = ((np.arange(side) + 0.4) / side * len(seen)).astype(int)
    rows, columns = np.nonzero(np.abs(seen - masked).sum(-1)[np.ix_(at, at)] > 4)
    return set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_a_token_is_picked_and_masked(explorer: Any, screenshots: Path) -> None:
    tab(explorer, "Masks")
    stage = explorer.locator(".vpw-explorer .vpw-stage").nth(0)
    drawn(explorer, ".vpw-panels", lambda: stage.click(position=cell(stage, 3, 2, 6, 6)))
    for panel in (2, 3):  # by attention, at random
        assert len(hidden_cells(explorer, panel)) == 5 and (3, 2) in hidden_cells(explorer, panel)
    handle = explorer.locator(".vpw-explorer .noUi-handle").first
    drawn(explorer, ".vpw-panels", lambda: handle.press("ArrowRight"))
    assert [len(hidden_cells(explorer, panel)) for panel in (2, 3)] == [6, 6]
    by_attention, at_random = (hidden_cells(explorer, panel) for panel in (2, 3))
    drawn(explorer, ".vpw-panels", lambda: explorer.get_by_role("button", name="draw again").click())
    assert hidden_cells(explorer, 2) == by_attention and hidden_cells(explorer, 3) != at_random
    heads = explorer.locator(".vpw-explorer select", has_text="mean of heads")
    for name in ("head 2", "mean of heads"):
        drawn(explorer, ".vpw-panels", lambda name=name: heads.select_option(name))
        assert heads.evaluate("select => select.selectedOptions[0]?.text.replaceAll('\\u00a0', ' ')") == name
    assert hidden_cells(explorer, 2) == by_attention
    explorer.wait_for_function("!document.querySelector('.vpw-explorer table').textContent.includes('…')")
    assert explorer.get_by_text("This picture cannot be read").count() == 0
    explorer.screenshot(path=screenshots / "explorer-masks.png")


@pytest.mark.parametrize("select", ["column", "symmetric", "row"])
def test_what_hides_with_the_pick_is_chosen(explorer: Any, select: str, scenes: list[Picture]) -> None:
    """The page's mask is the top of the parsing attention read that way, here computed anew."""
    tab(explorer, "Masks")
    toggle = explorer.locator(".vpw-explorer .jupyter-button", has_text=select)
    drawn(explorer, ".vpw-panels", toggle.click)
    assert "mod-active" in toggle.get_attribute("class")
    model, _ = load_run()
    held_out = next(picture for picture in scenes if picture.split == "val")
    one = next(encoded(model.visual, [held_out]))[2][0].numpy()
    pick = 6 * 3 + 2
    ranked = {"row": one[pick], "column": one[:, pick], "symmetric": one[pick] + one[:, pick]}[select]
    ranked[pick] = np.inf
    wanted = {divmod(int(token), 6) for token in np.argsort(-ranked)[:6]}
    assert hidden_cells(explorer, 2) == wanted


def test_words_layers_and_heads(explorer: Any, screenshots: Path) -> None:
    tab(explorer, "Words and patches")
    status = explorer.locator(".vpw-explorer .vpw-reader .vpw-status")
    word = explorer.locator(".vpw-explorer .vpw-word").nth(1)
    word.hover()
    before = status.text_content()
    assert before.startswith(f"“{word.text_content()}” looks ")
    heads = explorer.locator(".vpw-explorer .vpw-maps .vpw-stage").nth(0)
    drawn(explorer, ".vpw-reader", lambda: heads.click(position=cell(heads, 0, 3, 3, 6)))
    assert explorer.locator(".vpw-explorer .vpw-reader .vpw-title").text_content().endswith("layer 1, head 4")
    word.hover()
    assert status.text_content() != before
    word.click()
    stage = explorer.locator(".vpw-explorer .vpw-reader .vpw-stage")
    stage.hover(position=cell(stage, 1, 1, 6, 6))
    assert status.text_content().startswith(f"“{word.text_content()}” looks at token 7 ")
    assert "vpw-picked" in word.get_attribute("class")
    explorer.screenshot(path=screenshots / "explorer-words.png")
    explorer.locator(".vpw-explorer .vpw-sentence").press("Escape")
    rolled = explorer.get_by_label("rolled out from the input")
    drawn(explorer, ".vpw-reader", rolled.click)
    title = explorer.locator(".vpw-explorer .vpw-reader .vpw-title")
    assert title.text_content().endswith("rolled out to layer 1")
    word.hover()
    assert status.text_content().startswith(f"“{word.text_content()}” looks ") and status.text_content() != before
    drawn(explorer, ".vpw-reader", rolled.click)


def test_the_code_that_recreates_the_view_is_told(explorer: Any) -> None:
    tab(explorer, "Masks")
    explorer.locator(".vpw-explorer .lm-Widget", has_text="copy as code").last.click()
    code = explorer.locator(".vpw-explorer .vpw-code")
    code.wait_for()
    stage = explorer.locator(".vpw-explorer .vpw-stage").nth(0)
    drawn(explorer, ".vpw-panels", lambda: stage.click(position=cell(stage, 1, 1, 6, 6)))
    explorer.wait_for_function("document.querySelector('.vpw-explorer .vpw-code').textContent.includes('pick(7, k=6')")
    lines = code.text_content().splitlines()
    assert lines[0] == "from vpworkbench.explorer import explore" and lines[-1] == "view"
    assert any(line.startswith("view.read(") for line in lines) and any(line.startswith("view.say(") for line in lines)
    compile("\n".join(lines), "code", "exec")
    explorer.locator(".vpw-explorer .lm-Widget", has_text="copy as code").last.click()


def test_the_whole_is_saved_as_one_page(browser: Any, explorer: Any, tmp_path: Path, screenshots: Path) -> None:
    """From the page, without code: the file opens without a kernel and without a network."""
    for _ in range(2):  # again, as after another pick
        download = saved(explorer, explorer.get_by_role("button", name="save as one page"))
    assert download.suggested_filename == "explorer.html"
    explorer.locator(".vpw-save .vpw-status", has_text="explorer.html is saved.").wait_for()
    explorer.screenshot(path=screenshots / "explorer-saved.png")
    download.save_as(tmp_path / "explorer.html")
    context = browser.new_context(viewport=SIZE, offline=True)
    page = context.new_page()
    page.goto((tmp_path / "explorer.html").as_uri())
    page.locator(".js-plotly-plot").wait_for()
    assert page.locator("h2").all_text_contents() == ["Masks", "Words and patches", "Flow", "What it says"]
    assert page.locator(".vpw-table:visible").count() == 2 and page.locator(".still:visible").count() == 0
    assert "(ITM)" in page.locator(".vpw-table").last.text_content()
    context.close()


def test_an_answers_words_show_where_they_looked(browser: Any, tmp_path: Path, screenshots: Path) -> None:
    """In the saved page: hover draws a word's map and tells its numbers, two clicks compare two words, keys do too."""
    question, image = "what is on the left", np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    model, processor = llava_with_processor(question)
    view = vpw.explore(model, image, processor=processor, question=question, answer="a red ball")
    view.save(tmp_path / "answer.html")
    context = browser.new_context(viewport=SIZE, offline=True)
    page = context.new_page()
    page.goto((tmp_path / "answer.html").as_uri())
    words, figures, status = (page.locator(f".vpw-answer {name}") for name in (".vpw-word", "figure", ".vpw-status"))
    words.nth(2).wait_for()
    plain = pixels(page, ".vpw-answer canvas")
    words.nth(1).hover()
    assert "“red” looks" in status.text_content() and not np.array_equal(pixels(page, ".vpw-answer canvas"), plain)
    shown = figures.locator("figcaption").first.text_content()
    assert shown.startswith(f"“red”: {float(view.answer.image_share[1].mean()):.1%}")
    words.nth(1).click()
    words.nth(2).click()
    assert figures.locator("visible=true").count() == 2
    assert page.locator(".vpw-answer [aria-selected=true]").all_text_contents() == ["red", "ball"]
    page.screenshot(path=screenshots / "answer.png")
    page.locator(".vpw-answer .vpw-sentence").press("Escape")
    assert page.locator(".vpw-answer [aria-selected=true]").count() == 0
    context.close()
    view.close()


@pytest.mark.parametrize("name", ["Masks", "Try it"])
def test_what_is_told_in_words_is_saved_too(explorer: Any, name: str, tmp_path: Path) -> None:
    tab(explorer, name)
    table = explorer.locator(".vpw-explorer .vpw-table:visible")
    for kind in ("PNG", "SVG", "CSV"):
        download = saved(explorer, table.locator("button", has_text=kind))
        download.save_as(tmp_path / kind)
    kept = pd.read_csv(tmp_path / "CSV", dtype=str)
    assert kept.columns[0] == "model" and kept.to_numpy().ravel().tolist() == table.locator("td").all_text_contents()


def test_a_cell_of_the_triangle_shows_its_span(explorer: Any, screenshots: Path) -> None:
    tab(explorer, "Flow")
    explorer.wait_for_selector(".vpw-explorer .js-plotly-plot .heatmaplayer image", state="attached")
    figure = explorer.locator(".vpw-explorer .js-plotly-plot").first
    figure.and_(explorer.get_by_role("img", name="Inter-Modality Flow as a triangle")).wait_for()
    rows = figure.evaluate("plot => [Array.from(plot.data[0].x), Array.from(plot.data[0].y)]")
    assert rows == [[1, 2, 3], [1, 2, 3]]
    triangle = figure.locator(".nsewdrag[data-subplot=xy]")
    triangle.scroll_into_view_if_needed()
    box = triangle.bounding_box()
    place = (box["x"] + 5 / 6 * box["width"], box["y"] + 1 / 2 * box["height"])  # second row, last column
    explorer.mouse.move(*place)
    explorer.wait_for_selector(".vpw-explorer .hoverlayer text", state="attached")
    explorer.mouse.click(*place)
    title = explorer.locator(".vpw-explorer .vpw-title", has_text="from the input of layer 2 to the output of 3")
    title.wait_for()
    explorer.locator(".vpw-explorer .widget-readout:visible", has_text="2 – 3").wait_for()  # the slider goes along
    outer = explorer.locator(".vpw-explorer").bounding_box()
    assert figure.bounding_box()["x"] + figure.bounding_box()["width"] <= outer["x"] + outer["width"]
    explorer.screenshot(path=screenshots / "explorer-flow.png")


def test_the_figure_is_saved_like_the_other_views(explorer: Any, tmp_path: Path) -> None:
    tab(explorer, "Flow")
    for name in ("PNG", "SVG", "CSV"):
        download = saved(explorer, explorer.locator(".vpw-explorer .vpw-chart .vpw-tools button", has_text=name))
        assert download.suggested_filename == f"flow-nmi-and-tokens.{name.lower()}"
        download.save_as(tmp_path / name)
    with Image.open(tmp_path / "PNG") as picture:
        assert picture.width >= 1500 and len(picture.convert("L").getcolors(10**6)) > 50
    assert xml.etree.ElementTree.parse(tmp_path / "SVG").getroot().tag.endswith("svg")
    table = pd.read_csv(tmp_path / "CSV")
    cells = table[table.value.notna()]
    assert sorted(zip(cells.y, cells.x, strict=True)) == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)]
    from_input = table[(table["x axis"] == "layer") & (table.trace == cells.trace.iloc[0])][:3]
    np.testing.assert_allclose(from_input.y, cells[cells.y == 1].value, rtol=1e-6)


def test_the_sentence_and_the_picture_are_ones_own(explorer: Any, tmp_path: Path, screenshots: Path) -> None:
    sentence = explorer.get_by_label("sentence").first
    sentence.fill(f"a red [MASK] {EVIL}")
    drawn(explorer, ".vpw-reader", lambda: sentence.press("Enter"))
    words = explorer.locator(".vpw-explorer .vpw-word").all_text_contents()
    assert words[:4] == ["[CLS]", "a", "red", "[MASK]"]
    assert explorer.evaluate("window.hacked") is None
    tab(explorer, "Try it")
    explorer.wait_for_function("document.querySelector('.vpw-explorer').textContent.includes('[MASK]')")
    good, broken = tmp_path / "blue.png", tmp_path / "broken.png"
    Image.new("RGB", (90, 90), (20, 40, 200)).save(good)
    broken.write_bytes(b"no picture")
    upload, status = (
        explorer.locator(".vpw-explorer .vpw-file"),
        explorer.locator(".vpw-explorer .vpw-drop .vpw-status"),
    )
    drawn(explorer, ".vpw-drop", lambda: upload.set_input_files(broken))
    assert status.text_content() == "broken.png: no picture that can be read"
    upload.set_input_files(good)
    wait_for_colour(explorer, (20, 40, 200))
    explorer.screenshot(path=screenshots / "explorer-try.png")
    dropped(explorer, (255, 0, 0))
    wait_for_colour(explorer, (255, 0, 0))
    explorer.wait_for_function("document.querySelector('.vpw-explorer').textContent.includes('red.png is read')")
    assert "vpw-over" not in explorer.locator(".vpw-explorer .vpw-zone").get_attribute("class")


def test_blocked_attention_is_hatched(explorer: Any, screenshots: Path) -> None:
    tab(explorer, "Try it")
    explorer.get_by_label("block", exact=True).select_option("words from the image")
    answers = explorer.locator(".vpw-explorer .vpw-table:visible")
    answers.locator("th", has_text="answer with the block").wait_for()
    first, last = answers.locator("tr").nth(1).locator("td").all_text_contents()[-2:]
    assert first.endswith("%") and last.endswith("%") and first != last
    explorer.screenshot(path=screenshots / "explorer-try-blocked.png")
    tab(explorer, "Words and patches")
    explorer.locator(".vpw-explorer .vpw-hatched:visible").wait_for()
    cells = explorer.locator(".vpw-explorer .vpw-maps:visible .vpw-stage").first
    cells.hover(position=cell(cells, 0, 0, 3, 6))
    status = explorer.locator(".vpw-explorer .vpw-maps:visible .vpw-status")
    assert "words to image: blocked · image to words: " in status.text_content()
    explorer.locator(".vpw-explorer .vpw-word").nth(1).hover()
    explorer.locator(".vpw-explorer .vpw-reader .vpw-status", has_text="cannot look at the image: blocked").wait_for()
    explorer.screenshot(path=screenshots / "explorer-words-blocked.png")
    canvas = pixels(explorer, ".vpw-explorer .vpw-reader .vpw-stage canvas")[..., :3]
    assert np.median(canvas) < 60
    tab(explorer, "Flow")
    explorer.locator(".vpw-explorer .vpw-hatched:visible").wait_for()
    explorer.screenshot(path=screenshots / "explorer-flow-blocked.png")
    tab(explorer, "Try it")
    explorer.get_by_label("block", exact=True).select_option("none")
    answers.locator("th", has_text="answer with the block").wait_for(state="detached")


def wait_for_colour(page: Any, colour: tuple[int, int, int]) -> None:
    """Wait until the first picture has this median colour; answers to earlier edits may be drawn before it."""
    until = time.monotonic() + WAIT_MS / 1000
    median = None
    while time.monotonic() < until:
        canvas = pixels(page, ".vpw-explorer .vpw-panels canvas")
        median = np.median(canvas[..., :3].reshape(-1, 3), axis=0)
        if np.abs(median - colour).max() <= 6:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"the picture is {median}, not {colour}")


def dropped(page: Any, colour: tuple[int, int, int]) -> None:
    """Drag a picture of one colour over the zone and let it go."""
    stream = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(stream, "PNG")
    zone = page.locator(".vpw-explorer .vpw-zone")
    held = page.evaluate_handle(
        """bytes => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], "red.png", { type: "image/png" }));
            return held;
        }""",
        list(stream.getvalue()),
    )
    zone.dispatch_event("dragover", {"dataTransfer": held})
    assert "vpw-over" in zone.get_attribute("class")
    zone.dispatch_event("drop", {"dataTransfer": held})


def test_bad_sentences_leave_the_explorer_alive(explorer: Any) -> None:
    sentence = explorer.get_by_label("sentence").first
    sentence.fill("word " * 2000)
    sentence.press("Enter")
    explorer.wait_for_function("document.querySelector('.vpw-explorer').textContent.includes('2,000 words')")
    sentence.fill("a blue square")
    drawn(explorer, ".vpw-reader", lambda: sentence.press("Enter"))
    assert explorer.locator(".vpw-explorer .vpw-word").all_text_contents()[1:4] == ["a", "blue", "square"]
    tab(explorer, "Flow")
    explorer.wait_for_selector(".vpw-explorer .js-plotly-plot .heatmaplayer image", state="attached")
    triangle = "plot => [plot.data[0].x.length, plot.data[0].z.length]"  # still whole after new numbers
    assert explorer.locator(".vpw-explorer .js-plotly-plot").first.evaluate(triangle) == [3, 3]


@pytest.mark.parametrize("name", TABS)
def test_views_fit_beside_the_file_browser(explorer: Any, name: str, screenshots: Path) -> None:
    tab(explorer, name)
    assert no_sideways_scrolling(explorer)
    assert explorer.failures == []


def test_all_is_reached_by_keys(explorer: Any) -> None:
    """From the sentence on by the tab key: controls, tabs, the pictures and what saves them."""
    tab(explorer, "Masks")
    explorer.get_by_label("sentence").first.focus()
    reached = []
    for _ in range(40):
        explorer.keyboard.press("Tab")
        reached.append(explorer.evaluate(_FOCUSED))
        if not reached[-1]:
            break
    told = "|".join(filter(None, reached))
    for name in (
        "picture",
        "Masks",
        "slider",
        "attends to",
        "mean of heads",
        "another random",
        "the image.",
        "random mask.",
        "Save as a PNG",
        "Save as an SVG",
        "Save the numbers",
        "error under",
    ):
        assert name in told, f"{name} is not among {told}"
    tab(explorer, "Flow")
    explorer.wait_for_selector(".vpw-explorer .js-plotly-plot .heatmaplayer image", state="attached")
    explorer.locator(".vpw-explorer .lm-TabBar-tab", has_text="Flow").focus()
    reached = []
    while len(reached) < 20 and reached.count("slider ") < 3:  # layer, from i, to j: ipywidgets' handles have no name
        explorer.keyboard.press("Tab")
        reached.append(explorer.evaluate(_FOCUSED))
    title = explorer.locator(".vpw-explorer .vpw-title:visible", has_text="A from the input")
    for keys, span in (
        (("End",), "to the output of 3"),
        (("Shift+Tab", "Home"), "of layer 1 to the output of 3"),
        (("Tab", "Home"), "of layer 1 to the output of 1"),
    ):
        for key in keys:
            explorer.keyboard.press(key)
        title.filter(has_text=span).wait_for()


_FOCUSED = """() => {
  const at = document.activeElement;
  if (!at.closest(".vpw-explorer")) return "";
  const label = at.getAttribute("aria-label") || at.labels?.[0]?.textContent || at.title || at.textContent;
  return `${at.getAttribute("role") ?? at.tagName} ${label}`.replaceAll("\\u00a0", " ");
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_text_stands_out_in_both_themes(explorer: Any, theme: str, screenshots: Path) -> None:
    """Contrast by WCAG's formula of every text of every view against what lies behind it."""
    explorer.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
    light = str("Light" in theme).lower()
    explorer.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
    explorer.wait_for_timeout(500)  # variables of the theme arrive with its style sheet
    for name in TABS:
        tab(explorer, name)
        explorer.locator(".vpw-explorer").scroll_into_view_if_needed()
        explorer.screenshot(path=screenshots / f"explorer-{name.split()[0].lower()}-{theme.split()[1].lower()}.png")
        faint = explorer.evaluate(_FAINT)
        assert faint == [], f"{name}: {faint}"


_FAINT = """() => {
  const numbers = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const shine = ([red, green, blue]) => [red, green, blue].map(one => one / 255)
    .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = element => {
    for (let outer = element; outer; outer = outer.parentElement) {
      const colour = numbers(getComputedStyle(outer).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.9) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll(".vpw-explorer *")) {
    const text = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join("").trim();
    const box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height || element.closest("select, .modebar, .heatmaplayer, .vpw-tip")) continue;
    const style = getComputedStyle(element);
    if (style.visibility === "hidden" || style.opacity === "0") continue;
    const ink = numbers(element instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [shine(ink), shine(behind(element))].sort((one, other) => other - one);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 3) faint.push(`${text.slice(0, 30)}: ${contrast.toFixed(1)} (${style.color} ${style.fill})`);
  }
  return faint;
}"""


@pytest.mark.slow
def test_the_same_notebook_in_notebook_7(
    browser: Any, jupyter: Jupyter, scenes_folder: Path, screenshots: Path
) -> None:
    page = opened_explorer(browser, jupyter, scenes_folder, "notebook")
    stage = page.locator(".vpw-explorer .vpw-stage").nth(0)
    drawn(page, ".vpw-panels", lambda: stage.click(position=cell(stage, 3, 2, 6, 6)))
    assert (3, 2) in hidden_cells(page, 2)
    assert no_sideways_scrolling(page) and page.failures == []
    page.screenshot(path=screenshots / "notebook-7.png")
    page.context.close()


TWO = """
import copy

import torch

from vpworkbench.explorer import explore
from vpworkbench.subjects import load_run

model, _ = load_run()
other = copy.deepcopy(model)
torch.manual_seed(0)
for parameter in other.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
explore(model, {data!r}, beside=other)
"""


def test_two_models_stand_side_by_side(browser: Any, jupyter: Jupyter, scenes_folder: Path, screenshots: Path) -> None:
    """One pick and the same dice for both; a mask, a sentence and a flow of each."""
    page = open_notebook(browser, jupyter, notebook(jupyter, "two.ipynb", TWO.format(data=str(scenes_folder))))
    assert finished(page) == []
    page.locator(".vpw-explorer").scroll_into_view_if_needed()
    page.wait_for_selector(".vpw-explorer .vpw-panels:not([data-drawn='0'])")
    titles = page.locator(".vpw-explorer .vpw-title").all_text_contents()
    assert {"model: masks", "model (2): masks"} <= set(titles)
    second = page.locator(".vpw-explorer .vpw-panels .vpw-stage").nth(4)
    drawn(page, ".vpw-panels", lambda: second.click(position=cell(second, 3, 2, 6, 6)))
    page.wait_for_function(
        "document.querySelectorAll('.vpw-explorer .vpw-panels .vpw-picked:not([hidden])').length > 8"
    )
    first, other = hidden_cells(page, 2), hidden_cells(page, 6, plain=4)
    assert (3, 2) in first & other and first != other and len(first) == len(other) == 5
    assert hidden_cells(page, 3) == hidden_cells(page, 7, plain=4)
    page.screenshot(path=screenshots / "two-masks.png")
    tab(page, "Words and patches")
    assert page.locator(".vpw-explorer .vpw-reader:visible").count() == 2
    page.screenshot(path=screenshots / "two-words.png")
    tab(page, "Flow")
    page.wait_for_selector(".vpw-explorer .js-plotly-plot .heatmaplayer image", state="attached")
    triangles = "plot => plot.data.filter(trace => trace.type === 'heatmap').length"
    assert page.locator(".vpw-explorer .js-plotly-plot").evaluate(triangles) == 2
    assert no_sideways_scrolling(page) and page.failures == []
    page.screenshot(path=screenshots / "two-flow.png")
    page.context.close()
