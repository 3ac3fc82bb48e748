"""Readers of the tasks' files on miniatures of the formats as published, and on generated scenes."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
from miniatures import PAIRS, QUESTIONS, RELATIONS, SNLI_VE, lines, nlvr2, picture, snli_ve, table, vqa, written

from vpworkbench.data.questions import answers_beside
from vpworkbench.data.task_readers import NLVR1_TASK, NLVR2, read_snli_ve, read_vqa
from vpworkbench.errors import DataError
from vpworkbench.metrics import vqa_score


def test_vqa_v2(tmp_path):
    first, second = read_vqa(vqa(tmp_path))["val"]
    assert (first.id, first.text, first.kind) == ("262148000", "Where is he looking?", "other")
    assert first.answers == ("down",) * 10 and second.answers == ("yes",)
    assert first.images[0].pixels().shape == (4, 6, 3) and first.images == second.images
    assert (first.answer, second.answer) == ("down", "yes") and first.origins == {"coco:262148"}


def test_vqa_test_dev_asks_about_the_images_of_test2015(tmp_path):
    questions = vqa(tmp_path, subset="test-dev2015")
    (tmp_path / "v2_mscoco_test-dev2015_annotations.json").unlink()
    assert not answers_beside(questions).exists()
    examples = read_vqa(questions)["test"]
    assert [example.answers for example in examples] == [(), ()]
    assert examples[0].images[0].name == "COCO_test2015_000000262148.jpg"


def test_cocos_questions_do_not_find_the_images_of_visual_genome(tmp_path):
    questions = vqa(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000262148.jpg").unlink()
    picture(tmp_path / "VG_100K" / "262148.jpg")
    missing = r"262148000\): image COCO_val2014_000000262148.jpg or 000000262148.jpg missing"
    with pytest.raises(DataError, match=missing):
        read_vqa(questions)
    own = written(tmp_path / "test.json", {"questions": [{"question_id": 1, "image_id": 262148, "question": "what?"}]})
    assert read_vqa(own)["test"][0].images[0].name == "262148.jpg"


def test_vqa_files_that_are_not_there_or_not_these(tmp_path):
    questions = vqa(tmp_path)
    annotations = answers_beside(questions)
    with pytest.raises(DataError, match="gone.json: no such file or folder"):
        read_vqa(tmp_path / "gone.json")
    with pytest.raises(
        DataError, match=r"unknown format \(.*annotations.* known here: VQA v2 questions; A-OKVQA.*; GQA"
    ):
        read_vqa(annotations)
    annotations.write_bytes(questions.read_bytes())
    with pytest.raises(DataError, match="annotations.json: unknown format .* known here: VQA v2 annotations"):
        read_vqa(questions)
    with pytest.raises(DataError, match="no such folder or zip"):
        read_vqa(vqa(tmp_path), images=tmp_path / "nowhere")


@pytest.mark.parametrize("subset", ["train2014", "val2014"])
def test_only_a_test_set_may_lack_its_annotations(tmp_path, subset):
    questions = vqa(tmp_path, subset=subset)
    (tmp_path / f"v2_mscoco_{subset}_annotations.json").unlink()
    with pytest.raises(DataError, match=rf"{questions.name}: .*put v2_mscoco_{subset}_annotations.json beside it"):
        read_vqa(questions)
    own = questions.rename(tmp_path / "mine.json")
    with pytest.raises(DataError, match="mine.json: .*put mine_annotations.json beside it"):
        read_vqa(own)
    tested = vqa(tmp_path, subset="test2015")
    (tmp_path / "v2_mscoco_test2015_annotations.json").unlink()
    assert len(read_vqa(tested)["test"]) == 2


def test_an_answer_of_blanks_is_none(tmp_path):
    picture(tmp_path / "1.jpg")
    record = {"image": "1.jpg", "question": "what?"}
    for name, answer in (("train", " "), ("val", [""]), ("val", [])):
        with pytest.raises(DataError, match=r"\[0\] \(1.jpg\): no answer; only test may lack it"):
            read_vqa(written(tmp_path / f"{name}.json", [record | {"answers": answer}]))
    (test,) = read_vqa(written(tmp_path / "test.json", [record | {"answers": [""]}]))["test"]
    (some,) = read_vqa(written(tmp_path / "val.json", [record | {"answers": ["", "it"]}]))["val"]
    assert test.answers == () and some.answers == ("", "it")  # the official score counts each of ten people


def test_ids_of_two_files_say_so(tmp_path):
    for name in ("train_a", "train_b"):
        table(tmp_path, rows=[row | {"id": 7 + place} for place, row in enumerate(QUESTIONS)]).rename(
            tmp_path / f"{name}.csv"
        )
    with pytest.raises(DataError, match="7: a second record of this id, in two files of this folder; drop one"):
        read_vqa(tmp_path)


def test_nlvr2_of_test_may_lack_labels(tmp_path):
    file = nlvr2(tmp_path, {"label": ...})
    assert [example.label for example in NLVR2.read(file.rename(tmp_path / "test1.json"))["test"]] == ["True", None]


def test_nlvr2_straight_from_a_zip(tmp_path):
    first, second = NLVR2.read(nlvr2(tmp_path))["val"]
    assert (first.id, first.text, first.label) == ("dev-850-0-0", "The left image has two dogs.", "True")
    assert second.label == "False" and len(first.images) == 2
    assert [image.pixels()[0, 0, 0] for image in first.images] == [0, 1]


def test_nlvr2_of_the_training_set_lies_in_numbered_folders(tmp_path):
    file = nlvr2(tmp_path)
    for side in (0, 1):
        picture(tmp_path / "images" / "train" / "27" / f"dev-850-0-img{side}.png")
    examples = NLVR2.read(file, images=tmp_path / "images")["val"]
    assert examples[0].images[1].name == "train/27/dev-850-0-img1.png"


def test_snli_ve_leaves_out_records_without_gold_and_the_premise(tmp_path):
    file = snli_ve(tmp_path)
    lines(file, SNLI_VE, SNLI_VE | {"gold_label": "-", "pairID": "b"}, SNLI_VE | {"pairID": "c"})
    first, second = read_snli_ve(file)["val"]
    assert (first.id, first.label, first.text) == ("3416050480.jpg#4r1n", "neutral", "A person is training his horse.")
    assert "A person on a horse." not in first.text and second.id == "c"
    assert first.origins == {"flickr:3416050480"}
    with_premise, _ = read_snli_ve(file, premise=True)["val"]
    assert with_premise.text == "A person on a horse. A person is training his horse."


def test_snli_ve_as_its_generator_writes_it(tmp_path):
    file = snli_ve(tmp_path)
    photo = {"Flikr30kID": "3416050480.jpg"}
    lines(file, {key: value for key, value in SNLI_VE.items() if key != "Flickr30K_ID"} | photo)
    (only,) = read_snli_ve(file)["val"]
    assert only.images[0].name == "3416050480.jpg" and only.origins == {"flickr:3416050480"}


def rows_of(read, file, **options):
    return [example for examples in read(file, **options).values() for example in examples]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_tables_for_each_task(tmp_path, kind):
    asked = rows_of(read_vqa, table(tmp_path, rows=QUESTIONS, kind=kind))
    assert {example.answers for example in asked} == {("red",), ("2",)} and asked[0].label is None
    pairs = rows_of(NLVR2.read, table(tmp_path, rows=PAIRS, kind=kind))
    assert {(pair.id, pair.label, len(pair.images)) for pair in pairs} == {("a", "True", 2), ("b", "False", 2)}
    relations = rows_of(read_snli_ve, table(tmp_path, rows=RELATIONS, kind=kind))
    expected = [("train", "entailment"), ("val", "contradiction")]
    assert [(example.split, example.label) for example in relations] == expected
    single = [row | {"label": label} for row, label in zip(QUESTIONS, ("TRUE", "0"), strict=True)]
    statements = rows_of(NLVR1_TASK.read, table(tmp_path, rows=single, kind=kind))
    assert {example.id[-1]: example.label for example in statements} == {
        number: label for number, label in zip("23" if kind == "csv" else "12", ("True", "False"), strict=True)
    }


def test_labels_may_lack_in_the_test_split_alone(tmp_path):
    rows = [RELATIONS[0], RELATIONS[1] | {"label": "", "split": "test"}]
    assert [example.label for example in rows_of(read_snli_ve, table(tmp_path, rows=rows))] == ["entailment", None]


def test_labels_of_json_may_be_plain_values(tmp_path):
    rows = [{"image": "photos/2.jpg", "text": "x", "label": True}, {"image": "photos/3.jpg", "text": "y", "label": 0}]
    file = table(tmp_path, rows=[row | {"split": "val"} for row in rows], kind="jsonl")
    assert [example.label for example in NLVR1_TASK.read(file)["val"]] == ["True", "False"]


def test_generated_scenes_by_the_same_readers(scenes_folder):
    questions = read_vqa(scenes_folder)["val"]
    assert len(questions) >= 60 and {example.kind for example in questions} == {"yes/no", "number", "other"}
    assert all(vqa_score(Counter(example.answers).most_common(1)[0][0], example.answers) == 1 for example in questions)
    pairs = NLVR2.read(scenes_folder)["train"]
    assert Counter(example.label for example in pairs)["True"] == len(pairs) / 2
    hypotheses = read_snli_ve(scenes_folder)["train"]
    counts = Counter(example.label for example in hypotheses)
    assert len(counts) == 3 and len(set(counts.values())) == 1
    assert not any(example.origins for example in (*questions, *pairs, *hypotheses))


def test_scenes_as_a_table_are_the_same_examples(tmp_path, scenes_folder):
    few = read_snli_ve(scenes_folder / "snli_ve_train.jsonl")["train"][:12]
    rows = [{"image": e.images[0].name, "text": e.text, "label": e.label, "split": "train", "id": e.id} for e in few]
    again = read_snli_ve(lines(tmp_path / "mine.jsonl", *rows), images=scenes_folder / "images.zip")
    assert again["train"] == few


def test_nlvr_v1_as_single_images(real_data):
    test = NLVR1_TASK.read(real_data / "nlvr1")["test"]
    assert len(test) == 990
    assert test[0].id == "test-3776-0-0.png"  # as the release's script reads predictions
    share = sum(example.label == "True" for example in test) / len(test)
    assert max(share, 1 - share) == pytest.approx(0.5616, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_easy_vqa():
    splits = read_vqa("easy-vqa")
    examples = splits["test"]
    assert len(examples) == 9673 and len({example.answers[0] for example in examples}) == 13
    assert examples[0].images[0].pixels().shape == (64, 64, 3)
    assert {example.images[0].name[-5] for example in splits["val"]} == {"0"}
