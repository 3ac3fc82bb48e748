"""`vpw explore`: Voila serves a small notebook as a page without code, for a class or a demo."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbformat
from pydantic import TypeAdapter

from vpworkbench.errors import SettingsError
from vpworkbench.explorer import explore
from vpworkbench.settings.base import PathOrName


def serve(checkpoint: str, data: str, *, beside: str, regions: str, port: int, browser: bool) -> None:
    """Serve `explore` on 127.0.0.1 until it is stopped; each visitor gets a kernel of their own.

    Jupyter's token protects the page: `$JUPYTER_TOKEN`, else a new one, printed with the address.
    """
    if find_spec("voila") is None:
        raise SettingsError("vpw explore needs Voila: pip install 'vpworkbench[voila]'")
    from voila.app import Voila

    given = {"model": checkpoint, "data": data, "beside": beside, "regions": regions}
    options = {name: value for name, value in given.items() if value}
    options = TypeAdapter(dict[str, PathOrName]).validate_python(options)  # absolute: kernels start in another folder
    explore(**options).close()  # fails before the server
    with tempfile.TemporaryDirectory(prefix="vpworkbench-voila-") as folder:
        notebook = write_notebook(Path(folder) / "explorer.ipynb", **options)
        address = ["--Voila.ip=127.0.0.1", f"--port={port}", "--Voila.port_retries=0", "--Voila.auto_token=True"]
        page = [f"--Voila.open_browser={browser}", "--VoilaConfiguration.show_tracebacks=True"]
        Voila.launch_instance([str(notebook), *address, *page])


def write_notebook(path: Path, **options: str) -> Path:
    """Write the notebook that Voila serves: `explore` with these options."""
    call = f"explore({', '.join(f'{name}={value!r}' for name, value in options.items())})"
    cells = [
        nbformat.v4.new_markdown_cell("# What does the mask hide, and where do words look?"),
        nbformat.v4.new_code_cell(f"from vpworkbench.explorer import explore\n\n{call}"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path
