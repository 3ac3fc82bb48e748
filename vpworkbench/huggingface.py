"""Models of Hugging Face's transformers: opened with their processors, given pictures and texts.

ViLT, VisualBERT and LXMERT are opened as their encoders, whatever head a checkpoint has: only the encoder is probed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vpworkbench.data.records import Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import CheckpointError, DataError, first_line
from vpworkbench.probes import modality_masks

MOST_REGIONS = 36  # per image: the number that VisualBERT and LXMERT were trained with


class RegionInputs(NamedTuple):
    """How a model takes regions: its setting for their width; its arguments, from features, boxes and real places."""

    width: str
    arguments: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


REGION_MODELS = {
    "visual_bert": RegionInputs(
        "visual_embedding_dim", lambda features, boxes, real: {"visual_embeds": features, "visual_attention_mask": real}
    ),
    "lxmert": RegionInputs(
        "visual_feat_dim",
        lambda features, boxes, real: {"visual_feats": features, "visual_pos": boxes, "visual_attention_mask": real},
    ),
}
"""By `model_type`."""
ENCODERS = ("vilt", *REGION_MODELS)


class ForeignInputs(NamedTuple):
    """A batch that a probe reads (`probing.ProbeInputs`), with the boxes of regions, (example, token, 4), if any."""

    forward: dict[str, Any]
    vision: Tensor
    tokens: Tensor
    language: Tensor
    boxes: Tensor | None = None


def is_pretrained(source: str) -> bool:
    """True if `source` is a folder that transformers wrote."""
    file = Path(source).expanduser() / "config.json"
    try:
        return bool(source) and "model_type" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def open_pretrained(source: str, *, regions: str = "") -> Processed:
    """A model with its processor, from a folder, the local cache or, for a name OWNER/NAME, the hub.

    Raises
    ------
    CheckpointError
        If there is no such model, or it needs `regions` and there are none.
    DataError
        If `regions` has features of another width.
    """
    place = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
    where = {"local_files_only": "/" not in place}  # a mistyped run name does not go to the hub
    try:
        config = transformers.AutoConfig.from_pretrained(place, **where)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        if config.model_type in ENCODERS:
            kind = transformers.AutoModel
        files = _open_regions(source, config, regions) if config.model_type in REGION_MODELS else None
        reader = transformers.AutoProcessor if files is None else transformers.AutoTokenizer
        processor = reader.from_pretrained(place, **where)
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers invents an empty one if none is saved
            raise OSError("no vocabulary is saved there")
        model = kind.from_pretrained(place, dtype="auto", **where).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, CheckpointError | DataError):
            raise
        reason = first_line(error)
        if where["local_files_only"] and isinstance(error, OSError):
            reason = "not in the local cache (names of the hub are OWNER/NAME)"
        raise CheckpointError(
            f"{source}: {reason}; a folder of transformers holds the model and its processor or tokenizer, each saved "
            "there by save_pretrained"
        ) from None
    return Processed(model, processor) if files is None else ProcessedRegions(model, processor, files)


def _open_regions(source: str, config: Any, regions: str) -> RegionFiles:
    width = getattr(config, REGION_MODELS[config.model_type].width)
    if regions and Path(regions).expanduser().exists():
        files = RegionFiles(regions, most=MOST_REGIONS, width=width)
        files.check_width()
        return files
    given = f"{regions!r} does not exist" if regions else "none are given"
    raise CheckpointError(
        f"{source}: {config.model_type} takes regions, not pixels, and {given}: give `regions`, a folder with one npz "
        f"for each image or a BUTD tsv, with features of {width} channels (docs/families.md; for generated scenes: "
        f"`vpw regions scenes FOLDER --width {width}`)"
    )


class Processed:
    """Calls a model's own processor: (pictures, texts) -> `ForeignInputs`, picture i with text i."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(
        self,
        pictures: Sequence[Picture],
        texts: list[str],
        *,
        special_tokens: Literal["language", "exclude"] = "language",
    ) -> ForeignInputs:
        device = next(self.model.parameters()).device
        arguments, regions = self.read(pictures, texts)
        forward = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
        masks = modality_masks(self.model, forward)
        language = masks.tokens & ~masks.vision
        if special_tokens == "exclude":
            language = without_special_tokens(language, forward, getattr(self.processor, "tokenizer", self.processor))
        boxes = None
        if regions is not None:
            boxes = torch.full((*masks.vision.shape, 4), torch.nan)
            boxes[:, -regions.shape[1] :] = regions
        return ForeignInputs(forward, masks.vision, masks.tokens, language, boxes)

    def read(self, pictures: Sequence[Picture], texts: list[str]) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments of the model's forward, and the boxes of its regions, if it takes any."""
        images = [Image.fromarray(picture.image.pixels()) for picture in pictures]
        prompts = [self._prompt(text) for text in texts]
        return self.processor(images=images, text=prompts, padding=True, return_tensors="pt"), None

    @property
    def is_chat(self) -> bool:
        """True if the processor has a chat template: a large decoder with many tokens per image."""
        return bool(getattr(self.processor, "chat_template", None))

    def _prompt(self, text: str) -> str:
        """The text with its image, as the model was trained: by its chat template, or after its image token."""
        if self.is_chat:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        token = getattr(self.processor, "image_token", "")
        return f"{token} {text}" if token and self.model.config.model_type != "paligemma" else text


class ProcessedRegions(Processed):
    """Texts by the model's tokenizer, regions from files instead of pixels."""

    def __init__(self, model: nn.Module, tokenizer: Any, regions: RegionFiles) -> None:
        super().__init__(model, tokenizer)
        self.regions = regions

    def read(self, pictures: Sequence[Picture], texts: list[str]) -> tuple[dict[str, Any], Tensor | None]:
        words = self.processor(texts, padding=True, truncation=True, return_tensors="pt")
        packed = self.regions.stack(pictures)
        packed = packed[:, : int(packed[..., -1].sum(dim=1).max())]  # no more padding than the batch needs
        features, boxes, real = packed.split((self.regions.width, 4, 1), dim=2)
        real, dtype = real[..., 0], self.model.dtype
        arguments = REGION_MODELS[self.model.config.model_type].arguments
        placed = boxes.masked_fill(real[..., None] == 0, torch.nan)
        return {**words, **arguments(features.to(dtype), boxes.to(dtype), real)}, placed


def without_special_tokens(language: Tensor, forward: dict[str, Any], tokenizer: Any) -> Tensor:
    """The set L without [CLS], [SEP] and other special tokens; bool (example, token).

    Raises
    ------
    ValueError
        If the model adds language tokens that `input_ids` does not hold.
    """
    ids = forward["input_ids"]
    if ids.shape == language.shape:  # image tokens are among the words
        ids = ids[language]
    else:
        ids = ids[forward["attention_mask"].bool()]
    if len(ids) != int(language.sum()):
        raise ValueError("special_tokens 'exclude': this model adds language tokens that input_ids does not hold")
    kept = language.clone()
    kept[language] = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    return kept
