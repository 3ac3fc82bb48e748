"""The whole model: visual side, fusion Transformer and the three pre-training heads (paper Fig. 1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpworkbench.errors import CheckpointError
from vpworkbench.model.fusion import build_fusion
from vpworkbench.model.visual import VisualTokens, build_visual, encode
from vpworkbench.model.words import Words, bert_tokenizer
from vpworkbench.settings import ModelSettings, fault_lines
from vpworkbench.settings.model import SpecialTokens
from vpworkbench.settings.training import Pool

if TYPE_CHECKING:
    from transformers import BertTokenizerFast


class Joint(NamedTuple):
    """The output of one forward; every objective, task and probe reads from here."""

    hidden: tuple[Tensor, ...]  # (text, word + vision, d): the embedding, then each layer's output
    word_tokens: Tensor  # bool (text, word), False at padding; visual tokens follow the words
    visual: VisualTokens  # those of the images, before any mask

    @property
    def cls(self) -> Tensor:
        """The last layer's output at [CLS], (text, d)."""
        return self.hidden[-1][:, 0]

    @property
    def words(self) -> int:
        """Word positions, special tokens and padding included."""
        return self.word_tokens.shape[1]

    @property
    def text(self) -> Tensor:
        """(text, word, d)"""
        return self.hidden[-1][:, : self.words]

    @property
    def vision(self) -> Tensor:
        """(text, vision, d)"""
        return self.hidden[-1][:, self.words :]

    def pooled(self, pool: Pool) -> Tensor:
        """What a head reads, (text, d): [CLS] (paper Sec. 4.2), or the mean over the words, special tokens included.

        The mean is that of Sentence-BERT (Reimers and Gurevych 2019), whose encoders are trained with it.
        """
        if pool == "cls":
            return self.cls
        shares = self.word_tokens / self.word_tokens.sum(dim=1, keepdim=True)
        return (shares[..., None].to(self.text) * self.text).sum(dim=1)


class Inputs(NamedTuple):
    """Image-text pairs ready for the model, and the sets V and L for the probes, bool (text, word + vision)."""

    forward: dict[str, Tensor]  # keyword arguments of `VisualParsingModel.forward`
    vision: Tensor  # the visual tokens
    tokens: Tensor  # all tokens that are not padding
    language: Tensor  # the words; [CLS] and [SEP] only if they count as language
    boxes: Tensor | None = None  # (text, word + vision, 4), of regions that the forward does not take


class VisualParsingModel(nn.Module):
    """Visual side, fusion Transformer and heads for MLM, ITM and MFR; with codes or classes also for MVM and MRC.

    The tokenizer is saved with the model; its size is the vocabulary.
    """

    def __init__(self, settings: ModelSettings, tokenizer: BertTokenizerFast) -> None:
        super().__init__()
        self._settings, self.words = settings, Words(tokenizer, settings.text_tokens)
        self.visual = build_visual(settings.visual)
        self.fusion = build_fusion(
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
        self.mvm = nn.Linear(width, settings.visual.codes) if settings.visual.codes else None  # and MRC
        self.freeze_visual(settings.visual.frozen)

    @property
    def settings(self) -> ModelSettings:
        """The settings, with those of the visual side as they are now: a start freezes its batch norm."""
        return self._settings.model_copy(update={"visual": self.visual.settings})

    @property
    def tokenizer(self) -> BertTokenizerFast:
        return self.words.tokenizer

    @property
    def device(self) -> torch.device:
        return self.mlm_bias.device

    def forward(self, images: Tensor, words: Tensor, word_tokens: Tensor, image_index: Tensor | None = None) -> Joint:
        """Encode each image once, and `fuse` its tokens with each of its texts; `images` as `encode` takes them."""
        return self.fuse(self.encode(images), words, word_tokens, image_index=image_index)

    def encode(self, images: Tensor) -> VisualTokens:
        """Visual tokens of uint8 images (image, 3, height, width), of packed regions, or kept by `visual.pack`."""
        return encode(self.visual, images)

    def freeze_visual(self, frozen: bool) -> None:
        """Take the visual side out of training, or back in; a saved model remembers it.

        A `SettingsError` if it has no weights, or a dictionary.
        """
        self.visual.settings = self.settings.with_overrides({"visual.frozen": frozen}).visual
        self.visual.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> VisualParsingModel:
        """As any module; a frozen visual side stays in evaluation mode."""
        super().train(mode)
        if self.visual.settings.frozen:
            self.visual.eval()
        return self

    def fuse(
        self,
        visual: VisualTokens,
        words: Tensor,
        word_tokens: Tensor,
        *,
        image_index: Tensor | None = None,
        masked: Tensor | None = None,
        causal: Tensor | None = None,
    ) -> Joint:
        """Pair the visual tokens of each image with each of its texts; one pass for each pair.

        Parameters
        ----------
        words, word_tokens : int64 and bool Tensor, (text, word)
            Token ids; False at padding.
        image_index : int64 Tensor or None, (text,)
            Image of each text; None if text i belongs to image i.
        masked : bool Tensor or None, (text, vision)
            Visual tokens to hide.
        causal : bool Tensor or None, (text,)
            Texts whose words see no later words, as `seq2seq_mask` says.
        """
        paired = visual.for_texts(image_index)
        options = {} if causal is None else {"causal": causal}
        hidden = self.fusion(words, word_tokens, self.fusion.embed_vision(paired, masked), paired.tokens, **options)
        return Joint(hidden, word_tokens, visual)

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., vocabulary), by the transposed word embedding (paper Eq. 7)."""
        return nn.functional.linear(states, self.fusion.bert.embeddings.word_embeddings.weight, self.mlm_bias)

    def prepare(self, images: Tensor, texts: list[str], *, special_tokens: SpecialTokens = "language") -> Inputs:
        """Pair image i with text i; `data.inputs.prepare` does so for files."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text for each image")
        words, word_tokens = self.words.tensors(texts)
        if self.settings.visual.kind.pixels:
            vision_tokens = torch.ones(len(images), self.settings.visual.tokens, dtype=torch.bool)
        else:
            vision_tokens = images[..., -1].cpu() > 0  # the last channel of packed regions is 1 at real ones
        language = word_tokens
        if special_tokens == "exclude":
            special = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
            language = word_tokens & ~torch.isin(words, special)
        no_words, no_vision = torch.zeros_like(word_tokens), torch.zeros_like(vision_tokens)
        forward = {"images": images, "words": words, "word_tokens": word_tokens}
        return Inputs(
            forward={name: tensor.to(self.device) for name, tensor in forward.items()},
            vision=torch.cat([no_words, vision_tokens], dim=1).to(self.device),
            tokens=torch.cat([word_tokens, vision_tokens], dim=1).to(self.device),
            language=torch.cat([language, no_vision], dim=1).to(self.device),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`, `config.json` and the tokenizer; equal models give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(self.settings.model_dump_json(indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisualParsingModel:
        """Load a folder that `save_pretrained` wrote, offline, in evaluation mode.

        A `CheckpointError` if a file is missing, damaged, a pickle, or belongs to another model.
        """
        from vpworkbench.model.published import without_nan  # it loads timm

        model, weights = cls.from_config(folder), Path(folder) / "model.safetensors"
        if not weights.exists():
            pickles = [path.name for path in Path(folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            hint = f"; {pickles[0]} is a pickle, which is never loaded: save it as safetensors" if pickles else ""
            raise CheckpointError(f"{weights}: no such file{hint}")
        try:
            missing, unexpected = model.load_state_dict(without_nan(load_file(weights), weights), strict=False)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{weights}: is damaged or does not fit its config.json: {error}") from None
        if missing or unexpected:
            raise CheckpointError(
                f"{weights}: missing keys {missing[:3]}, unexpected keys {unexpected[:3]}; a file of another model?"
            )
        return model.eval()

    @classmethod
    def from_config(cls, folder: str | Path) -> VisualParsingModel:
        """The model of a saved folder with random weights."""
        return cls(_read_settings(Path(folder) / "config.json"), bert_tokenizer(Path(folder)))


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; the tensors may lie anywhere."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)


def _read_settings(file: Path) -> ModelSettings:
    if not file.exists():
        raise CheckpointError(f"{file.parent}: not a checkpoint (no config.json); give the folder that a run wrote")
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content.get("architecture") != "vpworkbench":
            raise CheckpointError(f"{file}: a checkpoint of another architecture; it needs one saved by vpworkbench")
        return ModelSettings.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {fault_lines(error)}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not json ({error}); was it cut off?") from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In the block the model is in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
