"""Where each word of an answer looked: hover over a word to see its map, click to pin it, and compare it with another.

`explore_answer` shows an `Answer` of `vpworkbench.answers`; with a model and its processor, a question can be typed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets
import numpy as np
import torch

from vpworkbench.answers import Answer, probe_answer
from vpworkbench.explorer.parts import WIDTH, StatusText, close_all, encoded, row
from vpworkbench.explorer.widgets import Maps, Reader, Table

COLUMNS = ["word", "probability", "without the image", "looks at the image", "if uniform", "reads most"]


def explore_answer(model: Any, processor: Any, image: Any, question: str, **options: Any) -> AnswerView:
    """Answer a question about an image, and show where each word of the answer looked.

    `options` are those of `probe_answer`. Another question can be typed; the model answers it.
    """

    def ask(text: str) -> Answer:
        return probe_answer(model, processor, image, text, **options)

    return AnswerView(np.asarray(image), question, ask)


class AnswerView(ipywidgets.VBox):
    """An image beside the answer to a question; below, its words with their numbers, and their attention by layer."""

    def __init__(self, image: np.ndarray, question: str, ask: Callable[[str], Answer]) -> None:
        super().__init__(layout={"width": "100%", "max_width": f"{WIDTH + 40}px"})
        self._image, self._ask = image, ask
        self.question = ipywidgets.Text(
            question, description="question", continuous_update=False, layout={"width": "640px"}
        )
        self.rolled = ipywidgets.Checkbox(False, description="rolled out from the input (Eq. 4)", indent=False)
        self.without_sinks = ipywidgets.Checkbox(False, description="leave sinks out of the map", indent=False)
        self.status = StatusText()
        self.reader = Reader(width=WIDTH)
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
        self.table = Table(names=COLUMNS, width=WIDTH)
        self.question.observe(lambda change: self.show(self.question.value), "value")
        for control in (self.rolled, self.without_sinks):
            control.observe(lambda change: self._draw_maps(), "value")
        self.children = (
            self.question,
            row(self.rolled, self.without_sinks),
            self.status,
            self.reader,
            self.table,
            self.shares,
        )
        self.show(question)

    def show(self, question: str) -> None:
        """Answer a question; an error is shown, and what was there stays."""
        try:
            self.answer = self._ask(question)
        except (ValueError, RuntimeError) as error:
            self.status.set(str(error))
            return
        answer = self.answer
        note = [f"Its image tokens have no place: {answer.masks.note}"] if not answer.masks.placed.any() else []
        if answer.uncounted:
            note.append(f"{len(answer.uncounted)} layers without softmax attention are not counted or blocked.")
        self.status.set("Hover over a word to see where it looked; click to pin it.", *note)
        alone = answer.log_probs.exp(), answer.blocked[0].exp()
        looks = answer.image_share.mean(dim=1), answer.null.mean(dim=1)
        rows = [
            [word, *(f"{float(part[at]):.1%}" for part in (*alone, *looks)), _most(answer, at)]
            for at, word in enumerate(answer.words)
        ]
        self.table.update(rows=rows, label=f"Answer: {answer.text}", alt="Each word of the answer with its numbers.")
        self.shares.update(
            values=np.stack([answer.image_share.numpy(), answer.null.numpy()]),
            label="Share of attention on the image, by word and layer",
            alt="Beside it, the share under uniform attention.",
        )
        self._draw_maps()

    def _draw_maps(self) -> None:
        answer = self.answer
        words = range(len(answer.words))
        looks = torch.stack([answer.map(word, rolled=self.rolled.value) for word in words])
        if self.without_sinks.value:
            looks = looks.masked_fill(_sinks(looks), 0.0)
        placed = answer.masks.placed[0, answer.masks.vision[0]]
        self.reader.update(
            image=encoded(self._image),
            words=list(answer.words),
            boxes=answer.boxes[placed].numpy(),
            looks=looks[:, placed].numpy(),
            reads=np.zeros((int(placed.sum()), len(answer.words))),  # the image precedes the answer
            on_grid=bool(placed.all()),
            pinned=-1,
            label=answer.text,
            alt="The image with the attention of the chosen word.",
        )

    def close(self) -> None:
        for child in self.children:
            close_all(child)
        super().close()


def _sinks(looks: torch.Tensor) -> torch.Tensor:
    """Visual tokens that every word gives at least five times their even share, bool (token,)."""
    share = looks / looks.sum(dim=1, keepdim=True)
    return (share >= 5 / looks.shape[1]).all(dim=0)


def _most(answer: Answer, word: int) -> str:
    return " ".join(token.strip() or repr(token) for token, _ in answer.most_attended(word, 3))
