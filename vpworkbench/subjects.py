"""The model under study: opened by name, given pictures and texts, probed.

Ours by the name of a run; others by the name or folder that transformers knows, through their own processors. ViLT,
VisualBERT and LXMERT are opened as their encoders, whatever head a checkpoint has: nothing else is probed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vpworkbench.data.inputs import prepare as prepare_ours
from vpworkbench.data.inputs import use_regions
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import CheckpointError, DataError, SettingsError
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.weights import freeze_batch_norm
from vpworkbench.probes import modality_masks
from vpworkbench.runs import runs_root, shipped_run
from vpworkbench.settings import DataSettings, PretrainSettings, checked
from vpworkbench.tasks.task import TaskModel

log = logging.getLogger(__name__)

LARGEST_BATCH = 16
MOST_REGIONS = 36  # of an image: what VisualBERT and LXMERT were trained with

Region = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
TAKES_REGIONS: dict[str, tuple[str, Region]] = {
    "visual_bert": (
        "visual_embedding_dim",
        lambda features, boxes, real: {"visual_embeds": features, "visual_attention_mask": real},
    ),
    "lxmert": (
        "visual_feat_dim",
        lambda features, boxes, real: {"visual_feats": features, "visual_pos": boxes, "visual_attention_mask": real},
    ),
}
"""`model_type` -> what its configuration calls the width of a feature; its inputs, of features, boxes, real or not."""
ENCODERS = ("vilt", *TAKES_REGIONS)


class Prepared(NamedTuple):
    """A batch that a probe reads: `ProbeInputs`, and where its regions lie, (example, token, 4), if it has some."""

    forward: dict[str, Any]
    vision: Tensor
    tokens: Tensor
    language: Tensor
    boxes: Tensor | None = None


class Opened(NamedTuple):
    """A model under comparison.

    Attributes
    ----------
    name : str
        As in figures and tables.
    prepare : callable
        (pictures, texts) -> ProbeInputs, picture i with text i; `special_tokens` as of `VisualParsingModel.prepare`.
    batch : int
        Pairs in one pass.
    data : DataSettings
        The set that it was trained on, where it is ours; else scenes.
    """

    name: str
    model: nn.Module
    prepare: Callable[..., Any]
    batch: int
    data: DataSettings = DataSettings()


def open_model(source: str, *, regions: str = "", alone: bool = True) -> Opened:
    """A model by the name of a run or a checkpoint of ours, or by a path or name that transformers knows.

    Parameters
    ----------
    source : str
        Empty: the tiny model that ships. A name of transformers is looked for in its local cache and, where there is a
        network and the name is OWNER/NAME, on the hub.
    regions : str
        For models that read regions: a folder of npz or a BUTD tsv, as of `visual.region_files`; empty: of VisualBERT
        and LXMERT none, of ours those that it was trained with.
    alone : bool
        False where `regions` may be for another of several: a model that reads pixels lets it be, and one of ours that
        takes features of another width keeps its own.

    Raises
    ------
    CheckpointError
        If it is neither, or takes regions and `regions` has none.
    DataError, SettingsError
        Where `regions` has features of another width; where they are given to a model that reads pixels.
    """
    subject = _opened(source, regions, alone)
    if alone and regions and not reads_regions(subject):
        raise SettingsError(f"regions: {subject.name} reads pixels; leave it empty")
    return subject


def reads_regions(subject: Opened) -> bool:
    """Whether a model is given the features of `data.regions`, and no pixels."""
    if isinstance(subject.model, VisualParsingModel):
        return not subject.model.settings.visual.kind.pixels
    return isinstance(subject.prepare, _WithRegions)


def _opened(source: str, regions: str, alone: bool) -> Opened:
    if _is_transformers(source):
        return _of_transformers(source, regions)
    try:
        model, settings = load_run(source)
    except CheckpointError as ours:
        try:
            return _of_transformers(source, regions)
        except CheckpointError as theirs:
            raise CheckpointError(f"{ours}; and transformers: {theirs}") from None
    name = source or "shipped"
    name = Path(name).name if "/" in name else name
    if regions and not settings.visual.kind.pixels:
        try:
            use_regions(model, regions)
        except DataError as other:
            if alone:
                raise
            log.warning("%s keeps its own regions: %s", name, other)
    return Opened(name, model, partial(prepare_ours, model), LARGEST_BATCH, settings.data)


def open_models(sources: Sequence[str], *, regions: str = "") -> list[Opened]:
    """All models, each under a name of its own, before any is probed; errors as of `open_model`."""
    subjects: list[Opened] = []
    for source in sources:
        subject = open_model(source, regions=regions, alone=len(sources) == 1)
        taken = [other.name for other in subjects]
        if subject.name in taken:
            subject = subject._replace(name=f"{subject.name} ({len(taken) + 1})")
        subjects.append(subject)
    if regions and not any(map(reads_regions, subjects)):
        raise SettingsError("regions: all of these models read pixels; leave it empty")
    return subjects


def load_run(checkpoint: str = "") -> tuple[VisualParsingModel, PretrainSettings]:
    """A pre-trained model and the settings that made it.

    Parameters
    ----------
    checkpoint : str
        A run's folder or its `checkpoint/`, or the name of a run of `01_pretrain`; empty: the tiny model that ships.

    Raises
    ------
    CheckpointError
        If there is no finished run; the places looked at are named.
    """
    places = [Path(checkpoint).expanduser()] if checkpoint else []
    places += [runs_root() / "01_pretrain" / checkpoint] if checkpoint else [shipped_run()]
    for place in places:
        folder = place.parent if place.name == "checkpoint" else place
        if (folder / "config.json").exists() and (folder / "checkpoint" / "model.safetensors").exists():
            settings = checked(PretrainSettings, json.loads((folder / "config.json").read_text())["settings"])
            model = VisualParsingModel.from_pretrained(folder / "checkpoint")
            if settings.init_visual:
                freeze_batch_norm(model)
            return model, settings
    raise CheckpointError(f"no finished pre-training run at {' nor at '.join(map(str, places))}; `vpw runs` lists them")


def load_task(checkpoint: str | Path) -> TaskModel:
    """A fine-tuned model by the folder of its run or of its checkpoint, or the name of a run of `04_finetune`.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    place = Path(checkpoint).expanduser()
    for folder in (place, place / "checkpoint", runs_root() / "04_finetune" / str(checkpoint) / "checkpoint"):
        if (folder / "task.json").exists():
            return TaskModel.from_pretrained(folder)
    return TaskModel.from_pretrained(place)


def token_counts(subject: Opened, pictures: Sequence[Picture]) -> tuple[float, float]:
    """Visual and language tokens of an example, means over at most one batch: what the null depends on."""
    some = pictures[: subject.batch]
    inputs = subject.prepare(some, [picture.captions[0] for picture in some])
    counts = (inputs.vision & inputs.tokens).sum(dim=1), inputs.language.sum(dim=1)
    return tuple(count.double().mean().item() for count in counts)


def _is_transformers(source: str) -> bool:
    file = Path(source).expanduser() / "config.json"
    if not source or not file.exists():
        return False
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and "model_type" in content


def _of_transformers(source: str, regions: str) -> Opened:
    place = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    where = {"local_files_only": "/" not in place}  # a mistyped run is not asked of the hub
    try:
        config = transformers.AutoConfig.from_pretrained(place, **where)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        if config.model_type in ENCODERS:
            kind = transformers.AutoModel
        if config.model_type in TAKES_REGIONS:
            files = _regions_for(source, config, regions)
            processor = transformers.AutoTokenizer.from_pretrained(place, **where)
        else:
            processor = transformers.AutoProcessor.from_pretrained(place, **where)
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one of no words where none is saved
            raise OSError("no vocabulary is saved there")
        model = kind.from_pretrained(place, dtype="auto", **where).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, CheckpointError | DataError):
            raise
        reason = str(error).splitlines()[0][:200]
        if where["local_files_only"] and isinstance(error, OSError):
            reason = "not in its local cache (names of the hub are OWNER/NAME)"
        raise CheckpointError(
            f"{source}: {reason}; a folder of transformers holds the model and its processor "
            "or tokenizer, each saved there by save_pretrained"
        ) from None
    name = Path(source).name
    if config.model_type in TAKES_REGIONS:
        return Opened(name, model, _WithRegions(model, processor, files), LARGEST_BATCH)
    is_decoder = bool(getattr(processor, "chat_template", None))  # large, and of many tokens: one pair at a time
    return Opened(name, model, _Processed(model, processor), 1 if is_decoder else LARGEST_BATCH)


def _regions_for(source: str, config: Any, regions: str) -> RegionFiles:
    width = getattr(config, TAKES_REGIONS[config.model_type][0])
    if regions and Path(regions).expanduser().exists():
        files = RegionFiles(regions, most=MOST_REGIONS, width=width)
        files.check_width()
        return files
    given = f"{regions!r} is not there" if regions else "none are given"
    raise CheckpointError(
        f"{source}: {config.model_type} takes regions, not pixels, and {given}: give `regions`, a folder with one "
        f"npz for each image or a BUTD tsv, features of {width} channels (docs/families.md; of generated scenes `vpw "
        f"regions --width {width}` makes them)"
    )


class _Processed:
    """Pictures and texts through a model's own processor."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(
        self,
        pictures: Sequence[Picture],
        texts: list[str],
        *,
        special_tokens: Literal["language", "exclude"] = "language",
    ) -> Prepared:
        device = next(self.model.parameters()).device
        made, regions = self._inputs(pictures, texts)
        forward = {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}
        masks = modality_masks(self.model, forward)
        language = masks.tokens & ~masks.vision
        if special_tokens == "exclude":
            language = _without_special(language, forward, getattr(self.processor, "tokenizer", self.processor))
        boxes = None
        if regions is not None:
            boxes = torch.full((*masks.vision.shape, 4), torch.nan)
            boxes[:, -regions.shape[1] :] = regions
        return Prepared(forward, masks.vision, masks.tokens, language, boxes)

    def _inputs(self, pictures: Sequence[Picture], texts: list[str]) -> tuple[dict[str, Any], Tensor | None]:
        """What the model's forward takes, and the boxes of its regions, if it takes some."""
        images = [Image.fromarray(picture.image.pixels()) for picture in pictures]
        prompts = [self._prompt(text) for text in texts]
        return self.processor(images=images, text=prompts, padding=True, return_tensors="pt"), None

    def _prompt(self, text: str) -> str:
        """The text as the model was trained to meet an image: by its chat template, or behind its image token."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        token = getattr(self.processor, "image_token", "")
        return f"{token} {text}" if token and self.model.config.model_type != "paligemma" else text


class _WithRegions(_Processed):
    """Regions that a detector found before, and texts by the model's tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, regions: RegionFiles) -> None:
        super().__init__(model, tokenizer)
        self.regions = regions

    def _inputs(self, pictures: Sequence[Picture], texts: list[str]) -> tuple[dict[str, Any], Tensor | None]:
        words = self.processor(texts, padding=True, truncation=True, return_tensors="pt")
        packed = self.regions.stack([picture.image for picture in pictures])
        packed = packed[:, : int(packed[..., -1].sum(dim=1).max())]  # no more padding than the batch needs
        features, boxes, real = packed.split((self.regions.width, 4, 1), dim=2)
        real = real[..., 0]
        named = TAKES_REGIONS[self.model.config.model_type][1]
        placed = boxes.masked_fill(real[..., None] == 0, torch.nan)
        return {**words, **named(features.to(self.model.dtype), boxes.to(self.model.dtype), real)}, placed


def _without_special(language: Tensor, forward: dict[str, Any], tokenizer: Any) -> Tensor:
    """The set L without [CLS], [SEP] and their like; (example, token).

    Raises
    ------
    ValueError
        Where a model adds tokens of its own to L, which no ids tell.
    """
    ids = forward["input_ids"]
    if ids.shape == language.shape:  # images stand among the words
        ids = ids[language]
    else:
        ids = ids[forward["attention_mask"].bool()]
    if len(ids) != int(language.sum()):
        raise ValueError("special_tokens 'exclude': this model has tokens of its own beside those of input_ids")
    kept = language.clone()
    kept[language] = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    return kept
