"""Models side by side: ours, and tiny ones of transformers saved with their processors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as hf

from vpworkbench import compare
from vpworkbench.config import SettingsError, compare_settings
from vpworkbench.model import CheckpointError
from vpworkbench.pretrain import build_tokenizer
from vpworkbench.probes.dataset import Probed

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.5)


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return build_tokenizer([text for picture in scenes for text in picture.captions])


@pytest.fixture(scope="module")
def vilt(tokenizer, tmp_path_factory) -> str:
    """A ViLT of transformers, as its own `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vilt"
    torch.manual_seed(0)
    hf.ViltModel(hf.ViltConfig(**SMALL, vocab_size=len(tokenizer), image_size=96, patch_size=32)).save_pretrained(
        folder
    )
    images = hf.ViltImageProcessor(size={"shortest_edge": 96}, size_divisor=32)
    hf.ViltProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llava(tokenizer, tmp_path_factory) -> str:
    """A decoder with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    words = hf.BertTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower, image_size=48, patch_size=16),
        text_config=hf.LlamaConfig(**SMALL, vocab_size=len(words), num_key_value_heads=2, pad_token_id=0),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    hf.LlavaProcessor(
        images, words, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_ours_and_transformers_on_the_same_pictures(vilt, llava, scenes, tmp_path):
    models = compare.open_models(["", vilt, llava])
    assert [model.name for model in models] == ["shipped", "tiny-vilt", "tiny-llava"]
    pictures = [picture for picture in scenes if picture.captions][:5]
    probed = compare.probe_all(models, pictures, folder=tmp_path)
    assert [result.flow.shape for result in probed.values()] == [(5, 3, 3), (5, 2, 2), (5, 2, 2)]
    for result in probed.values():
        assert np.isfinite(result.from_input).all() and len(set(result.examples)) == 5
    assert Probed.load(tmp_path / "model-2" / "probes.parquet").config["model"] == "tiny-llava"
    counts = {model.name: compare.token_counts(model, pictures) for model in models}
    assert counts["shipped"][0] == 36 and counts["tiny-vilt"][0] == 10 and counts["tiny-llava"][0] == 9
    table = compare.table(probed, counts)
    assert list(table.index) == list(probed)
    assert table.loc["shipped", "flow"] == pytest.approx(probed["shipped"].from_input[:, -1].mean())
    assert (table["flow_low"] <= table["flow"]).all() and (table["excess"] > 0).all()
    assert set(compare.means(probed)["model"]) == set(probed)


def test_the_same_model_twice_keeps_two_names():
    assert [model.name for model in compare.open_models(["", ""])] == ["shipped", "shipped (2)"]


def test_what_is_no_model_is_refused_before_any_is_probed(tmp_path):
    with pytest.raises(CheckpointError, match="no finished pre-training run at /nowhere.*transformers"):
        compare.open_models(["", "/nowhere"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lxmert", "architectures": ["LxmertModel"]}))
    with pytest.raises(CheckpointError, match="lxmert takes region features"):
        compare.open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vilt"}))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        compare.open_model(str(tmp_path))


def test_settings_take_one_model_or_a_list():
    assert compare_settings().models == ("",)
    assert compare_settings(models=["a", "b"], images=8).models == ("a", "b")
    with pytest.raises(SettingsError, match="images"):
        compare_settings(images=1)
