"""Presets are values: complete settings of pre-training under a name. Each task lists its own schedules.

Systems are values too: what they change in these settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpworkbench.settings.base import known
from vpworkbench.settings.model import FusionSettings, VisualSettings
from vpworkbench.settings.training import (
    TRAINING_SCENES,
    DataSettings,
    MaskSettings,
    OptimSettings,
    PretrainSettings,
    TrainSettings,
)


def _scenes(image_px: int) -> DataSettings:
    return DataSettings(scenes=TRAINING_SCENES.model_copy(update={"image_px": image_px}), text_tokens=40)


_SWIN_SMALL: dict[str, Any] = {"patch_px": 4, "width": 96, "depths": (2, 2, 2), "heads": (3, 6, 12), "window": 8}
_SWIN_T: dict[str, Any] = {"patch_px": 4, "width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7}
_SWIN_B: dict[str, Any] = {"patch_px": 4, "width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 12}
_OTHER_FAMILIES: dict[str, Any] = {"drop_path": 0.2, "stride": 32, "patch_width": 768}

PRESETS: dict[str, PretrainSettings] = {
    "tiny": PretrainSettings(
        preset="tiny",
        init_visual="scenes",
        data=DataSettings(word_share=0.3),  # of about ten words in a text: at 0.15 MLM learns half as fast
        # At 2e-4 training undoes what the visual side knew. Frozen it keeps all of it, and the time that this saves
        # teaches the fusion more (docs/results.md, the recipe).
        visual=VisualSettings(frozen=True),
        fusion=FusionSettings(dropout=0.0),
        # The paper's rate of the fusion suits a pre-trained BERT; a small fusion from scratch takes twenty times more.
        optim=OptimSettings(lr_fusion=1e-3, warmup=100, decay_at="linear"),
        train=TrainSettings(steps=1_500),
    ),
    "small": PretrainSettings(
        preset="small",
        data=_scenes(image_px=128),
        visual=VisualSettings(image_px=128, patch_width=384, **_SWIN_SMALL),
        fusion=FusionSettings(layers=6, width=384, heads=12, feed_forward=1536),
        optim=OptimSettings(lr_visual=2e-4, lr_fusion=3e-4, warmup=100),  # its visual side starts from scratch
    ),
    "ablation-224": PretrainSettings(
        preset="ablation-224",
        data=_scenes(image_px=224),
        visual=VisualSettings(image_px=224, backbone="resnet50", **_SWIN_T, **_OTHER_FAMILIES),
        fusion=FusionSettings(layers=3, width=768, heads=12, feed_forward=3072),
        train=TrainSettings(epochs=40, images=512, accumulate=64),
    ),
    "paper-384": PretrainSettings(
        preset="paper-384",
        data=_scenes(image_px=384),
        visual=VisualSettings(image_px=384, backbone="resnet101", **_SWIN_B, **_OTHER_FAMILIES),
        fusion=FusionSettings(layers=12, width=768, heads=12, feed_forward=3072),
        mask=MaskSettings(budget=7),
        train=TrainSettings(epochs=40, images=512, accumulate=64),
    ),
}


def preset(name: str) -> PretrainSettings:
    """The named preset; an unknown name is a `SettingsError` that lists the known ones."""
    return PRESETS[known(name, PRESETS, "preset: no preset")]


_CLASSES_FOR_FEATURES = {"mask.mode": "random", "loss.mrc": 1.0, "loss.mfr": 0.0, "loss.vla": 0.0}
_MATCHED_ONLY = {"loss.itm": 0.0, "data.matched_per_image": 4, "data.unmatched_per_image": 0}  # as many texts as others
_WRITES = {"loss.seq2seq": 0.75, "data.mask_end": True}

SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "vilbert": {"fusion.kind": "two-stream", **_CLASSES_FOR_FEATURES},  # Lu et al. 2019
    "vl-bert": {"fusion.whole_image": True, **_CLASSES_FOR_FEATURES, **_MATCHED_ONLY},  # Su et al. 2020
    "unicoder-vl": _CLASSES_FOR_FEATURES,  # Li et al. 2020
    "unified-vlp": {"mask.mode": "none", **_WRITES, **_MATCHED_ONLY},  # Zhou et al. 2020
}
"""Systems of the paper's tables, by the value of `system` of `01_pretrain`: overrides of their fusion and objectives.

Each takes any visual side; all of them were made for `regions`. docs/systems.md says what is as in their papers.
"""
