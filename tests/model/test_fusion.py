"""The fusion Transformer against Hugging Face's BERT, and the 2-D position written out."""

from __future__ import annotations

import math

import torch
from transformers import BertConfig, BertModel

from vpworkbench.model.fusion import Fusion, sine_position
from vpworkbench.model.visual import VisualTokens
from vpworkbench.settings import FusionSettings

SETTINGS = FusionSettings(layers=3, width=48, heads=4, feed_forward=96, positions=64)


def test_text_alone_equals_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    fusion = Fusion(SETTINGS, vocabulary=50, vision_width=32, grid=3).eval()
    first = {
        name: value
        for name, value in bert.state_dict().items()
        if not name.startswith(("encoder.layer.3", "encoder.layer.4"))
    }
    fusion.bert.load_state_dict(first)
    words = torch.randint(5, 50, (2, 9))
    tokens = torch.ones(2, 9, dtype=torch.bool)
    tokens[1, 6:] = False
    with torch.no_grad():
        ours = fusion(words, tokens)
        theirs = bert(words, attention_mask=tokens.long(), output_hidden_states=True).hidden_states
    for layer in range(4):
        torch.testing.assert_close(ours[layer][tokens], theirs[layer][tokens], rtol=0, atol=1e-5)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    fusion = Fusion(SETTINGS, vocabulary=50, vision_width=32, grid=3).eval()
    words, vision = torch.randint(5, 50, (1, 6)), fusion.embed_vision(VisualTokens(torch.randn(1, 9, 32)))
    padded = torch.cat([words, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    tokens = torch.arange(10)[None] < 6
    with torch.no_grad():
        plain = fusion(words, torch.ones(1, 6, dtype=torch.bool), vision)[-1]
        longer = fusion(padded, tokens, vision)[-1]
    torch.testing.assert_close(longer[:, :6], plain[:, :6], rtol=0, atol=1e-5)
    torch.testing.assert_close(longer[:, 10:], plain[:, 6:], rtol=0, atol=1e-5)


def test_sine_position_is_detrs():
    grid, width = 5, 16
    code = sine_position(grid, width)
    for row in range(grid):
        for column in range(grid):
            for half, place in ((0, row), (1, column)):
                for channel in range(width // 2):
                    angle = (place + 1) / (grid + 1e-6) * 2 * math.pi / 10_000 ** (2 * (channel // 2) / (width // 2))
                    expected = math.cos(angle) if channel % 2 else math.sin(angle)
                    assert abs(code[row * grid + column, half * width // 2 + channel].item() - expected) < 1e-5


def test_position_is_added_behind_the_linear_layer_and_before_the_norm():
    fusion = Fusion(SETTINGS, vocabulary=50, vision_width=32, grid=3).eval()
    features = torch.randn(2, 9, 32)
    written = fusion.vision_norm(fusion.vision_in(features) + sine_position(3, 48))
    torch.testing.assert_close(fusion.embed_vision(VisualTokens(features)), written)


def test_masked_tokens_look_alike():
    """What a masked token held cannot be read from its embedding."""
    fusion = Fusion(SETTINGS, vocabulary=50, vision_width=32, grid=3).eval()
    masked = torch.zeros(1, 9, dtype=torch.bool)
    masked[0, 4] = True
    one, other = (fusion.embed_vision(VisualTokens(torch.randn(1, 9, 32)), masked) for _ in range(2))
    torch.testing.assert_close(one[0, 4], other[0, 4])
    assert not torch.allclose(one[0, 3], other[0, 3])
