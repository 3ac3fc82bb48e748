"""Flow, rows, columns and geometry of each model family, on tiny random models, against their own eager attention.

One row of FAMILIES for each family that the documentation names.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import nn

from vpworkbench.data.inputs import prepare
from vpworkbench.probes import check, hidden_states, inter_modality_flow, modality_masks, modality_nmi
from vpworkbench.probes.layouts import LAYOUTS, grid_boxes

IMAGE = 90  # id of an image place
WIDE = 0.5  # range of the initial weights: near-uniform attention would hide mistakes
TEXT = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=WIDE,
    pad_token_id=0,
)
VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)


class Family(NamedTuple):
    """A tiny model of a family, its inputs, and the boxes of its first image's tokens."""

    model: nn.Module
    inputs: dict[str, Any]
    boxes: torch.Tensor | None = None


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def padded(count: int, words: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of two examples: a word, `count` image places, words; the second padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 80, (2, count + words), generator=generator)
    ids[0, 1 : 1 + count] = ids[1, 3 : 3 + count] = IMAGE
    ids[1, :2] = 0
    return ids, (ids != 0).long()


def llava() -> Family:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    ids, mask = padded(9)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 24, 24)}
    return Family(hf.LlavaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def vipllava() -> Family:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, 0],
    )
    ids, mask = padded(9)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 24, 24)}
    return Family(hf.VipLlavaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def paligemma() -> Family:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, projection_dim=32),
        text_config=hf.GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    ids, mask = padded(9)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels(2, 3, 24, 24),
        "token_type_ids": torch.zeros_like(ids),
    }
    return Family(hf.PaliGemmaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def qwen(kind: str) -> Family:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
    shared = dict(image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    vision = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
    text = dict(TEXT, rope_parameters=rope)
    text.pop("head_dim")
    if kind == "qwen2_vl":
        config = hf.Qwen2VLConfig(vision_config=dict(vision, embed_dim=16, hidden_size=32), text_config=text, **shared)
        model = hf.Qwen2VLForConditionalGeneration
    elif kind == "qwen2_5_vl":
        tower = dict(
            vision, hidden_size=16, intermediate_size=32, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]
        )
        config = hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **shared)
        model = hf.Qwen2_5_VLForConditionalGeneration
    else:
        tower = dict(
            vision,
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        )
        config = hf.Qwen3VLConfig(vision_config=tower, text_config=dict(text, head_dim=8), **shared)
        model = hf.Qwen3VLForConditionalGeneration
    ids = torch.tensor([[5, 92, *[IMAGE] * 6, 93, 6, 7, 8], [0, 0, 5, 92, *[IMAGE] * 4, 93, 6, 7, 8]])
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels(24 + 16, 3 * 2 * 4 * 4),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return Family(model(config), inputs, grid_boxes(2, 3))


def idefics3(kind: str) -> Family:
    tower = dict(VIT, image_size=16, patch_size=4)
    if kind == "smolvlm":
        config = hf.SmolVLMConfig(
            vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
        model = hf.SmolVLMForConditionalGeneration
    else:
        config = hf.Idefics3Config(
            vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
        model = hf.Idefics3ForConditionalGeneration
    tile, around, line = [IMAGE] * 4, 80, 85  # 2 x 2 tokens a tile; 81... name rows and columns, 79 the whole

    def tiles(*names: int) -> list[int]:
        return [token for name in names for token in (around, name, *tile)]

    split = [*tiles(81, 82, 83), line, *tiles(86, 87, 88), line, line, *tiles(79), around]
    single = [*tiles(79), around]
    first = [5, *split, 6, 7]
    second = [5, *single, 6, *single, 8]
    ids = torch.tensor([first, [0] * (len(first) - len(second)) + second])
    images = pixels(2, 7, 3, 16, 16)
    images[1, 2:] = 0  # the processor's padding: no images
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": images}
    parts = [grid_boxes(2, 2, tuple(box.tolist())) for box in grid_boxes(2, 3)]
    return Family(model(config), inputs, torch.cat([*parts, grid_boxes(2, 2)]))


def internvl() -> Family:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**dict(VIT, image_size=(16, 16), patch_size=(4, 4))),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    ids, mask = padded(4)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 16, 16)}
    return Family(hf.InternVLForConditionalGeneration(config), inputs, grid_boxes(2, 2))


def gemma3() -> Family:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=6, layer_types=kinds)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**dict(VIT, image_size=32)),
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=91,
        eoi_token_index=92,
    )
    ids, mask = padded(4, words=8)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels(2, 3, 32, 32),
        "token_type_ids": (ids == IMAGE).long(),
    }
    return Family(hf.Gemma3ForConditionalGeneration(config), inputs, grid_boxes(2, 2))


def chameleon() -> Family:
    names = {"<image>": IMAGE} | {f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(10)}
    codes = dict(
        num_embeddings=10,
        embed_dim=8,
        latent_channels=8,
        base_channels=32,
        resolution=8,
        num_res_blocks=1,
        channel_multiplier=[1, 1, 1],
        double_latent=False,
    )
    config = hf.ChameleonConfig(**TEXT, vq_config=codes, vocabulary_map=names)
    ids, mask = padded(4)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 8, 8)}
    return Family(hf.ChameleonForConditionalGeneration(config), inputs, grid_boxes(2, 2))


ENCODER = {
    key: TEXT[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "initializer_range",
        "num_hidden_layers",
    )
}


def words(right: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 80, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7 - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def vilt() -> Family:
    model = hf.ViltModel(hf.ViltConfig(**ENCODER, image_size=24, patch_size=8, max_image_length=-1))
    mask = torch.ones(2, 24, 24, dtype=torch.long)
    mask[1, :, 16:] = 0  # the second image is narrower
    return Family(model, words() | {"pixel_values": pixels(2, 3, 24, 24), "pixel_mask": mask})


def visual_bert() -> Family:
    model = hf.VisualBertModel(hf.VisualBertConfig(**ENCODER, visual_embedding_dim=12))
    mask = torch.ones(2, 5)
    mask[0, 4:] = 0
    return Family(model, words() | {"visual_embeds": pixels(2, 5, 12), "visual_attention_mask": mask})


def flava() -> Family:
    own = dict(ENCODER, num_hidden_layers=2)
    config = hf.FlavaConfig(
        text_config=own,
        image_config=dict(own, image_size=16, patch_size=8),
        multimodal_config=dict(ENCODER),
        hidden_size=32,
        projection_dim=32,
        initializer_range=WIDE,
    )
    boxes = torch.cat([grid_boxes(1, 1), grid_boxes(2, 2)])
    return Family(hf.FlavaModel(config), words() | {"pixel_values": pixels(2, 3, 16, 16)}, boxes)


def lxmert() -> Family:
    config = hf.LxmertConfig(
        **{key: value for key, value in ENCODER.items() if key != "num_hidden_layers"},
        l_layers=1,
        x_layers=2,
        r_layers=1,
        visual_feat_dim=12,
    )
    boxes = pixels(2, 5, 4).sort(dim=-1).values[..., [0, 1, 2, 3]]
    mask = torch.ones(2, 5)
    mask[0, 4:] = 0
    inputs = words() | {"visual_feats": pixels(2, 5, 12), "visual_pos": boxes, "visual_attention_mask": mask}
    return Family(hf.LxmertModel(config), inputs, boxes[0])


def bridgetower() -> Family:
    text = dict(ENCODER, num_hidden_layers=3, max_position_embeddings=40, hidden_size=64, initializer_factor=20)
    config = hf.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=48,
        initializer_factor=20,
        text_config=text,
        vision_config=dict(hidden_size=64, num_hidden_layers=3, patch_size=8, image_size=16),
    )
    boxes = torch.cat([grid_boxes(1, 1), grid_boxes(2, 2)])
    return Family(hf.BridgeTowerModel(config), words() | {"pixel_values": pixels(2, 3, 16, 16)}, boxes)


FAMILIES = {
    "llava": llava,
    "vipllava": vipllava,
    "paligemma": paligemma,
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "idefics3": lambda: idefics3("idefics3"),
    "smolvlm": lambda: idefics3("smolvlm"),
    "internvl": internvl,
    "gemma3": gemma3,
    "chameleon": chameleon,
    "vilt": vilt,
    "visual_bert": visual_bert,
    "flava": flava,
    "lxmert": lxmert,
    "bridgetower": bridgetower,
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    torch.manual_seed(0)
    built = FAMILIES[request.param]()
    built.model.eval()
    return built


def blocks(length: int, *parts: tuple[slice, slice, torch.Tensor]) -> torch.Tensor:
    """A of one layer (Eq. 3), (example, query, key): each attention in turn halves what its rows had before."""
    joint = torch.eye(length, dtype=torch.float64).repeat(len(parts[0][2]), 1, 1)
    for queries, keys, weights in parts:
        joint[:, queries] *= 0.5
        joint[:, queries, keys] += 0.5 * weights.double().mean(dim=1)
    return joint


def maps_of_modules(family: Family, kinds: tuple[str, ...], *, ask: bool) -> list[torch.Tensor]:
    """The softmax weights that modules of these classes form themselves, in the order in which they run."""
    maps, handles = [], []

    def asked(module, args, kwargs):
        return args, kwargs | {"output_attentions": True}

    for module in family.model.modules():
        if type(module).__name__ in kinds:
            if ask:
                handles.append(module.register_forward_pre_hook(asked, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda module, args, output: maps.append(output[1])))
    with torch.no_grad():
        family.model(**family.inputs)
    for handle in handles:
        handle.remove()
    return maps


def eager_layers(family: Family) -> list[torch.Tensor]:
    """A of every layer in which both modalities are, from the model's own eager attention."""
    model, kind = family.model, family.model.config.model_type
    words = family.inputs["input_ids"].shape[1]
    if kind == "lxmert":
        inner = maps_of_modules(family, ("LxmertAttention",), ask=True)[-4 * model.config.x_layers :]
        length = words + family.inputs["visual_feats"].shape[1]
        text, image = slice(0, words), slice(words, length)
        layers = []
        for across, back, own, seen in zip(*(inner[part::4] for part in range(4)), strict=True):
            layers += [
                blocks(length, (text, image, across), (image, text, back)),
                blocks(length, (text, text, own), (image, image, seen)),
            ]
        return layers
    if kind == "bridgetower":
        model.set_attn_implementation("eager")
        kinds = ("BridgeTowerSelfAttention", "BridgeTowerCrossAttention")
        maps = maps_of_modules(family, kinds, ask=False)
        length = words + 5
        text, image = slice(0, words), slice(words, length)
        # the text tower's own layers run in between: two before the first pair of streams, one between the pairs
        pairs = [maps[2:6], maps[7:11]]
        return [
            blocks(length, (text, text, a), (text, image, b), (image, image, c), (image, text, d))
            for a, b, c, d in pairs
        ]
    if kind == "flava":
        model.multimodal_model.config.output_attentions = True
        with torch.no_grad():
            maps = model(**family.inputs).multimodal_output.attentions
        model.multimodal_model.config.output_attentions = False
    else:
        before = model.config._attn_implementation
        if before != "eager":
            model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(**family.inputs, output_attentions=True).attentions
        if before != "eager":
            model.set_attn_implementation(before)
    everything = slice(None)
    return [blocks(len(weights[0, 0]), (everything, everything, weights)) for weights in maps]


def shares(product: torch.Tensor, vision: torch.Tensor, language: torch.Tensor) -> tuple[float, float]:
    """Eq. 5-6 of one example: text to vision, vision to text."""
    there, back = product[language][:, vision].sum(), product[vision][:, language].sum()
    total = there + back + product[vision][:, vision].sum() + product[language][:, language].sum()
    return there / total, back / total


def test_flow_rows_and_columns_equal_the_models_own_attention(family):
    """Every (i, j), with padding and a batch of two; patches that are shuffled: under one random state."""
    torch.manual_seed(1)
    masks = modality_masks(family.model, family.inputs)
    vision, tokens = masks.vision & masks.tokens, masks.tokens
    last = [int(real.nonzero().max()) for real in tokens]
    picked = torch.tensor([[int(seen.nonzero()[1]), end] for seen, end in zip(vision, last, strict=True)])
    flow = inter_modality_flow(family.model, family.inputs, masks.vision, tokens, rows=picked, columns=picked)
    layers = eager_layers(family)
    assert len(layers) == len(flow.layers)
    for start, stop in combinations_with_replacement(range(len(layers)), 2):
        product = torch.eye(tokens.shape[1], dtype=torch.float64)
        for layer in layers[start : stop + 1]:
            product = layer @ product
        for example in range(2):
            there, back = shares(product[example], vision[example], tokens[example] & ~vision[example])
            assert abs(flow.text_to_vision[example, start, stop] - there) <= 1e-5
            assert abs(flow.vision_to_text[example, start, stop] - back) <= 1e-5
            if start == 0:
                rows = flow.rows_from_input[example, stop].double()
                torch.testing.assert_close(rows, product[example][picked[example]], rtol=0, atol=2e-5)
                columns = flow.columns_from_input[example, stop][:, tokens[example]].double()
                expected = product[example][tokens[example]][:, picked[example]].T
                torch.testing.assert_close(columns, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(flow.per_head.mean(-1), flow.within_layer)


def test_the_probed_forward_is_the_plain_one_and_leaves_the_model_alone(family):
    torch.manual_seed(1)
    masks = modality_masks(family.model, family.inputs)
    settings = [dict(vars(module)) for module in family.model.modules()]
    state = torch.get_rng_state()
    result = check(family.model, family.inputs, masks.vision, masks.tokens, examples=2)
    assert result.outputs <= 1e-3 and result.flow <= 1e-5  # weights this wide make outputs of about 10
    assert torch.equal(torch.get_rng_state(), state)
    for module, before in zip(family.model.modules(), settings, strict=True):
        assert vars(module).keys() == before.keys()


def test_hidden_states_cover_the_sequence_and_have_an_nmi(family):
    masks = modality_masks(family.model, family.inputs)
    hidden = hidden_states(family.model, family.inputs, tokens=masks.tokens)
    assert all(state.shape[:2] == masks.tokens.shape for state in hidden)
    nmi = modality_nmi(hidden, masks.vision, masks.tokens)
    assert nmi.shape == (2, len(hidden)) and ((nmi >= 0) & (nmi <= 1)).all()


def test_boxes_are_where_the_tokens_lie(family):
    masks = modality_masks(family.model, family.inputs)
    assert masks.boxes.shape == (*masks.vision.shape, 4) and masks.image.shape == masks.vision.shape
    assert masks.boxes[~masks.vision].isnan().all() and (masks.image[~masks.vision] == -1).all()
    if family.boxes is not None:
        torch.testing.assert_close(masks.boxes[0][masks.vision[0]], family.boxes)
        assert (masks.image[0][masks.vision[0] & masks.tokens[0]] == 0).all()


def test_every_known_family_is_tested_and_documented():
    assert set(LAYOUTS) == set(FAMILIES) | {"vpworkbench"}  # test_our_model_has_its_grid
    listed = (Path(__file__).parents[2] / "docs" / "probes.md").read_text()
    assert all(f"`{name}`" in listed for name in LAYOUTS)


# --- layouts beyond one image of one size --------------------------------------------------------


def test_our_model_has_its_grid(model, scenes):
    inputs = prepare(model, scenes[:2], [picture.captions[0] for picture in scenes[:2]])
    masks = modality_masks(model, inputs.forward)
    assert torch.equal(masks.vision, inputs.vision) and torch.equal(masks.tokens, inputs.tokens)
    torch.testing.assert_close(masks.boxes[1][masks.vision[1]], grid_boxes(6, 6))
    assert masks.image[1][masks.vision[1]].tolist() == [1] * 36


def test_vilt_tells_the_order_of_the_very_pass():
    """A new order in every forward: rows and columns follow the boxes, and flow does not care."""
    torch.manual_seed(0)
    family = vilt()
    family.model.eval()
    masks = modality_masks(family.model, family.inputs)
    passes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        passes.append(inter_modality_flow(family.model, family.inputs, masks.vision, masks.tokens, rows=[1]))
    one, other = passes
    assert not torch.equal(one.boxes.nan_to_num(-1), other.boxes.nan_to_num(-1))
    torch.testing.assert_close(one.flow, other.flow, equal_nan=True)

    def in_reading_order(flow):
        boxes, weights = flow.boxes[0], flow.rows[0, 2, :, 0]
        patches = (~boxes[:, 0].isnan()).nonzero().flatten()[1:]
        order = (boxes[patches, 1] * 10 + boxes[patches, 0]).argsort()
        return weights[:, patches[order]]

    torch.testing.assert_close(in_reading_order(one), in_reading_order(other), rtol=0, atol=1e-5)


def test_qwen_counts_images_and_frames():
    torch.manual_seed(0)
    family = qwen("qwen2_vl")
    ids = torch.tensor([[5, 92, *[IMAGE] * 4, 93, 6, 92, *[91] * 8, 93, 7]])
    inputs = {
        "input_ids": ids,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    masks = modality_masks(family.model, inputs)
    assert masks.image[0][masks.vision[0]].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(masks.boxes[0][masks.vision[0]], grid_boxes(2, 2).repeat(3, 1))


def test_internvl_takes_its_tiles_from_the_processor():
    torch.manual_seed(0)
    family = internvl()
    ids = torch.tensor([[5, *[IMAGE] * 12, 6], [5, 6, 7, *[IMAGE] * 4, 8, 9, *[8] * 5]])
    inputs = {"input_ids": ids, "pixel_values": pixels(4, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"images of \[3, 1\] tiles: pass tiles"):
        modality_masks(family.model, inputs)
    with pytest.raises(ValueError, match="2 x 2 is not the 3 tiles"):
        modality_masks(family.model, inputs, tiles=[(2, 2), (1, 1)])
    masks = modality_masks(family.model, inputs, tiles=[(1, 2), (1, 1)])
    left, right = grid_boxes(2, 2, (0, 0, 0.5, 1)), grid_boxes(2, 2, (0.5, 0, 1, 1))
    torch.testing.assert_close(masks.boxes[0][masks.vision[0]], torch.cat([left, right, grid_boxes(2, 2)]))
    assert masks.image[1].unique().tolist() == [-1, 1]


def test_images_that_do_not_fit_the_ids_and_unknown_families():
    torch.manual_seed(0)
    family = llava()
    with pytest.raises(ValueError, match="18 visual tokens, but 3 images of this size make 27"):
        modality_masks(family.model, family.inputs | {"pixel_values": pixels(3, 3, 24, 24)})
    with pytest.raises(ValueError, match="attention_mask is .* pass the plain one"):
        modality_masks(family.model, family.inputs | {"attention_mask": torch.ones(2, 1, 15, 15)})
    with pytest.raises(ValueError, match="no input_ids"):
        modality_masks(family.model, {"pixel_values": pixels(2, 3, 24, 24)})
    bert = hf.BertModel(hf.BertConfig(**ENCODER))
    with pytest.raises(ValueError, match=r"model_type 'bert'.*Build `vision` and `tokens`"):
        modality_masks(bert, words())


def test_a_sequence_of_another_length_names_who_built_it():
    """LXMERT's joint sequence is words and regions; the words alone are not it."""
    torch.manual_seed(0)
    family = lxmert()
    family.model.eval()
    vision = torch.arange(9)[None].expand(2, -1) > 6
    with pytest.raises(ValueError, match="`vision` has 9 tokens .* must cover the words and then the image"):
        inter_modality_flow(family.model, family.inputs, vision, torch.ones_like(vision))
