"""View 4: another sentence, another image, one's own; what the model says of it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import pandas as pd
from PIL import Image, UnidentifiedImageError

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import prepare
from vpworkbench.data.records import Picture
from vpworkbench.errors import DataError, RegionsMissing
from vpworkbench.explorer.parts import WIDTH, Note, column, row
from vpworkbench.explorer.readings import Reading
from vpworkbench.explorer.widgets import Drop, Table
from vpworkbench.model.readouts import fill_mask, match_probability

MOST_WORDS = 512
LARGEST_PX = 20_000_000  # pixels of an upload
NAMES = ["model", "asked", "answer"]

UNREADABLE = (ValueError, DataError, RuntimeError, IndexError)
"""What models raise of a picture or a sentence that they cannot take; the explorer stays alive."""
NO_REGIONS = (
    "this model reads regions, and an image of one's own has none: a detector makes them, or of scenes `vpw regions`"
)


class TryView:
    """A sentence to edit, a picture to choose or to drop, and the answers.

    Parameters
    ----------
    readings
        Of the first picture.
    pictures : sequence of Picture
    read : callable
        (picture, text) -> None: lets the models read; raises a ValueError that says what is wrong.
    """

    title = "Try it"

    def __init__(
        self, readings: Sequence[Reading], pictures: Sequence[Picture], read: Callable[[Picture, str], None]
    ) -> None:
        self._read, self._is_quiet = read, False
        self.pictures = list(pictures)
        self.scratch = tempfile.TemporaryDirectory(prefix="vpworkbench-explorer-")
        self.text = ipywidgets.Text(
            continuous_update=False, description="sentence", layout={"width": "640px"},
            placeholder="type a sentence and press Enter; [MASK] is filled in",
        )  # fmt: skip
        self.choice = ipywidgets.Dropdown(description="picture", layout={"width": "260px"})
        self.caption = ipywidgets.Dropdown(description="caption", layout={"width": "640px"})
        self.drop = Drop(label="Your own image: choose or drop it here", width=420)
        self.note, self.answers, self.unasked = Note(), Table(label="Answers", names=NAMES, width=WIDTH), Note()
        self.text.observe(lambda change: self.say(change["new"]), "value")
        self.choice.observe(lambda change: self.look(change["new"]), "value")
        self.caption.observe(lambda change: self.say(change["new"]), "value")
        self.drop.observe(lambda change: self.take(bytes(self.drop.file), self.drop.file_name), "count")
        # Sentence and picture stand above all views; what is said of them is this one.
        self.controls = column(row(self.text, self.choice), self.note)
        self.widget = column(row(self.caption), self.answers, self.unasked, self.drop)
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        """Show what the models say."""
        self.readings = list(readings)
        picture, text = readings[0].picture, readings[0].text
        self._is_quiet = True
        names = [(_name(one, place), place) for place, one in enumerate(self.pictures)]
        if tuple(names) != self.choice.options:
            self.choice.options = names
        self.choice.value = next(place for place, one in enumerate(self.pictures) if one is picture)
        self.caption.options = list(dict.fromkeys([*picture.captions[:10], *picture.foils[:4], text]))
        self.caption.value = text
        self.text.value = text
        self._is_quiet = False
        self.note.say(*_unseen(self.readings))
        self.answers.update(rows=[list(cells) for cells in self._said()], alt=f"Of the sentence “{text}”.")
        self.unasked.say(*(
            f"{one.subject.name} is fine-tuned: no ITM and no words for [MASK]; the model that it was before has them."
            for one in readings if one.subject.task_model is not None
        ))  # fmt: skip

    def say(self, text: str) -> None:
        """Read another sentence with the same picture; what is wrong with it is said in the page."""
        self._try(self.readings[0].picture, text)

    def look(self, place: int) -> None:
        """Read another picture of the list, with its own first caption where it has one."""
        picture = self.pictures[place]
        self._try(picture, picture.captions[0] if picture.captions else self.readings[0].text)

    def take(self, content: bytes, name: str) -> None:
        """An image of one's own: the sentence stays."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > LARGEST_PX:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many; scale it down")
                image.load()
            file = f"{len(self.pictures)}-{Path(name).name[-60:] or 'image'}"
            (Path(self.scratch.name) / file).write_bytes(content)
        except Image.DecompressionBombError:  # tells no size
            self.drop.update(message=f"{name}: its pixels are too many; scale it down")
            return
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            told = error if isinstance(error, ValueError) and "pixels" in str(error) else "no picture that can be read"
            self.drop.update(message=f"{name}: {told}")
            return
        picture = Picture(Path(name).name, ImageFile(Path(self.scratch.name), file), "test", ())
        self.pictures.append(picture)
        if self._try(picture, self.readings[0].text):
            self.drop.update(message=f"{name} is read")
        else:
            self.pictures.pop()
            self.drop.update(message=self.note.text)

    def _try(self, picture: Picture, text: str) -> bool:
        if self._is_quiet:
            return True
        try:
            if len(text.split()) > MOST_WORDS:
                raise ValueError(f"{len(text.split()):,} words are too many for a model; at most {MOST_WORDS}")
            self._read(picture, text)
        except UNREADABLE as error:
            is_own = picture.image.folder == Path(self.scratch.name)
            told = NO_REGIONS if is_own and isinstance(error, RegionsMissing) else str(error).splitlines()[0][:300]
            self.note.say(f"Not read: {told}")
            return False
        return True

    def _said(self) -> list[tuple[str, str, str]]:
        nothing = [("", "This model has no head that answers here.")]
        return [(reading.subject.name, asked, answer)
                for reading in self.readings for asked, answer in _answers(reading) or nothing]  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """`answers`."""
        return {"answers": pd.DataFrame(self._said(), columns=NAMES)}

    def close(self) -> None:
        self.drop.close()
        self.scratch.cleanup()
        self.readings, self.pictures = [], []


def _answers(reading: Reading) -> list[tuple[str, str]]:
    """What one model is asked, and its answer."""
    picture, text, base, task = reading.picture, reading.text, reading.subject.base, reading.subject.task_model
    if task is not None and task.task.images > 1:
        return [(task.task.name, "No answer: it judges statements about two images, and here there is one.")]
    if task is not None:
        told = _listed(list(task.predict(picture.image, text).items())[:5])
        return [(f"{task.task.name}: its answer", told)]
    if base is None:
        return []
    share = match_probability(base, prepare(base, [picture], [text]))[0]
    said = [("is the sentence true of the image? (ITM)", f"{100 * share:.1f}%")]
    if base.tokenizer.mask_token_id in base.words.ids(text):
        said.append(("what stands at [MASK]? (MLM)", _listed(fill_mask(base, prepare(base, [picture], [text])))))
    return said


def _listed(shares: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares)


def _unseen(readings: Sequence[Reading]) -> list[str]:
    """What of the sentence the models do not see as it is written."""
    told = []
    for reading in readings:
        base = reading.subject.base
        if base is None:
            continue
        count = len(base.tokenizer(reading.text, truncation=False, verbose=False)["input_ids"])
        if count > base.words.longest:
            told.append(f"{reading.subject.name} reads {base.words.longest} of {count} tokens; the rest is cut off.")
        if unknown := reading.words.count(base.tokenizer.unk_token):
            told.append(f"{reading.subject.name} does not know {unknown} of these tokens; it reads them as [UNK].")
    return told


def _name(picture: Picture, place: int) -> str:
    return f"{place}: {picture.id}"[:60]
