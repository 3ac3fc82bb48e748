"""Where each word of an answer looked: hover over a word to see its map, pin two words to compare them.

The view of a decoder of transformers in `explore`; its numbers are those of `vpworkbench.answers.probe_answer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch

from vpworkbench.answers import probe_answer
from vpworkbench.errors import first_line
from vpworkbench.explorer import still
from vpworkbench.explorer.page import Part, Section, write_page
from vpworkbench.explorer.parts import WIDTH, StatusText, close_all, encoded, row
from vpworkbench.explorer.readings import check_index
from vpworkbench.explorer.widgets import AnswerWords, Maps, Table
from vpworkbench.huggingface import as_read

QUESTION = "What is shown in the image?"
COLUMNS = ["word", "probability", "without the image", "prior", "looks at the image", "if uniform", "reads most"]


class Placed(NamedTuple):
    """An image and its visual tokens, as `still.panel` draws them."""

    image: np.ndarray
    boxes: np.ndarray
    on_grid: bool


class AnswerView(ipywidgets.VBox):
    """A question about an image, the answer with its maps, its numbers in a table, and its attention by layer.

    Parameters
    ----------
    images : mapping of str to uint8 array, (height, width, 3)
        The images to choose from.
    options
        Those of `probe_answer`.
    """

    def __init__(
        self, model: Any, processor: Any, images: Mapping[str, np.ndarray], question: str, options: Mapping[str, Any]
    ) -> None:
        super().__init__(layout={"width": "100%", "max_width": f"{WIDTH + 40}px"})
        self.add_class("vpw-explorer")
        self.model, self.processor, self.images, self._options = model, processor, dict(images), dict(options)
        self.question = ipywidgets.Text(
            question, description="question", continuous_update=False, layout={"width": "520px"}
        )
        self.choice = ipywidgets.Dropdown(options=list(images), description="image", layout={"width": "260px"})
        self.layer, self.head = (
            ipywidgets.Dropdown(options=[("mean of all", -1)], description=name, layout={"width": "190px"})
            for name in ("layer", "head")
        )
        self.rolled = ipywidgets.Checkbox(False, description="rolled out from the input (Eq. 4)", indent=False)
        self.status = StatusText()
        self.words = AnswerWords(width=WIDTH)
        self.table = Table(names=COLUMNS, width=WIDTH)
        self.shares = Maps(
            names=["looks at the image", "if uniform"],
            percent=True,
            low=[0.0] * 2,
            high=[1.0] * 2,
            row_name="word",
            column_name="layer",
            count_from=1,
            width=WIDTH,
        )
        for control in (self.question, self.choice):
            control.observe(lambda change: self.show(self.choice.value, self.question.value), "value")
        for control in (self.layer, self.head, self.rolled):
            control.observe(lambda change: self._draw_maps(), "value")
        asked, looked = row(self.question, self.choice), row(self.layer, self.head, self.rolled)
        self.children = (asked, looked, self.status, self.words, self.table, self.shares)
        self._ask(self.choice.value, question)  # errors of the first question are the caller's
        self._draw()

    def _ask(self, image: str, question: str) -> None:
        """Set the answer, and what it answers: the controls may already show a question that has none."""
        self.answer = probe_answer(self.model, self.processor, self.images[image], question, **self._options)
        self._asked, self._image = question, as_read(self.processor, self.images[image])

    def show(self, image: str, question: str) -> None:
        """Answer a question about one of the images; an error is shown, and what was there stays."""
        try:
            self._ask(image, question)
        except (ValueError, RuntimeError) as error:
            self.status.set(f"Not answered: {first_line(error)}")
            return
        self._draw()

    def say(self, question: str) -> AnswerView:
        """Ask another question about the same image."""
        self.question.value = question
        return self

    def look(self, image: int) -> AnswerView:
        """Ask the same question about another image, by its place."""
        check_index("image", image, len(self.images))
        self.choice.value = list(self.images)[image]
        return self

    def pin(self, *words: int, layer: int | None = None, head: int | None = None, rolled: bool = False) -> AnswerView:
        """Pin up to two words, by their places, and choose layer and head of their maps, from 0 (none: the mean).

        A roll-out takes the mean of the heads.
        """
        if len(words) > 2:
            raise ValueError(f"pin {words}: two words can be compared")
        for word in words:
            check_index("word", word, len(self.answer.words))
        check_index("layer", layer, len(self.answer.layers))
        check_index("head", head, self.answer.attention.shape[2])
        self.layer.value, self.head.value = (-1 if place is None else place for place in (layer, head))
        self.rolled.value = rolled
        self.words.pinned = list(words)
        return self

    def _draw(self) -> None:
        answer = self.answer
        note = [f"Its image tokens have no place: {answer.masks.note}"] if not answer.masks.placed.any() else []
        if answer.uncounted:
            note.append(
                f"{len(answer.uncounted)} parts without softmax attention are not counted or blocked: "
                f"{', '.join(answer.uncounted)}."
            )
        self.status.set(*note)
        for control, count in ((self.layer, len(answer.layers)), (self.head, answer.attention.shape[2])):
            if len(control.options) != count + 1:
                control.options = [("mean of all", -1), *((str(place + 1), place) for place in range(count))]
        rows = self.tables()["words"].drop(columns="place").assign(word=_readable(answer.words))
        shown = rows.map(lambda one: one if isinstance(one, str) else "" if np.isnan(one) else f"{one:.1%}")
        self.table.update(
            rows=shown.to_numpy().tolist(), label=f"Answer: {answer.text}", alt="Each word with its numbers."
        )
        self.shares.update(
            values=np.stack([answer.image_share.numpy(), answer.null.numpy()]),
            label="Share of attention on the image, by word and layer",
            alt="Beside it, the share under uniform attention.",
        )
        self.words.pinned = []
        self._draw_maps()

    def _looks(self) -> torch.Tensor:
        """Attention of each word to the visual tokens that have a place, (word, token)."""
        answer, placed = self.answer, self._placed
        layer, head = (None if control.value < 0 else control.value for control in (self.layer, self.head))
        options = {"layer": layer, "head": head, "rolled": self.rolled.value}
        return torch.stack([answer.map(word, **options)[placed] for word in range(len(answer.words))])

    @property
    def _placed(self) -> torch.Tensor:
        return self.answer.masks.placed[0, self.answer.masks.vision[0]]

    def _draw_maps(self) -> None:
        looks, table = self._looks(), self.tables()["words"]
        self.words.update(
            image=encoded(self._image),
            words=_readable(self.answer.words),
            notes=[_note(**numbers) for numbers in table.to_dict("records")],
            boxes=self.answer.boxes[self._placed].numpy(),
            on_grid=bool(self._placed.all()),
            looks=looks.numpy(),
            shares=self.answer.image_share.mean(dim=1).numpy(),
            nulls=self.answer.null.mean(dim=1).numpy(),
            sinks=_sinks(looks).nonzero().flatten().tolist(),
            label=f"{self._asked} {self.answer.text}",
            alt="Bright where the chosen word looked.",
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """`words`: the numbers of each word."""
        answer = self.answer
        prior = answer.log_probs * torch.nan if answer.prior is None else answer.prior
        logs = answer.log_probs, answer.blocked[0], prior
        means = [part.exp() for part in logs] + [answer.image_share.mean(dim=1), answer.null.mean(dim=1)]
        names = ("probability", "without the image", "prior", "looks at the image", "if uniform")
        numbers = {name: part.double().numpy() for name, part in zip(names, means, strict=True)}
        places = range(len(answer.words))
        most = [" ".join(_readable(token for token, _ in answer.most_attended(place, 3))) for place in places]
        table = pd.DataFrame({"place": places, "word": answer.words, **numbers, "reads most": most})
        return {"words": table}

    def save(self, path: str | Path) -> Path:
        """Write the view as one HTML file that opens without a kernel and without a network."""
        intro = "Hover over a word to see where it looked. A click pins it, a second click compares two."
        parts = [Part(self.words, self._still()), Part(self.table), Part(self.shares, self._still_shares())]
        name = type(self.model).__name__
        return write_page(path, f"{name} on “{self._asked}”", [Section(self.answer.text, intro, parts)])

    def _still(self) -> bytes:
        """The pinned words, or else the last one, on the image."""
        looks, words = self._looks().numpy(), self.words.pinned or [len(self.answer.words) - 1]
        placed = Placed(self._image, self.answer.boxes[self._placed].numpy(), bool(self._placed.all()))
        figure = still.blank(300 * len(words), 300)
        for axes, word in zip(figure.subplots(1, len(words), squeeze=False)[0], words, strict=True):
            title = still.shortened(f"“{self.words.words[word]}” looked here", 40)
            still.panel(axes, placed, "shade", looks[word], title)
        return still.png(figure)

    def _still_shares(self) -> bytes:
        figure = still.blank(640, 260)
        pair = self.answer.image_share, self.answer.null
        for axes, name, values in zip(figure.subplots(1, 2), self.shares.names, pair, strict=True):
            still.matrix(axes, values.numpy(), name, "word", "layer", vmin=0, vmax=1)
        return still.png(figure)

    def close(self) -> None:
        for child in self.children:
            close_all(child)
        for part in (self.layout, super()):
            part.close()


def _sinks(looks: torch.Tensor) -> torch.Tensor:
    """Visual tokens that every word gives at least five times their even share, bool (token,)."""
    share = looks / looks.sum(dim=1, keepdim=True)
    return (share >= 5 / max(1, looks.shape[1])).all(dim=0)


def _note(**numbers: Any) -> str:
    """What the status line says about a word."""
    prior = "" if np.isnan(numbers["prior"]) else f", {numbers['prior']:.1%} without one in the prompt"
    return (
        f"“{numbers['word'].strip()}” looks {numbers['looks at the image']:.1%} at the image (uniform attention: "
        f"{numbers['if uniform']:.1%}). Its probability is {numbers['probability']:.1%}, "
        f"{numbers['without the image']:.1%} without attention to the image{prior}."
    )


def _readable(words: Iterable[str]) -> list[str]:
    return [word.strip() or repr(word) for word in words]
