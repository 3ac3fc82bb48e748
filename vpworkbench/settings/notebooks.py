"""From the parameters of a notebook to its settings: one function a notebook, same names, same defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import checked, nearest
from vpworkbench.settings.families import FAMILIES
from vpworkbench.settings.presets import TASK_PRESETS
from vpworkbench.settings.presets import preset as named_preset
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.settings.settings import (
    CompareSettings,
    ExploreSettings,
    FamilyRunsSettings,
    FinetuneSettings,
    PretrainSettings,
    ProbeSettings,
    RunsSettings,
    TrainSettings,
    VisualInitSettings,
)


def pretrain_settings(
    *,
    preset: str = "tiny",
    data: str | list[str] = "scenes",
    visual: str = "swin",
    visual_tokens: int = 0,
    regions: str = "",
    masking: str = "",
    init_visual: str = "auto",
    init_text: str = "",
    steps: int = 40,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> PretrainSettings:
    """Settings of a run from the parameters of `01_pretrain.ipynb`.

    Parameters
    ----------
    visual_tokens : int
        So many tokens of an image, of regions at most so many; 0: as the preset has it.
    regions : str
        The folder that `vpw regions` wrote, whose width is taken over, or another that `visual.region_files` takes.
    masking : str
        `none`, `random`, `attention` or `code`; empty takes `attention` for families with a parsing attention, `code`
        for a visual dictionary, `random` for the others.
    init_visual : str
        `auto` takes the preset's start; none for regions, whose features are given.
    steps, epochs
        Epochs, where given, decide; else steps; both 0: the preset's own length. A run of few steps generates fewer
        scenes, unless `overrides` says how many.

    Raises
    ------
    SettingsError
        All faults at once.
    """
    base, overrides = named_preset(preset), overrides or {}
    if visual_tokens and (both := {"visual.image_px", "visual.window", "visual.regions"} & overrides.keys()):
        raise SettingsError(f"visual_tokens {visual_tokens} and {min(both)}: one decides the other; give one of them")
    kind = FAMILIES.get(visual, FAMILIES["swin"])  # an unknown name is told with all other faults
    masking = masking or ("attention" if kind.parsing else "code" if overrides.get("visual.dictionary") else "random")
    start = base.init_visual if kind.pixels else ""
    if kind.pixels and (regions or overrides.get("visual.region_files")):
        raise SettingsError(f"regions: visual {visual!r} reads pixels; give visual='regions', or leave regions empty")
    if not kind.pixels and init_visual not in ("", "auto"):
        raise SettingsError(f"init_visual: the features of {visual!r} are given, nothing begins; leave it empty")
    values: dict[str, Any] = {
        "data.sets": data, "visual.family": visual, "mask.mode": masking,
        "init_text": init_text, "seed": seed, "train.checkpoint_every": checkpoint_every,
        "init_visual": start if init_visual == "auto" else init_visual,
    } | _regions(regions)  # fmt: skip
    if steps or epochs:
        values |= {"train.steps": 0 if epochs else steps, "train.epochs": epochs}
    if visual_tokens:  # what the number of tokens limits has to wait for it
        plain = {key: value for key, value in overrides.items() if key not in ("visual.sampled", "mask.budget")}
        sizes = base.with_overrides(values | plain).visual.sized(visual_tokens)
        overrides = overrides | {f"visual.{name}": value for name, value in sizes.items()}
    settings = base.with_overrides(values | overrides)
    if "scenes" not in settings.data.sets or "data.scenes.images" in overrides:
        return settings
    return settings.with_overrides({"data.scenes.images": _scenes_seen(settings.data.scenes, settings.train)})


def visual_init_settings(
    *,
    preset: str = "tiny",
    visual: str = "swin",
    visual_tokens: int = 0,
    images: int = 640,
    epochs: float = 4,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> VisualInitSettings:
    """Settings of a run from the parameters of `00_visual_init.ipynb`; 0 images: the preset's, 0 epochs: 8."""
    base = named_preset(preset)
    scenes = base.data.scenes.model_copy(update={"image_px": base.visual.image_px})
    values = {
        "preset": preset, "seed": seed, "visual": base.visual.model_dump(), "scenes": scenes.model_dump(),
    }  # fmt: skip
    changes = {
        "visual.family": visual, "scenes.images": images or scenes.images, "train.epochs": epochs or 8,
        "train.checkpoint_every": checkpoint_every,
    }  # fmt: skip
    settings = checked(VisualInitSettings, values).with_overrides(changes | (overrides or {}))
    if not visual_tokens:
        return settings
    sizes = settings.visual.sized(visual_tokens)
    return settings.with_overrides({f"visual.{name}": value for name, value in sizes.items()})


def probe_settings(
    *,
    checkpoint: str = "",
    data: str | list[str] = "",
    regions: str = "",
    images: int = 64,
    special_tokens: str = "language",
    seed: int = 0,
) -> ProbeSettings:
    """Settings of a run from the parameters of `02_probe.ipynb` or `00_tour.ipynb`."""
    given = {"checkpoint": checkpoint, "data": data or (), "regions": regions, "images": images}
    return checked(ProbeSettings, given | {"special_tokens": special_tokens, "seed": seed})


def compare_settings(
    *,
    models: str | list[str] = "",
    data: str | list[str] = "scenes",
    regions: str = "",
    images: int = 64,
    seed: int = 0,
) -> CompareSettings:
    """Settings of a run from the parameters of `03_compare_models.ipynb`."""
    values = {"models": models, "regions": regions, "images": images, "seed": seed}
    return checked(CompareSettings, values).with_overrides({"data.sets": data})


def explore_settings(
    *,
    checkpoint: str = "",
    beside: str = "",
    data: str = "scenes",
    regions: str = "",
    picture: int = 0,
    sentence: str = "",
    seed: int = 0,
) -> ExploreSettings:
    """Settings of a run from the parameters of `05_explore_masks.ipynb`."""
    given = {"checkpoint": checkpoint, "beside": beside, "data": data, "picture": picture, "sentence": sentence}
    return checked(ExploreSettings, given | {"regions": regions, "seed": seed})


def runs_settings(
    *, notebook: str = "01_pretrain", where: str = "", quantity: str = "itm", gallery: bool = True
) -> RunsSettings:
    """Settings of a run from the parameters of `06_runs.ipynb`."""
    return checked(RunsSettings, {"notebook": notebook, "where": where, "quantity": quantity, "gallery": gallery})


def family_runs_settings(
    *, prefix: str = "families", runs: str = "", seeds: int = 3, length: int = 0, steps: int = 6, images: int = 16
) -> FamilyRunsSettings:
    """Settings of a run from the parameters of `08_families.ipynb`."""
    values = {"prefix": prefix, "runs": runs, "seeds": seeds, "length": length, "steps": steps, "images": images}
    return checked(FamilyRunsSettings, values)


def finetune_settings(
    *,
    task: str = "vqa",
    preset: str = "tiny",
    data: str = "scenes",
    checkpoint: str = "",
    regions: str = "",
    pretrained: bool = True,
    steps: int = 40,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> FinetuneSettings:
    """Settings of a run from the parameters of `04_finetune.ipynb`; steps and epochs as of `pretrain_settings`."""
    if preset not in TASK_PRESETS:
        raise SettingsError(f"preset: no preset {preset!r}{nearest(preset, TASK_PRESETS)} (known: tiny, paper)")
    if task not in TASK_PRESETS[preset]:
        known = ", ".join(TASK_PRESETS[preset])
        raise SettingsError(f"task: no task {task!r}{nearest(task, TASK_PRESETS[preset])} (known: {known})")
    overrides = overrides or {}
    parts = {name: part.model_dump() for name, part in TASK_PRESETS[preset][task].items()}
    base = checked(FinetuneSettings, {"task": task, "preset": preset, **parts})
    values = {"data": data, "checkpoint": checkpoint, "regions": regions, "pretrained": pretrained, "seed": seed,
              "train.checkpoint_every": checkpoint_every}  # fmt: skip
    if steps or epochs:
        values |= {"train.steps": 0 if epochs else steps, "train.epochs": epochs}
    settings = base.with_overrides(values | overrides)
    if settings.data != "scenes" or "scenes.images" in overrides:
        return settings
    return settings.with_overrides({"scenes.images": _scenes_seen(settings.scenes, settings.train)})


def _regions(folder: str) -> dict[str, Any]:
    """Settings of region files; of a folder that `vpw regions` wrote with their width."""
    if not folder:
        return {}
    config = Path(folder).expanduser() / "config.json"
    try:
        made = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"regions: {config} is no json ({error}); make the regions anew, or remove it") from None
    made = made.get("settings") if isinstance(made, dict) else None
    width = {"visual.region_width": made["width"]} if isinstance(made, dict) and "width" in made else {}
    return {"visual.region_files": folder} | width


def _scenes_seen(scenes: SceneSettings, train: TrainSettings) -> int:
    """How many scenes are worth generating: in thousands, no more than the steps see."""
    seen = -(-train.steps * train.images // 1000) * 1000
    return min(seen, scenes.images) if train.steps else scenes.images
