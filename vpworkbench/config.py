"""Settings: typed, frozen, checked as a whole before any work starts.

One pydantic model for each part, nested; a preset is a value. A part receives its own settings, never the
whole tree. Everything a run was made with is written back by `model_dump`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vpworkbench.data.scenes import SceneSettings


class SettingsError(ValueError):
    """Settings that cannot be used: every fault on a line of its own, each with its remedy."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, wrong types refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def with_overrides(self, overrides: dict[str, Any]) -> Self:
        """A copy with some values replaced; keys are dotted paths, e.g. `{"mask.budget": 14}`.

        Raises
        ------
        SettingsError
            For an unknown path (the nearest valid one is named) or a value of the wrong type or range.
        """
        valid = dict(_leaves(self))
        values = self.model_dump()
        faults = []
        for path, value in overrides.items():
            if path not in valid:
                faults.append(f"{path}: no such setting{nearest(path, valid)}")
                continue
            *parents, leaf = path.split(".")
            node = values
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        if faults:
            raise SettingsError("\n".join(faults))
        return checked(type(self), values)


S = TypeVar("S", bound=Settings)


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """Build settings; all faults at once, one line each, as a `SettingsError`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(fault_lines(error, _leaf_names(kind))) from None


def fault_lines(error: ValidationError, valid: Iterable[str] = ()) -> str:
    """One line for each fault of a pydantic error: where, what, what was given, the nearest valid name."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "settings"
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{path}: no such setting{nearest(path, valid)}")
        elif fault["type"] == "value_error":
            lines.append(f"{path}: {fault['ctx']['error']}")
        else:
            lines.append(f"{path}: {fault['msg']} (given: {fault['input']!r:.60})")
    return "\n".join(lines)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that comes nearest, to be put behind an error; empty where none does."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _leaves(settings: Settings, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _leaf_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _leaf_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def _anchored(value: Any) -> Any:
    """A relative path that exists, made absolute; a bare word is left alone: `scenes` is a set even beside a folder.

    So a run is found again from any folder, and has one hash however it was started.
    """
    if isinstance(value, (list, tuple)):
        return [_anchored(item) for item in value]
    if isinstance(value, str) and re.search(r"[/\\]", value) and os.path.exists(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _one_or_many(value: Any) -> Any:
    return _anchored((value,) if isinstance(value, str) else value)


Place = Annotated[str, BeforeValidator(_anchored)]
"""A path, or a word that stands for something installed or shipped."""


class VisualSettings(Settings):
    """The visual side: how an image becomes visual tokens (paper Sec. 3.1, Table 5)."""

    family: Literal["swin", "grid", "patch"] = Field(
        "swin", description="Swin visual parser, CNN grid features (SOHO, Pixel-BERT) or patches (ViLT)"
    )
    image_px: int = Field(96, ge=8, le=4096, description="side of the square input")
    patch_px: int = Field(8, ge=1, description="Swin: side of a patch of the first stage")
    width: int = Field(96, ge=8, description="Swin: channels of the first stage; doubles with every stage")
    depths: tuple[int, ...] = Field((2, 2), min_length=1, description="Swin: blocks of each stage")
    heads: tuple[int, ...] = Field((3, 6), min_length=1, description="Swin: heads of each stage")
    window: int = Field(6, ge=1, description="Swin: side of an attention window")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Swin: stochastic depth of the last block")
    backbone: str = Field("resnet10t", description="grid: any timm CNN")
    stride: int = Field(16, ge=4, description="grid, patch: pixels from one token to the next")
    patch_width: int = Field(192, ge=8, description="patch: channels of the projection")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must have one entry for each stage")
        step = self.patch_px * 2 ** (len(self.depths) - 1) if self.family == "swin" else self.stride
        if self.image_px % step:
            raise ValueError(f"image_px {self.image_px} must be a multiple of {step} (one visual token)")
        return self

    @property
    def grid(self) -> int:
        """Tokens on a side; m = grid ** 2."""
        if self.family == "swin":
            return self.image_px // (self.patch_px * 2 ** (len(self.depths) - 1))
        return self.image_px // self.stride

    @property
    def tokens(self) -> int:
        """m, the number of visual tokens (paper Eq. 1)."""
        return self.grid**2


class FusionSettings(Settings):
    """The fusion Transformer: a BERT encoder over words and visual tokens (paper Sec. 3.3)."""

    layers: int = Field(3, ge=1)
    width: int = Field(192, ge=8, description="d, channels of the joint sequence")
    heads: int = Field(6, ge=1)
    feed_forward: int = Field(768, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)
    positions: int = Field(512, ge=8, description="rows of the word-position table, as BERT's")
    visual_type: bool = Field(False, description="add a learned vector to visual tokens [peer: SOHO]")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (2-D sine position)")
        return self


class ModelSettings(Settings):
    """What rebuilds a model; saved as `config.json` of a checkpoint."""

    architecture: Literal["vpworkbench"] = "vpworkbench"
    visual: VisualSettings
    fusion: FusionSettings
    text_tokens: int = Field(ge=4)


class DataSettings(Settings):
    """Which images and texts, and how a batch of groups is made from them (paper Sec. 4.1)."""

    sets: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        ("scenes",), min_length=1, description="'scenes', or folders / annotation files of real sets"
    )
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    text_tokens: int = Field(32, ge=4, description="longest text in tokens, [CLS] and [SEP] included")
    grouped: bool = Field(True, description="one image with several texts; else the image is replaced (p 0.5)")
    matched_per_image: int = Field(2, ge=1)
    unmatched_per_image: int = Field(2, ge=0)
    word_share: float = Field(0.15, gt=0, lt=1, description="words masked for MLM")
    flip: bool = Field(False, description="mirror training images at random; wrong where texts say left or right")
    workers: int = Field(1, ge=0, le=64, description="processes that prepare batches; 0: in the main one")


class MaskSettings(Settings):
    """Which visual tokens are masked for feature regression (paper Eq. 9)."""

    mode: Literal["none", "random", "attention"] = "attention"
    where: Literal["tokens", "pixels"] = Field(
        "tokens",
        description="tokens: behind the parser, whose neighbours have seen them; pixels: before it too, one mask an "
        "image, for one more pass of the parser",
    )
    budget: int | None = Field(
        None, ge=1, description="k, tokens per image, the picked one included; default round(0.15 m), at least 2"
    )
    select: Literal["row", "column", "symmetric"] = Field(
        "row", description="the pick attends to (row), attends to the pick (column), or both"
    )

    def tokens_of(self, visual: VisualSettings) -> int:
        """k for a visual side with m tokens."""
        return self.budget if self.budget is not None else max(2, round(0.15 * visual.tokens))


class LossSettings(Settings):
    """Weights of the objectives (paper Eq. 10) and the open choices inside them."""

    itm: float = Field(1.0, ge=0, description="lambda1")
    mfr: float = Field(0.01, ge=0, description="lambda2")
    vla: float = Field(0.1, ge=0, description="weight of the OT alignment inside ITM; 0 leaves it out")
    mfr_reduction: Literal["mean", "sum"] = Field("mean", description="over channels; Eq. 9 prints the sum")


class OptimSettings(Settings):
    """AdamW and its schedule (paper Sec. 4.1); a step is one optimiser update."""

    lr_visual: float = Field(5e-6, gt=0)
    lr_fusion: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(500, ge=0, description="optimiser steps of linear warm-up")
    decay_at: tuple[float, ...] = Field((25 / 40, 35 / 40), description="shares of the run after which lr x decay")
    decay: float = Field(0.1, gt=0, le=1)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")


class TrainSettings(Settings):
    """How long, in which batches, where, and how often the run is saved."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0: `epochs` decides")
    epochs: float = Field(0, ge=0, description="passes over the images; 0: `steps` decides")
    images: int = Field(16, ge=1, description="images in one optimiser step")
    accumulate: int = Field(1, ge=1, description="micro-batches in one step; must divide `images`")
    checkpoint_every: int = Field(0, ge=0, description="optimiser steps between checkpoints; 0: only at the end")
    log_every: int = Field(20, ge=1, description="optimiser steps between lines of metrics.jsonl")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bf16: bool = Field(False, description="bfloat16 autocast; needs a GPU or CPU that is fast at it")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.images % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} must divide images {self.images}")
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(f"give steps or epochs, one of them (steps {self.steps}, epochs {self.epochs:g})")
        return self


class PretrainSettings(Settings):
    """Everything that decides a pre-training run."""

    preset: str = "tiny"
    seed: int = Field(0, ge=0, lt=2**31)
    init_visual: Place = Field("", description="'' scratch, 'scenes' (shipped), 'efficientnet-lite0', or a file")
    init_text: Place = Field("", description="'' scratch, 'minilm' (extra `weights`), or a folder of a BERT")
    data: DataSettings = DataSettings()
    visual: VisualSettings = VisualSettings()
    fusion: FusionSettings = FusionSettings()
    mask: MaskSettings = MaskSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings(steps=200)

    def step_size(self) -> dict[str, int]:
        """Batch size of an optimiser step, in images, in pairs, and in tokens: places, padding included, at most."""
        data = self.data
        texts = data.matched_per_image + data.unmatched_per_image if data.grouped else 1
        pairs = self.train.images * texts
        tokens = pairs * (data.text_tokens + self.visual.tokens)
        return {"images_per_step": self.train.images, "pairs_per_step": pairs, "tokens_per_step": tokens}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        budget = self.mask.tokens_of(self.visual)
        if self.mask.mode != "none" and budget > self.visual.tokens:
            raise ValueError(f"mask.budget {budget} is larger than the {self.visual.tokens} visual tokens")
        if self.mask.mode == "attention" and self.visual.family != "swin":
            raise ValueError(
                f"mask.mode 'attention' needs a parsing attention, which {self.visual.family!r} has not; "
                "use masking='random' or visual='swin'"
            )
        if self.data.text_tokens > self.fusion.positions:
            raise ValueError(
                f"data.text_tokens {self.data.text_tokens} exceeds fusion.positions {self.fusion.positions}"
            )
        return self


class VisualInitSettings(Settings):
    """Training of a visual side on the scenes' own labels: the miniature of an ImageNet start."""

    preset: str = "tiny"
    seed: int = Field(0, ge=0, lt=2**31)
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    visual: VisualSettings = VisualSettings()
    optim: OptimSettings = OptimSettings(lr_visual=1e-3, lr_fusion=1e-3, weight_decay=0.05, warmup=100)
    train: TrainSettings = TrainSettings(epochs=10, images=64)
    workers: int = Field(1, ge=0, le=64)


_FROM_SCRATCH = OptimSettings(lr_visual=2e-4, lr_fusion=1e-3, warmup=100, decay_at=(0.6, 0.85))
"""The paper's rates suit a pre-trained BERT and Swin-B; a fusion of 3 x 192 from scratch takes twenty times more."""

PRESETS: dict[str, PretrainSettings] = {
    "tiny": PretrainSettings(
        preset="tiny",
        init_visual="scenes",
        data=DataSettings(word_share=0.3),  # of ten words a text: at 0.15 MLM learns half as fast
        fusion=FusionSettings(dropout=0.0),
        optim=_FROM_SCRATCH,
        train=TrainSettings(steps=1_100),
    ),
    "small": PretrainSettings(
        preset="small",
        data=DataSettings(scenes=SceneSettings(images=12_000, val=500, test=500, image_px=128), text_tokens=40),
        visual=VisualSettings(
            image_px=128, patch_px=4, width=96, depths=(2, 2, 2), heads=(3, 6, 12), window=8, patch_width=384
        ),
        fusion=FusionSettings(layers=6, width=384, heads=12, feed_forward=1536),
        optim=OptimSettings(lr_visual=2e-4, lr_fusion=3e-4, warmup=100),
    ),
    "ablation-224": PretrainSettings(
        preset="ablation-224",
        data=DataSettings(scenes=SceneSettings(images=12_000, val=500, test=500, image_px=224), text_tokens=40),
        visual=VisualSettings(
            image_px=224, patch_px=4, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7,
            drop_path=0.2, backbone="resnet50", stride=32, patch_width=768,
        ),
        fusion=FusionSettings(layers=3, width=768, heads=12, feed_forward=3072),
        train=TrainSettings(epochs=40, images=512, accumulate=64),
    ),
    "paper-384": PretrainSettings(
        preset="paper-384",
        data=DataSettings(scenes=SceneSettings(images=12_000, val=500, test=500, image_px=384), text_tokens=40),
        visual=VisualSettings(
            image_px=384, patch_px=4, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12,
            drop_path=0.2, backbone="resnet101", stride=32, patch_width=768,
        ),
        fusion=FusionSettings(layers=12, width=768, heads=12, feed_forward=3072),
        mask=MaskSettings(budget=7),
        train=TrainSettings(epochs=40, images=512, accumulate=64),
    ),
}  # fmt: skip


def preset(name: str) -> PretrainSettings:
    """The named preset; an unknown name is a `SettingsError` that lists the known ones."""
    if name not in PRESETS:
        raise SettingsError(f"preset: no preset {name!r}{nearest(name, PRESETS)} (known: {', '.join(PRESETS)})")
    return PRESETS[name]


def pretrain_settings(
    *,
    preset: str = "tiny",
    data: str | list[str] = "scenes",
    visual: str = "swin",
    masking: str = "",
    init_visual: str = "auto",
    init_text: str = "",
    steps: int = 0,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> PretrainSettings:
    """Settings of a run from the parameters of `01_pretrain.ipynb`.

    Parameters
    ----------
    masking : str
        `none`, `random` or `attention`; empty takes `attention` for Swin and `random` for the families
        that have no parsing attention.
    init_visual : str
        `auto` takes the preset's start where the shipped weights fit it (family and sizes), else none.
    steps, epochs
        Neither given: the preset's own length.

    Raises
    ------
    SettingsError
        All faults at once.
    """
    base = globals()["preset"](preset)
    masking = masking or ("attention" if visual == "swin" else "random")
    values: dict[str, Any] = {
        "data.sets": data, "visual.family": visual, "mask.mode": masking,
        "init_text": init_text, "seed": seed, "train.checkpoint_every": checkpoint_every,
        "init_visual": base.init_visual if init_visual == "auto" else init_visual,
    }  # fmt: skip
    if steps or epochs:
        values |= {"train.steps": steps, "train.epochs": epochs}
    return base.with_overrides(values | (overrides or {}))


def visual_init_settings(
    *,
    preset: str = "tiny",
    visual: str = "swin",
    images: int = 12_000,
    epochs: float = 8,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> VisualInitSettings:
    """Settings of a run from the parameters of `00_visual_init.ipynb`."""
    base = globals()["preset"](preset)
    scenes = base.data.scenes.model_copy(update={"image_px": base.visual.image_px})
    values = {
        "preset": preset, "seed": seed, "visual": base.visual.model_dump(), "scenes": scenes.model_dump(),
    }  # fmt: skip
    changes = {
        "visual.family": visual, "scenes.images": images, "train.epochs": epochs,
        "train.checkpoint_every": checkpoint_every,
    }  # fmt: skip
    return checked(VisualInitSettings, values).with_overrides(changes | (overrides or {}))


class ProbeSettings(Settings):
    """Which model is probed, on how many held-out pictures."""

    checkpoint: Place = Field(
        "", description="a checkpoint folder, or the name of a 01_pretrain run; '' the shipped one"
    )
    images: int = Field(64, ge=2, le=100_000)
    special_tokens: Literal["language", "exclude"] = Field(
        "language", description="[CLS] and [SEP] count as language, or in neither modality"
    )
    seed: int = Field(0, ge=0, lt=2**31)


def probe_settings(
    *, checkpoint: str = "", images: int = 64, special_tokens: str = "language", seed: int = 0
) -> ProbeSettings:
    """Settings of a run from the parameters of `02_probe.ipynb` or `00_tour.ipynb`."""
    given = {"checkpoint": checkpoint, "images": images, "special_tokens": special_tokens, "seed": seed}
    return checked(ProbeSettings, given)


class CompareSettings(Settings):
    """Which models are compared, on which held-out pictures."""

    models: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        ("",),
        min_length=1,
        description="runs or checkpoints of ours, paths or names of transformers; '' the shipped one",
    )
    data: DataSettings = DataSettings()
    images: int = Field(64, ge=2, le=100_000)
    seed: int = Field(0, ge=0, lt=2**31)


def compare_settings(
    *, models: str | list[str] = "", data: str | list[str] = "scenes", images: int = 64, seed: int = 0
) -> CompareSettings:
    """Settings of a run from the parameters of `03_compare_models.ipynb`."""
    values = {"models": models, "images": images, "seed": seed}
    return checked(CompareSettings, values).with_overrides({"data.sets": data})


class FinetuneSettings(Settings):
    """Everything that decides a fine-tuning run (paper Sec. 4.2)."""

    task: Literal["vqa", "nlvr2", "nlvr1", "snli-ve"]
    preset: str = "tiny"
    data: Place = Field("scenes", description="'scenes', 'easy-vqa', or the folder of the task's original files")
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    checkpoint: Place = Field("", description="a pre-trained checkpoint or run; '' the shipped one")
    pretrained: bool = Field(True, description="false: the same model and visual start, its fusion from scratch")
    answer_count: int = Field(9, ge=1, description="VQA: how often an answer is seen in training to be one")
    premise: bool = Field(False, description="SNLI-VE: the text premise too; it is the image's caption and leaks")
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(1, ge=0, le=64)
    optim: OptimSettings = OptimSettings()
    train: TrainSettings


_TINY_TASK = {
    "optim": OptimSettings(lr_visual=1e-4, lr_fusion=5e-4, warmup=50, decay_at=(0.6, 0.85)),
    "train": TrainSettings(epochs=4, images=32),
}
TASK_PRESETS: dict[str, dict[str, dict[str, Settings]]] = {
    "tiny": {task: _TINY_TASK for task in ("vqa", "nlvr2", "nlvr1", "snli-ve")},
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
    },
}
"""Schedules of paper Sec. 4.2 and smaller ones; `train.images` counts examples here."""


def finetune_settings(
    *,
    task: str = "vqa",
    preset: str = "tiny",
    data: str = "scenes",
    checkpoint: str = "",
    pretrained: bool = True,
    steps: int = 0,
    epochs: float = 0,
    seed: int = 0,
    checkpoint_every: int = 0,
    overrides: dict[str, Any] | None = None,
) -> FinetuneSettings:
    """Settings of a run from the parameters of `04_finetune.ipynb`."""
    if preset not in TASK_PRESETS:
        raise SettingsError(f"preset: no preset {preset!r}{nearest(preset, TASK_PRESETS)} (known: tiny, paper)")
    if task not in TASK_PRESETS[preset]:
        known = ", ".join(TASK_PRESETS[preset])
        raise SettingsError(f"task: no task {task!r}{nearest(task, TASK_PRESETS[preset])} (known: {known})")
    parts = {name: part.model_dump() for name, part in TASK_PRESETS[preset][task].items()}
    base = checked(FinetuneSettings, {"task": task, "preset": preset, **parts})
    values = {"data": data, "checkpoint": checkpoint, "pretrained": pretrained, "seed": seed,
              "train.checkpoint_every": checkpoint_every}  # fmt: skip
    if steps or epochs:
        values |= {"train.steps": steps, "train.epochs": epochs}
    return base.with_overrides(values | (overrides or {}))
