"""Settings: typed, frozen, checked as a whole before any work starts.

One pydantic model for each part, nested; a preset is a value. A part receives its own settings, never the
whole tree. Everything a run was made with is written back by `model_dump`.
"""

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import Settings, checked, fault_lines, nearest
from vpworkbench.settings.notebooks import (
    compare_settings,
    explore_settings,
    family_runs_settings,
    finetune_settings,
    pretrain_settings,
    probe_settings,
    runs_settings,
    visual_init_settings,
)
from vpworkbench.settings.presets import PRESETS, TASK_PRESETS, preset
from vpworkbench.settings.settings import (
    CompareSettings,
    DataSettings,
    ExploreSettings,
    FamilyRunsSettings,
    FinetuneSettings,
    FusionSettings,
    LossSettings,
    MaskSettings,
    ModelSettings,
    OptimSettings,
    PretrainSettings,
    ProbeSettings,
    RegionSettings,
    RetrievalSettings,
    RunsSettings,
    TrainSettings,
    VisualInitSettings,
    VisualSettings,
)

__all__ = [
    "CompareSettings",
    "ExploreSettings",
    "DataSettings",
    "FamilyRunsSettings",
    "FinetuneSettings",
    "FusionSettings",
    "LossSettings",
    "MaskSettings",
    "ModelSettings",
    "OptimSettings",
    "PRESETS",
    "PretrainSettings",
    "ProbeSettings",
    "RegionSettings",
    "RetrievalSettings",
    "RunsSettings",
    "Settings",
    "SettingsError",
    "TASK_PRESETS",
    "TrainSettings",
    "VisualInitSettings",
    "VisualSettings",
    "checked",
    "compare_settings",
    "explore_settings",
    "family_runs_settings",
    "fault_lines",
    "finetune_settings",
    "nearest",
    "preset",
    "pretrain_settings",
    "probe_settings",
    "runs_settings",
    "visual_init_settings",
]
