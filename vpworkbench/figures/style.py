"""The look that all figures share: colours, template, sizes, safe text, export to a file.

Backgrounds are transparent and text is mid-grey, so that a figure is legible in light and dark themes. Text from data
is escaped where it is drawn, because plotly would read it as markup.
"""

from __future__ import annotations

import html
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from vpworkbench.stats import Interval

log = logging.getLogger(__name__)

# Okabe and Ito (2008), safe for colour-blind readers. Black and yellow are left out and blue is a little lighter: all
# colours must be visible on white and on #111111.
BLUE, VERMILLION, GREEN = "#1C82C4", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE)
LANGUAGE, VISION = BLUE, VERMILLION
COLOURS = "Cividis"  # perceptually uniform, safe for colour-blind readers
DIVERGING = "RdBu"  # red below 0 and blue above
GREY = "#7a7a7a"  # contrast above 4 on white and on #111111
FAINT, CLEAR = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
WIDTH, HEIGHT = 780, 340  # pixels; fits beside the file browser of a 1280-pixel JupyterLab
_AXIS = {
    "gridcolor": FAINT,
    "zerolinecolor": FAINT,
    "linecolor": GREY,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 12}},
}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"color": GREY, "size": 12, "family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12}, "font": {"size": 15}},
        "colorway": PALETTE,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"bgcolor": CLEAR},
        "modebar": {"bgcolor": CLEAR, "color": "#999999", "activecolor": SKY},
        "hoverlabel": {"font": {"size": 12}},
    }
)


def export(figures: Mapping[Path, go.Figure]) -> None:
    """Save figures as pages, and as PNG and SVG beside them if kaleido finds a browser; else log what is missing."""
    for page, figure in figures.items():
        figure.write_html(page, include_plotlyjs="directory")
    pictures = {page.with_suffix(suffix): figure for page, figure in figures.items() for suffix in (".png", ".svg")}
    size = {side: [figure.layout[side] for figure in pictures.values()] for side in ("width", "height")}
    try:
        pio.write_images(list(pictures.values()), list(pictures), scale=2, **size)  # starts one browser for all
    except (ValueError, RuntimeError):  # no kaleido; no browser
        remedy = "pip install kaleido; apt install chromium, or plotly_get_chrome"
        log.warning("PNG and SVG need kaleido and Chrome or Chromium (%s); or use a figure's camera button", remedy)


def finish(
    figure: go.Figure, *, alt: str, title: str = "", width: int | None = None, height: int | None = None
) -> go.Figure:
    """Apply the shared look; a figure with a size of its own keeps it, plus room for the title."""
    layout: dict[str, object] = {"template": TEMPLATE, "meta": {"alt": alt}}
    top = 44 if title else 10
    if figure.layout.width is not None:
        layout |= {"height": figure.layout.height + top, "margin": {"t": top}}
    else:
        top += 22 * bool(figure.layout.annotations)  # titles of panels
        figure.update_annotations(font_size=12)
        layout |= {"width": width or WIDTH, "height": height or HEIGHT}
        layout |= {"margin": {"l": 60, "r": 20, "t": top, "b": 50}}
    if title:
        layout["title"] = {"text": title, "y": 1, "yanchor": "top", "pad": {"t": 14, "l": 12}}
    return figure.update_layout(layout)


def escaped(text: str) -> str:
    """Text that plotly shows as it is: it reads neither its markup nor formulas between dollars."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def wrapped(captions: str | Sequence[str], letters: int) -> list[str]:
    """Escaped lines; several captions each begin with a bullet."""
    if isinstance(captions, str):
        texts = [captions]
    else:
        texts = [f"• {caption}" for caption in captions] if len(captions) > 1 else list(captions)
    lines = [line for text in texts for line in textwrap.wrap(text, letters) or [""]]
    return [escaped(line) for line in lines]  # after wrapping: an entity must not be broken


def percent(share: float) -> str:
    return f"{100 * float(share):.1f}%"


def fill(colours: str | Sequence[str]) -> dict[str, object]:
    """Translucent bars, so that error bars are visible inside them."""
    one = isinstance(colours, str)
    inside = translucent(colours, 0.55) if one else [translucent(colour, 0.55) for colour in colours]
    return {"color": inside, "line": {"color": colours if one else list(colours), "width": 1.5}}


def stacked(intervals: Sequence[Interval]) -> Interval:
    """Several intervals as one, with an array for each part."""
    return Interval(*(np.array(part, dtype=float) for part in zip(*intervals, strict=True)))


def error_bars(interval: Interval) -> dict[str, object]:
    up, down = interval.high - interval.mean, interval.mean - interval.low
    look = {"color": GREY, "thickness": 2, "width": 6}
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down} | look


def translucent(colour: str, share: float) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share})"
