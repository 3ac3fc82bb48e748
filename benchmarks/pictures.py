"""The figures of README and docs, of the model that ships: `make figure`. Needs Chromium."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image

import vpworkbench as vpw
from vpworkbench import figures
from vpworkbench.data.batches import contact_sheet
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.studies.examples import take_apart
from vpworkbench.subjects import load_run

DOCS = Path(__file__).parents[1] / "docs"
OVERVIEW_PX = 1170  # width


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
    pages = [folder / f"{number}.html" for number in range(len(parts))]
    figures.export(dict(zip(pages, parts, strict=True)))
    drawn = [Image.open(page.with_suffix(".png")) for page in pages]
    whole = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), "white")
    top = 0
    for one in drawn:
        whole.paste(one, (0, top), one if one.has_transparency_data else None)
        top += one.height
    return whole.resize((OVERVIEW_PX, round(whole.height * OVERVIEW_PX / whole.width)), Image.Resampling.LANCZOS)


def knock_out(folder: Path) -> Image.Image:
    """Flow beside effect."""
    os.environ["VPW_RUNS"] = str(folder)
    run_notebook("07_knock_out", name="figure")
    return Image.open(folder / "07_knock_out" / "figure" / "figures" / "effects.png")


def main() -> None:
    """Draw all of them into docs/."""
    with tempfile.TemporaryDirectory() as folder:
        for draw in (overview, knock_out):
            image = draw(Path(folder))
            image.quantize(256).save(DOCS / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
