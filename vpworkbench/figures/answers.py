"""Right and wrong answers, each beside a view of where the model attended."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from vpworkbench.figures.pictures import darkened, data_url, pictures
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


class Reviewed(NamedTuple):
    """One answer of a model, and where the model attended."""

    text: str  # the question, statement or caption
    wanted: str  # the right answer; empty if the release withholds it
    predicted: str
    score: float  # official score in [0, 1]; nan if the answer is withheld
    images: tuple[np.ndarray, ...]  # uint8, (height, width, 3)
    # For each image, the share of [CLS]'s attention on each visual token, rolled out from the input to the last layer
    # (paper Eq. 4); (row, column).
    attention: tuple[np.ndarray, ...]

    @property
    def right(self) -> bool:
        """At least half of the official score."""
        return self.score >= 0.5

    @property
    def lines(self) -> list[str]:
        """The text, the model's answer, and the right one where they differ."""
        wanted = "the answer is withheld" if np.isnan(self.score) else f"wanted: {self.wanted}"
        return [self.text, f"✓ {self.predicted}"] if self.right else [self.text, f"✗ {self.predicted}", wanted]

    def darkened_images(self) -> list[np.ndarray]:
        """The images, dark where the model did not attend."""
        return [darkened(image, attention) for image, attention in zip(self.images, self.attention, strict=True)]


def answers(reviewed: Sequence[Reviewed], *, count: int = 8) -> go.Figure:
    """A contact sheet of at most `count` answers: half of them right, if there are enough of both kinds."""
    right = [one for one in reviewed if one.right][: count // 2]
    chosen = right + [one for one in reviewed if not one.right][: count - len(right)]
    figure = pictures([_side_by_side(one.darkened_images()) for one in chosen], [one.lines for one in chosen])
    wrong = len(chosen) - len(right)
    alt = f"{len(right)} right and {wrong} wrong answers; images are bright where the model attended."
    return finish(figure, title="Right and wrong answers, and where the model attended (bright)", alt=alt)


def answers_page(reviewed: Sequence[Reviewed], *, title: str) -> str:
    """All answers as one HTML page that needs no scripts and no network; buttons show the right or the wrong ones."""
    right = sum(one.right for one in reviewed)
    counts = {"all": len(reviewed), "right": right, "wrong": len(reviewed) - right}
    buttons = "".join(
        f'<label><input type="radio" name="shown" id="{kind}"{" checked" if kind == "all" else ""}> {kind} ({count})'
        "</label>"
        for kind, count in counts.items()
    )
    cards = "\n".join(map(_card, reviewed))
    name = html.escape(title)
    legend = "The second copy of an image is bright where [CLS] attends (rolled out from the input to the last layer)."
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{name}</h1><p>{legend}</p>\n<p>{buttons}</p>\n<main>\n{cards}\n</main></body></html>\n"
    )


def _card(one: Reviewed) -> str:
    images = "".join(
        f'<img src="{_source(image)}" alt="the image"> '
        f'<img src="{_source(dark)}" alt="the image, bright where the model attended">'
        for image, dark in zip(one.images, one.darkened_images(), strict=True)
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in one.lines)
    return f'<article class="{"right" if one.right else "wrong"}">{images}{lines}</article>'


def _source(image: np.ndarray) -> str:
    return data_url(Image.fromarray(image), "JPEG", quality=85)


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images in a row, with grey gaps; lower ones get a black margin below."""
    height = max(image.shape[0] for image in images)
    gap = np.full((height, 4, 3), 128, dtype=np.uint8)
    parts = []
    for image in images:
        parts += [gap] * bool(parts) + [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0)))]
    return np.concatenate(parts, axis=1)
