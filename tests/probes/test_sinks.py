"""Sinks by the definition on explicit attention maps; planted ones are found, and none under uniform attention."""

import pytest
import torch
from probes.tiny_models import FAMILIES
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from vpworkbench.probes import find_sinks, inter_modality_flow, modality_masks
from vpworkbench.probes.layers import visit_attention_maps

LENGTH = 24
TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
KINDS = {"bidirectional": lambda: BertModel(BertConfig(**TINY)), "causal": lambda: LlamaModel(LlamaConfig(**TINY))}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def batch():
    """A word, 14 visual tokens, words; the second example is padded."""
    words = torch.randint(1, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = torch.ones(2, LENGTH, dtype=torch.bool)
    tokens[1, 20:] = False
    vision = (torch.arange(LENGTH) >= 1) & (torch.arange(LENGTH) < 15)
    return {"input_ids": words, "attention_mask": tokens.long()}, vision.expand(2, -1).clone(), tokens


def projections(model):
    if isinstance(model, BertModel):
        return [(layer.attention.self.query, layer.attention.self.key) for layer in model.encoder.layer]
    return [(layer.self_attn.q_proj, layer.self_attn.k_proj) for layer in model.layers]


def plant(model, token, layers=(0, 1, 2), strength=6.0):
    """Each head's keys at `token` get a large share in a direction that every query has."""
    for number in layers:
        query, key = projections(model)[number]
        query.register_forward_hook(lambda module, args, output: output + strength)

        def raised(module, args, output):
            output = output.clone()
            output[:, token] += strength
            return output

        key.register_forward_hook(raised)


def naive(weights, vision, language, times):
    """The definition for one example and layer; weights (query, key), averaged over heads, 0 where masked."""
    tokens = vision | language
    share = weights * (weights > 0).sum(dim=-1, keepdim=True)
    found = torch.zeros_like(tokens)
    for key in tokens.nonzero().flatten().tolist():
        votes = []
        for kind in (vision, language):
            queries = [query for query in kind.nonzero().flatten().tolist() if query != key]
            able = [query for query in queries if weights[query, key] > 0]
            if able and len(able) >= len(queries) / 2:
                votes.append(sum(bool(share[query, key] >= times) for query in able) > len(able) / 2)
        found[key] = bool(votes) and all(votes)
    return found


@pytest.mark.parametrize("times", [1.2, 2.0])
def test_sinks_equal_the_definition_on_explicit_maps(model, times):
    inputs, vision, tokens = batch()
    plant(model, 3, strength=1.0)
    found = find_sinks(model, inputs, vision, tokens, times=times)
    maps = []
    visit_attention_maps(model, inputs, (2, LENGTH), maps.append)
    for layer, weights in enumerate(maps):
        for example in range(2):
            sets = vision[example] & tokens[example], tokens[example] & ~vision[example]
            assert found.by_layer[example, layer].equal(naive(weights[example].mean(dim=0), *sets, times))
            others = tokens[example] & (weights[example, 0, :, 3] > 0) & (torch.arange(LENGTH) != 3)
            rows = weights[example].mean(dim=0)
            received = (rows[:, 3] * (rows > 0).sum(dim=-1))[others].mean()
            torch.testing.assert_close(found.received[example, layer, 3], received)
    assert found.by_layer.any() and not found.by_layer.all() and len(found.layers) == 3


@pytest.mark.parametrize("token", [0, 4])
def test_a_planted_sink_is_found_and_flow_is_measured_without_it(model, token):
    inputs, vision, tokens = batch()
    plant(model, token)
    found = find_sinks(model, inputs, vision, tokens)
    assert found.tokens.nonzero().tolist() == [[0, token], [1, token]]
    assert found.counts == {"vision": float(token == 4), "language": float(token == 0)}
    rest = found.without
    assert (rest.vision | rest.language).equal(tokens & (torch.arange(LENGTH) != token))
    assert not (rest.vision & ~vision).any() and not (rest.language & vision).any()
    whole = inter_modality_flow(model, inputs, vision, tokens)
    without = inter_modality_flow(model, inputs, rest.vision, rest.tokens, language=rest.language)
    crossing = "text_to_vision" if token == 4 else "vision_to_text"  # all queries of the other modality read the sink
    assert (getattr(without, crossing) < getattr(whole, crossing))[:, 0].all()


def test_a_late_token_of_a_causal_decoder_has_too_few_queries(model):
    inputs, vision, tokens = batch()
    plant(model, 21)
    found = find_sinks(model, inputs, vision, tokens)
    assert (found.received[0, :, 21] > 5).all()
    assert found.tokens[0, 21] == isinstance(model, BertModel)


def test_a_sink_of_few_layers_is_one_there_only(model):
    inputs, vision, tokens = batch()
    plant(model, 4, layers=[1])
    found = find_sinks(model, inputs, vision, tokens)
    assert found.by_layer.any(dim=-1).tolist() == [[False, True, False]] * 2 and not found.tokens.any()


def test_uniform_attention_has_no_sinks(model):
    for query, _ in projections(model):
        nn.init.zeros_(query.weight)
    inputs, vision, tokens = batch()
    found = find_sinks(model, inputs, vision, tokens, times=1.01)
    assert not found.by_layer.any()
    received = found.received[~found.received.isnan()]
    torch.testing.assert_close(received, torch.ones_like(received))
    # nobody attends to padding, and in a causal decoder nobody else to the last token
    assert found.received.isnan().sum() == 3 * (4 + 2 * isinstance(model, LlamaModel))


def test_what_only_the_words_read_is_no_sink():
    """A visual token that all words read, and no visual token: it is what the words ask for."""
    torch.manual_seed(0)
    model = KINDS["bidirectional"]().eval()
    inputs, vision, tokens = batch()
    plant(model, 4, layers=[0])
    query, _ = projections(model)[0]
    query.register_forward_hook(lambda module, args, output: output - 6.0 * vision[..., None])
    found = find_sinks(model, inputs, vision, tokens)
    assert found.received[:, 0, 4].min() > 5 and not found.by_layer[:, 0, 4].any()


@pytest.mark.parametrize("name", ["lxmert", "bridgetower", "gemma3"])
def test_every_kind_of_sequence_is_searched(name):
    torch.manual_seed(0)
    family = FAMILIES[name]()
    masks = modality_masks(family.model.eval(), family.inputs)
    found = find_sinks(family.model, family.inputs, masks.vision, masks.tokens, times=1.5)
    flow = inter_modality_flow(family.model, family.inputs, masks.vision, masks.tokens)
    assert found.layers == flow.layers and found.by_layer.shape == (2, len(flow.layers), masks.tokens.shape[1])
    assert not (found.by_layer & ~masks.tokens[:, None]).any()


def test_refusals(model):
    inputs, vision, tokens = batch()
    with pytest.raises(ValueError, match="times=1: uniform attention gives"):
        find_sinks(model, inputs, vision, tokens, times=1)
    with pytest.raises(ValueError, match=r"examples \[0, 1\] have no visual token"):
        find_sinks(model, inputs, vision & False, tokens)
    with pytest.raises(ValueError, match="other lengths"):
        find_sinks(model, inputs, vision[:, :9], tokens[:, :9])
