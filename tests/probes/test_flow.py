"""Inter-Modality Flow against the printed formula on the models' own eager attention maps."""

from itertools import combinations_with_replacement

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)
from transformers.models.bert.modeling_bert import BertEncoder

from vpworkbench.probes import check, crossing_share, flow_from_attention, hidden_states, inter_modality_flow
from vpworkbench.probes.attention import intercept_attention
from vpworkbench.probes.model_parts import attention_configs

LAYERS, HEADS, LENGTH = 3, 4, 13
TINY = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=48,
    initializer_range=0.6,  # peaked attention: near-uniform maps would hide mistakes
    attn_implementation="sdpa",
)
DECODER = dict(TINY, num_key_value_heads=2, head_dim=8)
FAMILIES = {
    "bidirectional": lambda: BertModel(BertConfig(**TINY)),
    "causal, grouped queries": lambda: LlamaModel(LlamaConfig(**DECODER)),
    "sliding window": lambda: MistralModel(MistralConfig(**DECODER, sliding_window=4)),
}


def naive_flow(attention, vision, language, start, stop):
    """Eq. 2-6 as printed, in float64: build the product, add up the entries that cross."""
    product = identity = torch.eye(len(vision), dtype=torch.float64)
    for layer in attention[start : stop + 1].double():
        product = 0.5 * (identity + layer.mean(0)) @ product
    to_vision = product[language][:, vision].sum()
    to_language = product[vision][:, language].sum()
    intra = product[vision][:, vision].sum() + product[language][:, language].sum()
    total = to_vision + to_language + intra
    return to_vision / total, to_language / total


def eager_attention(model, inputs):
    """The model's own maps, (layer, example, head, query, key)."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(attention)


def batch(padding="right"):
    """Three examples; the middle one is not padded."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 50, (3, LENGTH), generator=generator)
    tokens = torch.ones(3, LENGTH, dtype=torch.bool)
    if padding == "right":
        tokens[0, 11:], tokens[2, 9:] = False, False
    elif padding == "left":
        tokens[0, :1], tokens[2, :2] = False, False
    vision = (torch.arange(LENGTH) >= 3) & (torch.arange(LENGTH) < 8)
    inputs = {"input_ids": words, "attention_mask": tokens.long()}
    return inputs, vision.expand(3, -1).clone(), tokens


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**TINY)).eval()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("special", [False, True])
def test_flow_equals_the_printed_formula_on_eager_maps(model, padding, special):
    inputs, vision, tokens = batch(padding)
    language = tokens & ~vision
    if special:
        language[:, 2] = False  # attended, but in neither set
    given = {"language": language} if special else {}
    flow = inter_modality_flow(model, inputs, vision, tokens, **given)
    attention = eager_attention(model, inputs)
    for start, stop in combinations_with_replacement(range(LAYERS), 2):
        for example in range(3):
            there, back = naive_flow(
                attention[:, example], vision[example] & tokens[example], language[example], start, stop
            )
            where = example, start, stop
            assert abs(flow.text_to_vision[where] - there) <= 1e-5
            assert abs(flow.vision_to_text[where] - back) <= 1e-5
            assert abs(flow.flow[where] - there - back) <= 1e-5
    assert flow.flow[:, *torch.tril_indices(LAYERS, LAYERS, -1)].isnan().all()
    assert (flow.from_input == flow.flow[:, 0]).all()
    torch.testing.assert_close(flow.per_head.mean(-1), flow.within_layer)
    assert len(flow.layers) == LAYERS


def test_the_null_is_the_flow_of_uniform_attention_under_the_same_mask(model):
    inputs, vision, tokens = batch("left")
    flow = inter_modality_flow(model, inputs, vision, tokens)
    attention = eager_attention(model, inputs)
    allowed = (attention > 0).double()
    uniform = allowed / allowed.sum(-1, keepdim=True)
    for example in range(3):
        sets = vision[example] & tokens[example], tokens[example] & ~vision[example]
        for start, stop in combinations_with_replacement(range(LAYERS), 2):
            expected = sum(naive_flow(uniform[:, example], *sets, start, stop))
            assert abs(flow.null[example, start, stop] - expected) <= 1e-5
    torch.testing.assert_close(flow.excess, flow.flow / flow.null, equal_nan=True)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_rows_and_columns_equal_eager_attention(model, padding):
    inputs, vision, tokens = batch(padding)
    picked = torch.tensor([[3, 8], [0, 12], [5, 4]])
    flow = inter_modality_flow(model, inputs, vision, tokens, rows=picked, columns=picked)
    attention = eager_attention(model, inputs).transpose(0, 1)  # example layer head query key
    for example in range(3):
        real = tokens[example]
        maps = attention[example]
        rows = maps[:, :, picked[example]]
        columns = maps[..., picked[example]].transpose(-1, -2)
        torch.testing.assert_close(flow.rows[example], rows, atol=2e-5, rtol=0)
        torch.testing.assert_close(flow.columns[example][..., real], columns[..., real], atol=2e-5, rtol=0)
        product = torch.eye(LENGTH)
        for layer in range(LAYERS):
            product = 0.5 * (torch.eye(LENGTH) + maps[layer].mean(0)) @ product
            rolled = flow.rows_from_input[example, layer]
            torch.testing.assert_close(rolled, product[picked[example]], atol=2e-5, rtol=0)
            rolled = flow.columns_from_input[example, layer][:, real]
            expected = product[real][:, picked[example]].T
            torch.testing.assert_close(rolled, expected, atol=2e-5, rtol=0)


def test_chosen_starts_keep_the_input_and_every_single_layer(model):
    inputs, vision, tokens = batch()
    whole = inter_modality_flow(model, inputs, vision, tokens)
    part = inter_modality_flow(model, inputs, vision, tokens, starts=[0])
    torch.testing.assert_close(part.from_input, whole.from_input)
    torch.testing.assert_close(part.within_layer, whole.within_layer)
    torch.testing.assert_close(part.null[:, 0], whole.null[:, 0])
    assert part.flow[:, 1, 2].isnan().all()


def test_an_example_depends_neither_on_batch_mates_nor_on_padding(bert):
    inputs, vision, tokens = batch()
    together = inter_modality_flow(bert, inputs, vision, tokens)
    alone = {key: value[2:, :9] for key, value in inputs.items()}
    alone = inter_modality_flow(bert, alone, vision[2:, :9], tokens[2:, :9])
    torch.testing.assert_close(together.flow[2:], alone.flow, equal_nan=True)
    torch.testing.assert_close(together.null[2:], alone.null, equal_nan=True)


def test_padding_that_is_attended_counts_in_neither_set(bert):
    inputs, vision, tokens = batch()
    inputs.pop("attention_mask")
    flow = inter_modality_flow(bert, inputs, vision, tokens)
    attention = eager_attention(bert, inputs)
    for example in range(3):
        sets = vision[example] & tokens[example], tokens[example] & ~vision[example]
        expected = sum(naive_flow(attention[:, example], *sets, 0, 2))
        assert abs(flow.from_input[example, 2] - expected) <= 1e-5


def test_padding_that_only_a_later_layer_attends_to_is_refused(bert):
    """1 - 1_L is then no longer 1_V; the sets that are carried were chosen by the first layer."""
    inputs, vision, tokens = batch()
    bert.encoder.layer[1].register_forward_pre_hook(lambda _, given: (given[0], None, *given[2:]))
    for options in ({}, {"starts": [0]}):
        refuses(bert, inputs, vision, tokens, "attends to padding or to a sink, and layers before it do not", **options)


def test_half_precision_stays_near_the_formula():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**TINY)).eval().to(torch.bfloat16)
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(bert, inputs, vision, tokens)
    attention = eager_attention(bert, inputs)
    for start, stop in combinations_with_replacement(range(LAYERS), 2):
        expected = sum(naive_flow(attention[:, 1], vision[1], ~vision[1], start, stop))
        assert abs(flow.flow[1, start, stop] - expected) <= 5e-3


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_long_sequences_stay_as_near(dtype, error):
    """1,024 tokens, against the formula in float64 on the model's own eager maps."""
    torch.manual_seed(0)
    length = 1024
    bert = BertModel(BertConfig(**{**TINY, "max_position_embeddings": length})).eval().to(dtype)
    words = torch.randint(1, 50, (1, length))
    tokens = torch.ones(1, length, dtype=torch.bool)
    tokens[:, 900:] = False
    vision = torch.arange(length)[None] > 100
    inputs = {"input_ids": words, "attention_mask": tokens.long()}
    flow = inter_modality_flow(bert, inputs, vision, tokens)
    attention = eager_attention(bert, inputs)
    for start, stop in combinations_with_replacement(range(LAYERS), 2):
        expected = sum(naive_flow(attention[:, 0], vision[0] & tokens[0], tokens[0] & ~vision[0], start, stop))
        assert abs(flow.flow[0, start, stop] - expected) <= error


# --- closed forms and the definition -------------------------------------------------------------


@pytest.mark.parametrize("words, patches", [(1, 1), (5, 9), (20, 4)])
def test_flow_from_attention_equals_the_printed_formula(words, patches):
    generator = torch.Generator().manual_seed(0)
    size = words + patches
    attention = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).softmax(-1)
    vision = torch.arange(size) >= words
    flow = flow_from_attention(attention, vision)
    for start, stop in combinations_with_replacement(range(4), 2):
        torch.testing.assert_close(flow[start, stop], sum(naive_flow(attention, vision, ~vision, start, stop)))


def test_uniform_attention_has_closed_forms():
    words, patches = 4, 9
    size = words + patches
    attention = torch.full((3, 2, size, size), 1 / size, dtype=torch.float64)
    flow = flow_from_attention(attention, torch.arange(size) >= words)
    for start, stop in combinations_with_replacement(range(3), 2):
        # after k layers 2^-k of a token's attention is still on itself
        expected = (1 - 0.5 ** (stop - start + 1)) * 2 * words * patches / size**2
        assert abs(flow[start, stop] - expected) < 1e-12
    assert abs(flow[0, 0] - words * patches / size**2) < 1e-12


def test_the_share_that_crosses_any_matrix_is_the_flow_of_its_layer():
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(1, 2, 6, 6, generator=generator, dtype=torch.float64).softmax(-1)
    vision = torch.arange(6) < 2
    layer = (torch.eye(6) + attention[0].mean(0)) / 2
    torch.testing.assert_close(crossing_share(layer, vision), flow_from_attention(attention, vision)[0, 0])
    layer[4:] = torch.nan  # rows that are unknown
    known = layer[:4]
    expected = (known[:2, 2:].sum() + known[2:, :2].sum()) / known.sum()
    torch.testing.assert_close(crossing_share(layer, vision), expected)


def test_a_model_with_zero_queries_flows_as_its_null(bert):
    for name, weight in bert.named_parameters():
        if ".query." in name:
            nn.init.zeros_(weight)
    inputs, vision, tokens = batch("none")
    flow = inter_modality_flow(bert, inputs, vision, tokens)
    torch.testing.assert_close(flow.flow, flow.null, equal_nan=True)
    within = torch.full((3, LAYERS), 5 * (LENGTH - 5) / LENGTH**2)
    torch.testing.assert_close(flow.within_layer, within)
    torch.testing.assert_close(flow.excess[:, 0], torch.ones(3, LAYERS))


# --- what the pass leaves alone ------------------------------------------------------------------


class Fusion(nn.Module):
    """Our model's shape: a bare encoder, embeddings outside, an additive 4-D padding mask."""

    def __init__(self, vision_layers: int = 0):
        super().__init__()
        self.config = BertConfig(**TINY)
        self.encoder = BertEncoder(self.config)
        self.tower = BertEncoder(BertConfig(**{**TINY, "num_hidden_layers": vision_layers}))

    def forward(self, hidden, tokens):
        mask = torch.zeros(len(hidden), 1, 1, hidden.shape[1])
        mask = mask.masked_fill(~tokens[:, None, None], torch.finfo(torch.float32).min)
        if len(self.tower.layer):
            hidden = self.tower(hidden, attention_mask=mask).last_hidden_state
        return self.encoder(hidden, attention_mask=mask).last_hidden_state


def fusion_batch():
    _, vision, tokens = batch()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, LENGTH, 32, generator=generator)
    return {"hidden": hidden, "tokens": tokens}, vision, tokens


def test_check_holds_a_bare_encoder_to_the_formula(capsys):
    torch.manual_seed(0)
    model = Fusion().eval()
    inputs, vision, tokens = fusion_batch()
    result = check(model, inputs, vision, tokens, examples=3)
    assert result.outputs <= 1e-4 and result.flow <= 1e-5
    assert (result.layers, result.tokens, result.examples) == (LAYERS, LENGTH, 3)
    assert "plain forward" in capsys.readouterr().out


def test_towers_of_the_same_length_are_told_apart_by_name():
    torch.manual_seed(0)
    model = Fusion(vision_layers=2).eval()
    inputs, vision, tokens = fusion_batch()
    with pytest.raises(ValueError, match="2 stacks .* name those"):
        inter_modality_flow(model, inputs, vision, tokens)
    flow = inter_modality_flow(model, inputs, vision, tokens, layers="encoder")
    assert flow.layers[0].startswith("encoder.layer.0") and len(flow.layers) == LAYERS
    by_rule = inter_modality_flow(model, inputs, vision, tokens, layers=lambda name: "tower" not in name)
    torch.testing.assert_close(flow.flow, by_rule.flow, equal_nan=True)


def test_hidden_states_of_ours_and_of_transformers(bert):
    torch.manual_seed(0)
    model = Fusion().eval()
    inputs, vision, tokens = fusion_batch()
    states = hidden_states(model, inputs)
    assert len(states) == LAYERS + 1
    assert states[0].equal(inputs["hidden"])
    torch.testing.assert_close(states[-1], model(**inputs))
    inputs, *_ = batch()
    expected = bert(**inputs, output_hidden_states=True).hidden_states
    for one, other in zip(hidden_states(bert, inputs), expected, strict=True):
        torch.testing.assert_close(one, other)
    two = Fusion(vision_layers=1).eval()
    with pytest.raises(ValueError, match="2 stacks"):
        hidden_states(two, fusion_batch()[0])
    assert len(hidden_states(two, fusion_batch()[0], layers="tower")) == 2


def state_of(model):
    return (
        [dict(config.__dict__) for config in attention_configs(model)],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("setting", ["sdpa", "eager"])
def test_the_model_is_as_before_afterwards_also_after_an_exception(bert, setting):
    bert.set_attn_implementation(setting)
    inputs, vision, tokens = batch()
    before = state_of(bert)
    inter_modality_flow(bert, inputs, vision, tokens)
    assert state_of(bert) == before
    hidden_states(bert, inputs)
    assert state_of(bert) == before

    def fail(call):
        torch.rand(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), intercept_attention(bert, fail):
        assert bert.config._attn_implementation == setting
        bert(**inputs)
    assert state_of(bert) == before
    assert bert(**inputs).last_hidden_state.requires_grad


def test_a_model_in_training_mode_without_dropout_is_probed_and_stays_so():
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(**DECODER)).train()
    inputs, vision, tokens = batch()
    flow = inter_modality_flow(llama, inputs, vision, tokens).flow
    assert llama.training and llama.config.use_cache
    expected = inter_modality_flow(llama.eval(), inputs, vision, tokens).flow
    assert flow.nan_to_num().equal(expected.nan_to_num())


@pytest.mark.parametrize("padding", ["none", "right"])
def test_the_fused_kernel_stays_in_use(model, padding):
    inputs, vision, tokens = batch(padding)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # any other kernel would be an error
        flow = inter_modality_flow(model, inputs, vision, tokens, columns=[4])
    assert flow.flow[:, 0, -1].isfinite().all()


def test_memory_grows_with_tokens_not_with_their_square():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**{**TINY, "max_position_embeddings": 2048})).eval()
    length = 2048
    inputs = {"input_ids": torch.ones(1, length, dtype=torch.long)}
    tokens = torch.ones(1, length, dtype=torch.bool)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        inter_modality_flow(bert, inputs, torch.arange(length)[None] > 100, tokens)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < length**2 * 4  # not even one map of one head in float32


# --- refusals ------------------------------------------------------------------------------------


def refuses(model, inputs, vision, tokens, match, **options):
    with pytest.raises(ValueError, match=match):
        inter_modality_flow(model, inputs, vision, tokens, **options)


def test_refusals_of_tokens(bert):
    inputs, vision, tokens = batch()
    refuses(bert, inputs, vision[:, :9], tokens, "vision is .3, 9. and tokens is")
    refuses(bert, inputs, vision[:, :9], tokens[:, :9], "9 tokens .* other lengths: .*13 queries")
    refuses(bert, inputs, vision.long(), tokens, "must be bool")
    refuses(bert, inputs, torch.zeros_like(vision), tokens, r"examples \[0, 1, 2\] have no visual")
    refuses(bert, inputs, torch.ones_like(vision), tokens, "have no language")
    refuses(bert, inputs, vision, tokens, "overlap", language=vision)
    tokens[1] = False
    refuses(bert, inputs, vision, tokens, r"examples \[1\] have no visual")
    with pytest.raises(ValueError, match="over the 4 tokens"):
        flow_from_attention(torch.ones(1, 1, 3, 3), torch.tensor([True, False, True, False]))


def test_refusals_of_settings(bert):
    inputs, vision, tokens = batch()
    refuses(bert, {**inputs, "output_attentions": True}, vision, tokens, "output_attentions")
    refuses(bert, inputs, vision, tokens, "positions from 0 to 12", rows=[13])
    refuses(bert, inputs, vision, tokens, "token positions from 0 to 12, .*2, 1", columns=torch.zeros(2, 1).long())
    refuses(bert, inputs, vision, tokens, "token positions from 0 to 12, .*bool", rows=vision)
    refuses(bert, inputs, vision, tokens, "layers='decoder'", layers="decoder")
    bert.train()
    refuses(bert, inputs, vision, tokens, r"dropout is left on in embeddings.dropout .*eval\(\)")
    llama = LlamaModel(LlamaConfig(**DECODER, attention_dropout=0.1)).train()
    refuses(llama, inputs, vision, tokens, "dropout is left on in layers.0.self_attn")


def test_refusals_of_models(bert):
    inputs, vision, tokens = batch()
    gemma = Gemma2Model(Gemma2Config(**{**DECODER, "attn_implementation": "eager"})).eval()
    refuses(gemma, inputs, vision, tokens, "caps its scores")
    refuses(nn.Linear(2, 2), inputs, vision, tokens, "no transformers config")
    llama = LlamaModel(LlamaConfig(**DECODER)).eval()
    window = torch.eye(LENGTH, dtype=torch.bool).expand(3, 1, -1, -1)
    refuses(llama, {**inputs, "attention_mask": window}, vision, tokens, "never lets one modality")
    nn.init.constant_(bert.encoder.layer[1].attention.self.key.bias, torch.nan)
    refuses(bert, inputs, vision, tokens, "nan in encoder.layer.1.attention")
