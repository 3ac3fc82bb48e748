"""Small models with random weights for the tests of the explorer: ViLT, LLaVA, and ours with any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers as hf

from vpworkbench.data.records import Picture
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.probes import modality_masks
from vpworkbench.settings import FusionSettings, ModelSettings, VisualSettings
from vpworkbench.subjects import Subject

IMAGE = 90  # id of an image place
ENCODER = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.5,
)


def opened(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Subject:
    """A model of transformers that is given the same inputs whatever the picture."""

    def prepare(pictures: list[Picture], texts: list[str]) -> Inputs:
        masks = modality_masks(model, inputs)
        return Inputs(inputs, masks.vision, masks.tokens, masks.tokens & ~masks.vision)

    return Subject(type(model).__name__, model.eval(), prepare, batch=1)


def vilt() -> Subject:
    torch.manual_seed(0)
    model = hf.ViltModel(hf.ViltConfig(**ENCODER, image_size=24, patch_size=8, max_image_length=-1))
    ids = torch.randint(1, 80, (1, 7))
    pixels = {"pixel_values": torch.rand(1, 3, 24, 24), "pixel_mask": torch.ones(1, 24, 24, dtype=torch.long)}
    return opened(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels)


def llava(before: Sequence[int] = (5,)) -> Subject:
    """A causal decoder; `before` are the ids of words before the image."""
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
    )
    text = hf.LlamaConfig(**ENCODER, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    ids = torch.tensor([[*before, *[IMAGE] * 9, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 24, 24)}
    return opened(hf.LlavaForConditionalGeneration(config), inputs)


def wide_model(scenes: list[Picture], tokens_on_a_side: int, layers: int = 2) -> VisualParsingModel:
    torch.manual_seed(0)
    settings = ModelSettings(
        visual=VisualSettings(family="patch", image_px=8 * tokens_on_a_side, stride=8, patch_width=16),
        fusion=FusionSettings(layers=layers, width=32, heads=4, feed_forward=32),
        text_tokens=24,
    )
    return VisualParsingModel(settings, build_tokenizer([scenes[0].captions[0]])).eval()
