"""Models and habits of users on which a probe once answered wrongly, or ended in an error that said nothing."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from probes.any_model import build
from probes.tiny_models import (
    ENCODER,
    IMAGE,
    TEXT,
    VIT,
    flava,
    grid_boxes,
    llava,
    lxmert,
    padded,
    pixels,
    vilt,
    visual_bert,
    words,
)
from torch import nn

from vpworkbench.probes import check, inter_modality_flow, modality_masks
from vpworkbench.probes.attention import AttentionCall
from vpworkbench.probes.exactness import _difference, _real


@pytest.fixture
def family():
    torch.manual_seed(0)
    built = llava()
    built.model.eval()
    return built


def probed(model, inputs, **options):
    masks = modality_masks(model, inputs)
    return inter_modality_flow(model, inputs, masks.vision, masks.tokens, **options)


# --- models that were answered wrongly ---------------------------------------------------------


def test_an_image_in_the_keys_of_a_cross_attention_is_refused():
    """Llama 3.2 Vision: its prompt holds one placeholder, which is not the image."""
    model, inputs = build("mllama")
    with pytest.raises(ValueError, match=r"cross_attn attends from the 12 tokens .* only keys of a cross attention"):
        probed(model, inputs)


def test_a_vision_tower_with_as_many_tokens_is_left_out(family):
    ids = torch.full((2, 10), IMAGE)  # a word and 9 image tokens; the tower has 9 patches and a class token
    ids[:, 0] = 70
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": family.inputs["pixel_values"]}
    masks = modality_masks(family.model, inputs)
    chosen, named = (
        inter_modality_flow(family.model, inputs, masks.vision, masks.tokens, layers=layers)
        for layers in (None, "model.language_model")
    )
    assert chosen.layers == named.layers and torch.equal(chosen.flow.nan_to_num(), named.flow.nan_to_num())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": torch.full((10,), 70)}, "give a batch"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is \(2, 9\), but input_ids are \(2, 15\)"),
        ({"pixel_values": torch.empty(2, 3, 24, 24, device="meta")}, r"inputs.to\(model.device\)"),
    ],
)
def test_inputs_that_do_not_fit(family, changed, message):
    masks, inputs = modality_masks(family.model, family.inputs), {**family.inputs, **changed}
    with pytest.raises(ValueError, match=message):
        modality_masks(family.model, inputs)
        check(family.model, inputs, masks.vision, masks.tokens)
    with pytest.raises(TypeError, match="inputs is a list"):
        check(family.model, [inputs], masks.vision, masks.tokens)


def test_two_passes_of_one_encoder_are_not_chained():
    """ViLT for NLVR2 runs its encoder once for each image; the model inside is probed as usual."""
    torch.manual_seed(0)
    config = hf.ViltConfig(
        **ENCODER, image_size=24, patch_size=8, max_image_length=-1, modality_type_vocab_size=3, num_images=2
    )
    model = hf.ViltForImagesAndTextClassification(config).eval()
    inputs = words() | {"pixel_values": pixels(2, 2, 3, 24, 24)}
    vision = torch.arange(17)[None].expand(2, -1) > 6
    with pytest.raises(ValueError, match="several passes in one forward.*'vilt'"):
        inter_modality_flow(model, inputs, vision, torch.ones_like(vision))
    one = probed(model.vilt, words() | {"pixel_values": pixels(2, 3, 24, 24)})
    assert len(one.layers) == 3


def test_layers_that_share_a_module_are_one_pass():
    """ALBERT runs one layer several times in a row."""
    torch.manual_seed(0)
    sizes = {key: ENCODER[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    model = hf.AlbertModel(hf.AlbertConfig(**sizes, embedding_size=8, num_hidden_layers=3)).eval()
    vision = torch.arange(7)[None].expand(2, -1) > 3
    assert len(inter_modality_flow(model, words(0), vision, torch.ones_like(vision)).layers) == 3


def test_layers_without_softmax_attention_are_named():
    model, inputs = build("qwen3_5")
    flow = probed(model, inputs)
    assert len(flow.layers) == 2 and len(flow.uncounted) == 2
    assert set(flow.uncounted) == {f"model.language_model.layers.{layer}" for layer in (0, 2)}
    assert "2 parts without softmax attention are not counted" in str(flow)


def test_image_tokens_without_pixels_are_refused(family):
    """The model would run: its embedding has a row for the placeholder."""
    words = {name: value for name, value in family.inputs.items() if not value.is_floating_point()}
    masks = modality_masks(family.model, family.inputs)
    with pytest.raises(ValueError, match=r"image tokens, but no pixels come with them"):
        inter_modality_flow(family.model, words, masks.vision, masks.tokens)


def test_audio_belongs_to_neither_modality(family):
    family.model.config.audio_token_id = 77
    ids = family.inputs["input_ids"].clone()
    ids[:, -2] = 77
    inputs = family.inputs | {"input_ids": ids}
    masks = modality_masks(family.model, inputs)
    assert masks.other.nonzero().tolist() == [[0, 13], [1, 13]] and not (masks.language & masks.other).any()
    by_default = probed(family.model, inputs)
    told = inter_modality_flow(family.model, inputs, masks.vision, masks.tokens, language=masks.language)
    as_language = masks.tokens & ~masks.vision
    counted = inter_modality_flow(family.model, inputs, masks.vision, masks.tokens, language=as_language)
    assert by_default.flow.nan_to_num().equal(told.flow.nan_to_num())
    assert not by_default.flow.nan_to_num().allclose(counted.flow.nan_to_num())


def test_images_of_several_sizes_in_one_call():
    """Pixtral's tower in the LLaVA class: the pixels are padded to the largest image."""
    torch.manual_seed(0)
    tower = dict(VIT, image_size=32)
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**tower),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, *[IMAGE] * 8, 6, 7], [0, 0, 0, 5, *[IMAGE] * 6, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels(2, 3, 32, 32),
        "image_sizes": torch.tensor([[16, 32], [24, 16]]),
    }
    masks = modality_masks(model, inputs)
    for example, grid in enumerate([(2, 4), (3, 2)]):
        torch.testing.assert_close(masks.boxes[example][masks.vision[example]], grid_boxes(*grid))
    assert check(model, inputs, masks.vision, masks.tokens, examples=2).flow <= 1e-5


def test_images_without_places_are_told_apart():
    model, inputs = build("idefics2")
    masks = modality_masks(model, inputs)
    assert [masks.image[row][masks.vision[row]].unique().item() for row in range(2)] == [0, 1]
    assert not masks.placed.any() and "learned queries" in masks.note


# --- habits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vilt, visual_bert, flava, lxmert])
def test_a_configuration_that_asks_for_attention_maps(make):
    torch.manual_seed(0)
    model, inputs, _ = make()
    model.eval()
    torch.manual_seed(1)
    expected = probed(model, inputs).flow
    for part in model.modules():
        if isinstance(getattr(part, "config", None), hf.PretrainedConfig):
            part.config.output_attentions = True
    torch.manual_seed(1)
    assert probed(model, inputs).flow.nan_to_num().equal(expected.nan_to_num())
    assert model.config.output_attentions


def test_wrapped_models_give_the_same_numbers(family):
    expected = probed(family.model, family.inputs).flow.nan_to_num()
    for wrapped in (nn.DataParallel(family.model), torch.compile(family.model)):
        assert probed(wrapped, family.inputs).flow.nan_to_num().equal(expected)
    for module in list(family.model.modules()):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert probed(family.model, family.inputs).flow.nan_to_num().equal(expected)


def test_weights_that_are_offloaded_and_layers_that_checkpoint(family):
    expected = probed(family.model, family.inputs).flow.nan_to_num()
    family.model.gradient_checkpointing_enable()
    assert probed(family.model.train(), family.inputs).flow.nan_to_num().equal(expected)
    cpu_offload(family.model.eval(), execution_device=torch.device("cpu"))
    assert next(family.model.parameters()).device.type == "meta"
    assert probed(family.model, family.inputs).flow.nan_to_num().equal(expected)


def test_a_model_in_bfloat16(family):
    expected = probed(family.model, family.inputs)
    masks = modality_masks(family.model, family.inputs)
    inputs = family.inputs | {"pixel_values": family.inputs["pixel_values"].bfloat16()}
    half = family.model.bfloat16()
    torch.testing.assert_close(probed(half, inputs).null, expected.null, equal_nan=True)
    assert check(half, inputs, masks.vision, masks.tokens, examples=2).flow <= 0.02


def test_hooks_of_accelerate_survive_where_forward_is_replaced():
    torch.manual_seed(0)
    model, inputs, _ = visual_bert()
    model.eval()
    layer = model.encoder.layer[0].attention.self
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    hooked = layer.forward
    probed(model, inputs)
    assert layer.forward is hooked


def test_soft_capped_scores_are_refused_in_one_line():
    """PaliGemma 2 has Gemma 2's text."""
    torch.manual_seed(0)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, projection_dim=32),
        text_config=hf.Gemma2Config(**TEXT, attn_logit_softcapping=50.0),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    ids, mask = padded(9)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 24, 24)}
    model = hf.PaliGemmaForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match=r"self_attn caps its scores \(softcap\).*flow_from_attention"):
        probed(model, inputs)


# --- check ---------------------------------------------------------------------------------------


def test_check_fails_where_the_forward_does_not_repeat_itself(family):
    masks = modality_masks(family.model, family.inputs)
    head = family.model.lm_head
    head.register_forward_hook(
        lambda module, args, output: output + torch.rand(()).item() + head.weight.data.add_(0.1).sum()
    )
    with pytest.raises(ValueError, match="outputs differ .* does not describe LlavaForConditionalGeneration"):
        check(family.model, family.inputs, masks.vision, masks.tokens)


def test_check_compares_real_tokens_only():
    tokens = torch.tensor([[False, True]])
    one, other = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    other[0, 0] = 7.2
    assert _difference(*_real(tokens, one, other)) == 0.0
    assert _difference(one, other) == pytest.approx(7.2)


# --- sinks, and heads by direction ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "of each query"])
def test_a_sink_is_one_more_key_without_a_value(kind):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator, dtype=torch.float64)
    sink = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) * 2
    sink = sink if kind == "of each query" else sink[:1, :, :1]
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / 8**0.5
    open_pairs = torch.rand(2, 1, 9, 9, generator=generator) < 0.7
    open_pairs |= torch.eye(9, dtype=torch.bool)
    mask = {"bool": open_pairs, "bias": torch.zeros(2, 1, 9, 9).double().masked_fill(~open_pairs, -1e30)}.get(kind)
    if kind == "causal":
        open_pairs = torch.ones(9, 9, dtype=torch.bool).tril()
    if kind not in ("none", "of each query"):
        scores = scores.masked_fill(~open_pairs, -torch.inf)
    weights = torch.cat([scores, sink[..., None].expand(2, 4, 9, 1)], dim=-1).softmax(dim=-1)[..., :-1]
    layer = nn.Identity()
    layer.num_key_value_groups = 2
    call = AttentionCall(layer, "layer", query, key, value, mask, 8**-0.5, kind == "causal", sink)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(call.weights(), weights)
    torch.testing.assert_close(call.output(), expected)
    columns = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    output, carried = call.output_and_columns(columns)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(carried, torch.einsum("ehqk,ekc->eqhc", weights, columns))


def test_heads_have_both_directions(family):
    flow = probed(family.model, family.inputs)
    there, back = flow.text_to_vision, flow.vision_to_text
    within = flow.per_head_text_to_vision.mean(-1), flow.per_head_vision_to_text.mean(-1)
    torch.testing.assert_close(within[0], there.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(within[1], back.diagonal(dim1=1, dim2=2))
