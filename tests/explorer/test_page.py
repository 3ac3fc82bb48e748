"""The explorer as one HTML file: opened from disk with the network blocked, with and without scripts."""

from __future__ import annotations

import base64
import gzip
import json
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from explorer.browser import SIZE, browser, saved, screenshots
from PIL import Image
from plotly.offline import get_plotlyjs

from vpworkbench.explorer.page import Part, Section, write_page
from vpworkbench.explorer.parts import encoded
from vpworkbench.explorer.widgets import Chart, Copy, Maps, Panels, Reader, Table

__all__ = ["browser", "screenshots"]
EVIL = '</script><img src=x onerror="window.hacked = true"><!--'
BOXES = [[x / 4, y / 4, (x + 1) / 4, (y + 1) / 4] for y in range(4) for x in range(4)]
OVERLAPPING = [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 0.7, 0.7]]
PICTURE = encoded(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))


def sections() -> list[Section]:
    panels = Panels(
        label=EVIL,
        alt="Masks on the image.",
        image=PICTURE,
        boxes=BOXES,
        values=np.eye(2, 16),
        picked=5,
        kinds=["shade", "mask"],
        captions=["attention", EVIL],
        width=700,
    )
    reader = Reader(
        label="Words",
        alt="The words.",
        image=PICTURE,
        boxes=BOXES,
        words=["a\x01b", EVIL],
        looks=np.full((2, 16), 0.03),
        reads=np.full((16, 2), 0.2),
    )
    regions = Panels(
        label="Boxes",
        alt="Boxes that overlap.",
        image=PICTURE,
        boxes=OVERLAPPING,
        captions=["", ""],
        values=[[0, 0, 0], [1, 0, 1]],
        kinds=["plain", "mask"],
        width=400,
    )
    curve = go.Scatter(x=[0, 1, 2], y=[1, 3, 2], name=EVIL)
    maps = Maps(label="Heads", values=np.arange(12.0).reshape(1, 3, 4), names=[EVIL], count_from=1)
    return [
        Section("Masks", EVIL, [Part(panels, PICTURE)]),
        Section("Boxes", "", [Part(regions, PICTURE)]),
        Section("Words", "", [Part(reader, PICTURE), Part(maps, PICTURE)]),
        Section(
            "Numbers",
            "",
            [
                Part(Chart(label="A curve")),
                Part(go.Figure(curve, {"meta": {"alt": "A curve."}}), PICTURE),
                Part(Table(label="Told", names=["asked", EVIL], rows=[[EVIL, "2%"], ["a, b", "3%"]])),
                Part(Copy(text=EVIL)),
            ],
        ),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "page.html", EVIL, sections())


def test_a_page_is_one_small_file_that_asks_for_nothing(written: Path) -> None:
    text = written.read_text()
    assert written.stat().st_size <= 8 * 2**20
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", text)
    assert text.count("<h2>") == 4


def test_what_a_page_holds_is_packed(written: Path) -> None:
    found = dict(re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', written.read_text()))
    stored = json.loads(gzip.decompress(base64.b64decode(found["values"])))
    assert sorted(stored["modules"]) == ["Chart", "Copy", "Maps", "Panels", "Reader", "Table"]  # each once
    assert [one["name"] for one in stored["values"]] == ["Panels", "Panels", "Reader", "Maps", "Chart", "Table", "Copy"]
    assert stored["figures"][0]["data"][0]["name"] == EVIL
    assert gzip.decompress(base64.b64decode(found["plotly"])).decode() == get_plotlyjs()
    assert written.stat().st_size < 2.5e6


def test_text_cannot_end_the_data(written: Path) -> None:
    assert EVIL not in written.read_text()
    assert "<img src=x" not in written.read_text()


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Any]:
    """The file in a browser that is offline and lists what it asked for."""
    context = browser.new_context(viewport=SIZE, offline=True)
    page = context.new_page()
    page.asked, page.failures = [], []
    page.route(re.compile("^(https?|wss?):"), lambda route: route.abort())
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.goto(written.as_uri())
    yield page
    context.close()


@pytest.mark.browser
def test_every_part_is_drawn_without_a_network(opened: Any, written: Path, screenshots: Path) -> None:
    for widget in ("panels", "reader", "maps", "chart", "table", "copy"):
        opened.wait_for_selector(f".vpw-{widget}[data-drawn='1']")
    opened.wait_for_selector(".plotly .scatterlayer path.js-line", state="attached")
    assert all(address == written.as_uri() or address.startswith(("blob:", "data:")) for address in opened.asked)
    assert opened.failures == []
    assert opened.evaluate("window.hacked") is None
    assert opened.locator(".vpw-title").nth(0).text_content() == EVIL
    assert opened.locator("h1").text_content() == EVIL
    assert opened.locator("figcaption").nth(1).text_content() == EVIL
    assert opened.locator(".vpw-table tr").nth(1).locator("td").all_text_contents() == [EVIL, "2%"]
    figure = opened.locator(".js-plotly-plot")
    assert (figure.get_attribute("role"), figure.get_attribute("aria-label")) == ("img", "A curve.")
    script = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert all(opened.locator("canvas").nth(place).evaluate(script) > 10 for place in range(4))
    assert opened.locator(".still:visible").count() == 0
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.screenshot(path=screenshots / "page.png", full_page=True)


@pytest.mark.browser
def test_a_page_answers_the_pointer_and_saves(opened: Any, tmp_path: Path) -> None:
    opened.wait_for_selector(".vpw-panels[data-drawn='1']")
    stage = opened.locator(".vpw-panels .vpw-stage").nth(0)
    box = stage.bounding_box()
    stage.click(position={"x": 0.6 * box["width"], "y": 0.1 * box["height"]})
    assert opened.locator(".vpw-panels .vpw-status").first.text_content().startswith("token 2 (row 1, column 3)")
    mark = opened.locator(".vpw-panels .vpw-picked").nth(1).evaluate("element => element.style.left")
    assert mark == "50%"
    download = saved(opened, opened.locator(".vpw-maps .vpw-tools button", has_text="CSV"))
    download.save_as(tmp_path / "maps.csv")
    table = pd.read_csv(tmp_path / "maps.csv")
    assert table["map"].unique().tolist() == [EVIL] and table["value"].tolist() == list(range(12))


@pytest.mark.browser
def test_of_boxes_that_overlap_the_smallest_is_hit(opened: Any) -> None:
    opened.wait_for_selector(".vpw-copy[data-drawn='1']")
    boxes = opened.locator(".vpw-panels").nth(1)
    stage, status = boxes.locator(".vpw-stage").first, boxes.locator(".vpw-status")
    side = stage.bounding_box()["width"]
    for at, token, told in ((0.9, 0, "hidden"), (0.3, 1, "seen"), (0.6, 2, "hidden")):
        stage.hover(position={"x": at * side, "y": at * side})
        assert status.text_content().startswith(f"token {token} ") and told in status.text_content()
    stage.click(position={"x": 0.6 * side, "y": 0.6 * side})
    mark = boxes.locator(".vpw-picked").first.bounding_box()
    assert mark["width"] == pytest.approx(0.2 * side, abs=1)
    masked = boxes.locator("canvas").nth(1)
    alike = "(canvas, at) => canvas.getContext('2d').getImageData(at * canvas.width, at * canvas.height, 1, 1).data[0]"
    darkest = (
        "canvas => Math.min(...canvas.getContext('2d').getImageData(0.85 * canvas.width, 0.85 * canvas.height, 9, 9)"
        ".data.filter((_, at) => at % 4 === 0))"
    )
    assert (
        masked.evaluate(darkest) < 60 < boxes.locator("canvas").nth(0).evaluate(darkest)
    )  # not over the box inside it
    assert masked.evaluate(alike, 0.45) == boxes.locator("canvas").nth(0).evaluate(alike, 0.45)


@pytest.mark.browser
def test_what_plotly_draws_is_saved_like_the_other_views(opened: Any, tmp_path: Path) -> None:
    opened.wait_for_selector(".plotly .scatterlayer path.js-line", state="attached")
    for name in ("PNG", "SVG", "CSV"):
        download = saved(opened, opened.locator(".vpw-chart .vpw-tools button", has_text=name))
        assert download.suggested_filename == f"a-curve.{name.lower()}"
        download.save_as(tmp_path / name)
    with Image.open(tmp_path / "PNG") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors(10**6)) > 10  # twice as fine, not blank
    drawing = xml.etree.ElementTree.parse(tmp_path / "SVG").getroot()
    assert any(EVIL in (part.text or "") or "js-line" in part.get("class", "") for part in drawing.iter())
    table = pd.read_csv(tmp_path / "CSV")
    assert table["trace"].tolist() == [EVIL] * 3 and table["y"].tolist() == [1, 3, 2]


@pytest.mark.browser
@pytest.mark.parametrize("widget", ["reader", "table"])
def test_what_is_told_is_saved_whatever_it_holds(opened: Any, widget: str, tmp_path: Path) -> None:
    """Control characters, which XML has no place for, and markup."""
    opened.wait_for_selector(f".vpw-{widget}[data-drawn='1']")
    for name in ("PNG", "SVG", "CSV"):
        download = saved(opened, opened.locator(f".vpw-{widget} .vpw-tools button", has_text=name))
        download.save_as(tmp_path / name)
    with Image.open(tmp_path / "PNG") as picture:
        assert len(picture.convert("L").getcolors(10**6)) > 10
    texts = [part.text for part in xml.etree.ElementTree.parse(tmp_path / "SVG").findall(".//{*}text")]
    table = pd.read_csv(tmp_path / "CSV")
    if widget == "reader":
        assert "ab" in texts
    else:
        assert "".join(EVIL.split()) in "".join(texts) and "3%" in texts
        assert table.columns.tolist() == ["asked", EVIL] and table.to_numpy().tolist() == [[EVIL, "2%"], ["a, b", "3%"]]


@pytest.mark.browser
def test_a_picture_that_cannot_be_saved_is_told(opened: Any) -> None:
    opened.wait_for_selector(".vpw-reader[data-drawn='1']")
    opened.locator(".vpw-word").first.evaluate("word => word.textContent = '\\ud800'")  # half of a letter
    opened.locator(".vpw-reader .vpw-tools button", has_text="PNG").click()
    opened.wait_for_function(
        "document.querySelector('.vpw-reader .vpw-status').textContent.startsWith('The PNG cannot be saved')"
    )


@pytest.mark.browser
def test_without_scripts_the_pictures_are_seen(browser: Any, written: Path) -> None:
    context = browser.new_context(viewport=SIZE, java_script_enabled=False)
    page = context.new_page()
    page.goto(written.as_uri())
    alts = [page.locator("img").nth(place).get_attribute("alt") for place in range(page.locator("img").count())]
    assert alts == ["Masks on the image.", "Boxes that overlap.", "The words.", "Heads", "A curve."]
    assert page.locator("img:visible").count() == 5
    assert page.locator("td:visible").all_text_contents() == [EVIL, "2%", "a, b", "3%"]
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("on_grid, told", [(True, "token 1 (row 2, column 1)"), (False, "token 1 · ")])
def test_regions_in_a_row_are_no_grid(browser: Any, tmp_path: Path, on_grid: bool, told: str) -> None:
    tower = [[0.2, place / 3, 0.8, (place + 1) / 3] for place in range(3)]
    panels = Panels(
        label="A tower",
        image=PICTURE,
        boxes=tower,
        on_grid=on_grid,
        captions=[""],
        kinds=["mask"],
        values=np.zeros((1, 3)),
    )
    page = browser.new_page()
    page.goto(write_page(tmp_path / "page.html", "", [Section("", "", [Part(panels, PICTURE)])]).as_uri())
    page.wait_for_selector(".vpw-panels[data-drawn='1']")
    stage = page.locator(".vpw-stage").first
    stage.hover(position={side: stage.bounding_box()[size] / 2 for side, size in (("x", "width"), ("y", "height"))})
    assert page.locator(".vpw-status").text_content().startswith(told)
    page.close()
