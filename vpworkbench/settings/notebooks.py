"""Settings of each notebook, whose parameters have the same names and defaults.

Where parameters are settings as they are, the class checks them. A function resolves those of notebooks that train.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import LocalPath, PathOrName, PathsOrNames, SetName, SetNames, Settings, known
from vpworkbench.settings.families import FAMILIES, Family
from vpworkbench.settings.model import FamilyName, SpecialTokens, VisualSettings
from vpworkbench.settings.presets import SYSTEMS
from vpworkbench.settings.presets import preset as named_preset
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.settings.training import (
    DataSettings,
    PretrainSettings,
    TrainSettings,
    VisualInitSettings,
    fast_bfloat16,
)

REGIONS = "for models that read regions: a folder of npz files or a BUTD tsv; '' the run's own"


def _with_sets(given: Any) -> Any:
    return {"sets": given} if isinstance(given, str | list | tuple) else given


class ProbeSettings(Settings):
    """Parameters of `02_probe` and `07_knock_out`: which model is probed, on how many held-out pictures."""

    checkpoint: PathOrName = Field("", description="a checkpoint, a run or a model of transformers; '' the shipped one")
    data: Annotated[SetNames, BeforeValidator(lambda given: given or ())] = Field(
        (), description="captioned sets; '' those that the model was trained on, scenes for third-party models"
    )
    regions: LocalPath = Field("", description=REGIONS)
    images: int = Field(64, ge=2, le=100_000)
    special_tokens: SpecialTokens = Field("language", description="what [CLS] and [SEP] count as")
    seed: int = Field(0, ge=0, lt=2**31)


class TourSettings(ProbeSettings):
    """Parameters of `00_tour`."""

    photographs: PathsOrNames = Field((), description="files to mask; empty: the two that scikit-learn ships")


class CompareSettings(Settings):
    """Parameters of `03_compare_models`: which models are compared, on which held-out pictures."""

    models: PathsOrNames = Field(("",), min_length=1, description="checkpoints, runs or models, as in `ProbeSettings`")
    data: Annotated[DataSettings, BeforeValidator(_with_sets)] = Field(
        DataSettings(), description="captioned sets, or all settings of data"
    )
    regions: LocalPath = Field("", description=REGIONS)
    images: int = Field(64, ge=2, le=100_000)
    seed: int = Field(0, ge=0, lt=2**31)


class ExploreSettings(Settings):
    """Parameters of `05_explore_masks`: which model is explored, on which pictures."""

    checkpoint: PathOrName = Field("", description="a checkpoint, a run or a model of transformers; '' the shipped one")
    beside: PathOrName = Field("", description="a second model, shown below the first; '' none")
    data: SetName = Field("scenes", description="a captioned set; its held-out pictures are shown")
    regions: LocalPath = Field("", description=REGIONS)
    picture: int = Field(0, ge=0, description="the picture to begin with")
    sentence: str = Field("", description="the sentence to begin with; '' the picture's first caption")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the random mask")


class RunsSettings(Settings):
    """Parameters of `06_runs`: which runs are compared."""

    notebook: str = Field("01_pretrain", description="the notebook of the runs; '' all notebooks")
    where: str = Field("", description="a condition on results and settings, in the syntax of pandas")
    quantity: str = Field("itm", description="the column of metrics.jsonl to draw")
    gallery: bool = Field(True, description="include the committed examples")


class StudySettings(Settings):
    """Parameters of `10_study`: which chains of runs are analysed."""

    source: LocalPath = Field("", description="a sweep file or the folder of a saved study; '' the one that ships")


class Arm(Settings):
    """One row of a comparison; all but the label are parameters of `01_pretrain`."""

    label: str = Field(pattern=r"^\w")
    visual: FamilyName = Field("swin", description="a visual family")
    masking: str = Field("", description="as in `01_pretrain`")
    system: str = Field("", description="as in `01_pretrain`")
    start: str = Field("", description="run PREFIX-START of 09_visual_init; '' shipped weights, or given features")
    overrides: dict[str, Any] = Field(default_factory=dict, description="any other setting")


class FamilyRunsSettings(Settings):
    """Parameters of `08_families`: which runs are compared, and the length of those in the list of calls."""

    arms: tuple[str | Arm, ...] = Field((), description="names of arms, or `Arm`s; empty: those of the notebook")

    prefix: str = Field("families", pattern=r"^\w[\w.-]*$", description="the names of the runs begin with it")
    runs: LocalPath = Field("", description="the folder of the runs; '' the run folders of this workbench")
    seeds: int = Field(3, ge=1, le=100, description="seeds of each arm in the list of calls")
    length: int = Field(0, ge=0, description="optimiser steps of each listed training; 0: those of the presets")


def pretrain_settings(
    *,
    preset: str = "tiny",
    data: str | list[str] = "scenes",
    visual: str = "swin",
    visual_tokens: int = 0,
    regions: str = "",
    masking: str = "",
    system: str = "",
    init_visual: str = "auto",
    init_text: str = "",
    steps: int = 40,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> PretrainSettings:
    """Settings of a run from the parameters of `01_pretrain`; a `SettingsError` lists all faults.

    Parameters
    ----------
    visual_tokens : int
        Visual tokens of an image, for regions at most; 0: those of the preset.
    regions : str
        A folder that `vpw regions` wrote, which also sets the width of features, or any value of `visual.region_files`.
    masking : str
        A value of `mask.mode`; empty: that of the system, else `attention` for families with a parsing attention and
        with `mask.source`, `code` with a visual dictionary, else `random`.
    system : str
        A key of `SYSTEMS`, whose fusion and objectives are taken; `overrides` come after them.
    init_visual : str
        `auto`: the start of the family, else of the preset. A name of timm also sets `visual.backbone` or `visual.vit`.
        `tiny` freezes what starts trained, unless it has a dictionary or sees masked pixels.
    steps, epochs
        Epochs decide if given, else steps; both 0: the preset's length. A short run generates fewer scenes, unless
        `overrides` sets their numbers.
    """
    of_system = dict(SYSTEMS[known(system, SYSTEMS, "system: no system")]) if system else {}
    mode = of_system.pop("mask.mode", "")
    base, overrides = named_preset(preset), of_system | (overrides or {})
    if visual_tokens and (both := {"visual.image_px", "visual.window", "visual.regions"} & overrides.keys()):
        raise SettingsError(f"visual_tokens {visual_tokens} also decides {min(both)}; give one of them")
    kind = FAMILIES.get(visual, FAMILIES["swin"])  # an unknown name is reported with all other faults
    if kind.pixels and (regions or overrides.get("visual.region_files")):
        raise SettingsError(f"regions: visual {visual!r} reads pixels; give visual='regions', or leave regions empty")
    if not kind.pixels and init_visual not in ("", "auto"):
        raise SettingsError(f"init_visual: visual {visual!r} reads given features; leave init_visual empty")
    start = init_visual if init_visual != "auto" else base.init_visual if kind.start is None else kind.start
    learns = overrides.get("visual.dictionary") or overrides.get("mask.where") == "pixels"
    values = {
        "data.sets": data,
        "visual.family": visual,
        "mask.mode": masking or mode or _default_masking(kind, overrides),
        "init_visual": start,
        "visual.frozen": base.visual.frozen and bool(start) and not learns,
        "init_text": init_text,
        "seed": seed,
        "train.checkpoint_every": checkpoint_every,
        "train.bf16": fast_bfloat16(),
    }
    values |= _region_values(regions, named=bool(overrides.get("loss.mrc")))
    values |= train_length(steps, epochs) | _network_named(kind, init_visual)
    overrides = overrides | _sizes(base.visual, values | overrides, visual_tokens)
    settings = base.with_overrides(values | overrides)
    needed = scenes_needed(settings.data.scenes, settings.train) if "scenes" in settings.data.sets else {}
    return settings.with_overrides({f"data.scenes.{split}": count for split, count in needed.items()} | overrides)


def visual_init_settings(
    *,
    preset: str = "tiny",
    visual: str = "swin",
    visual_tokens: int = 0,
    images: int = 320,
    epochs: float = 2,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> VisualInitSettings:
    """Settings of a run from the parameters of `09_visual_init`; 0 images: those of the preset, 0 epochs: 8.

    A demonstration (fewer than 1,000 images) is measured on 100 held-out scenes.
    """
    base = named_preset(preset)
    scenes = base.data.scenes.model_copy(update={"image_px": base.visual.image_px})
    settings = VisualInitSettings(preset=preset, seed=seed, visual=base.visual, scenes=scenes)
    values = {
        "visual.family": visual,
        "visual.frozen": False,
        "scenes.images": images or scenes.images,
        "train.epochs": epochs or 8,
        "train.checkpoint_every": checkpoint_every,
    }
    if visual_tokens and (both := {"visual.image_px", "visual.window"} & (overrides or {}).keys()):
        raise SettingsError(f"visual_tokens {visual_tokens} also decides {min(both)}; give one of them")
    held_out = {"scenes.val": 100, "scenes.test": 100} if 0 < images < 1000 else {}
    values |= held_out | (overrides or {})
    return settings.with_overrides(values | _sizes(base.visual, values, visual_tokens))


def train_length(steps: int, epochs: float) -> dict[str, float]:
    """Overrides for the length of a training; epochs decide if given, and both 0 keep what is set."""
    return {"train.steps": 0 if epochs else steps, "train.epochs": epochs} if steps or epochs else {}


def scenes_needed(scenes: SceneSettings, train: TrainSettings) -> dict[str, int]:
    """Overrides for the numbers of scenes: in training as many as the steps use, rounded up to thousands.

    A demonstration (fewer than 100 steps) learns next to nothing: 100 held-out scenes of each split measure that.
    """
    used = -(-train.steps * train.images // 1000) * 1000 if train.steps else scenes.images
    held_out = {"val": 100, "test": 100} if 0 < train.steps < 100 else {}
    return {split: min(count, getattr(scenes, split)) for split, count in ({"images": used} | held_out).items()}


def _sizes(base: VisualSettings, values: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Overrides for a number of visual tokens, 0: the family's own, if it has one.

    What else is wrong with `values` is reported when they are checked.
    """
    changed = {key.removeprefix("visual."): value for key, value in values.items() if key.startswith("visual.")}
    visual = base.model_copy(update=changed)
    try:
        tokens = tokens or ("image_px" not in changed and visual.kind.tokens)
        sizes = visual.sized(tokens) if tokens else {}
    except (AttributeError, LookupError, TypeError):
        return {}
    return {f"visual.{name}": value for name, value in sizes.items()}


def _default_masking(kind: Family, overrides: dict[str, Any]) -> str:
    if kind.parsing or overrides.get("mask.source"):
        return "attention"
    return "code" if overrides.get("visual.dictionary") else "random"


def _network_named(kind: Family, start: str) -> dict[str, str]:
    """Overrides for a start by the name of a network in timm."""
    if not kind.timm or not re.fullmatch(r"\w+(\.\w+)?", start) or start in ("auto", "scenes", "imagenet"):
        return {}
    from timm import is_model  # takes a second: only for a name that may be one

    return {f"visual.{kind.timm}": start} if is_model(start) else {}


def _region_values(folder: str, *, named: bool) -> dict[str, Any]:
    """Overrides for region files: their width and, if they are to be `named`, the number of their classes.

    `config.json` and `summary.json`, which `vpw regions` wrote there, state them.
    """
    if not folder:
        return {}
    config, summary = (Path(folder).expanduser() / name for name in ("config.json", "summary.json"))
    try:
        content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        width = {"visual.region_width": content["settings"]["width"]} if "settings" in content else {}
        if named and width and summary.exists():
            width["visual.classes"] = json.loads(summary.read_text(encoding="utf-8")).get("classes", 0)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"regions: {config} cannot be read ({error}); make the regions again") from None
    return {"visual.region_files": folder} | width
