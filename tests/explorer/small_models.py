"""Small models with random weights for the tests of the explorer: ViLT, LLaVA, and ours with any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from probes import tiny_models

from vpworkbench.data.records import Picture
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.probes import modality_masks
from vpworkbench.settings import FusionSettings, ModelSettings, VisualSettings
from vpworkbench.subjects import Subject


def opened(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Subject:
    """A model of transformers that is given the same inputs whatever the picture."""

    def prepare(pictures: list[Picture], texts: list[str]) -> Inputs:
        masks = modality_masks(model, inputs)
        return Inputs(inputs, masks.vision, masks.tokens, masks.tokens & ~masks.vision)

    return Subject(type(model).__name__, model.eval(), prepare, batch=1)


def vilt() -> Subject:
    torch.manual_seed(0)
    family = tiny_models.vilt()
    return opened(family.model, {name: part[:1] for name, part in family.inputs.items()})


def llava(before: Sequence[int] = (5,)) -> Subject:
    """A causal decoder; `before` are the ids of words before the image."""
    torch.manual_seed(0)
    ids = torch.tensor([[*before, *[tiny_models.IMAGE] * 9, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 24, 24)}
    return opened(tiny_models.llava().model, inputs)


def wide_model(scenes: list[Picture], tokens_on_a_side: int, layers: int = 2) -> VisualParsingModel:
    torch.manual_seed(0)
    settings = ModelSettings(
        visual=VisualSettings(family="patch", image_px=8 * tokens_on_a_side, stride=8, patch_width=16),
        fusion=FusionSettings(layers=layers, width=32, heads=4, feed_forward=32),
        text_tokens=24,
    )
    return VisualParsingModel(settings, build_tokenizer([scenes[0].captions[0]])).eval()
