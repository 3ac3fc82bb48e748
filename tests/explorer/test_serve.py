"""`vpw explore`: the explorer as a page, behind a token, on this machine alone."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from explorer.browser import (
    SIZE,
    WAIT_MS,
    browser,
    saved,
    screenshots,
    stop,
)  # fixtures are found by name in the module

from vpworkbench.cli import main
from vpworkbench.explorer import serve
from vpworkbench.runs import shipped_run

__all__ = ["browser", "screenshots"]


def test_without_voila_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["explore"])
    assert stopped.value.code == 2 and "pip install 'vpworkbench[voila]'" in capsys.readouterr().err


def test_a_model_that_is_not_there_stops_it_before_the_server(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explore", "nowhere", "--no-browser"])
    assert stopped.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_names_are_data_in_the_notebook(tmp_path):
    """A path with a quote is a text of the call, not code."""
    written = serve.write_notebook(tmp_path / "explorer.ipynb", model="a'); import os; ('", regions="boxes.tsv")
    source = nbformat.read(written, as_version=4).cells[1].source
    assert source.endswith("""explore(model="a'); import os; ('", regions='boxes.tsv')""")


def test_a_second_model_that_is_not_there_stops_it_too(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explore", "--beside", "nowhere", "--no-browser"])
    assert stopped.value.code == 2 and "nowhere" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(scratch: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a running `vpw explore`, with two models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {"JUPYTER_TOKEN": token, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "vpworkbench.cli", "explore", "--port", str(port), "--no-browser"]
    command += ["--beside", str(shipped_run())]
    with (scratch / "voila.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=scratch, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}/"
        _wait(address, server, scratch / "voila.txt")
        yield address, token
    finally:
        stop(server)


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 2 * WAIT_MS / 1000
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # refused, and therefore there
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise RuntimeError(f"no server:\n{log.read_text()[-2000:]}")


@pytest.mark.browser
def test_the_page_needs_the_token_and_shows_the_explorer(
    browser: Any, served: tuple[str, str], screenshots: Path
) -> None:
    address, token = served
    page = browser.new_context(viewport=SIZE).new_page()
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.set_default_timeout(2 * WAIT_MS)
    page.goto(address)
    assert "/login" in page.url and page.locator("input[type=password]").count()
    page.goto(f"{address}?token={token}")
    page.wait_for_selector(".vpw-panels[data-drawn]:not([data-drawn='0']) canvas")
    for name in ("shipped", shipped_run().name):
        page.locator(".vpw-title", has_text=f"{name}: masks").wait_for()
    assert page.get_by_text("import explore").filter(visible=True).count() == 0  # no code
    version = int(page.locator(".vpw-panels").first.get_attribute("data-version"))
    page.locator(".vpw-panels .vpw-stage").first.click(position={"x": 20, "y": 20})
    page.wait_for_function(
        f"Number(document.querySelector('.vpw-panels').dataset.version) > {version}"
    )  # the kernel answered
    page.screenshot(path=screenshots / "voila.png")
    download = saved(page, page.get_by_role("button", name="save as one page"))  # without code, too
    kept = Path(download.path()).read_text()
    assert download.suggested_filename == "explorer.html" and kept.count("<h2>") == 4
    page.context.close()


def test_files_and_kernels_are_closed_without_the_token(served: tuple[str, str]) -> None:
    address, _ = served
    for path in ("api/kernels", "voila/files/explorer.ipynb", "api/contents"):
        try:
            with urllib.request.urlopen(address + path, timeout=20) as answer:
                assert "/login?" in answer.url, path
        except urllib.error.HTTPError as refused:
            assert refused.code in (401, 403, 404, 405)
