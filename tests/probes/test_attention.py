"""Attention calls: a handler reads them, and may change them."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from vpworkbench.probes.attention import AttentionCall, intercept_attention
from vpworkbench.probes.layers import visit_attention_maps

TINY = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    initializer_range=0.6,
    attn_implementation="sdpa",
)
WORDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["bidirectional", "causal"])
def model(request):
    torch.manual_seed(0)
    if request.param == "causal":
        return LlamaModel(LlamaConfig(**TINY, num_key_value_heads=2)).eval()
    return BertModel(BertConfig(**TINY)).eval()


def calls_of(model, **inputs) -> list[AttentionCall]:
    calls = []

    def keep(call):
        calls.append(call)
        return call.output()

    with intercept_attention(model, keep):
        model(input_ids=WORDS, **inputs)
    return calls


def test_a_handler_that_changes_the_mask_changes_the_model():
    """Keys that a handler blocks are those that the model's own padding mask blocks."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).eval()
    allowed = torch.ones(2, 9, dtype=torch.bool)
    allowed[:, 3:5] = False
    with intercept_attention(model, lambda call: replace(call, mask=allowed[:, None, None]).output()):
        blocked = model(input_ids=WORDS).last_hidden_state
    expected = model(input_ids=WORDS, attention_mask=allowed.long()).last_hidden_state
    torch.testing.assert_close(blocked, expected)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bool of each head", "bias of each head"])
def test_blocked_pairs_have_no_weight(kind):
    """Also where a layer adds a bias, or allows each head other keys; a query that loses all its keys reads nothing."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64)
    open_pairs = torch.rand(2, 4 if "head" in kind else 1, 9, 9, generator=generator) < 0.7
    open_pairs |= torch.eye(9, dtype=torch.bool)
    bias = torch.randn(2, 4, 9, 9, generator=generator, dtype=torch.float64)
    mask, scores = None, query @ key.transpose(2, 3) / 8**0.5
    if kind == "causal":
        scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    elif kind != "none":
        mask = open_pairs
        if "bias" in kind:
            mask, scores = bias.masked_fill(~open_pairs, torch.finfo(torch.float64).min), scores + bias
        scores = scores.masked_fill(~open_pairs, -torch.inf)
    call = AttentionCall(torch.nn.Identity(), "layer", query, key, value, mask, 8**-0.5, kind == "causal")
    assert call.allowed().expand(2, 4, -1, -1).equal(scores > -torch.inf)
    blocked = torch.rand(2, 9, 9, generator=generator) < 0.5
    blocked[0, 4] = True
    weights = scores.masked_fill(blocked[:, None], -torch.inf).softmax(dim=-1).nan_to_num()
    expected = (weights @ value).transpose(1, 2)
    assert (expected[0, 4] == 0).all() and (call.output_without(blocked)[0, 4] == 0).all()
    torch.testing.assert_close(call.output_without(blocked), expected)


def test_output_and_columns_are_products_with_the_weights(model):
    columns = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(2))
    for call in calls_of(model):
        weights = call.weights()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 9))
        output, carried = call.output_and_columns(columns)
        torch.testing.assert_close(output, call.output())
        torch.testing.assert_close(carried, torch.einsum("ehqk,ekc->eqhc", weights, columns))
        picked = torch.tensor([[0, 5], [8, 2]])
        expected = torch.stack([weights[0][:, picked[0]], weights[1][:, picked[1]]])
        torch.testing.assert_close(call.weights(picked), expected)
        parts = list(call.mean_weights())
        assert torch.cat([some for some, _ in parts]).tolist() == list(range(9))
        torch.testing.assert_close(torch.cat([part for _, part in parts], dim=1), weights.mean(dim=1))


def test_uniform_attention_averages_over_the_keys_that_the_mask_allows(model):
    columns = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(2))
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, :2] = 0
    for inputs in ({}, {"attention_mask": real}):
        for call in calls_of(model, **inputs):
            allowed = (call.weights() > 0).float()[:, 0]  # example query key
            expected = allowed / allowed.sum(dim=-1, keepdim=True) @ columns
            rows = real.bool() if inputs else torch.ones(2, 9, dtype=torch.bool)
            torch.testing.assert_close(call.uniform_attention(columns)[rows], expected[rows])


def test_calls_know_who_may_attend_to_whom(model):
    causal = isinstance(model, LlamaModel)
    first, last = torch.arange(9).expand(2, -1) == 0, torch.arange(9).expand(2, -1) == 8
    real = torch.ones(2, 9, dtype=torch.long)
    real[:, 0] = 0
    for call in calls_of(model):
        assert call.reading.keys_of(last)[:, 0].all() and call.reading.keys_of(first)[:, 8].all() == (not causal)
    for call in calls_of(model, attention_mask=real):
        assert not call.reading.keys_of(last)[:, 0].any()


def test_maps_are_the_models_own(model):
    maps = []
    visit_attention_maps(model, {"input_ids": WORDS}, (2, 9), maps.append)
    model.set_attn_implementation("eager")
    expected = model(input_ids=WORDS, output_attentions=True).attentions
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_probes_are_imported_without_transformers():
    code = "import sys, vpworkbench.probes; print({'transformers', 'timm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120).strip() == "set()"
