"""The model under study: loaded by name, ready to be given pictures and texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vpworkbench.data.inputs import prepare, use_regions
from vpworkbench.data.records import Picture
from vpworkbench.errors import CheckpointError, DataError, SettingsError
from vpworkbench.huggingface import Processed, is_pretrained, open_pretrained
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.runs import runs_root, saved_settings, shipped_run
from vpworkbench.settings import DataSettings, FinetuneSettings, MaskSettings, PretrainSettings, checked
from vpworkbench.tasks.predict import load_task_model
from vpworkbench.tasks.task import TaskModel

log = logging.getLogger(__name__)

LARGEST_BATCH = 16


@dataclass(frozen=True)
class Subject:
    """A model under study; `prepare(pictures, texts, special_tokens="language")` pairs picture i with text i."""

    name: str  # in figures and tables
    model: nn.Module  # whose attention is probed
    prepare: Callable[..., Inputs]
    batch: int = LARGEST_BATCH  # image-text pairs in one pass
    data: DataSettings = DataSettings()  # the set that it was trained on; scenes if that is unknown
    mask: MaskSettings = MaskSettings()  # by which it was trained, if that is known
    base: VisualParsingModel | None = None  # `model` if it is one of ours, with heads and perhaps a parsing attention
    task_model: TaskModel | None = None  # the fine-tuned model, if there is one: it answers
    task_settings: FinetuneSettings | None = None  # of the run that made it: where its examples are

    @property
    def reads_regions(self) -> bool:
        """True if it takes region features from files instead of pixels."""
        if self.base is not None:
            return not self.base.settings.visual.kind.pixels
        return getattr(self.prepare, "regions", None) is not None

    @property
    def has_questions(self) -> bool:
        """True if it was fine-tuned in a run, to answer about one image."""
        return self.task_settings is not None and self.task_model.task.images == 1 and bool(self.task_model.labels)

    @property
    def answers(self) -> bool:
        """True if it is a decoder of transformers, with its processor, that answers in words."""
        return isinstance(self.prepare, Processed) and bool(getattr(self.model, "can_generate", bool)())


Loadable = Subject | TaskModel | VisualParsingModel | str | None


def load(source: Loadable = "", *, regions: str = "", optional_regions: bool = False) -> Subject:
    """A model of ours or of transformers, by name, by folder, or as it is.

    `source` is '' or None for the tiny model that ships; a folder of a run of `01_pretrain` or `04_finetune`, its name,
    or NOTEBOOK/NAME where both have a run of that name; a folder of transformers, or a name that is in its local cache
    or, as OWNER/NAME, on the hub; or a model of ours. Models that read regions take `regions`, a folder of npz or a
    BUTD tsv; empty: those that they were trained with. With `optional_regions` they may be meant for another model:
    this one then ignores regions that it cannot read. A model in memory is put into evaluation mode.

    A `CheckpointError` if there is no such model, two runs have the name, or it needs regions and there are none; a
    `DataError` or `SettingsError` if `regions` has features of another width, or the model reads pixels.
    """
    subject = _load(source, regions)
    opened_with_them = subject.base is None and subject.reads_regions
    if not regions or opened_with_them or not isinstance(source, str | None):
        return subject
    if subject.reads_regions:
        try:
            use_regions(subject.base, regions)
        except DataError as fault:
            if not optional_regions:
                raise
            log.warning("%s keeps its own regions: %s", subject.name, fault)
    elif not optional_regions:
        raise SettingsError(f"regions: {subject.name} reads pixels; leave it empty")
    return subject


def load_all(sources: Sequence[str], *, regions: str = "") -> list[Subject]:
    """All models, each under a name of its own; errors like those of `load`."""
    subjects: list[Subject] = []
    for source in sources:
        subject = load(source, regions=regions, optional_regions=len(sources) > 1)
        if subject.name in [other.name for other in subjects]:
            subject = replace(subject, name=f"{subject.name} ({len(subjects) + 1})")
        subjects.append(subject)
    if regions and not any(subject.reads_regions for subject in subjects):
        raise SettingsError("regions: all of these models read pixels; leave it empty")
    return subjects


def predict(source: Loadable, images: Any, text: str) -> dict[str, float]:
    """Probability of each answer of a fine-tuned model for one text, most likely first.

    `images` is a path, a PIL image or a uint8 array (height, width, 3); for NLVR2 a pair of them.
    """
    subject = load(source)
    if subject.task_model is None:
        raise CheckpointError(f"{subject.name} is not fine-tuned and answers nothing; name a run of 04_finetune")
    return subject.task_model.predict(images, text)


def _load(source: Loadable, regions: str) -> Subject:
    if isinstance(source, Subject):
        return source
    if isinstance(source, TaskModel):
        return _ours(f"model, {source.task.name}", source.base, task_model=source.eval())
    if isinstance(source, VisualParsingModel):
        return _ours("model", source)
    if not isinstance(source, str | None):
        kind = type(source).__name__
        raise TypeError(
            f"{kind} is no model of vpworkbench: load its folder by vpw.load(path), or give vpw.explore its processor"
        )
    source = source or ""
    if is_pretrained(source):
        return _of_transformers(source, regions)
    name = (Path(source).name if "/" in source else source) or "shipped"
    if folder := _task_folder(source):
        if "/" not in source and (runs_root() / "01_pretrain" / source / "checkpoint").exists():
            both = f"01_pretrain/{source} or 04_finetune/{source}"
            raise CheckpointError(f"{source} is a run of two notebooks, and each has a model; write {both}")
        model, run = load_task_model(folder), folder.parent
        settings = checked(FinetuneSettings, saved_settings(run)) if (run / "config.json").exists() else None
        return _ours(f"{name}, {model.task.name}", model.base, task_model=model, task_settings=settings)
    try:
        model, settings = load_run(source)
    except CheckpointError as ours:
        try:
            return _of_transformers(source, regions)
        except CheckpointError as theirs:
            raise CheckpointError(f"{ours}; and transformers: {theirs}") from None
    return _ours(name, model, data=settings.data, mask=settings.mask)


def _ours(name: str, model: VisualParsingModel, **parts: Any) -> Subject:
    return Subject(name, model.eval(), partial(prepare, model), base=model, **parts)


def _of_transformers(source: str, regions: str) -> Subject:
    processed = open_pretrained(source, regions=regions)
    is_chat = getattr(processed.processor, "chat_template", None)  # a large decoder with many tokens per image
    return Subject(Path(source).name, processed.model, processed, batch=1 if is_chat else LARGEST_BATCH)


def load_run(checkpoint: str = "") -> tuple[VisualParsingModel, PretrainSettings]:
    """A pre-trained model and the settings of its run; `CheckpointError` if there is no finished run.

    `checkpoint` is a run's folder or its `checkpoint/`, NAME or 01_pretrain/NAME of a run. Empty: the tiny model that
    ships.
    """
    named = dict.fromkeys((Path(checkpoint).expanduser(), _run_folder(checkpoint, "01_pretrain")))
    places = named if checkpoint else [shipped_run()]
    for place in places:
        folder = place.parent if place.name == "checkpoint" else place
        if (folder / "config.json").exists() and (folder / "checkpoint" / "model.safetensors").exists():
            settings = checked(PretrainSettings, saved_settings(folder))
            return VisualParsingModel.from_pretrained(folder / "checkpoint"), settings
    raise CheckpointError(f"no finished pre-training run at {' nor at '.join(map(str, places))}; `vpw runs` lists them")


def load_task(checkpoint: str | Path) -> TaskModel:
    """A fine-tuned model, by the folder of its run or checkpoint, or by NAME or 04_finetune/NAME.

    `CheckpointError` if there is none.
    """
    return load_task_model(_task_folder(str(checkpoint)) or Path(checkpoint).expanduser())


def _task_folder(source: str) -> Path | None:
    place = Path(source).expanduser()
    folders = (place, place / "checkpoint", _run_folder(source, "04_finetune") / "checkpoint") if source else ()
    return next((folder for folder in folders if (folder / "task.json").exists()), None)


def _run_folder(name: str, notebook: str) -> Path:
    """Of a run that is given by its name, or as NOTEBOOK/NAME."""
    return runs_root() / name if "/" in name else runs_root() / notebook / name


def token_counts(subject: Subject, pictures: Sequence[Picture]) -> tuple[float, float]:
    """Visual and language tokens of an example, means over at most one batch: the null depends on them."""
    some = pictures[: subject.batch]
    inputs = subject.prepare(some, [picture.captions[0] for picture in some])
    counts = (inputs.vision & inputs.tokens).sum(dim=1), inputs.language.sum(dim=1)
    return tuple(count.double().mean().item() for count in counts)
