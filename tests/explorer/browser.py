"""Real pages: JupyterLab and Notebook 7 on this machine, driven in an installed Chromium by Playwright.

A test module imports the fixtures it needs and marks its tests `browser`. `$VPW_CHROMIUM` chooses the browser,
`$VPW_SCREENSHOTS` the folder for pictures of what was seen.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZE = {"width": 1280, "height": 800}
WAIT_MS = 120_000  # patience where other work runs beside
SETTINGS = {  # no news from outside, nothing that covers the page
    "notification": {"fetchNews": "false", "checkForUpdates": False}
}


def chromium() -> str:
    """Path of the browser; "" where there is none."""
    chosen = os.environ.get("VPW_CHROMIUM", "")
    found = (shutil.which(name) for name in ([chosen] if chosen else NAMES))
    return next((path for path in found if path), "")


@pytest.fixture(scope="module")  # no longer: while Playwright is there, other tests find an event loop that runs
def browser() -> Iterator[Any]:
    """A running Chromium; skipped with the reason where it or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = chromium()
    if not path:
        pytest.skip(f"needs one of {', '.join(NAMES)} on PATH, or VPW_CHROMIUM")
    flags = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=flags)
        yield running
        running.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("VPW_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Jupyter(NamedTuple):
    """A server and the folder that it shows."""

    address: str
    token: str
    folder: Path


@pytest.fixture(scope="module")
def jupyter(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """One server that shows both JupyterLab and Notebook 7; settings, kernels and files are scratch."""
    scratch = tmp_path_factory.mktemp("jupyter")
    folder, token = scratch / "files", secrets.token_hex(16)
    folder.mkdir()
    settings = scratch / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    for name, values in SETTINGS.items():
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (scratch / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *_flags(port, token, folder)]
        server = subprocess.Popen(command, env=_environment(scratch), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{address}/api?token={token}", server, scratch / "log.txt")
        yield Jupyter(address, token, folder)
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and its kernels; on a busy machine it may need a minute."""
    server.terminate()
    try:
        server.wait(WAIT_MS / 1000)
    except subprocess.TimeoutExpired:
        server.kill()  # its kernels end by themselves
        server.wait()


def _flags(port: int, token: str, folder: Path) -> list[str]:
    return [
        "--no-browser",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
        "--JupyterNotebookApp.expose_app_in_browser=True",
        *(["--allow-root"] if os.geteuid() == 0 else []),
    ]


def _environment(scratch: Path) -> dict[str, str]:
    own = {name: str(scratch / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    lab = {
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),
    }
    return os.environ | own | lab | {"PYTHONPATH": str(ROOT)}


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"Jupyter did not start:\n{log.read_text()[-2000:]}")


def with_parameters(jupyter: Jupyter, path: Path, copy: str, **values: object) -> str:
    """Copy a notebook to the server's folder, its parameters followed by others as papermill does it; its name.

    A file that is open already shares its kernel, so each test gives its copy a name of its own.
    """
    book = nbformat.read(path, as_version=4)
    place = next(place for place, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    nbformat.write(book, jupyter.folder / copy)
    return copy


def notebook(jupyter: Jupyter, name: str, *cells: str) -> str:
    """A notebook of these code cells in the server's folder; its name."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, jupyter.folder / name)
    return name


def open_notebook(browser: Any, jupyter: Jupyter, name: str, *, place: str = "lab", dark: bool = False) -> Any:
    """Open a notebook in "lab" or "notebook" and run all of it; `page.failures` lists what fails from then on."""
    context = browser.new_context(viewport=SIZE, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    path = f"lab/workspaces/{secrets.token_hex(4)}/tree" if place == "lab" else "notebooks"
    page.goto(f"{jupyter.address}/{path}/{name}?token={jupyter.token}")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    page.evaluate(_READY)
    page.failures.clear()  # those of Jupyter's own start
    if dark:
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    page.failures.clear()  # what Notebook 7 itself stumbles over while it loads is not the notebook's
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    return page


_READY = """async () => {
  const panel = jupyterapp.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
}"""


def finished(page: Any) -> list[str]:
    """Wait until every cell has run; the errors and warnings that cells show."""
    page.wait_for_function(f"({_CELLS}).every(cell => cell.executionCount)")  # a cell has its number when it begins
    page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    return page.evaluate(f"({_CELLS}).flatMap(cell => cell.outputs.toJSON()).flatMap({_ERRORS})")


_ERRORS = """({output_type, name, ename, evalue, text}) =>
    output_type === 'error' ? [`${ename}: ${evalue}`] : name === 'stderr' ? [[text].flat().join('')] : []"""
_CELLS = "[...jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code')"


def saved(page: Any, button: Any) -> Any:
    """The download that a click on `button` starts; if none comes, the failure says what the page shows instead.

    Playwright scrolls to the button and presses it at once. JupyterLab lays out its cells after the scroll, on a busy
    machine up to a quarter of a second later. If they move before the release, the browser makes no click of the two,
    so the click is repeated until the button has received it. A browser may also hold back a page's second download,
    which it takes for one without a click: then the user clicks again, and so does this, once.
    """
    button.evaluate("button => button.addEventListener('click', () => (button.dataset.clicked = 'yes'))")
    try:
        return _downloaded(page, button, WAIT_MS / 4) or _downloaded(page, button, WAIT_MS) or _fail(page, button)
    finally:
        button.evaluate("button => delete button.dataset.clicked")


def _downloaded(page: Any, button: Any, wait_ms: float) -> Any:
    from playwright.sync_api import TimeoutError as NothingCame

    button.evaluate("button => delete button.dataset.clicked")
    try:
        with page.expect_download(timeout=wait_ms) as download:
            while button.get_attribute("data-clicked") is None:
                button.click()
        return download.value
    except NothingCame:
        return None


def _fail(page: Any, button: Any) -> None:
    texts = page.locator(".vpw-status").all_text_contents()
    clicked = button.get_attribute("data-clicked")
    raise AssertionError(f"no download; clicked: {clicked}; status: {texts}; failures: {page.failures}")


def no_sideways_scrolling(page: Any) -> bool:
    """Whether neither the notebook nor a cell's output is wider than its place."""
    wide = "element => element.scrollWidth > element.clientWidth + 1"
    selector = ".jp-WindowedPanel-outer, .jp-Notebook, .jp-OutputArea-output"
    return not page.eval_on_selector_all(selector, f"elements => elements.some({wide})")
