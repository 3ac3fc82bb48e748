"""Saving, loading, refusing; preparing inputs."""

from __future__ import annotations

import json

import pytest
import torch

from vpworkbench.data.inputs import prepare
from vpworkbench.errors import CheckpointError
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.settings import PRESETS, ModelSettings


def pairs(model, scenes, count: int = 3):
    return prepare(model, scenes[:count], [picture.captions[0] for picture in scenes[:count]])


def test_every_preset_builds(model):
    built = 0
    for name, preset in PRESETS.items():
        settings = ModelSettings(visual=preset.visual, fusion=preset.fusion, text_tokens=preset.data.text_tokens)
        with torch.device("meta"):
            made = VisualParsingModel(settings, model.tokenizer)
        assert made.visual.settings == preset.visual and len(made.fusion.bert.encoder.layer) == preset.fusion.layers, (
            name
        )
        built += 1
    assert built == 4


def test_saved_and_loaded_again(model, scenes, tmp_path):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    again = VisualParsingModel.from_pretrained(tmp_path / "one")
    assert again.settings == model.settings and again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with torch.no_grad():
        one, other = (m(**pairs(m, scenes).forward) for m in (model, again))
    assert torch.equal(one.hidden[-1], other.hidden[-1])


def test_result_does_not_depend_on_batch_mates(model, scenes):
    texts = ["a red square", scenes[1].captions[0], "a blue ball is left of a red heart and a green ring"]
    with torch.no_grad():
        together = model(**prepare(model, scenes[:3], texts).forward)
        alone = model(**prepare(model, scenes[:1], texts[:1]).forward)
    torch.testing.assert_close(together.cls[:1], alone.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.vision[:1], alone.vision, rtol=0, atol=1e-5)


def test_prepared_sets_are_words_and_visual_tokens(model, scenes):
    inputs = pairs(model, scenes)
    words = inputs.forward["words"].shape[1]
    assert inputs.vision[:, words:].all() and not inputs.vision[:, :words].any()
    assert (inputs.tokens[:, :words] == (inputs.forward["words"] != 0)).all()
    assert (inputs.language == inputs.tokens & ~inputs.vision).all()
    without = prepare(model, scenes[:1], [scenes[0].captions[0]], special_tokens="exclude")
    left_out = without.tokens & ~without.vision & ~without.language
    ids = without.forward["words"][0][left_out[0, : without.forward["words"].shape[1]]]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "[SEP]"]


def test_word_head_is_the_transposed_embedding_and_itm_reads_the_raw_cls(model, scenes):
    with torch.no_grad():
        joint = model(**pairs(model, scenes).forward)
        written = joint.text @ model.fusion.bert.embeddings.word_embeddings.weight.T + model.mlm_bias
    torch.testing.assert_close(model.word_logits(joint.text), written)
    assert torch.equal(joint.cls, joint.hidden[-1][:, 0]) and model.itm.out_features == 2


def test_as_many_texts_as_images(model, scenes):
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        prepare(model, scenes[:2], ["a red square"])


def damaged(folder, damage: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5_000])
    elif damage == "other architecture":
        config.write_text(json.dumps({"architectures": ["BertModel"], "hidden_size": 8}))
    elif damage == "other sizes":
        content = json.loads(config.read_text())
        content["fusion"]["layers"] = 3
        config.write_text(json.dumps(content))
    elif damage == "cut config":
        config.write_text(config.read_text()[:50])
    elif damage == "gone":
        config.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        ("pickle", "model.safetensors: no such file; pytorch_model.bin is a pickle"),
        ("truncated", "model.safetensors: is damaged or does not fit its config.json"),
        ("other architecture", "config.json: a checkpoint of another architecture"),
        ("other sizes", "model.safetensors: missing keys"),
        ("cut config", "config.json: not json"),
        ("gone", "not a checkpoint"),
    ],
)
def test_damaged_checkpoint_names_the_file(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path)
    damaged(tmp_path, damage)
    with pytest.raises(CheckpointError, match=message):
        VisualParsingModel.from_pretrained(tmp_path)
