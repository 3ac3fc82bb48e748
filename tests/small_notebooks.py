"""Small notebooks that open a run, log a line and write a summary, for tests of what executes notebooks."""

import nbformat

PARAMETERS = """
name: str = ""
seed: int = 0  # any
stumble: str = ""  # while this file exists, the last cell fails
"""
OPEN = """
from pathlib import Path
from vpworkbench.settings import Settings
from vpworkbench.runs import open_run
class Small(Settings):
    seed: int = 0
run = open_run("{notebook}", Small(seed=seed), name=name)
"""
TRAIN = """
run.progress("steps", 2, 2)
run.log(1 + len(run.metrics()), loss=0.5)
"""
STUMBLE = """
if stumble:
    assert not Path(stumble).exists(), "too early"
run.write_summary(seed=seed, lines=len(run.metrics()))
"""


def write_notebook(path, parameters, *cells, tags=()):
    """A notebook of these code cells; `tags` are those of the cells after the parameters, in order."""
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (parameters, *cells)]
    for cell, tag in zip(cells, ["parameters", *tags], strict=False):
        cell.metadata["tags"] = [tag]
    path.parent.mkdir(exist_ok=True)
    metadata = {"language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path
