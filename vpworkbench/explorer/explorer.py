"""The explorer: four views of one input, in a notebook, in code and as a file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ipywidgets
import pandas as pd
import plotly.graph_objects as go

from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out, load_splits
from vpworkbench.errors import DataError
from vpworkbench.explorer import still
from vpworkbench.explorer.flow import FlowView
from vpworkbench.explorer.masks import MasksView, Select
from vpworkbench.explorer.page import Part, Section, write_page
from vpworkbench.explorer.parts import WIDTH, Delayed, View, column
from vpworkbench.explorer.readings import Reading, check_index, first_caption, read
from vpworkbench.explorer.try_it import UNREADABLE, TryView
from vpworkbench.explorer.widgets import Copy, Save
from vpworkbench.explorer.words import WordsView
from vpworkbench.settings import DataSettings
from vpworkbench.subjects import Loadable, Subject, load

PICTURES = 24
ViewName = Literal["masks", "words", "flow", "try"]
ALL: tuple[ViewName, ...] = ("masks", "words", "flow", "try")


def explore(
    model: Loadable = None,
    data: Sequence[Picture] | str | Path | None = None,
    *,
    beside: Loadable = None,
    regions: str = "",
    pictures: int = PICTURES,
    views: Sequence[ViewName] = ALL,
) -> Explorer:
    """Open the explorer of a model, or of two models on the same input.

    Parameters
    ----------
    model
        A `VisualParsingModel`, a `TaskModel`, a `Subject` of `subjects.load`, or the name or folder of a run;
        None: the shipped tiny model.
    data
        Pictures, a captioned set that `load_splits` reads ("scenes", a folder, a file), or None: generated scenes. The
        held-out pictures of a set are shown.
    beside
        A second model, drawn below the first: before and after pre-training, masks by attention and at random.
    regions : str
        Regions for models that read them, see `subjects.load`.
    pictures : int
        Largest number of pictures to choose from.
    views
        The views to show. A notebook without `flow` stays small: plotly's script takes 5 MB of a saved one.

    If a model can read none of the pictures, the error is the one for the last picture.
    """
    if unknown := [name for name in views if name not in ALL]:
        raise ValueError(f"views: no view {unknown[0]!r}; there are {', '.join(ALL)}")
    given = (model, beside) if beside is not None else (model,)
    subjects = [load(one, regions=regions, optional_regions=len(given) > 1) for one in given]
    if len(subjects) == 2 and subjects[0].name == subjects[1].name:
        subjects = [replace(one, name=f"{one.name} ({number})") for number, one in enumerate(subjects, start=1)]
    chosen = _load_pictures(data, pictures)
    readings = _first_readings(subjects, chosen, data)
    data_argument = None if data is None else str(data) if isinstance(data, str | Path) else _Name("pictures")
    beside_argument = beside if beside is None or isinstance(beside, str) else _Name("other")
    arguments = (
        [] if model is None and data is None else [repr(model if isinstance(model, str | None) else _Name("model"))]
    )
    arguments += [] if data is None else [repr(data_argument)]
    options = {"beside": (beside_argument, None), "regions": (regions, ""), "pictures": (pictures, PICTURES)}
    options["views"] = (tuple(views), ALL)
    arguments += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
    return Explorer(readings, chosen, views=views, call=f"explore({', '.join(arguments)})")


class _Name(str):
    """A variable name in code that recreates a view: its repr has no quotes."""

    __repr__ = str.__str__


def _first_readings(subjects: Sequence[Subject], pictures: Sequence[Picture], source: object) -> list[Reading]:
    """Readings of the first picture that all models can read."""
    refused: Exception = DataError(f"{source}: no picture to explore")
    for picture in pictures:
        try:
            return [read(one, picture, first_caption(picture)) for one in subjects]
        except UNREADABLE as error:
            refused = error
    raise refused


def _load_pictures(data: Sequence[Picture] | str | Path | None, most: int) -> list[Picture]:
    if data is not None and not isinstance(data, str | Path):
        return list(data)[:most]
    settings = DataSettings(sets=("scenes" if data is None else str(data),))
    if settings.sets == ("scenes",):  # generate only what is shown
        few = settings.scenes.model_copy(update={"val": min(most, settings.scenes.val)})
        return load_held_out(settings.model_copy(update={"scenes": few}))
    splits = load_splits(settings)
    return next((splits[name] for name in ("val", "test", "train") if splits.get(name)), [])[:most]


class Explorer(ipywidgets.VBox):
    """Four views of one input: masks, words and patches, flow, try it.

    Attributes
    ----------
    masks, words, flow : View or None
        None if a view is not shown.
    trial : TryView
    readings : list of Reading
        The present input, read by each model.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        pictures: Sequence[Picture],
        *,
        views: Sequence[ViewName] = ALL,
        call: str = "explore(...)",
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
        self.readings = [read(subject, picture, text) for subject in self.subjects]  # fails before anything is shown
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

    def pick(
        self,
        token: int | None = None,
        *,
        k: int | None = None,
        select: Select | None = None,
        head: int | None = None,
        draw: int | None = None,
    ) -> Explorer:
        """Pick a visual token and choose what is hidden with it; see `MasksView.set`."""
        self._view("masks").set(token, k=k, select=select, head=head, draw=draw)
        return self

    def read(
        self, place: int | None = None, *, layer: int | None = None, head: int | None = None, rolled: bool | None = None
    ) -> Explorer:
        """Pin a word or a patch, choose layer and head; see `WordsView.set`."""
        self._view("words").set(place, layer=layer, head=head, rolled=rolled)
        return self

    def span(self, start: int, stop: int, *, model: int = 0, layer: int | None = None) -> Explorer:
        """Choose a span of layers, from 0; see `FlowView.set`."""
        self._view("flow").set(start, stop, model=model, layer=layer)
        return self

    def _view(self, name: ViewName) -> Any:
        if (view := getattr(self, name)) is None:
            raise ValueError(f"this explorer was opened without the view {name!r}; add it to `views`")
        return view

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
        """The numbers of all views."""
        return {name: table for view in self._views for name, table in view.tables().items()}

    def save_csv(self, folder: str | Path) -> list[Path]:
        """Write every table as a csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, table in self.tables().items():
            files.append(folder / f"{name}.csv")
            table.to_csv(files[-1], index=False)
        return files

    def save(self, path: str | Path) -> Path:
        """Write everything as one HTML file that opens without a kernel and without a network."""
        sections = [self._masks_section(self.masks)] if self.masks is not None else []
        sections += [self._words_section(self.words)] if self.words is not None else []
        sections += [self._flow_section(self.flow)] if self.flow is not None else []
        sections.append(Section("What it says", "", [Part(self.trial.answers)]))
        models = " and ".join(one.name for one in self.subjects)
        return write_page(path, f"{models} on “{self.readings[0].text}”", sections)

    @staticmethod
    def _masks_section(view: MasksView) -> Section:
        if not view.readings:
            return Section(view.title, view.status.text)
        view.settle()
        parts = []
        for number, (panels, errors) in enumerate(zip(view.panels, view.errors, strict=True)):
            parts += [Part(panels, still.masks(view, number)), Part(errors)]
        intro = "Hover over a token to see its numbers. To pick another token, open the explorer: the model must run."
        return Section(view.title, intro, [*parts, Part(view.numbers)])

    @staticmethod
    def _words_section(view: WordsView) -> Section:
        parts = []
        for number, (maps, reader) in enumerate(zip(view.maps, view.readers, strict=True)):
            parts += [Part(maps, still.words(view, number)), Part(reader)]
        return Section(
            view.title, "Hover over a word to see where it looks, over a patch to see what it reads. Click pins.", parts
        )

    @staticmethod
    def _flow_section(view: FlowView) -> Section:
        figure = Part(go.Figure(view.figure), still.flow(view), view.save.alt)
        parts = [Part(view.save), figure, *(Part(maps) for maps in view.maps)]
        return Section(
            view.title, "Dashed: uniform attention. Below the figure: A of the marked span of layers.", parts
        )

    def close(self) -> None:
        """Take the explorer off the page and free its memory."""
        self._delayed.cancel()
        controls = [part for view in self._views for part in vars(view).values() if isinstance(part, ipywidgets.Widget)]
        for view in self._views:
            view.close()
        for widget in [*controls, *_descendants(self), self._code]:
            _close(widget)
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
            bundle["image/png"] = base64.b64encode(still.overview(self.readings, self.masks)).decode("ascii")
        return bundle


def _close(widget: ipywidgets.Widget) -> None:
    """Close a widget with its layout and style, which ipywidgets would keep forever."""
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if isinstance(part, ipywidgets.Widget):
            part.close()


def _descendants(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """All widgets in a box, and in the boxes in it."""
    found: list[ipywidgets.Widget] = []
    for child in getattr(widget, "children", ()):
        found += [*_descendants(child), child]
    return found
