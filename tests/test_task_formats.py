"""Readers of the tasks' files on hand-made miniatures of the formats as published, and on generated scenes."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections import Counter

import pytest
from PIL import Image

from vpworkbench.data.records import DataError
from vpworkbench.data.task_formats import read_easy_vqa, read_nlvr1, read_nlvr2, read_snli_ve, read_vqa
from vpworkbench.metrics import vqa_score


def picture(path, colour=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


def vqa(folder, *, question=None, annotation=None):
    """Two questions of one COCO image, as v2_OpenEnded_mscoco_val2014_questions.json has them."""
    picture(folder / "val2014" / "COCO_val2014_000000262148.jpg")
    first = {"image_id": 262148, "question": "Where is he  looking?", "question_id": 262148000}
    second = {"image_id": 262148, "question": "Is he on a board?", "question_id": 262148001}
    questions = [first, second | (question or {})]
    answers = [{"answer": "down", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    annotations = [
        {"question_type": "where is", "multiple_choice_answer": "down", "answers": answers, "image_id": 262148,
         "answer_type": "other", "question_id": 262148000},
        {"question_type": "is he", "multiple_choice_answer": "yes", "image_id": 262148, "answer_type": "yes/no",
         "answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}], "question_id": 262148001}
        | (annotation or {}),
    ]  # fmt: skip
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    files = folder / "v2_OpenEnded_mscoco_val2014_questions.json", folder / "v2_mscoco_val2014_annotations.json"
    files[0].write_text(json.dumps(header | {"task_type": "Open-Ended", "questions": questions}))
    files[1].write_text(json.dumps(header | {"annotations": annotations}))
    return files


def test_vqa_v2(tmp_path):
    questions, annotations = vqa(tmp_path)
    first, second = read_vqa(questions, annotations, split="val")
    assert (first.id, first.text, first.kind) == ("262148000", "Where is he looking?", "other")
    assert first.answers == ("down",) * 10 and second.answers == ("yes",)
    assert first.images[0].pixels().shape == (4, 6, 3) and first.images == second.images
    test = read_vqa(questions, None, split="test")
    assert [example.answers for example in test] == [(), ()]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question": {"question": ""}}, r"questions\[1\]: question"),
        ({"question": {"image_id": "x"}}, r"questions\[1\]: image_id"),
        ({"question": {"image_id": 7}}, r"question_id 262148001\): image_id 7, but 262148 in"),
        ({"question": {"question_id": 5}}, r"question_id 5\): no annotation of it"),
        ({"annotation": {"question_id": 262148000}}, r"annotations\[1\]: question_id 262148000 a second time"),
        ({"annotation": {"answers": []}}, r"annotations\[1\]: answers"),
        ({"annotation": {"answers": [{"text": "no"}]}}, r"annotations\[1\]: answers.0.answer"),
    ],
)
def test_broken_vqa_records_name_file_and_record(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as error:
        read_vqa(*vqa(tmp_path, **changes), split="val")
    assert str(tmp_path) in str(error.value)


def test_vqa_files_that_are_not_there_or_not_these(tmp_path):
    questions, annotations = vqa(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_vqa(tmp_path / "gone.json", None, split="val")
    with pytest.raises(DataError, match="has no list 'questions'"):
        read_vqa(annotations, None, split="val")
    with pytest.raises(DataError, match="no such folder or zip"):
        read_vqa(questions, annotations, split="val", images=tmp_path / "nowhere")
    (tmp_path / "val2014" / "COCO_val2014_000000262148.jpg").rename(tmp_path / "val2014" / "other.jpg")
    with pytest.raises(DataError, match=r"262148000\): image COCO_val2014_000000262148.jpg .* missing"):
        read_vqa(questions, annotations, split="val")


NLVR2 = {
    "validation": {"7": "True"}, "sentence": "The left image  has two dogs.", "left_url": "http://a/b.jpg",
    "writer": 3, "label": "True", "right_url": "http://a/c.jpg", "synset": "dog", "query": "dogs",
    "identifier": "dev-850-0-0", "extra_validations": {},
}  # fmt: skip


def nlvr2(folder, **changes):
    """Two json lines and a zip of images, named as in the release."""
    with zipfile.ZipFile(folder / "dev_img.zip", "w") as archive:
        for side in (0, 1):
            picture(folder / "x.png", (side, 0, 0))
            archive.write(folder / "x.png", f"dev/dev-850-0-img{side}.png")
    (folder / "x.png").unlink()
    second = NLVR2 | {"identifier": "dev-850-0-1", "label": "False"} | changes
    (folder / "dev.json").write_text(json.dumps(NLVR2) + "\n\n" + json.dumps(second) + "\n")
    return folder / "dev.json"


def test_nlvr2_straight_from_a_zip(tmp_path):
    first, second = read_nlvr2(nlvr2(tmp_path), split="val")
    assert (first.id, first.text, first.label) == ("dev-850-0-0", "The left image has two dogs.", "True")
    assert second.label == "False" and len(first.images) == 2
    assert [image.pixels()[0, 0, 0] for image in first.images] == [0, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": "maybe"}, "line 3: label"),
        ({"sentence": ""}, "line 3: sentence"),
        ({"identifier": "dev-850-0-0"}, "dev-850-0-0: a second record"),
        ({"identifier": "dev-851-0-0"}, r"line 3 \(dev-851-0-0\): image dev-851-0-img0.png missing"),
        ({"identifier": "../../x-0-0"}, "leaves the image folder"),
    ],
)
def test_broken_nlvr2_records(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_nlvr2(nlvr2(tmp_path, **changes), split="val")


SNLI_VE = {
    "Flickr30K_ID": "3416050480", "annotator_labels": ["neutral", "entailment"], "captionID": "3416050480.jpg#4",
    "gold_label": "neutral", "pairID": "3416050480.jpg#4r1n", "sentence1": "A person on a horse.",
    "sentence2": "A person is training his horse.",
}  # fmt: skip


def snli_ve(folder, **changes):
    picture(folder / "flickr30k-images" / "3416050480.jpg")
    lines = [SNLI_VE, SNLI_VE | {"gold_label": "-", "pairID": "b"}, SNLI_VE | {"pairID": "c"} | changes]
    (folder / "snli_ve_dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "snli_ve_dev.jsonl"


def test_snli_ve_leaves_out_records_without_gold_and_the_premise(tmp_path):
    first, second = read_snli_ve(snli_ve(tmp_path), split="val")
    assert (first.id, first.label, first.text) == ("3416050480.jpg#4r1n", "neutral", "A person is training his horse.")
    assert "A person on a horse." not in first.text and second.id == "c"
    told, _ = read_snli_ve(tmp_path / "snli_ve_dev.jsonl", split="val", premise=True)
    assert told.text == "A person on a horse. A person is training his horse."


@pytest.mark.parametrize(
    "changes, message",
    [({"gold_label": "yes"}, "line 3: gold_label"), ({"sentence2": None}, "line 3: sentence2"),
     ({"Flickr30K_ID": "9"}, r"line 3 \(c\): image 9.jpg or 9.png missing")],
)  # fmt: skip
def test_broken_snli_ve_records(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_snli_ve(snli_ve(tmp_path, **changes), split="val")


def test_cut_lines_are_named(tmp_path):
    file = nlvr2(tmp_path)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match="line 3 is not json"):
        read_nlvr2(file, split="val")


def test_generated_scenes_by_the_same_readers(scenes_folder):
    questions = read_vqa(
        scenes_folder / "v2_OpenEnded_scenes_val_questions.json", scenes_folder / "v2_scenes_val_annotations.json",
        split="val", images=scenes_folder / "images.zip",
    )  # fmt: skip
    assert len(questions) >= 60 and {example.kind for example in questions} == {"yes/no", "number", "other"}
    assert all(vqa_score(Counter(example.answers).most_common(1)[0][0], example.answers) == 1 for example in questions)
    pairs = read_nlvr2(scenes_folder / "nlvr2" / "train.json", split="train")
    assert Counter(example.label for example in pairs)["True"] == len(pairs) / 2
    hypotheses = read_snli_ve(scenes_folder / "snli_ve_train.jsonl", split="train")
    counts = Counter(example.label for example in hypotheses)
    assert len(counts) == 3 and len(set(counts.values())) == 1


def test_nlvr_v1_as_single_images(real_data):
    examples = read_nlvr1(real_data / "nlvr1")
    test = [example for example in examples if example.split == "test"]
    assert len(test) == 990
    share = sum(example.label == "True" for example in test) / len(test)
    assert max(share, 1 - share) == pytest.approx(0.5616, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_easy_vqa():
    examples = read_easy_vqa("test")
    assert len(examples) == 9673 and len({example.answers[0] for example in examples}) == 13
    assert examples[0].images[0].pixels().shape == (64, 64, 3)
