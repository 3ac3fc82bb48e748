"""Models of Hugging Face's transformers: opened with their processors, given pictures and texts.

ViLT, VisualBERT and LXMERT are opened as their encoders, whatever head a checkpoint has: only the encoder is probed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vpworkbench.data.records import Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import CheckpointError, DataError, first_line
from vpworkbench.model.model import Inputs
from vpworkbench.model.published import without_nan
from vpworkbench.probes import modality_masks
from vpworkbench.settings.model import SpecialTokens

MOST_REGIONS = 36  # per image: the number that VisualBERT and LXMERT were trained with


class RegionNames(NamedTuple):
    """What a model calls its regions."""

    width: str  # setting: channels of a feature
    features: str  # argument of the forward
    boxes: str = ""  # argument of the forward; empty if it takes none


REGION_MODELS = {
    "visual_bert": RegionNames("visual_embedding_dim", "visual_embeds"),
    "lxmert": RegionNames("visual_feat_dim", "visual_feats", "visual_pos"),
}
"""By `model_type`."""
ENCODERS = ("vilt", *REGION_MODELS)


def is_pretrained(source: str) -> bool:
    """True if `source` is a folder that transformers wrote."""
    file = Path(source).expanduser() / "config.json"
    try:
        return bool(source) and "model_type" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def open_pretrained(source: str, *, regions: str = "") -> Processed:
    """A model with its processor, from a folder, the local cache or, for a name OWNER/NAME, the hub.

    `CheckpointError` if there is no such model, or it needs `regions` and there are none; `DataError` if `regions` has
    features of another width.
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
    without_nan(dict(model.named_parameters()), source)
    return Processed(model, processor, files)


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
    """Calls a model's own processor: (pictures, texts) -> `Inputs`, picture i with text i.

    With `regions`, they replace the pixels, and the processor is a tokenizer.
    """

    def __init__(self, model: nn.Module, processor: Any, regions: RegionFiles | None) -> None:
        self.model, self.processor, self.regions = model, processor, regions

    def __call__(
        self, pictures: Sequence[Picture], texts: list[str], *, special_tokens: SpecialTokens = "language"
    ) -> Inputs:
        if self.regions is None:
            images = [Image.fromarray(picture.image.pixels()) for picture in pictures]
            prompts = [prompt(self.processor, text, 1) for text in texts]
            arguments, placed = self.processor(images=images, text=prompts, padding=True, return_tensors="pt"), None
        else:
            arguments, placed = self._with_regions(pictures, texts)
        device = device_of(self.model)
        forward = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
        masks = modality_masks(self.model, forward)
        language, boxes = masks.language, None
        if special_tokens == "exclude":
            language &= ~self._special_tokens(language, forward)
        if placed is not None:
            boxes = torch.full((*masks.vision.shape, 4), torch.nan)
            boxes[:, -placed.shape[1] :] = placed
        return Inputs(forward, masks.vision, masks.tokens, language, boxes)

    def _with_regions(self, pictures: Sequence[Picture], texts: list[str]) -> tuple[dict[str, Any], Tensor]:
        """The arguments of the forward, and the boxes of the regions, (image, region, 4), nan at padding."""
        packed = self.regions.stack(pictures)
        packed = packed[:, : int((packed[..., -1] > 0).sum(dim=1).max())]  # no more padding than the batch needs
        features, boxes, real = packed.split((self.regions.width, 4, 1), dim=2)
        names, dtype = REGION_MODELS[self.model.config.model_type], self.model.dtype
        arguments = {
            **self.processor(texts, padding=True, truncation=True, return_tensors="pt"),
            names.features: features.to(dtype),
            "visual_attention_mask": real[..., 0],
        }
        if names.boxes:
            arguments[names.boxes] = boxes.to(dtype)
        return arguments, boxes.masked_fill(real == 0, torch.nan)

    def _special_tokens(self, language: Tensor, forward: dict[str, Any]) -> Tensor:
        """True at [CLS], [SEP] and other special tokens among the language tokens; bool (example, token)."""
        ids, tokenizer = forward["input_ids"], getattr(self.processor, "tokenizer", self.processor)
        # Image tokens are among the words, or they follow the words without ids.
        ids = ids[language if ids.shape == language.shape else forward["attention_mask"].bool()]
        if len(ids) != int(language.sum()):
            raise ValueError("special_tokens 'exclude': this model adds language tokens that input_ids does not hold")
        special = torch.zeros_like(language)
        special[language] = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
        return special


ADDS_IMAGE_TOKENS = ("PaliGemma", "Blip2", "InstructBlip", "Florence2", "Fuyu")
"""Models whose processors put the image tokens into the text themselves."""


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first weights that are on one."""
    found = (parameter.device for parameter in model.parameters())
    return next((device for device in found if device.type != "meta"), torch.device("cpu"))  # meta: offloaded


def prompt(processor: Any, text: str, images: int, *, to_answer: bool = False) -> str:
    """The text with its images, as the model was trained: by its chat template, or after its image tokens.

    `to_answer` ends a chat where the model's answer begins.
    """
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        return processor.apply_chat_template(message, tokenize=False, add_generation_prompt=to_answer)
    token = getattr(processor, "image_token", "")
    adds_tokens = re.sub("Video|Processor$", "", type(processor).__name__) in ADDS_IMAGE_TOKENS
    return " ".join([*[token] * images, text]) if token and not adds_tokens else text


def as_read(processor: Any, image: np.ndarray) -> np.ndarray:
    """A picture, uint8 (height, width, 3), as a processor that crops or pads it hands it to the model.

    Boxes of tokens are shares of what the model reads. Where that has the shape of the picture, it is the picture.
    """
    images = getattr(processor, "image_processor", None)
    if not (getattr(images, "do_center_crop", False) or getattr(images, "do_pad", False)):
        return image
    pixels = images(images=Image.fromarray(image), return_tensors="pt").get("pixel_values")
    height, width = image.shape[:2]
    if not torch.is_tensor(pixels) or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        return image  # tiles, or patches in a row: their boxes are shares of the picture
    pixels = pixels[0].permute(1, 2, 0)
    if pixels.shape[0] * width == pixels.shape[1] * height:
        return image
    if images.do_normalize:
        pixels = pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)
    scale = 1 / images.rescale_factor if images.do_rescale else 1
    return (pixels * scale).round().clamp(0, 255).to(torch.uint8).numpy()


def prompt_inputs(processor: Any, images: Sequence[Any], text: str, device: torch.device) -> dict[str, Any]:
    """The arguments of a model's forward for one prompt; without `images`: text only."""
    given = {"images": list(images)} if images else {}
    made = processor(text=[prompt(processor, text, len(images), to_answer=True)], return_tensors="pt", **given)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}
