"""Models side by side: ours, and tiny ones of transformers saved with their processors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from vpworkbench import subjects
from vpworkbench.data.images import ImageFile
from vpworkbench.data.regions import write_regions
from vpworkbench.errors import CheckpointError, DataError
from vpworkbench.explorer import explore
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.model.words import build_tokenizer
from vpworkbench.probes import check
from vpworkbench.probing import Probed
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.settings import CompareSettings
from vpworkbench.studies import compare
from vpworkbench.studies.effects import conclusions, match_effect, measure, table
from vpworkbench.studies.questions import known

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
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    counts = {"patch_size": 16, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = hf.LlavaProcessor(images, words, image_token="<image>", chat_template=template, **counts)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def visual_bert(tokenizer, tmp_path_factory) -> str:
    """With its heads of pre-training, as the published ones have them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-visual_bert"
    torch.manual_seed(0)
    config = hf.VisualBertConfig(**SMALL, vocab_size=len(tokenizer), visual_embedding_dim=12)
    hf.VisualBertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lxmert(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-lxmert"
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "num_hidden_layers"}
    config = hf.LxmertConfig(**sizes, vocab_size=len(tokenizer), l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=12)
    hf.LxmertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def regions(scenes, tmp_path_factory) -> str:
    """Four regions of every picture of the scenes, and of those that notebooks take; every third has three."""
    folder = tmp_path_factory.mktemp("regions")
    rng = np.random.default_rng(0)
    held_out = compare.held_out(CompareSettings(images=8))
    for chosen in ([picture for picture in scenes if picture.captions], held_out):
        for number, picture in enumerate(chosen):
            count = 3 if number % 3 == 2 else 4
            corners = rng.uniform(0, 40, (count, 2))
            boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (count, 2))], axis=1)
            file = folder / Path(picture.image.name).with_suffix(".npz").name
            write_regions(file, rng.normal(size=(count, 12)), boxes, (96, 96))
    return str(folder)


def test_ours_and_transformers_on_the_same_pictures(vilt, llava, scenes, tmp_path):
    models = subjects.load_all(["", vilt, llava])
    assert [model.name for model in models] == ["shipped", "tiny-vilt", "tiny-llava"]
    pictures = [picture for picture in scenes if picture.captions][:5]
    probed = compare.probe_all(models, pictures, folder=tmp_path)
    assert [result.flow.shape for result in probed.values()] == [(5, 3, 3), (5, 2, 2), (5, 2, 2)]
    for result in probed.values():
        assert np.isfinite(result.from_input).all() and len(set(result.examples)) == 5
    assert Probed.load(tmp_path / "model-2" / "probes.parquet").config["model"] == "tiny-llava"
    counts = {model.name: subjects.token_counts(model, pictures) for model in models}
    assert counts["shipped"][0] == 36 and counts["tiny-vilt"][0] == 10 and counts["tiny-llava"][0] == 9
    effects = {one.name: match_effect(one, pictures, probed[one.name].flow.shape[1]) for one in models}
    table = compare.table(probed, counts, effects)
    assert list(table.index) == list(probed)
    assert table["match_effect"].isna().tolist() == [False, True, True] and table["match_effect"].iloc[0] > 1
    assert table.loc["shipped", "flow"] == pytest.approx(probed["shipped"].from_input[:, -1].mean())
    for name, one in probed.items():  # of the span from the input to the last layer, and of no other
        assert table.loc[name, "excess"] == pytest.approx((one.flow / one.null)[:, 0, -1].mean())
        assert table.loc[name, "null"] == pytest.approx(one.null[:, 0, -1].mean())
    assert (table["flow_low"] <= table["flow"]).all()
    assert set(compare.means(probed)["model"]) == set(probed)


def test_the_next_word_of_a_decoder_is_asked(llava, vilt, scenes):
    """Teacher forced, from the logits before the word."""
    subject = subjects.load(llava)
    assert known(subject) == ("word",) and known(subjects.load(vilt)) == ()
    pictures = [picture for picture in scenes if picture.captions][:3]
    found = measure(subject, pictures, "word")
    for number, picture in enumerate(pictures):
        inputs = subject.prepare([picture], picture.captions[:1])
        words = subject.prepare.processor.tokenizer.convert_ids_to_tokens(inputs.forward["input_ids"][0])
        attributes = [word for word in picture.captions[0].split() if word in ATTRIBUTE_WORDS]
        place = words.index(attributes[number % len(attributes)])
        with torch.no_grad():
            logits = subject.model(**inputs.forward).logits[0, place - 1].double()
        expected = logits.log_softmax(dim=-1)[inputs.forward["input_ids"][0, place]]
        assert float(found.blocked.before[number]) == pytest.approx(float(expected), abs=1e-5)
    np.testing.assert_allclose(found.lens[:, -1], found.blocked.before, atol=1e-5)
    assert "the image cannot read the words" in found.single  # the template puts [CLS] before the image
    without = replace(found, reverse=None)
    assert len(without.single) == 3 and "effect of the reverse" not in set(table({"word": without}).quantity)
    assert conclusions({"word": without}, None)[0].startswith("Word: the right one has probability")


def test_the_same_model_twice_keeps_two_names():
    assert [model.name for model in subjects.load_all(["", ""])] == ["shipped", "shipped (2)"]


def test_what_is_no_model_is_refused_before_any_is_probed(tmp_path):
    with pytest.raises(CheckpointError, match="no finished pre-training run at /nowhere.*transformers"):
        subjects.load_all(["", "/nowhere"])
    with pytest.raises(CheckpointError, match=r"no finished .* at tiny-atention .*not in the local cache .*OWNER/NAME"):
        subjects.load("tiny-atention")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lxmert", "architectures": ["LxmertModel"]}))
    wanted = "lxmert takes regions, not pixels, and none are given: give `regions`.*2048 channels"
    with pytest.raises(CheckpointError, match=wanted):
        subjects.load(str(tmp_path))
    with pytest.raises(CheckpointError, match="'nowhere.tsv' does not exist"):
        subjects.load(str(tmp_path), regions="nowhere.tsv")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vilt"}))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        subjects.load(str(tmp_path))


def test_a_folder_without_its_tokenizer_says_so(visual_bert, regions, tmp_path):
    bare = shutil.copytree(visual_bert, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(CheckpointError, match=r"bare: .*processor or tokenizer, each saved there"):
        subjects.load(str(bare), regions=regions)


def test_regions_of_another_width_are_refused_when_the_model_is_opened(lxmert, tmp_path):
    write_regions(tmp_path / "images" / "7.npz", np.zeros((2, 9)), np.array([[0, 0, 5, 5]] * 2), (9, 9))
    with pytest.raises(DataError, match="images/7.npz: features of 9 channels .* takes 12; .*`vpw regions --width 12`"):
        subjects.load(lxmert, regions=str(tmp_path))


def test_models_of_regions_read_them_from_files(visual_bert, lxmert, regions, scenes):
    """The model's own call on hand-made inputs gives the same hidden states; the third picture has fewer regions."""
    pictures = [picture for picture in scenes if picture.captions][:3]
    texts = [picture.captions[0] for picture in pictures]
    for folder in (visual_bert, lxmert):
        subject = subjects.load(folder, regions=regions)
        inputs = subject.prepare(pictures, texts)
        assert type(subject.model).__name__ in ("VisualBertModel", "LxmertModel")
        assert (inputs.vision & inputs.tokens).sum(dim=1).tolist() == [4, 4, 3]
        boxes = np.load(Path(regions) / Path(pictures[0].image.name).with_suffix(".npz").name)["boxes"] / 96
        np.testing.assert_allclose(inputs.boxes[0, -4:], boxes, rtol=1e-5)
        assert inputs.boxes[2, -1].isnan().all() and inputs.boxes[:, :-4].isnan().all()
        assert check(subject.model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language)
    with pytest.raises(DataError, match="no features of this image"):
        subject.prepare([replace(pictures[0], image=ImageFile(Path("elsewhere"), "x.png"))], texts[:1])


def test_exclude_leaves_the_special_tokens_out(visual_bert, vilt, llava, regions, scenes, tokenizer):
    """As our own model does: [CLS] and [SEP] in neither set."""
    pictures = [picture for picture in scenes if picture.captions][:2]
    texts = [picture.captions[0] for picture in pictures]
    wanted = [len(tokenizer.tokenize(text)) for text in texts]
    for subject in subjects.load_all(["", visual_bert, vilt], regions=regions):
        counted = subject.prepare(pictures, texts)
        excluded = subject.prepare(pictures, texts, special_tokens="exclude")
        assert excluded.language.sum(dim=1).tolist() == wanted
        assert counted.language.sum(dim=1).tolist() == [count + 2 for count in wanted]
        assert torch.equal(excluded.tokens, counted.tokens)


def test_a_checkpoint_of_others_is_probed_by_the_same_notebook(visual_bert, regions, runs_folder):
    parameters = {"checkpoint": visual_bert, "images": 4, "regions": regions}
    executed = run_notebook("02_probe", name="theirs", parameters=parameters).parent
    summary = json.loads((executed / "summary.json").read_text())
    assert summary["images"] == 4 and 0 < summary["flow_from_input_last_layer"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("source, said", [("vilt", 0), ("llava", 3)])
def test_a_checkpoint_of_others_is_knocked_out_as_far_as_its_heads_are_known(source, said, request, runs_folder):
    parameters = {"checkpoint": request.getfixturevalue(source), "images": 4}
    folder = run_notebook("07_knock_out", name=source, parameters=parameters).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["conclusions"]) == said and ("word_blocked" in summary) == (said > 0)
    assert (folder / "effects.csv").exists() == (said > 0) and not (folder / "patch.csv").exists()
    assert (folder / "figures" / "flow.html").exists()


@pytest.mark.parametrize("source", ["vilt", "visual_bert", "lxmert"])
def test_checkpoints_of_others_are_explored_by_the_same_call(source, regions, request):
    view = explore(
        request.getfixturevalue(source),
        regions="" if source == "vilt" else regions,
        pictures=2,
        views=("words", "flow"),
    )
    reading = view.readings[0]
    assert reading.boxes.shape == (10 if source == "vilt" else 4, 4) and np.isfinite(reading.boxes).all()
    assert reading.words[0] == "[CLS]"
    exec(view.code, names := {})  # the code that a reader would copy
    assert names["view"].code == view.code and repr(names["view"]) == repr(view)


@pytest.mark.slow
def test_all_of_them_side_by_side(vilt, visual_bert, lxmert, regions, runs_folder):
    parameters = {"models": ["", vilt, visual_bert, lxmert], "regions": regions, "images": 4}
    folder = run_notebook("03_compare_models", name="others", parameters=parameters).parent
    table = pd.read_csv(folder / "table.csv", index_col="model")
    wanted = {"shipped": 36, "tiny-vilt": 10, "tiny-visual_bert": 3.75, "tiny-lxmert": 3.75}
    assert table["visual_tokens"].to_dict() == wanted


def test_settings_take_one_model_or_a_list():
    assert CompareSettings().models == ("",)
    assert CompareSettings(models=["a", "b"], images=8).models == ("a", "b")
    with pytest.raises(ValidationError, match="images"):
        CompareSettings(images=1)
