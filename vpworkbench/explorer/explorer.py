"""The explorer: four views of one input, in a notebook, in code and as a file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import ipywidgets
import numpy as np
import pandas as pd
from PIL import Image

from vpworkbench.data.images import read_image
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out, load_splits
from vpworkbench.errors import DataError
from vpworkbench.explorer import still
from vpworkbench.explorer.answer import QUESTION, AnswerView
from vpworkbench.explorer.flow import MODELS, FlowView
from vpworkbench.explorer.masks import MasksView
from vpworkbench.explorer.page import write_page
from vpworkbench.explorer.parts import WIDTH, Delayed, View, close_all, column
from vpworkbench.explorer.readings import Reading, check_index, read
from vpworkbench.explorer.try_it import UNREADABLE, TryView
from vpworkbench.explorer.widgets import Copy, Save
from vpworkbench.explorer.words import WordsView
from vpworkbench.huggingface import Processed
from vpworkbench.settings import DataSettings
from vpworkbench.subjects import Loadable, Subject, load_all

ViewName = Literal["masks", "words", "flow", "try"]
ALL: tuple[ViewName, ...] = get_args(ViewName)
Images = Sequence[Picture] | str | Path | Image.Image | np.ndarray | None
"""Pictures, the name of a captioned set, or one image."""


def explore(
    model: Loadable = None,
    data: Images = None,
    *,
    beside: Loadable = None,
    regions: str = "",
    pictures: int = 24,
    views: Sequence[ViewName] | None = None,
    processor: Any = None,
    question: str = QUESTION,
    **answering: Any,
) -> Explorer | AnswerView:
    """Open the explorer of a model, or of two models on the same input.

    A decoder of transformers, given by name, folder or with its processor, answers a question: see `AnswerView`.

    Parameters
    ----------
    model, regions
        See `subjects.load`.
    data
        Pictures, or a captioned set ("scenes", a folder, a file), of which the held-out pictures are shown; None:
        generated scenes. For a decoder also one image: a file, a PIL image or an array.
    beside
        A second model, drawn below the first, such as one before pre-training.
    pictures : int
        Largest number of pictures to choose from.
    processor, question, answering
        The processor of a decoder in memory; what a decoder is asked; and options of `probe_answer`.
    views
        The views to show, by default all; of a decoder, its answer. A notebook without `flow` stays small: plotly's
        script takes 5 MB of a saved one.

    If a model can read none of the pictures, the error is the one for the last picture.
    """
    if unknown := [name for name in views or () if name not in ALL]:
        raise ValueError(f"views: no view {unknown[0]!r}; there are {', '.join(ALL)}")
    if processor is not None:
        model = Subject(type(model).__name__, model, Processed(model, processor, None), batch=1)
    subjects = load_all((model,) if beside is None else (model, beside), regions=regions)
    if views is None and beside is None and subjects[0].answers:
        opened = subjects[0].prepare  # the model with its processor
        return AnswerView(opened.model, opened.processor, _images(data, pictures), question, answering)
    if answering:
        raise TypeError(f"explore: {', '.join(answering)}: only a decoder's answer has these options")
    if isinstance(data, Image.Image | np.ndarray):
        raise TypeError("data: one image is for a decoder; give pictures, or add the image in the explorer")
    chosen = _load_pictures(data, pictures)
    is_default = views is None or tuple(views) == ALL and not subjects[0].answers
    named = None if is_default else tuple(views)
    options = {"model": _in_code(model, "model"), "data": _in_code(data, "pictures")}
    options |= {"beside": _in_code(beside, "other"), "regions": repr(regions)}
    options |= {"pictures": repr(pictures), "views": repr(named)}
    options |= {"processor": _in_code(processor, "processor")}
    defaults = {name: repr(parameter.default) for name, parameter in signature(explore).parameters.items()}
    call = ", ".join(f"{name}={value}" for name, value in options.items() if value != defaults[name])
    return Explorer(
        _first_readings(subjects, chosen, data), chosen, ALL if views is None else views, f"explore({call})"
    )


def _in_code(value: object, name: str) -> str:
    """An argument in code that recreates a view: names of runs and sets as they are, anything else as a variable."""
    if isinstance(value, Path):
        return repr(str(value))
    return repr(value) if isinstance(value, str | None) else name


def _first_readings(subjects: Sequence[Subject], pictures: Sequence[Picture], source: object) -> list[Reading]:
    """Readings of the first picture that all models can read."""
    refused: Exception = DataError(f"{source}: no picture to explore")
    for picture in pictures:
        text = picture.captions[0] if picture.captions else "a picture"
        try:
            return [read(one, picture, text) for one in subjects]
        except UNREADABLE as error:
            refused = error
    raise refused


def _images(data: Images, most: int) -> dict[str, np.ndarray]:
    """Images by name: one that is given, or those of pictures."""
    is_file = isinstance(data, str | Path) and Path(data).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    if is_file or not isinstance(data, Sequence | Path | None):
        return {"image": np.asarray(read_image(data))}
    images = {picture.id: picture.image.pixels() for picture in _load_pictures(data, most)}
    if not images:
        raise DataError(f"{data}: no picture to explore")
    return images


def _load_pictures(data: Sequence[Picture] | str | Path | None, most: int) -> list[Picture]:
    if data is not None and not isinstance(data, str | Path):
        return list(data)[:most]
    settings = DataSettings(sets=("scenes" if data is None else str(data),))
    if settings.sets == ("scenes",):  # generate only what is shown
        return load_held_out(settings, images=most)
    splits = load_splits(settings)
    return next((splits[name] for name in ("val", "test", "train") if splits.get(name)), [])[:most]


class Explorer(ipywidgets.VBox):
    """Four views of one input: `masks`, `words` and `flow`, each None if it is not shown, and `trial`.

    `readings` is the present input, read by each model.
    """

    def __init__(
        self, readings: Sequence[Reading], pictures: Sequence[Picture], views: Sequence[ViewName], call: str
    ) -> None:
        super().__init__(layout={"width": "100%", "max_width": f"{WIDTH + 40}px"})
        self.add_class("vpw-explorer")
        self.readings, self.subjects = list(readings), [one.subject for one in readings]
        self._call, self._given_pictures = call, len(pictures)
        self.masks = MasksView(self.readings) if "masks" in views else None
        self.words = WordsView(self.readings) if "words" in views else None
        self.flow = FlowView(self.readings) if "flow" in views else None
        self.trial = TryView(self.readings, pictures, self._read_and_show)
        self._views: list[View] = [view for view in (self.masks, self.words, self.flow, self.trial) if view is not None]
        self._tab_views = [view for view in self._views if view is not self.trial or "try" in views]
        self._code = Copy(label="Code that recreates this view", width=WIDTH)
        self._tabs = ipywidgets.Tab(
            [view.widget for view in self._tab_views], titles=[view.title for view in self._tab_views]
        )
        self._take = ipywidgets.Accordion(
            [column(self._code)], titles=["copy as code"], selected_index=None, layout={"flex": "1"}
        )
        self._take.observe(lambda change: self._update_code(), "selected_index")
        for view in self._views:
            view.changed = self._update_code
        self._tabs.observe(lambda change: self._tab_opened(), "selected_index")
        self._delayed = Delayed(0.1)
        save = Save(
            lambda: self.save(Path(self.trial.scratch.name) / "explorer.html"),
            width=170,
            alt="Everything in one HTML file that opens without a kernel and without a network",
        )
        self.children = (self.trial.controls, self._tabs, ipywidgets.HBox([self._take, save]))
        self._tab_opened()

    def _tab_opened(self) -> None:
        place = self._tabs.selected_index
        if self.flow is not None and place is not None and self._tab_views[place] is self.flow:
            self.flow.open()
        self._update_code()

    def _read_and_show(self, picture: Picture, text: str) -> None:
        block = self.trial.block
        self.readings = [read(one, picture, text, block) for one in self.subjects]  # fails before anything is shown
        for view in self._views:
            view.show(self.readings)
        self._update_code()

    # ------------------------------------------------------------------------------------------- in a notebook

    def say(self, text: str) -> Explorer:
        """Read another sentence with the same picture."""
        self._read_and_show(self.readings[0].picture, text)
        return self

    def look(self, picture: int) -> Explorer:
        """Read another of the pictures, by its place; images that were added come last."""
        check_index("picture", picture, len(self.trial.pictures))
        self.trial.look(picture)
        return self

    def pick(self, token: int | None = None, **options: Any) -> Explorer:
        """Pick a visual token and choose what is hidden with it: `k`, `select`, `head`, `draw`, see `MasksView.set`."""
        return self._set("masks", token, **options)

    def read(self, place: int | None = None, **options: Any) -> Explorer:
        """Pin a word or a patch, choose `layer`, `head` and `rolled`, see `WordsView.set`."""
        return self._set("words", place, **options)

    def span(self, start: int, stop: int, **options: Any) -> Explorer:
        """Choose a span of layers, from 0, and the `model` and `layer` of the tokens, see `FlowView.set`."""
        return self._set("flow", start, stop, **options)

    def block(self, way: str = "", first: int = 0, last: int | None = None) -> Explorer:
        """Block a way of `knock_out` in layers `first` to `last`, from 0; an empty way blocks nothing."""
        self.trial.set(way, first, last)
        return self

    def _set(self, name: ViewName, *places: int | None, **options: Any) -> Explorer:
        if (view := getattr(self, name)) is None:
            raise ValueError(f"this explorer was opened without the view {name!r}; add it to `views`")
        view.set(*places, **options)
        return self

    @property
    def code(self) -> str:
        """The lines of code that recreate the present view."""
        reading = self.readings[0]
        place = next(place for place, one in enumerate(self.trial.pictures) if one is reading.picture)
        lines = ["from vpworkbench.explorer import explore", "", f"view = {self._call}"]
        if place < self._given_pictures:
            lines.append(f"view.look({place})")
        else:  # an image that the user added; its file is elsewhere
            name = reading.picture.id
            lines.append(f'view.trial.add_image(open({name!r}, "rb").read(), {name!r})')
        lines.append(f"view.say({reading.text!r})")
        lines += [line for view in self._views if (line := view.code())]
        return "\n".join([*lines, "view"])

    def _update_code(self) -> None:
        """Send the code if it is visible."""
        if self._take.selected_index is not None:
            self._code.update(text=self.code)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The numbers of all views; where something is blocked, a column `block` says what."""
        tables = {name: table for view in self._views for name, table in view.tables().items()}
        block = self.readings[0].block
        blocked = tables.keys() - {"masks"} if block else ()
        return tables | {name: tables[name].assign(block=str(block)) for name in blocked}

    def save_csv(self, folder: str | Path) -> list[Path]:
        """Write every table as a csv."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = {Path(folder) / f"{name}.csv": table for name, table in self.tables().items()}
        for file, table in files.items():
            table.to_csv(file, index=False)
        return list(files)

    def save(self, path: str | Path) -> Path:
        """Write everything as one HTML file that opens without a kernel and without a network."""
        models = " and ".join(one.name for one in self.subjects)
        title = f"{models} on “{self.readings[0].text}”{self.readings[0].note}"
        return write_page(path, title, [view.section() for view in self._views])

    def close(self) -> None:
        """Take the explorer off the page and free its memory."""
        self._delayed.cancel()
        for view in self._views:
            view.close()
        for child in self.children:
            close_all(child)
        self.readings, self.subjects, self.children = [], [], ()
        for part in (self.layout, super()):
            part.close()

    def __repr__(self) -> str:
        if not self.readings:
            return "Explorer(closed)"
        models = ", ".join(
            f"{one.subject.name}: {one.layers} layers, {one.heads} heads, {len(one.boxes)} visual tokens"
            for one in self.readings
        )
        return f"Explorer({models}; {self.readings[0].text!r})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live view, and a picture of image, mask and flow for pages without widgets, such as GitHub's."""
        bundle = super()._repr_mimebundle_(**options) or {}
        bundle["text/plain"] = repr(self)
        if self.flow is not None and self.readings:
            self._delayed(self.flow.open)  # after the first view
        if self.readings:
            bundle["image/png"] = base64.b64encode(self._overview()).decode("ascii")
        return bundle

    def _overview(self) -> bytes:
        """A picture of the image, its mask and the flow curves, a row for each model."""
        figure = still.blank(940, 250 * len(self.readings))
        rows = figure.subplots(len(self.readings), 4, squeeze=False)
        for reading, (image, mask, *flows), colour in zip(self.readings, rows, MODELS, strict=False):
            image.imshow(reading.image)
            image.set_title(still.shortened(f"{reading.subject.name}: {reading.text}", 26))
            image.set_axis_off()
            if self.masks is not None and reading in self.masks.readings:
                self.masks.draw_mask(mask, reading)
            else:
                still.panel(mask, reading, "plain", np.zeros(len(reading.boxes)), "")
            titles = "from the input to layer j", "within layer i"
            for axes, values, title in zip(flows, reading.curves, titles, strict=True):
                still.curves(axes, *values, f"flow {title}", colour)
        return still.png(figure)
