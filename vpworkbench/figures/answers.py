"""Right and wrong answers, each with the images and, beside them, where the model looked."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from vpworkbench.figures.pictures import pictures
from vpworkbench.figures.style import finish

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.35 system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; }
main { display: flex; flex-wrap: wrap; gap: 14px; }
article { width: 330px; border-left: 6px solid #1C82C4; padding: 4px 10px; }
article.wrong { border-color: #D55E00; }
img { width: 48%; image-rendering: auto; border-radius: 4px; }
p { margin: 6px 0 0; overflow-wrap: anywhere; }
label { margin-right: 18px; }
body:has(#right:checked) .wrong, body:has(#wrong:checked) .right { display: none; }
"""


def answers(reviewed: Sequence[Any], *, count: int = 8) -> go.Figure:
    """A contact sheet: the first right and the first wrong answers, their images dark where the model did not look.

    Parameters
    ----------
    reviewed
        Of `review.review`.
    count : int
        Examples, half of them right where there are as many.
    """
    right = [one for one in reviewed if one.right][: count // 2]
    shown = right + [one for one in reviewed if not one.right][: count - len(right)]
    if not shown:
        raise ValueError("answers needs at least one example")
    figure = pictures([_side_by_side(one) for one in shown], [_told(one) for one in shown])
    alt = f"{len(right)} right and {len(shown) - len(right)} wrong answers; images are bright where the model looked."
    return finish(figure, title="Right and wrong answers, and where the model looked (bright)", alt=alt)


def answers_page(reviewed: Sequence[Any], *, title: str) -> str:
    """All of them as one HTML page without scripts that opens offline; buttons choose right or wrong ones."""
    right = sum(one.right for one in reviewed)
    counts = {"all": len(reviewed), "right": right, "wrong": len(reviewed) - right}
    buttons = "".join(
        f'<label><input type="radio" name="shown" id="{kind}"{" checked" if kind == "all" else ""}> {kind} ({count})'
        "</label>"
        for kind, count in counts.items()
    )
    cards = "\n".join(map(_card, reviewed))
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{name}</h1><p>Beside each image the same, bright where [CLS] looked (attention rolled out "
        f"from the input to the last layer).</p>\n<p>{buttons}</p>\n<main>\n{cards}\n</main></body></html>\n"
    )


def _card(one: Any) -> str:
    shown = "".join(
        f'<img src="{_source(image)}" alt="the image"> '
        f'<img src="{_source(_looked(image, attention))}" alt="the image, bright where the model looked">'
        for image, attention in zip(one.images, one.attention, strict=True)
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in _told(one))
    return f'<article class="{"right" if one.right else "wrong"}">{shown}{lines}</article>'


def _told(one: Any) -> list[str]:
    wanted = "the answer is withheld" if np.isnan(one.score) else f"wanted: {one.wanted}"
    return [one.text, f"{'✓' if one.right else '✗'} {one.predicted}", *([] if one.right else [wanted])]


def _side_by_side(one: Any) -> np.ndarray:
    """The images of an example in a row, as the model looked at them."""
    looked = [_looked(image, attention) for image, attention in zip(one.images, one.attention, strict=True)]
    height = max(image.shape[0] for image in looked)
    gap = np.full((height, 4, 3), 128, dtype=np.uint8)
    parts = []
    for image in looked:
        parts += [gap] * bool(parts) + [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0)))]
    return np.concatenate(parts, axis=1)


def _looked(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The image, dark where attention (row, column) is small; uint8 as given."""
    share = Image.fromarray((attention / max(attention.max(), 1e-12)).astype(np.float32))
    light = np.asarray(share.resize(image.shape[1::-1], Image.Resampling.NEAREST))
    return (image * (0.14 + 0.86 * light[..., None])).round().astype(np.uint8)


def _source(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
