"""The figures of README and docs, of the model that ships: `make figure`. Needs Chromium."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from PIL import Image

import vpworkbench as vpw
from vpworkbench import figures
from vpworkbench.data.batches import contact_sheet
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.studies import study as studies
from vpworkbench.studies.examples import take_apart
from vpworkbench.subjects import load_run

DOCS = Path(__file__).parents[1] / "docs"
WIDTH_PX = 1170


def overview(folder: Path) -> Image.Image:
    """Scenes, an image with both masks, and the flow curves, one below the other."""
    model, trained = load_run()
    pictures = vpw.held_out(trained.data)
    example = take_apart(model, pictures[0], trained, seed=0)
    probed = vpw.probe(model, pictures, images=64)
    nulls = {name: getattr(probed, name) for name in ("null_from_input", "null_within_layer")}
    parts = [
        figures.pictures(*contact_sheet(pictures, 4)),
        figures.masks(example.image, example.masks, pick=example.pick, grid=example.grid),
        figures.flow_curves(probed.from_input, probed.within_layer, **nulls),
    ]
    return one_below_the_other(parts, folder)


def study(folder: Path) -> Image.Image:
    """Differences between kinds of masks, and the VQA score against each measure."""
    found = studies.open_study()
    differ = studies.differences(found)
    parts = [
        figures.forest(
            studies.intervals(differ, outcome),
            no_matter=studies.NO_MATTER,
            title=words[0].upper() + words[1:],
            axis="paired difference",
        )
        for outcome, words in studies.OUTCOMES.items()
    ]
    measures = figures.scores_against(
        studies.by_arm(found.runs), title="VQA score against six measures", score="VQA score"
    )
    return one_below_the_other([*parts, measures], folder)


def one_below_the_other(parts: Sequence[go.Figure], folder: Path) -> Image.Image:
    """Figures as one picture."""
    pages = [folder / f"{number}.html" for number in range(len(parts))]
    figures.export(dict(zip(pages, parts, strict=True)))
    drawn = [Image.open(page.with_suffix(".png")) for page in pages]
    whole = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), "white")
    top = 0
    for one in drawn:
        whole.paste(one, (0, top), one if one.has_transparency_data else None)
        top += one.height
    return whole.resize((WIDTH_PX, round(whole.height * WIDTH_PX / whole.width)), Image.Resampling.LANCZOS)


def knock_out(folder: Path) -> Image.Image:
    """Flow beside effect."""
    os.environ["VPW_RUNS"] = str(folder)
    run_notebook("07_knock_out", name="figure")
    return Image.open(folder / "07_knock_out" / "figure" / "figures" / "effects.png")


def main() -> None:
    """Draw all of them into docs/."""
    with tempfile.TemporaryDirectory() as folder:
        for draw in (overview, knock_out, study):
            image = draw(Path(folder))
            image.quantize(256).save(DOCS / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
