"""All faults of a set at once, with file and record; what published sets have is a warning."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from test_task_formats import nlvr2, snli_ve, vqa

from vpworkbench.cli import main
from vpworkbench.data.doctor import diagnose
from vpworkbench.data.records import DataError


def test_generated_scenes_are_sound(scenes_folder):
    found = diagnose(scenes_folder)
    assert found.is_sound and set(found.tables) == {"captions", "vqa", "nlvr2", "snli-ve"}
    assert found.tables["captions"]["train"] == {"records": 60, "images": 60, "texts": 300, "longer_texts": 0}
    assert found.tables["vqa"]["val"]["images"] == 20 and "unanswerable" in found.tables["vqa"]["val"]


def test_all_faults_of_a_set_at_once(tmp_path):
    vqa(tmp_path, question={"question": ""})
    (tmp_path / "pairs").mkdir()
    nlvr2(tmp_path / "pairs", label="maybe")
    (tmp_path / "entailment").mkdir()
    file = snli_ve(tmp_path / "entailment", Flickr30K_ID="gone")
    (file.parent / "flickr30k-images" / "3416050480.jpg").write_bytes(b"\xff\xd8 cut")
    found = diagnose(tmp_path)
    text = "\n".join(found.errors)
    assert not found.is_sound
    for told in ("questions[1]: question", "line 3: label", "image gone.jpg or gone.png missing", "cannot be decoded"):
        assert told in text
    assert all(str(tmp_path) in error for error in found.errors)


def test_a_file_that_is_cut_does_not_hide_the_others(tmp_path):
    questions, _ = vqa(tmp_path)
    questions.write_text(questions.read_text()[:50])
    (tmp_path / "e").mkdir()
    snli_ve(tmp_path / "e")
    found = diagnose(tmp_path)
    assert "not json" in found.errors[0] and found.tables["snli-ve"]["val"]["records"] == 2


def test_overlaps_duplicates_and_long_texts_are_warnings(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    records = []
    for number, split in enumerate(("train", "train", "val")):
        Image.new("RGB", (4, 4)).save(images / f"{number}.png")
        sentence = {"raw": "a very long caption " * (20 if number == 0 else 1)}
        records.append({"filename": f"{number}.png", "split": split, "sentences": [sentence]})
    (tmp_path / "dataset_mine.json").write_text(json.dumps({"images": records}))
    found = diagnose(tmp_path)
    assert found.is_sound
    assert found.warnings == [
        "captions: 1 images are in train and in val",
        "captions: 2 image files are copies of others",
        "captions: 1 texts of train are longer than the configured length and will be cut",
    ]


def test_nlvr_v1_as_published_has_overlaps_and_is_sound(real_data):
    found = diagnose(real_data / "nlvr1", images=False)
    assert found.is_sound and found.tables["captions"]["test"]["records"] == 990
    assert any("are in test and in train" in warning for warning in found.warnings)


def test_exit_codes_and_json(tmp_path, scenes_folder, capsys):
    (tmp_path / "e").mkdir()
    snli_ve(tmp_path / "e", gold_label="yes")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path / "e"), "--json"])
    assert stop.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] is False and "gold_label" in told["errors"][0]
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(scenes_folder), "--no-images"])
    assert stop.value.code == 0 and "sound" in capsys.readouterr().out


def test_nothing_to_examine(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no set of a known format"):
        diagnose(tmp_path)
