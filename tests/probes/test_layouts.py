"""Flow, rows, columns and geometry of each model family, on tiny random models, against their own eager attention.

One row of `tiny_models.FAMILIES` for each family that the documentation names.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
import transformers as hf
from probes.tiny_models import ENCODER, FAMILIES, IMAGE, Family, internvl, llava, lxmert, pixels, qwen, vilt, words

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.inputs import prepare
from vpworkbench.probes import check, hidden_states, inter_modality_flow, modality_masks, modality_nmi
from vpworkbench.probes.layouts import LAYOUTS


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
            outputs = model(**family.inputs, output_attentions=True)
        maps = outputs.get("attentions", outputs.get("encoder_attentions"))
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
    assert set(LAYOUTS) - {"vpworkbench"} <= set(FAMILIES)  # ours: test_our_model_has_its_grid
    listed = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert all(f"`{name}`" in listed for name in LAYOUTS)


# --- layouts beyond one image of one size --------------------------------------------------------


def test_tokens_of_videos_have_their_frame_and_second():
    model = qwen("qwen2_5_vl").model
    video = 91  # two videos: 3 steps of 2 x 2 tokens, and 1 step of 2 x 1
    ids = torch.tensor([[5, *[video] * 12, 6, *[video] * 2]])
    grids = torch.tensor([[3, 4, 4], [1, 4, 2]])
    masks = modality_masks(model, {"input_ids": ids, "video_grid_thw": grids, "second_per_grid_ts": [0.5, 1.0]})
    assert masks.frame[0].tolist() == [-1, *[0] * 4, *[1] * 4, *[2] * 4, -1, 0, 0]
    assert masks.image[0].tolist() == [-1, *[0] * 4, *[1] * 4, *[2] * 4, -1, 3, 3]
    assert masks.second[masks.vision].tolist() == [*[0.0] * 4, *[0.5] * 4, *[1.0] * 4, 0.0, 0.0]
    assert masks.second[~masks.vision].isnan().all() and masks.placed.equal(masks.vision)
    untold = modality_masks(model, {"input_ids": ids, "video_grid_thw": grids})
    assert untold.frame.equal(masks.frame) and untold.second.isnan().all()
    assert modality_masks(model, {"input_ids": torch.tensor([[5, 6]])}).frame is None


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
    for boxes in one.boxes:  # shares of each image, also of the one that is padded
        patches = boxes[boxes.isfinite().all(dim=1)]
        assert patches.amin(dim=0)[:2].tolist() == [0, 0] and patches.amax(dim=0)[2:].tolist() == [1, 1]
        assert float((patches[1:, 2:] - patches[1:, :2]).prod(dim=1).sum()) == pytest.approx(1)

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
    unknown = modality_masks(family.model, inputs)
    assert unknown.note.startswith("images of [3, 1] tiles: pass tiles") and not unknown.placed.any()
    assert unknown.image[0].unique().tolist() == [-1, 0] and unknown.image[1].unique().tolist() == [-1, 1]
    with pytest.raises(ValueError, match="2 x 2 is not the 3 tiles"):
        modality_masks(family.model, inputs, tiles=[(2, 2), (1, 1)])
    masks = modality_masks(family.model, inputs, tiles=[(1, 2), (1, 1)])
    left, right = grid_boxes(2, 2, (0, 0, 0.5, 1)), grid_boxes(2, 2, (0.5, 0, 1, 1))
    torch.testing.assert_close(masks.boxes[0][masks.vision[0]], torch.cat([left, right, grid_boxes(2, 2)]))
    assert masks.image[1].unique().tolist() == [-1, 1]


def test_images_that_do_not_fit_the_ids_and_unknown_families():
    torch.manual_seed(0)
    family = llava()
    other = modality_masks(family.model, family.inputs | {"pixel_values": pixels(3, 3, 24, 24)})
    assert other.note.startswith("18 image tokens fit no grid") and not other.placed.any()
    given = modality_masks(family.model, family.inputs | {"pixel_values": pixels(3, 3, 24, 24)}, grid=(3, 3))
    torch.testing.assert_close(given.boxes[1][given.vision[1]], grid_boxes(3, 3))
    with pytest.raises(ValueError, match="makes 8 tokens, but input_ids hold 18"):
        modality_masks(family.model, family.inputs, grid=[(2, 2), (2, 2)])
    for wrong in (3, "3x3", (0, 2), (1, 3, 3)):
        with pytest.raises(ValueError, match=r"grid=.*: give \(rows, columns\) for each image"):
            modality_masks(family.model, family.inputs, grid=wrong)
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
