"""Live flow against all paths through explicit attention maps, and against what noise on a state changes."""

from itertools import combinations_with_replacement

import pytest
import torch
from probes.test_layouts import eager_layers
from probes.tiny_models import FAMILIES
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from vpworkbench.probes import inter_modality_flow, modality_masks

TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
KINDS = {"bidirectional": lambda: BertModel(BertConfig(**TINY)), "causal": lambda: LlamaModel(LlamaConfig(**TINY))}


def has_path(layers, readout, token, after):
    """Whether the state of `token` after a layer reaches a read-out token by some path of attention or residuals."""
    if after == len(layers) - 1:
        return bool(readout[token])
    readers = layers[after + 1][:, token].nonzero().flatten().tolist()
    return any(has_path(layers, readout, reader, after + 1) for reader in readers)


def brute_force(layers, vision, language, readout, start, stop):
    """Eq. 2-6 in float64, with the rows that no path leads on from left out of what crosses."""
    product = torch.eye(len(vision), dtype=torch.float64)
    for layer in layers[start : stop + 1]:
        product = layer @ product
    crossing = live = total = 0.0
    for query in (vision | language).nonzero().flatten().tolist():
        other = language if vision[query] else vision
        crossing += product[query][other].sum()
        live += product[query][other].sum() * has_path(layers, readout, query, stop)
        total += product[query][vision | language].sum()
    return live / total, crossing / total


@pytest.mark.parametrize("name", ["visual_bert", "llava", "gemma3", "paligemma", "lxmert", "bridgetower"])
def test_live_flow_equals_brute_force_over_paths(name):
    """With padding; words and visual tokens as read-outs; causal, windowed and bidirectional masks, and two streams."""
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.model.eval()
    masks = modality_masks(family.model, family.inputs)
    vision, language = masks.vision & masks.tokens, masks.tokens & ~masks.vision
    flow = inter_modality_flow(family.model, family.inputs, masks.vision, masks.tokens)
    every = eager_layers(family)
    readout = torch.zeros_like(masks.tokens)
    for example in range(2):
        words, patches = language[example].nonzero().flatten(), vision[example].nonzero().flatten()
        readout[example, words[2 if example else 0]] = True
        readout[example, patches[1]] = example == 1
    live = flow.live(readout)
    for start, stop in combinations_with_replacement(range(len(every)), 2):
        for example in range(2):
            layers = [layer[example] for layer in every]
            sets = vision[example], language[example], readout[example]
            expected, crossing = brute_force(layers, *sets, start, stop)
            assert abs(live[example, start, stop] - expected) <= 1e-6
            dead = flow.flow[example, start, stop] - live[example, start, stop]
            assert abs(dead - (crossing - expected)) <= 1e-6
    assert live[:, 0, -1].isfinite().all() and live[:, *torch.tril_indices(*live.shape[1:], -1)].isnan().all()


def batch():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 50, (2, 13), generator=generator)
    tokens = torch.ones(2, 13, dtype=torch.bool)
    tokens[1, 10:] = False
    vision = (torch.arange(13) >= 3) & (torch.arange(13) < 8)
    return {"input_ids": words, "attention_mask": tokens.long()}, vision.expand(2, -1).clone(), tokens


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def test_noise_on_a_state_reaches_the_readout_exactly_where_it_is_live(model):
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(model, inputs, vision, tokens)
    live = flow.live(torch.arange(13).expand(2, -1) == 6)
    many = {name: value.repeat_interleave(13, dim=0) for name, value in inputs.items()}  # (example token) token
    noise = torch.eye(13).repeat(2, 1)[..., None]
    plain = model(**many).last_hidden_state[:, 6]
    for layer, block in enumerate(model.encoder.layer if isinstance(model, BertModel) else model.layers):
        handle = block.register_forward_hook(lambda module, args, state: state + noise)
        changed = (model(**many).last_hidden_state[:, 6] != plain).any(dim=-1).view(2, 13)
        handle.remove()
        expected = (flow.by_query[:, 0, layer] * changed).sum(dim=-1)
        torch.testing.assert_close(live[:, 0, layer], expected, rtol=0, atol=1e-6)
        assert changed.any() and not changed.all()


def test_all_tokens_read_all_flow_and_one_token_reads_its_own_row(model):
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(model, inputs, vision, tokens)
    torch.testing.assert_close(flow.live(tokens), flow.flow, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(flow.by_query.sum(dim=-1), flow.flow, rtol=0, atol=1e-6, equal_nan=True)
    assert (flow.by_query[1, ..., 10:].nan_to_num() == 0).all()
    first = torch.arange(13).expand(2, -1) == 0
    torch.testing.assert_close(flow.live(first)[:, :, -1], flow.by_query[:, :, -1, 0])
    assert (flow.live(first) <= flow.flow + 1e-6)[flow.flow.isfinite()].all()


def test_masks_are_kept_by_reference_and_chosen_starts_stay_nan(model):
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(model, inputs, vision, tokens, starts=[0])
    masks = [reading.mask for layer in flow.readings for _, reading in layer]
    assert len({mask.data_ptr() for mask in masks}) == 1
    assert flow.live(tokens)[:, 1, 2].isnan().all() and flow.live(tokens)[:, 0, 2].isfinite().all()
    unpadded = inter_modality_flow(model, {"input_ids": inputs["input_ids"]}, vision, torch.ones_like(tokens))
    assert all(reading.mask is None for layer in unpadded.readings for _, reading in layer)


def test_refusals(model):
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(model, inputs, vision, tokens)
    for bad in (tokens[:, :9], tokens.long(), tokens & (torch.arange(2) > 0)[:, None], tokens[0]):
        with pytest.raises(ValueError, match=r"readout_tokens must be bool \(2, 13\), .* with at least"):
            flow.live(bad)
