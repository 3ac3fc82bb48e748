"""The settings of every part, and of every kind of run: names, types, ranges, and what must agree."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import Location, Place, Settings, nearest, one_or_many
from vpworkbench.settings.families import FAMILIES, Family
from vpworkbench.settings.scenes import SceneSettings

SMALLEST_PX, LARGEST_PX = 8, 4096


def added(default: Any, **constraints: Any) -> Any:
    """A field that came later: at its default it is not written, so that older runs keep their hash and their name."""
    return Field(default, exclude_if=lambda value: value == default, **constraints)


class VisualSettings(Settings):
    """The visual side: how an image becomes visual tokens (paper Sec. 3.1, Table 5)."""

    family: str = Field(
        "swin",
        description="Swin visual parser, CNN grid features (SOHO, Pixel-BERT), patches (ViLT), regions (UNITER); a key "
        "of `config.families.FAMILIES`",
    )
    image_px: int = Field(96, ge=SMALLEST_PX, le=LARGEST_PX, description="side of the square input")
    patch_px: int = Field(8, ge=1, description="Swin: side of a patch of the first stage")
    width: int = Field(96, ge=8, description="Swin: channels of the first stage; doubles with every stage")
    depths: tuple[int, ...] = Field((2, 2), min_length=1, description="Swin: blocks of each stage")
    heads: tuple[int, ...] = Field((3, 6), min_length=1, description="Swin: heads of each stage")
    window: int = Field(6, ge=1, description="Swin: side of an attention window")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Swin: stochastic depth of the last block")
    backbone: str = Field("resnet10t", description="grid: a CNN of timm, with `output_stride` unless stride is 32")
    stride: int = Field(16, ge=4, description="grid, patch: pixels from one token to the next")
    patch_width: int = Field(192, ge=8, description="patch: channels of the projection")
    frozen_norm: bool = added(
        False, description="grid: batch norm keeps its statistics; so it is wherever weights are taken over"
    )
    dictionary: int = added(0, ge=0, le=65_536, description="grid: codes of SOHO's visual dictionary (2048); 0: none")
    sampled: int = added(
        0, ge=0, description="tokens of each image that pre-training sees, drawn at random (Pixel-BERT); 0: all"
    )
    position: Literal["sine", "learned"] = added(
        "sine", description="of tokens on a grid, in the joint embedding: the paper's, or a table as ViLT has it"
    )
    regions: int = added(
        36, ge=1, le=1024, description="tokens on no grid: so many an image; regions at most, the first of its file"
    )
    region_width: int = added(2048, ge=1, description="regions: channels of the features; BUTD's are 2048")
    region_files: Location = added("", description="regions: a folder of npz, one for each image, or a BUTD tsv")

    @field_validator("family")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in FAMILIES:
            raise ValueError(f"no visual family {name!r}{nearest(name, FAMILIES)} (known: {', '.join(FAMILIES)})")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must have one entry for each stage")
        if self.kind.step and self.image_px % (step := self.kind.step(self)):
            raise ValueError(f"image_px {self.image_px} must be a multiple of {step} (one visual token)")
        if self.dictionary and not self.kind.dictionary:
            able = ", ".join(repr(name) for name, kind in FAMILIES.items() if kind.dictionary)
            raise ValueError(f"dictionary {self.dictionary}: visual family {self.family!r} has none (only {able})")
        if not self.kind.on_grid and (self.sampled or self.position != "sine"):
            raise ValueError(
                f"visual family {self.family!r} has boxes in the place of positions, and few tokens: sampled must be "
                "0, position 'sine'"
            )
        if self.sampled > self.tokens:
            raise ValueError(f"sampled {self.sampled} is larger than the {self.tokens} visual tokens")
        return self

    @property
    def kind(self) -> Family:
        """The family itself."""
        return FAMILIES[self.family]

    @property
    def grid(self) -> int:
        """Tokens on a side; m = grid ** 2."""
        if self.kind.step is None:
            raise ValueError(f"visual family {self.family!r} has tokens with boxes, no grid of them")
        return self.image_px // self.kind.step(self)

    @property
    def tokens(self) -> int:
        """m, the number of visual tokens (paper Eq. 1); of those on no grid the largest number."""
        return self.grid**2 if self.kind.on_grid else self.regions

    @property
    def trained_tokens(self) -> int:
        """The visual tokens that a pair has in pre-training."""
        return self.sampled or self.tokens

    def sized(self, tokens: int) -> dict[str, int]:
        """What to set for so many visual tokens; of those on no grid for at most so many.

        A token keeps its pixels and the image gets as many as it takes; Swin's last stage keeps one window.

        Raises
        ------
        SettingsError
            For tokens on a grid where the number is no square, naming those that are possible.
        """
        if self.kind.step is None:
            return {"regions": tokens}
        step, side = self.kind.step(self), math.isqrt(max(tokens, 0))
        sides = range(max(2, -(-SMALLEST_PX // step)), LARGEST_PX // step + 1)
        if side**2 != tokens or side not in sides:
            first = ", ".join(str(possible**2) for possible in sides[:12])
            raise SettingsError(
                f"visual_tokens: {tokens} cannot be: tokens of {self.family!r} are the squares of a grid, {step} px "
                f"each; possible are {first} and so on, up to {sides[-1] ** 2}"
            )
        return {"image_px": side * step, "window": side}


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


Places = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


class DataSettings(Settings):
    """Which images and texts, and how a batch of groups is made from them (paper Sec. 4.1)."""

    sets: Places = Field(("scenes",), min_length=1, description="'scenes', or folders / annotation files of real sets")
    images: Places = Field((), description="folders and zips of the images; empty: beside each annotation file")
    exclude: Places = Field(
        (), description="more folders / annotation files, of tasks too, whose val and test images are not trained on"
    )
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    text_tokens: int = Field(32, ge=4, description="longest text in tokens, [CLS] and [SEP] included")
    grouped: bool = Field(True, description="one image with several texts; else the image is replaced (p 0.5)")
    matched_per_image: int = Field(2, ge=1)
    unmatched_per_image: int = Field(2, ge=0)
    word_share: float = Field(0.15, gt=0, lt=1, description="words masked for MLM")
    flip: bool = Field(False, description="mirror training images at random; wrong where texts say left or right")
    workers: int = Field(1, ge=0, le=64, description="processes that prepare batches; 0: in the main one")
    cache: bool = added(False, description="decode and resize every image once, into one memory-mapped file")


class MaskSettings(Settings):
    """Which visual tokens are masked for feature regression (paper Eq. 9)."""

    mode: Literal["none", "random", "attention", "code"] = Field(
        "attention",
        description="k tokens by attention or at random, whose features are guessed (MFR); or all of one code of "
        "the visual dictionary, which is guessed (MVM of SOHO)",
    )
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
        return self.budget if self.budget is not None else max(2, round(0.15 * visual.trained_tokens))


class LossSettings(Settings):
    """Weights of the objectives (paper Eq. 10) and the open choices inside them."""

    itm: float = Field(1.0, ge=0, description="lambda1")
    mfr: float = Field(0.01, ge=0, description="lambda2")
    vla: float = Field(0.1, ge=0, description="weight of the OT alignment inside ITM; 0 leaves it out")
    mvm: float = added(1.0, ge=0, description="weight of masked visual modelling (mask.mode 'code')")
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
    processes: int = Field(1, ge=1, exclude=True, description="share each step among so many GPUs (or CPU processes)")
    keep_last: int = added(1, ge=1, description="checkpoints that are kept, the final weights included")
    keep_best: bool = added(False, description="keep the weights of the lowest held-out loss too; needs probe_every")
    probe_every: int = added(0, ge=0, description="optimiser steps between probes of a held-out batch; 0: never")
    compile: bool = added(False, description="torch.compile the visual side and the fusion; needs a C++ compiler")
    gradient_checkpointing: bool = added(False, description="compute activations twice, to hold fewer")
    tracker: Literal["", "tensorboard", "wandb"] = added("", description="log there too; accelerate's trackers")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.images % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} must divide images {self.images}")
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(f"give steps or epochs, one of them (steps {self.steps}, epochs {self.epochs:g})")
        if self.images % self.processes:
            raise ValueError(f"processes {self.processes} must divide images {self.images}")
        if self.probe_every % self.log_every:
            raise ValueError(f"probe_every {self.probe_every} must be a multiple of log_every {self.log_every}")
        if self.keep_best and not self.probe_every:
            raise ValueError("keep_best goes by the held-out loss, which needs probe_every")
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
        tokens = pairs * (data.text_tokens + self.visual.trained_tokens)
        return {"images_per_step": self.train.images, "pairs_per_step": pairs, "tokens_per_step": tokens}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        budget = self.mask.tokens_of(self.visual)
        if self.mask.mode != "none" and budget > self.visual.trained_tokens:
            raise ValueError(f"mask.budget {budget} is larger than the {self.visual.trained_tokens} visual tokens")
        if self.mask.mode == "code" and not self.visual.dictionary:
            raise ValueError("mask.mode 'code' hides the tokens of one code: set visual.dictionary (2048 in SOHO)")
        if self.visual.sampled and self.mask.where == "pixels":
            raise ValueError("visual.sampled leaves out tokens, mask.where 'pixels' hides all their pixels: not both")
        if self.mask.where == "pixels" and not self.visual.kind.on_grid:
            raise ValueError(
                f"mask.where 'pixels' hides the squares of tokens, which {self.visual.family!r} has not; use 'tokens'"
            )
        if not self.visual.kind.pixels and (self.data.flip or self.data.cache):
            raise ValueError(
                f"visual family {self.visual.family!r} reads features, no pixels: data.flip and data.cache must be "
                "false"
            )
        if self.mask.mode == "attention" and not self.visual.kind.parsing:
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

    @model_validator(mode="after")
    def _sees_pixels(self) -> Self:
        if not self.visual.kind.on_grid:
            raise ValueError(
                f"visual family {self.visual.family!r} has no tokens on a grid, which are what scenes have labels of"
            )
        return self


class RegionSettings(Settings):
    """Features of true boxes: of which set, and how the small CNN that makes them is trained on scene labels."""

    source: Place = Field("scenes", description="'scenes', the folder of generated scenes, or of NLVR v1")
    seed: int = Field(0, ge=0, lt=2**31)
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    crop_px: int = Field(32, ge=8, le=256, description="side that a box is squeezed to")
    width: int = Field(128, ge=1, description="channels of a feature")
    optim: OptimSettings = OptimSettings(lr_visual=1e-3, lr_fusion=1e-3, weight_decay=0.05, warmup=100)
    train: TrainSettings = TrainSettings(epochs=1, images=64)
    workers: int = Field(1, ge=0, le=64)


class ProbeSettings(Settings):
    """Which model is probed, on how many held-out pictures."""

    checkpoint: Place = Field(
        "",
        description="a checkpoint folder, the name of a 01_pretrain run, a model of transformers; '' the shipped one",
    )
    data: Places = added((), description="captioned sets; (): those it was trained on, of models of others scenes")
    regions: Location = added(
        "", description="of models that read regions: a folder of npz or a BUTD tsv; '' a run's own"
    )
    images: int = Field(64, ge=2, le=100_000)
    special_tokens: Literal["language", "exclude"] = Field(
        "language", description="[CLS] and [SEP] count as language, or in neither modality"
    )
    seed: int = Field(0, ge=0, lt=2**31)


class CompareSettings(Settings):
    """Which models are compared, on which held-out pictures."""

    models: Places = Field(
        ("",),
        min_length=1,
        description="runs or checkpoints of ours, paths or names of transformers; '' the shipped one",
    )
    data: DataSettings = DataSettings()
    regions: Location = added(
        "", description="of models that read regions: a folder of npz or a BUTD tsv; '' a run's own"
    )
    images: int = Field(64, ge=2, le=100_000)
    seed: int = Field(0, ge=0, lt=2**31)


class RetrievalSettings(Settings):
    """Image-text retrieval: the pairs that are trained on, and what is searched (paper Sec. 4.2, Table 4)."""

    negatives: int = Field(2, ge=1, description="unmatched captions of each image, from its batch")
    hard: float = Field(
        0.0, ge=0, le=1, description="draw them from this share of all training captions instead, those that come "
        "nearest to the image by the frozen dual projection",
    )  # fmt: skip
    flip: bool = Field(False, description="mirror training images at random; wrong where texts say left or right")
    search_images: int = Field(0, ge=0, description="the first images of val, and of test, are searched; 0: all")
    pairs: int = Field(512, ge=1, description="pairs in one pass of the fusion when scoring; thousands on a GPU")


class FinetuneSettings(Settings):
    """Everything that decides a fine-tuning run (paper Sec. 4.2)."""

    task: Literal["vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval"]
    preset: str = "tiny"
    data: Place = Field(
        "scenes",
        description="'scenes', 'easy-vqa', the folder of the task's files, or one file; retrieval: any captioned set",
    )
    images: Places = Field((), description="folders and zips of the images; empty: beside each annotation file")
    scenes: SceneSettings = SceneSettings(images=12_000, val=500, test=500)
    checkpoint: Place = Field("", description="a pre-trained checkpoint or run; '' the shipped one")
    pretrained: bool = Field(True, description="false: the same model and visual start, its fusion from scratch")
    answer_count: int = Field(
        9, ge=1, description="VQA: an answer stands for so many questions of training and validation to be one"
    )
    answer_list: Location = added(
        "", description="VQA: a file of the answers, a json list or one a line; '' those that `answer_count` finds"
    )
    pairing: Literal["pair", "pair-attention"] = Field(
        "pair", description="NLVR2: both [CLS] side by side, or UNITER's attention from each pass to the other"
    )
    regions: Location = added("", description="region files of this task's images; '' those of the checkpoint")
    premise: bool = Field(False, description="SNLI-VE: the text premise too; it is the image's caption and leaks")
    retrieval: RetrievalSettings = Field(
        RetrievalSettings(),
        exclude_if=lambda value: value == RetrievalSettings(),  # other tasks' runs keep their hash
    )
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(1, ge=0, le=64)
    optim: OptimSettings = OptimSettings()
    train: TrainSettings

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        if self.answer_list and self.task != "vqa":
            raise ValueError(f"answer_list is of vqa, not of {self.task}; leave it empty")
        return self


class ExploreSettings(Settings):
    """Which model is explored, on which pictures."""

    checkpoint: Place = Field("", description="a checkpoint, a run or a model of transformers; '' the shipped one")
    beside: Place = Field("", description="a second one under it; '' none")
    data: Place = Field("scenes", description="a captioned set; its held-out pictures are shown")
    regions: Location = added(
        "", description="of models that read regions: a folder of npz or a BUTD tsv; '' a run's own"
    )
    picture: int = Field(0, ge=0, description="the picture to begin with")
    sentence: str = Field("", description="the sentence to begin with; '' the picture's first caption")
    seed: int = Field(0, ge=0, lt=2**31, description="of the random mask")


class RunsSettings(Settings):
    """Which runs are put side by side."""

    notebook: str = Field("01_pretrain", description="its runs; '' those of all notebooks")
    where: str = Field("", description="a condition on the table and the settings, as pandas takes it")
    quantity: str = Field("itm", description="what of metrics.jsonl is drawn")
    gallery: bool = Field(True, description="the committed examples too")


class FamilyRunsSettings(Settings):
    """Which runs of the visual families are compared; and how small a demonstration is, where there are none."""

    prefix: str = Field("families", pattern=r"^\w[\w.-]*$", description="of the runs' names")
    runs: Location = Field("", description="folder that holds them; empty: this workbench's")
    seeds: int = Field(3, ge=1, le=100, description="of each arm, in the list of calls")
    length: int = Field(
        0, ge=0, description="optimiser steps of each listed pre-training and fine-tuning; 0: the presets'"
    )
    steps: int = Field(6, ge=1, description="of the demonstration")
    images: int = Field(16, ge=2, description="probed in the demonstration")
