"""An explorer as one HTML file: widgets, figures and their values, without a kernel and without a network."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from vpworkbench.explorer.widgets import STATIC, Drawn, Table


@dataclass(frozen=True)
class Part:
    """One widget, figure or text on the page.

    Attributes
    ----------
    content : Drawn, plotly.graph_objects.Figure, str or None
        Text is never read as markup. None: only the picture.
    picture : bytes
        PNG, shown if scripts are off or fail; a `Table` needs none.
    alt : str
        Description of the picture; empty: that of the widget.
    """

    content: Drawn | go.Figure | str | None
    picture: bytes = b""
    alt: str = ""


@dataclass(frozen=True)
class Section:
    heading: str
    paragraph: str
    parts: Sequence[Part] = field(default_factory=list)


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one self-contained file; its content security policy forbids every request."""
    path = Path(path)
    parts = [part for section in sections for part in section.parts]
    widgets = [part.content.state() for part in parts if isinstance(part.content, Drawn)]
    figures = [json.loads(part.content.to_json()) for part in parts if isinstance(part.content, go.Figure)]
    values = {
        "modules": {state["name"]: state["esm"] for state in widgets},  # one for each class of widgets
        "values": [{"name": state["name"], "traits": state["traits"]} for state in widgets],
        "figures": figures,
    }
    pieces = [
        _HEAD.format(title=html.escape(title), style=(STATIC / "page.css").read_text(encoding="utf-8")),
        *{f"<style>{state['css']}</style>" for state in widgets},
        f"</head>\n<body>\n<h1>{html.escape(title)}</h1>",
        *(_section(section) for section in sections),
        _island("values", json.dumps(values, default=_as_json)),
        _island("plotly", get_plotlyjs()) if figures else "",
        f'<script type="module">{(STATIC / "page.js").read_text(encoding="utf-8")}</script>',
        "</body>\n</html>\n",
    ]
    path.write_text("\n".join(pieces), encoding="utf-8")
    return path


_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:;
 style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>"""


def _section(section: Section) -> str:
    parts = "\n".join(_part(part) for part in section.parts)
    intro = f"<p>{html.escape(section.paragraph)}</p>" if section.paragraph else ""
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n{intro}\n{parts}\n</section>"


def _part(part: Part) -> str:
    content = part.content
    picture = _picture(part)
    if isinstance(content, Drawn):
        return f'<div class="part"><div class="still">{picture}</div><div class="live" data-widget></div></div>'
    if isinstance(content, go.Figure):
        live = '<div class="live scroll" data-figure></div>'
        return f'<div class="part"><div class="still">{picture}</div>{live}</div>'
    if isinstance(content, str):
        return f'<p class="part">{html.escape(content)}</p>'
    if content is None:
        return f'<div class="part">{picture}</div>'
    raise TypeError(f"write_page takes widgets, plotly figures and text, not {type(content).__name__}")


def _picture(part: Part) -> str:
    if isinstance(part.content, Table):
        table = pd.DataFrame(part.content.rows, columns=part.content.names)
        return table.to_html(border=0, escape=True, index=False)
    if not part.picture:
        return ""
    alt = part.alt or getattr(part.content, "alt", "") or getattr(part.content, "label", "")
    data = base64.b64encode(part.picture).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _island(name: str, text: str) -> str:
    """Compressed text for a script. In base64 no text can close the element, and plotly's script takes a third."""
    packed = base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def _as_json(value: object) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"a page cannot hold {type(value).__name__}")
