"""View 4: another sentence, another image, or the user's own image; the answers of the model."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import pandas as pd
from PIL import Image

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import prepare
from vpworkbench.data.records import Picture
from vpworkbench.errors import RegionsMissing, first_line
from vpworkbench.explorer.page import Part, Section
from vpworkbench.explorer.parts import WIDTH, StatusText, View, column, row
from vpworkbench.explorer.readings import Block, Reading, check_index
from vpworkbench.explorer.widgets import Drop, Table
from vpworkbench.model.readouts import fill_mask, match_probability

MOST_WORDS = 512
LARGEST_PX = 20_000_000  # pixels of an upload
NAMES = ["model", "asked", "answer", "answer with the block"]  # the last one only if something is blocked
WAYS = {"none": "", "words from the image": "text_to_vision", "the image from words": "vision_to_text", "both": "both"}

UNREADABLE = (ValueError, RuntimeError, IndexError)
"""Errors of models that cannot read a picture or a sentence; the explorer reports them and stays usable."""
NO_REGIONS = (
    "this model reads regions and your image has none; make them with a detector, or for scenes with `vpw regions`"
)


class TryView(View):
    """A sentence to edit, a picture to choose or to add, attention to block, and the answers.

    `read` lets the models read a picture with a text; it raises an error of `UNREADABLE` if they cannot.
    """

    title = "Try it"

    def __init__(
        self, readings: Sequence[Reading], pictures: Sequence[Picture], read: Callable[[Picture, str], None]
    ) -> None:
        super().__init__()
        self._read = read
        self.pictures = list(pictures)
        self.scratch = tempfile.TemporaryDirectory(prefix="vpworkbench-explorer-")
        self.text = ipywidgets.Text(
            continuous_update=False,
            description="sentence",
            layout={"width": "640px"},
            placeholder="type a sentence and press Enter; [MASK] is filled in",
        )
        self.choice = ipywidgets.Dropdown(description="picture", layout={"width": "260px"})
        self.caption = ipywidgets.Dropdown(description="caption", layout={"width": "640px"})
        self.way = ipywidgets.Dropdown(options=WAYS, description="block", layout={"width": "280px"})
        count = min(reading.layers for reading in readings)
        self.layers = ipywidgets.IntRangeSlider(
            value=(1, count), min=1, max=count, description="in layers", layout={"width": "300px"}
        )
        self.drop = Drop(label="Your own image: choose or drop it here", width=420)
        self.answers = Table(label="Answers", names=NAMES, width=WIDTH)
        self.status = StatusText()
        self.text.observe(lambda change: self.say(change["new"]), "value")
        self.choice.observe(lambda change: self.look(change["new"]), "value")
        self.caption.observe(lambda change: self.say(change["new"]), "value")
        for control in (self.way, self.layers):
            control.observe(lambda change: self._block_chosen(), "value")
        self.drop.observe(lambda change: self.add_image(bytes(self.drop.file), self.drop.file_name), "count")
        self.controls = column(row(self.text, self.choice), self.status)  # shown above all views
        self.widget.children = (row(self.caption), row(self.way, self.layers), self.answers, self.drop)
        self.show(readings)

    @property
    def block(self) -> Block | None:
        """What the controls ask to block."""
        first, last = self.layers.value
        return Block(self.way.value, first - 1, last - 1) if self.way.value else None

    def show(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)
        picture, text = readings[0].picture, readings[0].text
        with self.quiet():
            names = tuple((f"{place}: {one.id}"[:60], place) for place, one in enumerate(self.pictures))
            if names != self.choice.options:
                self.choice.options = names
            self.choice.value = next(place for place, one in enumerate(self.pictures) if one is picture)
            self.caption.options = list(dict.fromkeys([*picture.captions[:10], *picture.foils[:4], text]))
            self.caption.value = self.text.value = text
            self._show_block()
        block = self.readings[0].block
        noted = [f"Blocked in all views but Masks: {block}."] if block else []
        self.status.set(*noted, *_not_read(self.readings))
        table = self.tables()["answers"]
        alt = f"Of the sentence “{text}”{self.readings[0].note}."
        self.answers.update(names=list(table), rows=table.to_numpy().tolist(), alt=alt)

    def say(self, text: str) -> None:
        """Read another sentence with the same picture; the page shows what is wrong with it."""
        self._try(self.readings[0].picture, text)

    def look(self, place: int) -> None:
        """Read another picture of the list with its own first caption, or the same sentence if it has none."""
        picture = self.pictures[place]
        self._try(picture, picture.captions[0] if picture.captions else self.readings[0].text)

    def set(self, way: str, first: int, last: int | None) -> None:
        """Block a way of `knock_out` in some layers, from 0 and by default to the last; an empty way blocks nothing."""
        if way not in WAYS.values():
            raise ValueError(f"way {way!r} is not known; known are {', '.join(filter(None, WAYS.values()))}")
        last = self.layers.max - 1 if last is None else last
        check_index("layer", first, last + 1)
        check_index("layer", last, self.layers.max)
        with self.quiet():
            self.way.value, self.layers.value = way, (first + 1, last + 1)
        self._read_or_unblock(self.readings[0].picture, self.readings[0].text)

    def _block_chosen(self) -> None:
        if self.block != self.readings[0].block:  # layers alone block nothing
            self.say(self.readings[0].text)

    def _read_or_unblock(self, picture: Picture, text: str) -> None:
        try:
            self._read(picture, text)
        except UNREADABLE:
            with self.quiet():
                self._show_block()
            raise

    def _show_block(self) -> None:
        """Set the controls to what is blocked."""
        way, first, last = self.readings[0].block or ("", *(end - 1 for end in self.layers.value))
        self.way.value, self.layers.value = way, (first + 1, last + 1)

    def add_image(self, content: bytes, name: str) -> None:
        """Add the user's own image and read it with the same sentence."""
        if fault := _fault(content):
            self.drop.update(message=f"{name}: {fault}")
            return
        file = ImageFile(Path(self.scratch.name), f"image-{len(self.pictures)}")
        (file.folder / file.name).write_bytes(content)
        picture = Picture(Path(name).name, file, "test", ())
        self.pictures.append(picture)
        if self._try(picture, self.readings[0].text):
            self.drop.update(message=f"{name} is read")
        else:
            self.pictures.pop()
            self.drop.update(message=self.status.text)

    def _try(self, picture: Picture, text: str) -> bool:
        if self._is_quiet:
            return True
        try:
            if len(text.split()) > MOST_WORDS:
                raise ValueError(f"{len(text.split()):,} words are too many for a model; at most {MOST_WORDS}")
            self._read_or_unblock(picture, text)
        except UNREADABLE as error:
            is_own = picture.image.folder == Path(self.scratch.name)
            reason = NO_REGIONS if is_own and isinstance(error, RegionsMissing) else first_line(error)
            self.status.set(f"Not read: {reason}")
            return False
        return True

    def section(self) -> Section:
        return Section("What it says", "", [Part(self.answers)])

    def tables(self) -> dict[str, pd.DataFrame]:
        """`answers`."""
        rows = []
        for reading in self.readings:
            before = _answers(reading)
            with reading.blocking():
                after = _answers(reading) if reading.block else before
            pairs = zip(before, after, strict=True)
            rows += [(reading.subject.name, asked, answer, blocked) for (asked, answer), (_, blocked) in pairs]
        table = pd.DataFrame(rows, columns=NAMES)
        return {"answers": table if self.readings[0].block else table.drop(columns=NAMES[-1])}

    def code(self) -> str:
        return f"view.block({self.way.value!r}, {', '.join(map(str, self.block[1:]))})" if self.block else ""

    def close(self) -> None:
        super().close()
        self.scratch.cleanup()
        self.pictures = []


def _fault(content: bytes) -> str:
    """Why an image cannot be read: Pillow refuses it, or it has too many pixels; empty if it can."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > LARGEST_PX:
                return f"{image.width} x {image.height} pixels are too many; scale it down"
            image.load()
    except Image.DecompressionBombError:  # does not say how many
        return "its pixels are too many; scale it down"
    except (OSError, ValueError, SyntaxError):
        return "no picture that can be read"
    return ""


def _answers(reading: Reading) -> list[tuple[str, str]]:
    """Questions to one model and its answers."""
    picture, text, base, task = reading.picture, reading.text, reading.subject.base, reading.subject.task_model
    if task is not None and task.task.images > 1:
        return [(task.task.name, "No answer: it judges statements about two images, and here there is one.")]
    if task is not None:
        shares = list(task.predict(picture.image, text).items())[:5]
        return [(f"{task.task.name} (fine-tuned: no ITM, fills no [MASK])", _listed(shares))]
    if base is None:
        return [("", "This model has no head that answers here.")]
    share = match_probability(base, prepare(base, [picture], [text]))[0]
    answers = [("is the sentence true of the image? (ITM)", f"{100 * share:.1f}%")]
    if base.tokenizer.mask_token_id in base.words.ids(text):
        words = fill_mask(base, prepare(base, [picture], [text]))
        answers.append(("which word belongs at [MASK]? (MLM)", _listed(words)))
    return answers


def _listed(shares: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares)


def _not_read(readings: Sequence[Reading]) -> list[str]:
    """Sentences about the parts of the text that a model does not read as written."""
    lines = []
    for reading in readings:
        base, name = reading.subject.base, reading.subject.name
        if base is None:
            continue
        count = len(base.tokenizer(reading.text, truncation=False, verbose=False)["input_ids"])
        if count > base.words.longest:
            lines.append(f"{name} reads {base.words.longest} of {count} tokens; the rest is cut off.")
        if unknown := reading.words.count(base.tokenizer.unk_token):
            lines.append(f"{name} does not know {unknown} of these tokens; it reads them as [UNK].")
    return lines
