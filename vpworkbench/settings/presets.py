"""Presets are values: complete settings under a name, for pre-training and for the downstream tasks."""

from __future__ import annotations

from typing import Any

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import Settings, nearest
from vpworkbench.settings.model import FusionSettings, VisualSettings
from vpworkbench.settings.training import (
    TRAINING_SCENES,
    DataSettings,
    MaskSettings,
    OptimSettings,
    PretrainSettings,
    RetrievalSettings,
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
        fusion=FusionSettings(dropout=0.0),
        # The paper's rates suit a pre-trained BERT and Swin-B; a small fusion from scratch takes twenty times more.
        optim=OptimSettings(lr_visual=2e-4, lr_fusion=1e-3, warmup=100, decay_at=(0.6, 0.85)),
        train=TrainSettings(steps=1_100),
    ),
    "small": PretrainSettings(
        preset="small",
        data=_scenes(image_px=128),
        visual=VisualSettings(image_px=128, patch_width=384, **_SWIN_SMALL),
        fusion=FusionSettings(layers=6, width=384, heads=12, feed_forward=1536),
        optim=OptimSettings(lr_visual=2e-4, lr_fusion=3e-4, warmup=100),
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

_TINY_TASK = {
    "optim": OptimSettings(lr_visual=1e-4, lr_fusion=5e-4, warmup=50, decay_at=(0.6, 0.85)),
    "train": TrainSettings(steps=1_000, images=32),
}
TASK_PRESETS: dict[str, dict[str, dict[str, Settings]]] = {
    "tiny": {task: _TINY_TASK for task in ("vqa", "nlvr2", "nlvr1", "snli-ve")}
    | {"retrieval": _TINY_TASK | {"retrieval": RetrievalSettings(search_images=100)}},
    "paper": {
        "vqa": {
            "optim": OptimSettings(decay_at=(65 / 100, 75 / 100)),
            "train": TrainSettings(epochs=100, images=512, accumulate=64),
        },
        "nlvr2": {
            "optim": OptimSettings(decay_at=tuple(epoch / 80 for epoch in (60, 65, 70, 75, 78, 79)), decay=0.5),
            "train": TrainSettings(epochs=80, images=512, accumulate=64),
        },
        "nlvr1": {
            "optim": OptimSettings(decay_at=tuple(epoch / 80 for epoch in (60, 65, 70, 75, 78, 79)), decay=0.5),
            "train": TrainSettings(epochs=80, images=512, accumulate=64),
        },
        "snli-ve": {
            "optim": OptimSettings(lr_visual=5e-5, decay_at=(15 / 25, 20 / 25, 23 / 25)),
            "train": TrainSettings(epochs=25, images=512, accumulate=64),
        },
        "retrieval": {
            "optim": OptimSettings(lr_visual=5e-5, decay_at=(5 / 10,), decay=0.5),
            "train": TrainSettings(epochs=10, images=32, accumulate=4),
        },
    },
}
"""Schedules of paper Sec. 4.2 and smaller ones; `train.images` counts examples here."""


def preset(name: str) -> PretrainSettings:
    """The named preset; an unknown name is a `SettingsError` that lists the known ones."""
    if name not in PRESETS:
        raise SettingsError(f"preset: no preset {name!r}{nearest(name, PRESETS)} (known: {', '.join(PRESETS)})")
    return PRESETS[name]
