"""From the parameters of `04_finetune.ipynb` to its settings, and from settings to examples."""

from __future__ import annotations

from typing import Any

from vpworkbench.errors import SettingsError
from vpworkbench.settings import FinetuneSettings, checked
from vpworkbench.settings.base import known
from vpworkbench.settings.notebooks import scenes_needed, train_length
from vpworkbench.settings.training import fast_bfloat16
from vpworkbench.tasks import TASKS


def finetune_settings(
    *,
    task: str = "vqa",
    preset: str = "tiny",
    data: str = "scenes",
    checkpoint: str = "",
    regions: str = "",
    pretrained: bool = True,
    steps: int = 20,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> FinetuneSettings:
    """Settings of a run from the parameters of `04_finetune`; for steps and epochs see `pretrain_settings`."""
    known(task, TASKS, "task: no task")
    known(preset, TASKS[task].schedules, "preset: no preset")
    overrides = overrides or {}
    for key in overrides:
        owners = [one.name for one in TASKS.values() if key.partition(".")[0] in one.own_settings]
        if owners and task not in owners:
            raise SettingsError(f"{key} is for {' and '.join(owners)}, not for {task}; leave it out")
    base = checked(FinetuneSettings, {"task": task, "preset": preset, **TASKS[task].schedules[preset]})
    values = {
        "data": data,
        "checkpoint": checkpoint,
        "regions": regions,
        "pretrained": pretrained,
        "seed": seed,
        "train.checkpoint_every": checkpoint_every,
        "train.bf16": fast_bfloat16(),
    }
    settings = base.with_overrides(values | train_length(steps, epochs) | overrides)
    needed = scenes_needed(settings.scenes, settings.train) if settings.data == "scenes" else {}
    return settings.with_overrides({f"scenes.{split}": count for split, count in needed.items()} | overrides)
