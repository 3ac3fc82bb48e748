"""Settings: one pydantic model for each part, nested; a preset is a value. A part receives its own, never the whole."""

from vpworkbench.settings.base import Settings, checked, fault_lines, nearest
from vpworkbench.settings.model import FusionSettings, ModelSettings, VisualSettings
from vpworkbench.settings.notebooks import (
    CompareSettings,
    ExploreSettings,
    FamilyRunsSettings,
    ProbeSettings,
    RunsSettings,
    StudySettings,
    TourSettings,
    pretrain_settings,
    visual_init_settings,
)
from vpworkbench.settings.presets import PRESETS, preset
from vpworkbench.settings.scenes import PairSettings, SceneSettings
from vpworkbench.settings.training import (
    DataSettings,
    FinetuneSettings,
    LabelSettings,
    LossSettings,
    MaskSettings,
    OptimSettings,
    PretrainSettings,
    RegionSettings,
    RetrievalSettings,
    TrainSettings,
    VisualInitSettings,
)
