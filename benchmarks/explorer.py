"""What the explorer costs in a real page: from an event to new data on the element, and the page against its peers.

A headless Chromium shows JupyterLab; the times are taken by the page itself, so browser, kernel and what lies between
count, and the driver does not.

    make bench-explorer        or        python -m benchmarks.explorer --help
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import plotly.graph_objects as go
import torch
import typer
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import report
from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Picture
from vpworkbench.errors import SettingsError
from vpworkbench.explorer import Explorer, explore
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.settings import ModelSettings, preset

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WORDS = [f"word{number}" for number in range(500)]
TARGETS_MS = {name: (80, 150) for name in ("click a token", "k", "head of the mask", "layer and head")} | {
    "layer of the tokens (plotly)": (120, 200),
    "map of 600 x 600": (100, 200),
    "sentence, ablation-224": (1_500, None),
}
"""Median and 95th percentile that an event may take on two CPU cores; the bare slider has none."""
GRIDS = {64: 6, 128: 10, 184: 12, 256: 14}
"""Tokens of a page, and on a side of its image; the rest are words."""

CELLS = {
    "wide": """
from benchmarks.explorer import wide
view = wide()
view
""",
    "more": """
import ipywidgets
import numpy as np
from IPython.display import display
from vpworkbench.explorer.widgets import Maps
slider, label = ipywidgets.IntSlider(description="floor"), ipywidgets.Label("0")
label.add_class("floor")
slider.observe(lambda change: setattr(label, "value", str(change.new)), "value")
values = np.random.default_rng(0).random((8, 1, 600, 600), dtype=np.float32)
maps = Maps(values=values[0], names=["600 x 600"], row_name="query", column_name="key", width=700)
maps.add_class("large")
other = ipywidgets.IntSlider(description="large")
other.observe(lambda change: maps.update(values=values[change.new % 8]), "value")
display(slider, label, other, maps)
""",
    "ablation": """
from benchmarks.explorer import ablation
view = ablation()
view
""",
}

CLOCK = """() => {
  const clock = window.vpwClock = { start: null, took: null };
  for (const kind of ["click", "keydown", "change"])
    document.addEventListener(kind, event => { clock.start ??= event.timeStamp; }, true);
  const end = (at, stop) => {
    if (clock.start === null || clock.took !== null) return;
    clock.took = at - clock.start;
    stop();
  };
  clock.arm = (selector, way) => {
    [clock.start, clock.took] = [null, null];
    const element = document.querySelector(selector);
    if (way === "plotly") {
      const drawn = () => end(performance.now(), () => element.removeListener("plotly_afterplot", drawn));
      element.on("plotly_afterplot", drawn);
      return;
    }
    const before = element.dataset.version;
    const observer = new MutationObserver(() => {
      if (way === "text") end(performance.now(), () => observer.disconnect());
      else if (element.dataset.version !== before) end(Number(element.dataset.drawnAt), () => observer.disconnect());
    });
    const text = { childList: true, characterData: true, subtree: true };
    observer.observe(element, way === "text" ? text : { attributes: true, attributeFilter: ["data-drawn"] });
  };
}"""


def measure_explorer(
    *, events: int = 20, tokens: Sequence[int] = tuple(GRIDS), scripts: str | Path = ""
) -> dict[str, Any]:
    """Measure the explorer of models with random weights in JupyterLab, and its page against bertviz and CircuitsVis.

    Parameters
    ----------
    events : int
        Of each kind; the first two warm up and do not count.
    tokens : sequence of int
        Lengths at which pages are compared, of those in `GRIDS`; 12 layers of 12 heads.
    scripts : path
        Folder of the scripts that the peers' pages load from a network, by file name; empty: the network is asked.

    Returns
    -------
    dict
        `events`: milliseconds by kind, `median` and `p95`; `first_view_s` from run-all until the open tab is drawn,
        `all_views_s` until plotly's figure in a tab behind it is there too; `pages`: by tool and length `build_s`,
        `bytes` and `first_drawing_s` (None: nothing was drawn in a minute, for example without a network).

    Raises
    ------
    SettingsError
        If Playwright or a browser is missing.
    """
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, _browser() as browser, _jupyter(Path(folder)) as address:
        page, first_s, all_s = _open(browser, address, Path(folder), "wide", ["wide", "more"], ".large .vpw")
        for name, (target, way, act) in tqdm(_actions(page).items(), desc="events", unit="kind"):
            measured[name] = _times(page, target, way, act, events)
        _close(page)
        page, *_ = _open(browser, address, Path(folder), "ablation", ["ablation"], ".vpw-panels")
        measured["sentence, ablation-224"] = _edits(page, max(5, events // 3))
        _close(page)
        pages = _pages(browser, Path(folder), tokens, Path(scripts) if scripts else None)
    sizes = {"device": f"cpu, {os.cpu_count()} cores", "torch": torch.__version__}
    opened = {"first_view_s": first_s, "all_views_s": all_s}
    return sizes | opened | {"events": {name: _quantiles(times) for name, times in measured.items()}, "pages": pages}


def wide(layers: int = 12, grid: int = 12, words: int = 40) -> Explorer:
    """An explorer of a model with random weights, 12 heads, grid^2 visual tokens, and a sentence of so many tokens."""
    settings = ModelSettings(
        visual=preset("tiny").visual.model_copy(update={"image_px": 16 * grid, "window": grid}),
        fusion=preset("tiny").fusion.model_copy(update={"layers": layers, "heads": 12}),
        text_tokens=words,
    )
    return explore(_model(settings), [_noise(16 * grid, " ".join(WORDS[: words - 2]))])  # [CLS] and [SEP]


def ablation() -> Explorer:
    """An explorer at the sizes of the paper's ablations: Swin-T at 224 px, three layers of width 768."""
    chosen = preset("ablation-224")
    settings = ModelSettings(visual=chosen.visual, fusion=chosen.fusion, text_tokens=chosen.data.text_tokens)
    return explore(_model(settings), [_noise(chosen.visual.image_px, " ".join(WORDS[:10]))])


def _model(settings: ModelSettings) -> VisualParsingModel:
    torch.manual_seed(0)
    return VisualParsingModel(settings, build_tokenizer([" ".join(WORDS)])).eval()


def _noise(side: int, text: str) -> Picture:
    folder = Path(tempfile.mkdtemp(prefix="vpworkbench-bench-"))
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return Picture("noise", ImageFile(folder, "noise.png"), "val", (text,))


# ----------------------------------------------------------------------------------------------- in JupyterLab


def _actions(page: Any) -> dict[str, tuple[str, str, Callable[[], None]]]:
    """What is done, on which element its answer is awaited, and how the answer shows there."""
    stage = page.locator(".vpw-panels .vpw-stage").first
    places = iter(range(10**6))

    def click_token() -> None:
        token = 7 * next(places) % 144
        box = stage.bounding_box()
        stage.click(
            position={"x": (token % 12 + 0.5) * box["width"] / 12, "y": (token // 12 + 0.5) * box["height"] / 12}
        )

    def tab(name: str) -> None:
        page.locator(".vpw-explorer .lm-TabBar-tab", has_text=name).first.click()

    def slide(scope: str, place: int, keys: tuple[str, str] = ("ArrowRight", "ArrowLeft")) -> Callable[[], None]:
        handle = page.locator(f"{scope} .noUi-handle").nth(place)
        return _alternating(lambda key: handle.press(key), keys)  # there and back: never against an end

    def choose_head() -> None:
        heads = page.locator(".vpw-explorer select").nth(1)
        heads.select_option(index=1 + next(places) % 3)

    def click_head() -> None:
        maps = page.locator(".vpw-explorer .vpw-maps canvas").first
        box, place = maps.bounding_box(), next(places) * 5 % 144
        at = {"x": (place % 12 + 0.5) / 12 * box["width"], "y": (place // 12 + 0.5) / 12 * box["height"]}
        maps.click(position=at)

    def in_tab(name: str, act: Callable[[], None]) -> Callable[[], None]:
        opened = []

        def once() -> None:
            if not opened:
                tab(name)
                page.wait_for_timeout(1_000)
                page.evaluate("vpwClock.start = null")
                opened.append(name)
            act()

        return once

    layer = slide(".vpw-explorer", 1, ("ArrowLeft", "ArrowRight"))  # it starts at the last layer
    return {
        "click a token": (".vpw-panels", "version", click_token),
        "k": (".vpw-panels", "version", slide(".vpw-explorer", 0)),
        "head of the mask": (".vpw-panels", "version", choose_head),
        "layer and head": (".vpw-explorer .vpw-reader", "version", in_tab("Words", click_head)),
        "layer of the tokens (plotly)": (".vpw-explorer .js-plotly-plot", "plotly", in_tab("Flow", layer)),
        "map of 600 x 600": (".large .vpw", "version", slide(".jp-Notebook", -1)),
        "floor: slider to label": (".floor", "text", slide(".jp-Notebook", -2)),
    }


def _times(page: Any, target: str, way: str, act: Callable[[], None], events: int) -> list[float]:
    """Milliseconds from an event to its answer on the element, as the page tells them."""
    times = []
    for _ in range(events):
        page.evaluate("([selector, way]) => vpwClock.arm(selector, way)", [target, way])
        act()
        page.wait_for_function("vpwClock.took !== null")
        times.append(page.evaluate("vpwClock.took"))
        page.wait_for_timeout(500)  # what a view does when the hand rests
    return times[2:]


def _alternating(act: Callable[[str], None], values: Sequence[str]) -> Callable[[], None]:
    count = iter(range(10**6))
    return lambda: act(values[next(count) % len(values)])


def _edits(page: Any, events: int) -> list[float]:
    """Milliseconds from Enter in an edited sentence to the redrawn view, with what the driver takes itself."""
    sentence, times = page.locator(".vpw-explorer input[type=text]").first, []
    for number in range(events):
        before = page.locator(".vpw-panels").first.get_attribute("data-version")
        sentence.fill(f"word{number} word{number + 1} word{number + 2}")
        began = time.perf_counter()
        sentence.press("Enter")
        page.wait_for_function("before => document.querySelector('.vpw-panels').dataset.version !== before", arg=before)
        times.append(1_000 * (time.perf_counter() - began))
        page.wait_for_timeout(500)
    return times[2:]


def _quantiles(times: Sequence[float]) -> dict[str, Any]:
    rounded = [round(one, 1) for one in times]
    return {"median": statistics.median(times), "p95": float(np.quantile(times, 0.95)), "ms": rounded}


@contextmanager
def _browser() -> Iterator[Any]:
    if find_spec("playwright") is None:
        raise SettingsError("the bench drives a browser by Playwright: pip install 'vpworkbench[dev]'")
    from playwright.sync_api import sync_playwright

    chosen = os.environ.get("VPW_CHROMIUM", "")
    path = next(filter(None, map(shutil.which, [chosen] if chosen else BROWSERS)), None)
    if path is None:
        raise SettingsError(f"no browser: install one of {', '.join(BROWSERS)}, or set VPW_CHROMIUM")
    flags = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextmanager
def _jupyter(folder: Path) -> Iterator[str]:
    """Address with token of a JupyterLab of its own, without anyone's settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_TOKEN": token}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "root_dir": folder}
    flags = ["--no-browser", "--LabApp.expose_app_in_browser=True"]
    flags += [f"--ServerApp.{name}={value}" for name, value in server.items()]
    flags += ["--allow-root"] if os.geteuid() == 0 else []
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], env=os.environ | own, **silent)
    try:
        _wait(f"http://127.0.0.1:{port}/api?token={token}")
        # A workspace for each notebook: one that is shared opens the notebooks of before again, and in front.
        yield f"http://127.0.0.1:{port}/lab/workspaces/{{name}}/tree/{{name}}.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(60)


def _wait(address: str, patience_s: float = 90) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise SettingsError("JupyterLab did not start; does `jupyter lab` work here?")


def _open(
    browser: Any, address: str, folder: Path, name: str, cells: Sequence[str], last: str
) -> tuple[Any, float, float]:
    """Run all cells of a notebook in the page; seconds until the first view is drawn, and until all are there."""
    import nbformat  # not where the kernel that is measured imports this module

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS[cell].strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.set_default_timeout(180_000)
    page.goto(address.format(name=name))
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    page.evaluate("""async () => { const panel = jupyterapp.shell.currentWidget;
        await panel.context.ready; await panel.sessionContext.ready; }""")
    page.evaluate(CLOCK)
    began = time.monotonic()
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    drawn = "[data-drawn]:not([data-drawn='0'])"
    page.wait_for_selector(f".vpw-explorer .vpw-panels{drawn}")
    first = time.monotonic() - began
    page.wait_for_selector(".vpw-explorer .js-plotly-plot", state="attached")
    page.wait_for_selector(last, state="attached")
    everything = time.monotonic() - began
    page.wait_for_timeout(3_000)
    return page, round(first, 2), round(everything, 2)


def _close(page: Any) -> None:
    """With its kernel, whose tensors would stay beside what is measured next."""
    page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    page.context.close()


# ----------------------------------------------------------------------------------------- pages, against peers


def _pages(
    browser: Any, folder: Path, tokens: Sequence[int], scripts: Path | None
) -> dict[str, dict[int, dict[str, Any]]]:
    """Build each tool's page of the same attention, and see when it draws first."""
    makers = {"ours": _ours} | {name: make for name, make in PEERS.items() if find_spec(name)}
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in makers}
    for length in tqdm(tokens, desc="pages", unit="length"):
        view = wide(grid=GRIDS[length], words=length - GRIDS[length] ** 2)
        for name, make in makers.items():
            path, began = folder / f"{name}-{length}.html", time.monotonic()
            make(view, path)
            found[name][length] = {"build_s": round(time.monotonic() - began, 3), "bytes": path.stat().st_size}
            found[name][length]["first_drawing_s"] = _first_drawing(browser, path, DRAWN[name], scripts)
            path.unlink()
        view.close()
    return found


def _ours(view: Explorer, path: Path) -> None:
    view.save(path)


def _bertviz(view: Explorer, path: Path) -> None:
    from bertviz import model_view

    attention = view.readings[0].attention[:, None]  # layer, example, head, query, key
    shown = model_view(tuple(attention), [f"t{place}" for place in range(attention.shape[-1])], html_action="return")
    head = '<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js"></script>'
    path.write_text(f"<!doctype html><meta charset=utf-8>{head}{shown.data}", encoding="utf-8")


def _circuitsvis(view: Explorer, path: Path) -> None:
    from circuitsvis.attention import attention_heads

    attention = view.readings[0].attention.flatten(0, 1)  # it knows heads of one layer: here of all
    names = [f"t{place}" for place in range(attention.shape[-1])]
    shown = attention_heads(attention=attention, tokens=names)
    page = f"<!doctype html><meta charset=utf-8>{shown.local_src}"  # with its script, so that no network is needed
    path.write_text(page, encoding="utf-8")


PEERS = {"bertviz": _bertviz, "circuitsvis": _circuitsvis}
DRAWN = {
    "ours": "document.querySelector('.vpw-panels[data-drawn]:not([data-drawn=\"0\"])')",
    "bertviz": "document.querySelector('svg line')",
    "circuitsvis": """(canvas => canvas?.width && canvas.height && new Uint32Array(canvas.getContext('2d').getImageData(
        0, 0, canvas.width, canvas.height).data.buffer).some(Boolean))(
        document.querySelector('[id^=circuits-vis] canvas'))""",
}
"""What holds in the page of each once something is drawn."""


def _first_drawing(browser: Any, path: Path, drawn: str, scripts: Path | None) -> float | None:
    """Seconds from the start of loading, in the page's own time; None if a minute draws nothing."""
    from playwright.sync_api import Error

    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()

    def serve(route: Any) -> None:
        file = scripts / Path(route.request.url.split("?")[0]).name
        if file.exists():
            route.fulfill(path=file, headers={"access-control-allow-origin": "*"}, content_type="text/javascript")
        else:
            route.abort()

    if scripts:
        page.route(re.compile("^https?:"), serve)
    try:
        page.goto(path.as_uri(), wait_until="commit", timeout=60_000)
        drawn_ms = page.wait_for_function(f"{drawn} && performance.now()", timeout=60_000)
        return round(drawn_ms.json_value() / 1000, 3)
    except Error:
        return None
    finally:
        page.context.close()


# ------------------------------------------------------------------------------------------------------ report


def event_figure(result: dict[str, Any]) -> go.Figure:
    """Milliseconds from an event to new data, one box for each kind of event."""
    figure = go.Figure()
    for number, (name, part) in enumerate(result["events"].items()):
        figure.add_box(x=part["ms"], name=name, marker_color=PALETTE[number % len(PALETTE)], showlegend=False)
    figure.update_xaxes(title_text="milliseconds from the event to new data on the element", type="log")
    alt = "Milliseconds from an event to new data on the element, one box for each kind of event."
    return finish(figure, alt=alt, width=900, height=460)


def main(
    events: Annotated[int, typer.Option(help="events of each kind; the first two do not count", min=3)] = 20,
    tokens: Annotated[str, typer.Option(help="lengths at which pages are compared")] = "64,128,184,256",
    scripts: Annotated[
        str, typer.Option(help="folder of the scripts that bertviz and CircuitsVis load; empty: from the network")
    ] = "",
) -> None:
    """The explorer in JupyterLab, from event to drawing, and its page against bertviz and CircuitsVis."""
    lengths = [int(length) for length in tokens.split(",") if length]
    result = measure_explorer(events=events, tokens=lengths, scripts=scripts)
    for name, part in result["events"].items():
        targets = ", ".join(f"{target:,}" for target in TARGETS_MS.get(name, ()) if target)
        print(f"{name:30} median {part['median']:8.1f} ms, p95 {part['p95']:8.1f} ms; target {targets or 'none'}")
    print(f"run-all to the first view drawn: {result['first_view_s']} s, all views: {result['all_views_s']} s")
    for name, pages in result["pages"].items():
        for length, part in pages.items():
            size = f"built in {part['build_s']:.2f} s, {part['bytes'] / 1e6:.1f} MB"
            print(f"{name:12} N {length}: {size}, first drawing {part['first_drawing_s']} s")
    report("explorer", result, event_figure(result))


if __name__ == "__main__":
    typer.run(main)
