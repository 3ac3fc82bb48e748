"""An explorer as one HTML file: widgets, figures and their values, without a kernel and without a network."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from vpworkbench.explorer.widgets import STATIC, Drawn, Table


class Part(NamedTuple):
    """One widget or figure on the page; a figure describes itself in `layout.meta["alt"]`."""

    content: Drawn | go.Figure
    picture: bytes = b""  # PNG, shown if scripts are off or fail; a `Table` needs none


class Section(NamedTuple):
    heading: str
    paragraph: str
    parts: Sequence[Part] = ()


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
        _HEAD.format(title=html.escape(title), style=(STATIC / "page.css").read_text(encoding="utf-8") + Drawn._css),
        f"</head>\n<body>\n<h1>{html.escape(title)}</h1>",
        *(_section(section) for section in sections),
        _island("values", json.dumps(values, default=lambda data: {"base64": base64.b64encode(data).decode("ascii")})),
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
    """The section; a part is seen as its picture until a script has filled the live one."""
    parts = "\n".join(
        f'<div class="part"><div class="still">{_picture(part)}</div>'
        f'<div class="live" {"data-widget" if isinstance(part.content, Drawn) else "data-figure"}></div></div>'
        for part in section.parts
    )
    intro = f"<p>{html.escape(section.paragraph)}</p>" if section.paragraph else ""
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n{intro}\n{parts}\n</section>"


def _picture(part: Part) -> str:
    if isinstance(part.content, Table):
        table = pd.DataFrame(part.content.rows, columns=part.content.names)
        return table.to_html(border=0, escape=True, index=False)
    if not part.picture:
        return ""
    alt = part.content.alt or part.content.label if isinstance(part.content, Drawn) else part.content.layout.meta["alt"]
    data = base64.b64encode(part.picture).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _island(name: str, text: str) -> str:
    """Compressed text for a script. In base64 no text can close the element, and plotly's script takes a third."""
    packed = base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="{name}">{packed}</script>'
