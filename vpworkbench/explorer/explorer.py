"""The explorer: four views of one input, and what puts them side by side, in a notebook, in code and in a file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from vpworkbench.explorer.parts import WIDTH, Later, column
from vpworkbench.explorer.readings import Reading, chosen_text, read
from vpworkbench.explorer.try_it import UNREADABLE, TryView
from vpworkbench.explorer.widgets import Copy, Save
from vpworkbench.explorer.words import WordsView
from vpworkbench.settings import DataSettings
from vpworkbench.subjects import Loadable, Subject, load

PICTURES = 24
ViewName = Literal["masks", "words", "flow", "try"]
View = TypeVar("View", MasksView, WordsView, FlowView)
VIEWS: dict[ViewName, type[MasksView] | type[WordsView] | type[FlowView]] = {
    "masks": MasksView, "words": WordsView, "flow": FlowView,
}  # fmt: skip
"""What shows readings; `try` is always there, as sentence and picture stand above all of them."""
ALL: tuple[ViewName, ...] = (*VIEWS, "try")


def explore(
    model: Loadable = None,
    data: Sequence[Picture] | str | Path | None = None,
    *,
    beside: Loadable = None,
    regions: str = "",
    pictures: int = PICTURES,
    views: Sequence[ViewName] = ALL,
) -> Explorer:
    """Open the explorer of a model, or of two on the same input.

    Parameters
    ----------
    model
        A `VisualParsingModel`, a `TaskModel`, a `Subject` of `subjects.load`, or the name or folder of a run;
        None: the tiny model that ships.
    data
        Pictures, a captioned set that `load_splits` reads ("scenes", a folder, a file), or None: generated scenes. Of a
        set the held-out pictures are shown.
    beside
        A second model, drawn under the first: before and after pre-training, masks by attention and at random.
    regions : str
        Regions for models that read some, see `subjects.load`.
    pictures : int
        At most so many to choose from.
    views
        Which are shown. A notebook without `flow` stays small: plotly's script alone is 5 MB of a saved one.

    Raises
    ------
    CheckpointError, DataError, TypeError, ValueError
        If there is no such model, set or view, or the set has no picture; if a model can read none of the pictures,
        what it says of the last: a DataError of a file or of regions that are missing, a ValueError where it makes no
        visual token.
    """
    if unknown := [name for name in views if name not in ALL]:
        raise ValueError(f"views: no view {unknown[0]!r}; there are {', '.join(ALL)}")
    given = (model, beside) if beside is not None else (model,)
    subjects = [load(one, regions=regions, optional_regions=len(given) > 1) for one in given]
    if len(subjects) == 2 and subjects[0].name == subjects[1].name:
        subjects = [replace(one, name=f"{one.name} ({number})") for number, one in enumerate(subjects, start=1)]
    chosen = _pictures(data, pictures)
    readings = _first_readings(subjects, chosen, data)
    call = ", ".join(part for part in (
        repr(model) if isinstance(model, str) else "model" if model is not None else "",
        "None" if model is None and data is not None else "",
        "" if data is None else repr(str(data)) if isinstance(data, str | Path) else "pictures",
        "" if beside is None else f"beside={beside!r}" if isinstance(beside, str) else "beside=other",
        f"regions={regions!r}" if regions else "",
        f"pictures={pictures}" if pictures != PICTURES else "",
        f"views={tuple(views)}" if tuple(views) != ALL else "",
    ) if part)  # fmt: skip
    return Explorer(readings, chosen, views=views, call=f"explore({call})")


def _first_readings(subjects: Sequence[Subject], pictures: Sequence[Picture], source: object) -> list[Reading]:
    """Of the first picture that all models can read; where there is none, the last one's error."""
    refused: Exception = DataError(f"{source}: no picture to explore")
    for picture in pictures:
        try:
            return [read(one, picture, chosen_text(picture)) for one in subjects]
        except UNREADABLE as error:
            refused = error
    raise refused


def _pictures(data: Sequence[Picture] | str | Path | None, most: int) -> list[Picture]:
    if data is not None and not isinstance(data, str | Path):
        return list(data)[:most]
    settings = DataSettings(sets=("scenes" if data is None else str(data),))
    if settings.sets == ("scenes",):  # the first ones of the held-out set, without the scenes of training
        few = settings.scenes.model_copy(update={"val": min(most, settings.scenes.val)})
        return load_held_out(settings.model_copy(update={"scenes": few}))
    splits = load_splits(settings)
    return next((splits[name] for name in ("val", "test", "train") if splits.get(name)), [])[:most]


class Explorer(ipywidgets.VBox):
    """Four views of one input: masks, words and patches, flow, try it.

    Attributes
    ----------
    masks, words, flow : the views, None where they are not shown
    trial : TryView
    readings : list of Reading
        Of the present input, one for each model.
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
        self._call, self._given = call, len(pictures)
        made = {name: kind(self.readings) for name, kind in VIEWS.items() if name in views}
        self.masks, self.words, self.flow = (made.get(name) for name in VIEWS)
        self.trial = TryView(self.readings, pictures, self._input)
        self._views = (*made.values(), self.trial)
        shown = [view for view in self._views if view is not self.trial or "try" in views]
        self._code = Copy(label="The lines that recreate this view", width=WIDTH)
        self._tabs = ipywidgets.Tab([view.widget for view in shown], titles=[view.title for view in shown])
        self._take = take = ipywidgets.Accordion([column(self._code)], titles=["copy as code"], selected_index=None)
        take.observe(lambda change: self._copy(), "selected_index")
        for view in made.values():
            view.changed = self._copy
        self._tabs.observe(lambda change: self._opened(shown), "selected_index")
        self._later = Later(0.1)
        take.layout.flex = "1"
        keep = Save(lambda: self.save(Path(self.trial.scratch.name) / "explorer.html"), width=170,
                    alt="All of it as one HTML file that opens without a kernel and without a network")  # fmt: skip
        self.children = (self.trial.controls, self._tabs, ipywidgets.HBox([take, keep]))
        self._opened(shown)

    def _opened(self, shown: Sequence[object]) -> None:
        place = self._tabs.selected_index
        if self.flow is not None and place is not None and shown[place] is self.flow:
            self.flow.open()
        self._copy()

    def _read(self, picture: Picture, text: str) -> list[Reading]:
        return [read(one, picture, text) for one in self.subjects]

    def _input(self, picture: Picture, text: str) -> None:
        self.readings = self._read(picture, text)  # fails before anything is shown
        for view in self._views:
            view.show(self.readings)
        self._copy()

    # ------------------------------------------------------------------------------------------- in a notebook

    def say(self, text: str) -> Explorer:
        """Read another sentence with the same picture."""
        self._input(self.readings[0].picture, text)
        return self

    def look(self, picture: int) -> Explorer:
        """Read another of the pictures, by its place; those that were dropped stand behind the others."""
        if not 0 <= picture < len(self.trial.pictures):
            raise ValueError(f"picture {picture} is not there; {len(self.trial.pictures)} are, from 0")
        self.trial.look(picture)
        return self

    def pick(
        self, token: int | None = None, *, k: int | None = None, select: Select | None = None,
        head: int | None = None, draw: int | None = None,
    ) -> Explorer:  # fmt: skip
        """Pick a visual token and what is hidden with it; see `MasksView.set`."""
        self._shown(self.masks, "masks").set(token, k=k, select=select, head=head, draw=draw)
        return self

    def read(
        self, place: int | None = None, *, layer: int | None = None, head: int | None = None,
        rolled: bool | None = None,
    ) -> Explorer:  # fmt: skip
        """Pin a word or a patch, choose layer and head; see `WordsView.set`."""
        self._shown(self.words, "words").set(place, layer=layer, head=head, rolled=rolled)
        return self

    def span(self, start: int, stop: int, *, model: int = 0, layer: int | None = None) -> Explorer:
        """Choose a span of layers, from 0; see `FlowView.set`."""
        self._shown(self.flow, "flow").set(start, stop, model=model, layer=layer)
        return self

    @staticmethod
    def _shown(view: View | None, name: ViewName) -> View:
        if view is None:
            raise ValueError(f"this explorer was opened without the view {name!r}; add it to `views`")
        return view

    @property
    def code(self) -> str:
        """The lines that recreate what is seen."""
        reading = self.readings[0]
        place = next(place for place, one in enumerate(self.trial.pictures) if one is reading.picture)
        lines = ["from vpworkbench.explorer import explore", "", f"view = {self._call}"]
        own = place >= self._given  # an image that was dropped: its file is elsewhere
        name = reading.picture.id
        lines += [f'view.trial.take(open({name!r}, "rb").read(), {name!r})' if own else f"view.look({place})"]
        lines += [f"view.say({reading.text!r})"]
        lines += [line for view in self._views if view is not self.trial and (line := view.code())]
        return "\n".join([*lines, "view"])

    def _copy(self) -> None:
        """Send the code, where it is seen."""
        if self._take.selected_index is not None:
            self._code.update(text=self.code)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The numbers behind all views."""
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
        """Write the whole as one HTML file that opens without a kernel and without a network."""
        masks, words, flow = self.masks, self.words, self.flow
        sections = []
        if masks is not None:
            masks.settle()
            parts = [part for place in range(len(masks.readings)) for part in (
                Part(masks.panels[place], still.panels(masks, place)),
                Part(masks.errors[place], still.errors(masks, place)),
            )]  # fmt: skip
            told = "Hover tells the numbers of a token. Another pick asks the model: open the explorer for it."
            sections.append(Section(masks.title, told if masks.readings else masks.note.text, [
                *parts, *([Part(masks.numbers)] if masks.readings else []),
            ]))  # fmt: skip
        if words is not None:
            parts = [part for place in range(len(words.readings)) for part in (
                Part(words.maps[place], still.heads(words, place)),
                Part(words.readers[place], still.sentence(words, place)),
            )]  # fmt: skip
            told = "Hover over a word: where it looks. Over a patch: which words it reads. Click pins."
            sections.append(Section(words.title, told, parts))
        if flow is not None:
            parts = [Part(flow.save), Part(go.Figure(flow.figure), still.curves(flow), flow.save.alt)]
            parts += [Part(flow.maps[place], still.mixing(flow, place)) for place in range(len(flow.readings))]
            told = "Dashed: attention spread evenly. Below the figure: A of the marked span of layers."
            sections.append(Section(flow.title, told, parts))
        sections.append(Section("What it says", "", [Part(self.trial.answers)]))
        models = " and ".join(one.name for one in self.subjects)
        return write_page(path, f"{models} on “{self.readings[0].text}”", sections)

    def close(self) -> None:
        """Take the explorer off the page and free what it holds."""
        self._later.cancel()
        controls = [part for view in self._views for part in vars(view).values() if isinstance(part, ipywidgets.Widget)]
        for view in self._views:
            view.close()
        for widget in [*controls, *_below(self), self._code]:
            _close(widget)
        self.readings, self.subjects, self.children = [], [], ()
        for part in (self.layout, super()):
            part.close()

    def __repr__(self) -> str:
        if not self.readings:
            return "Explorer(closed)"
        models = ", ".join(f"{one.subject.name}: {one.layers} layers, {one.heads} heads, {len(one.boxes)} visual tokens"
                           for one in self.readings)  # fmt: skip
        return f"Explorer({models}; {self.readings[0].text!r})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live view; where there is none (GitHub), a picture of image, mask and flow."""
        bundle = super()._repr_mimebundle_(**options) or {}
        bundle["text/plain"] = repr(self)
        if self.flow is not None and self.readings:
            self._later(self.flow.open)  # when the first view is on its way
        if self.readings:
            bundle["image/png"] = base64.b64encode(still.overview(self.readings, self.masks)).decode("ascii")
        return bundle


def _close(widget: ipywidgets.Widget) -> None:
    """Close a widget and its layout and style, which ipywidgets would keep for good."""
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if isinstance(part, ipywidgets.Widget):
            part.close()


def _below(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """All widgets in a box, and in the boxes in it."""
    found: list[ipywidgets.Widget] = []
    for child in getattr(widget, "children", ()):
        found += [*_below(child), child]
    return found
