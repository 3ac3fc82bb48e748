"""The whole model: visual side, fusion Transformer and the three pre-training heads (paper Fig. 1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertTokenizerFast

from vpworkbench.errors import CheckpointError
from vpworkbench.model.fusion import Fusion
from vpworkbench.model.visual import VisualTokens, build_visual
from vpworkbench.model.words import Words
from vpworkbench.settings import ModelSettings, fault_lines


class Joint(NamedTuple):
    """What one forward gives; every objective, task and probe reads from here.

    Attributes
    ----------
    hidden : tuple of Tensor, (text, word + vision, d)
        The embedding, then each layer's output.
    words : int
        Places of the words (special tokens and pads included); visual tokens stand behind them.
    visual : VisualTokens
        Of the images, before any mask: the target of MFR.
    """

    hidden: tuple[Tensor, ...]
    words: int
    visual: VisualTokens

    @property
    def last_hidden_state(self) -> Tensor:
        """(text, word + vision, d)"""
        return self.hidden[-1]

    @property
    def cls(self) -> Tensor:
        """(text, d), the output at [CLS]."""
        return self.hidden[-1][:, 0]

    @property
    def text(self) -> Tensor:
        """(text, word, d)"""
        return self.hidden[-1][:, : self.words]

    @property
    def vision(self) -> Tensor:
        """(text, vision, d)"""
        return self.hidden[-1][:, self.words :]


class Inputs(NamedTuple):
    """A batch of image-text pairs ready for the model, and the sets V and L for the probes.

    Attributes
    ----------
    forward : dict of Tensor
        Keyword arguments of `VisualParsingModel.forward`.
    vision, tokens : bool Tensor, (text, word + vision)
        The visual places; the real (non-padding) places.
    language : bool Tensor, (text, word + vision)
        The real words; [CLS] and [SEP] only where they count as language.
    """

    forward: dict[str, Tensor]
    vision: Tensor
    tokens: Tensor
    language: Tensor


class VisualParsingModel(nn.Module):
    """Visual parser + fusion Transformer + heads for MLM, ITM and MFR, with a visual dictionary for MVM too.

    Parameters
    ----------
    settings
        Visual side, fusion and the longest text.
    tokenizer
        Travels with the model; its size is the vocabulary.
    """

    def __init__(self, settings: ModelSettings, tokenizer: BertTokenizerFast) -> None:
        super().__init__()
        self.settings, self.words = settings, Words(tokenizer, settings.text_tokens)
        self.visual = build_visual(settings.visual)
        self.fusion = Fusion(
            settings.fusion,
            vocabulary=len(tokenizer),
            vision_width=self.visual.width,
            grid=settings.visual.grid if settings.visual.kind.on_grid else None,
            learned_position=settings.visual.position == "learned",
        )
        width = settings.fusion.width
        self.mlm_bias = nn.Parameter(torch.zeros(len(tokenizer)))
        self.itm = nn.Linear(width, 2)
        self.mfr = nn.Linear(width, self.visual.width)
        self.mvm = nn.Linear(width, settings.visual.dictionary) if settings.visual.dictionary else None

    @property
    def tokenizer(self) -> BertTokenizerFast:
        return self.words.tokenizer

    @property
    def device(self) -> torch.device:
        return self.mlm_bias.device

    def forward(
        self,
        images: Tensor,
        words: Tensor,
        word_tokens: Tensor,
        image_index: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Joint:
        """Encode each image once, pair its tokens with each of its texts, and fuse.

        Parameters
        ----------
        images : uint8 Tensor, (image, 3, height, width), or packed regions
        words : int64 Tensor, (text, word)
        word_tokens : bool Tensor, (text, word)
        image_index : int64 Tensor or None, (text,)
            Row of `images` of each text; None where text i belongs to image i.
        masked : bool Tensor or None, (text, vision)
            Visual tokens to hide.
        """
        return self.fuse(self.visual(images), words, word_tokens, image_index=image_index, masked=masked)

    def fuse(
        self,
        visual: VisualTokens,
        words: Tensor,
        word_tokens: Tensor,
        *,
        image_index: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Joint:
        """The part behind the visual side: for tokens that were computed before."""
        shown = visual.for_texts(image_index)
        hidden = self.fusion(words, word_tokens, self.fusion.embed_vision(shown, masked), shown.tokens)
        return Joint(hidden, words.shape[1], visual)

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., vocabulary), by the transposed word embedding (paper Eq. 7)."""
        return nn.functional.linear(states, self.fusion.bert.embeddings.word_embeddings.weight, self.mlm_bias)

    def prepare(
        self, images: Tensor, texts: list[str], *, special_tokens: Literal["language", "exclude"] = "language"
    ) -> Inputs:
        """Pair image i with text i.

        Parameters
        ----------
        images : uint8 Tensor (image, 3, height, width), or packed regions
        special_tokens
            [CLS] and [SEP] count as language (the default of Eq. 5), or in neither modality.

        Raises
        ------
        ValueError
            If there are not as many images as texts, or none.
        """
        if len(images) != len(texts) or not texts:
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text for each image")
        words, word_tokens = self.words.tensors(texts)
        if self.settings.visual.kind.pixels:
            seen = torch.ones(len(images), self.settings.visual.tokens, dtype=torch.bool)
        else:
            seen = images[..., -1].cpu() > 0  # the last channel of packed regions is 1 at real ones
        specials = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]
        counted = word_tokens
        if special_tokens == "exclude":
            counted = word_tokens & ~torch.isin(words, torch.tensor(specials))
        inputs = Inputs(
            forward={"images": images, "words": words, "word_tokens": word_tokens},
            vision=torch.cat([torch.zeros_like(word_tokens), seen], dim=1),
            tokens=torch.cat([word_tokens, seen], dim=1),
            language=torch.cat([counted, torch.zeros_like(seen)], dim=1),
        )
        forward = {name: tensor.to(self.device) for name, tensor in inputs.forward.items()}
        return Inputs(forward, *(mask.to(self.device) for mask in inputs[1:]))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors`, `config.json` and the tokenizer; equal models give equal bytes.

        Parameters
        ----------
        dtype
            Of the weights in the file, e.g. `torch.float16` for one of half the size; loading widens them again.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(self.settings.model_dump_json(indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> VisualParsingModel:
        """Load a folder that `save_pretrained` wrote, offline, in evaluation mode.

        Raises
        ------
        CheckpointError
            For a missing folder, another architecture, a pickle, a truncated or an unfitting file.
        """
        folder = Path(folder)
        _read_settings(folder)
        weights = folder / "model.safetensors"
        if not weights.exists():
            pickles = [
                path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for path in folder.glob(pattern)
            ]
            hint = f"; {pickles[0]} is a pickle, which is never loaded: save it as safetensors" if pickles else ""
            raise CheckpointError(f"{weights}: no such file{hint}")
        model = cls.from_config(folder)
        try:
            missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{weights}: does not fit {folder / 'config.json'} or is not whole: {error}"
            ) from None
        if missing or unexpected:
            raise CheckpointError(
                f"{weights}: missing keys {missing[:3]}, unexpected keys {unexpected[:3]}; a file of another model?"
            )
        return model.to(device).eval()

    @classmethod
    def from_config(cls, folder: str | Path) -> VisualParsingModel:
        """The model of a checkpoint with random weights."""
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
        return cls(_read_settings(Path(folder)), tokenizer)


def _read_settings(folder: Path) -> ModelSettings:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: no checkpoint there (no config.json); give the folder that a run wrote")
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content.get("architecture") != "vpworkbench":
            raise CheckpointError(f"{file}: a checkpoint of another architecture; it needs one saved by vpworkbench")
        return ModelSettings.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {fault_lines(error)}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not json ({error}); was it cut off?") from None
