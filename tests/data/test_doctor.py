"""All faults of a set at once, with file and record; what published sets have is a warning."""

from __future__ import annotations

import json
import shutil

import pytest
from miniatures import (
    PAIRS,
    QUESTIONS,
    RELATIONS,
    coco,
    karpathy,
    lines,
    nlvr1,
    nlvr2,
    picture,
    resized,
    snli_ve,
    table,
    visual_genome,
    vqa,
    written,
)

from vpworkbench.cli import main
from vpworkbench.data.doctor import diagnose
from vpworkbench.errors import DataError


def test_generated_scenes_are_sound(scenes_folder):
    found = diagnose(scenes_folder)
    assert found.is_sound and set(found.tables) == {"karpathy", "vqa", "nlvr2", "snli-ve"}
    assert found.tables["karpathy"]["train"] == {"records": 60, "images": 60, "texts": 300, "too_long": 0}
    assert found.tables["vqa"]["val"]["images"] == 20 and "unanswerable" in found.tables["vqa"]["val"]
    assert "settings.json: unknown format (its keys are images, val, test" in found.unread[0] and len(found.unread) == 1


@pytest.mark.parametrize(
    "write, kind",
    [
        (karpathy, "karpathy"),
        (coco, "coco"),
        (visual_genome, "vg"),
        (nlvr1, "nlvr1"),
        (vqa, "vqa"),
        (nlvr2, "nlvr2"),
        (snli_ve, "snli-ve"),
        (table, "table (captions)"),
    ],
)
def test_every_format_by_its_file_and_by_its_folder(tmp_path, write, kind):
    path = write(tmp_path)
    for place in (path, tmp_path):
        found = diagnose(place)
        assert found.is_sound and list(found.tables) == [kind], str(found)
        assert sum(row["records"] for row in found.tables[kind].values()) >= 2
    images = list(tmp_path.rglob("*.jpg")) + list(tmp_path.rglob("*-0.png"))
    if images:  # not in a zip
        images[0].write_bytes(images[0].read_bytes()[:-9] + b"cut")
        images[0].write_bytes(b"\xff\xd8 cut")
        assert any("cannot be decoded" in error for error in diagnose(path).errors)


@pytest.mark.parametrize(
    "rows, kind",
    [
        (QUESTIONS, "table (vqa)"),
        (PAIRS, "table (nlvr2)"),
        (RELATIONS, "table (snli-ve)"),
        ([{key: value for key, value in row.items() if key != "label"} for row in QUESTIONS], "table (captions)"),
    ],
)
def test_what_a_table_is_for_is_told_by_its_labels(tmp_path, rows, kind):
    assert list(diagnose(table(tmp_path, rows=rows)).tables) == [kind]


def test_tables_for_different_tasks_are_no_set(tmp_path):
    """A run reads all tables of a folder for one task."""
    table(tmp_path, rows=QUESTIONS)
    table(tmp_path / "pairs", rows=PAIRS)
    (error,) = diagnose(tmp_path).errors
    assert error.endswith("table (vqa) and table (nlvr2), which a run reads as one; name a file")


def test_a_label_among_others_that_is_none_is_an_error(tmp_path):
    rows = [RELATIONS[0], RELATIONS[1], RELATIONS[0] | {"text": "x", "label": "entails"}]
    (error,) = diagnose(table(tmp_path, rows=rows)).errors
    assert "line 4" in error and "label 'entails'; expected one of entailment" in error
    (first, *_) = diagnose(table(tmp_path, rows=rows), task="nlvr1").errors
    assert "expected one of true, false" in first


def test_all_faults_of_all_files_at_once(tmp_path):
    vqa(tmp_path, question={"question": ""})
    nlvr2(tmp_path / "pairs", {"label": "maybe"})
    snli_ve(tmp_path / "entailment", {"Flickr30K_ID": "gone"})
    (tmp_path / "entailment" / "flickr30k-images" / "3416050480.jpg").write_bytes(b"\xff\xd8 cut")
    karpathy(tmp_path / "captions", {"filename": "../../secret.jpg"})
    (tmp_path / "captions" / "dataset_cut.json").write_text('{"images": [')
    visual_genome(tmp_path / "vg", region={"phrase": 3})
    found = diagnose(tmp_path)
    told = [
        "questions[1]: question",
        "is none of the questions",
        "line 2: label",
        "gone.jpg or gone.png missing",
        "cannot be decoded",
        "leaves the image folder",
        "cut.json: not JSON",
        "[1]: regions.0.phrase",
    ]
    assert len(found.errors) == len(told)
    assert all(any(part in error for error in found.errors) for part in told)
    assert all(str(tmp_path) in error for error in found.errors)
    assert found.tables["snli-ve"]["val"]["records"] == 1 and found.tables["karpathy"]["train"]["records"] == 2


def test_every_broken_line_is_listed(tmp_path):
    path = nlvr2(tmp_path)
    path.write_text(path.read_text().splitlines()[0] + "\n{cut\n7\n" + '{"identifier": 3}\n')
    places = [error.split(": ")[1][:6] for error in diagnose(path).errors]
    assert places == ["line 2", "line 3", "line 4"]


def test_overlaps_duplicates_and_long_texts_are_warnings(tmp_path):
    records = []
    for number, split in enumerate(("train", "train", "val")):
        picture(tmp_path / "images" / f"{number}.png")
        sentence = {"raw": "a very long caption " * (20 if number == 0 else 1)}
        records.append({"filename": f"{number}.png", "split": split, "sentences": [sentence]})
    found = diagnose(written(tmp_path / "dataset_mine.json", {"images": records}))
    assert found.is_sound
    assert found.warnings == [
        "karpathy: 1 texts of train are longer than 40 tokens and will be cut",
        "karpathy: 2 image files are copies of other files",
        "karpathy: 1 texts are said of the same image again",
        "1 images are in train of karpathy and in val of karpathy",
    ]


def test_overlaps_are_found_by_id(tmp_path):
    coco(tmp_path, subset="train2014")
    for path in coco(tmp_path, subset="val2017").parents[1].glob("val2017/*"):
        resized(path, path)
    assert diagnose(tmp_path).warnings[-1] == "2 images are in train of coco and in val of coco"


def test_overlaps_of_captioned_sets_with_each_other(tmp_path):
    """COCO and Visual Genome together, as the paper has them: one image by its content, one by its id."""
    held_out = coco(tmp_path, subset="val2014").parents[1] / "val2014"
    visual_genome(tmp_path, data={"coco_id": 25})
    resized(held_out / f"COCO_val2014_{25:012d}.jpg", tmp_path / "VG_100K" / "2.jpg")
    shutil.copy(held_out / "COCO_val2014_000000000009.jpg", tmp_path / "VG_100K_2" / "1.jpg")
    found = diagnose(tmp_path)
    assert found.is_sound and found.warnings == ["2 images are in train of vg and in val of coco"]
    (lacking,) = diagnose(tmp_path / "annotations", places=tmp_path).warnings
    assert lacking == "captions: no training records; a run needs some, of this set or another"


def test_lengths_are_counted_as_a_run_counts_them(tmp_path):
    """A word that training has once is spelled: ten letters are ten tokens."""
    rows = [{"image": "photos/2.jpg", "text": text} for text in ("abcdefghij", "word word word word")]
    path = table(tmp_path, rows=[row | {"split": "train"} for row in rows])
    assert diagnose(path, text_tokens=11).tables["table (captions)"]["train"]["too_long"] == 1
    assert diagnose(path, text_tokens=12).tables["table (captions)"]["train"]["too_long"] == 0


def test_answers_out_of_vocabulary(tmp_path):
    picture(tmp_path / "1.jpg")
    picture(tmp_path / "2.jpg", (9, 0, 0))
    rows = [{"image": "1.jpg", "text": f"what {k}?", "label": "red", "split": "train"} for k in range(3)]
    rows += [
        {"image": "2.jpg", "text": f"what {k}?", "label": label, "split": "val"}
        for k, label in enumerate(("Red.", "blue"))
    ]
    path = lines(tmp_path / "mine.jsonl", *rows)
    found = diagnose(path, answer_count=4)
    assert found.tables["table (vqa)"]["train"]["unanswerable"] == 0
    assert found.tables["table (vqa)"]["val"]["unanswerable"] == 1 and found.is_sound
    assert "5 of 5 questions have one to three answers: their targets and scores are exact matches" in found.warnings[0]
    assert found.warnings[1:] == [
        "table (vqa): 1 of 2 questions of val have none of the 1 answers that are given for at least 4 questions of "
        "training and validation: they count as 0"
    ]
    assert diagnose(path, answer_count=5).tables["table (vqa)"]["train"]["unanswerable"] == 3


def test_a_damaged_zip_hides_no_other_fault(tmp_path):
    nlvr1(tmp_path, {"label": "maybe"})
    snli_ve(tmp_path)
    (tmp_path / "other.zip").write_bytes(b"PK cut")
    errors = diagnose(tmp_path).errors
    assert len(errors) == 2 and "other.zip: not a complete zip" in errors[0] and "line 2: label" in errors[1]


def test_answers_without_their_questions_are_not_read(tmp_path):
    vqa(tmp_path).unlink()
    with pytest.raises(DataError, match="annotations.json: annotations without their questions beside them"):
        diagnose(tmp_path)
    karpathy(tmp_path)
    (tmp_path / "predictions.csv").write_text("identifier,label\na,True\n")
    first, second = diagnose(tmp_path).unread
    assert "predictions.csv" in first and "v2_mscoco_val2014_annotations.json" in second


def test_an_image_in_a_damaged_zip_and_images_elsewhere(tmp_path):
    path = nlvr2(tmp_path)
    archive = tmp_path / "dev_img.zip"
    data = archive.read_bytes()
    place = data.index(b"IHDR")
    archive.write_bytes(data[:place] + b"XXXX" + data[place + 4 :])  # its checksum does not hold any more
    moved = archive.rename(tmp_path.parent / f"{tmp_path.name}.zip")
    (error,) = diagnose(path, places=moved).errors
    assert "img0.png: image missing or unreadable (Bad CRC-32" in error
    assert diagnose(path, places=moved, images=False).is_sound  # not looked into
    (error,) = diagnose(path).errors
    assert "no images beside it" in error


def test_nlvr_v1_as_published_has_overlaps_and_is_sound(real_data):
    found = diagnose(real_data / "nlvr1", images=False)
    assert found.is_sound and found.tables["nlvr1"]["test"]["records"] == 990
    assert "31 images are in train of nlvr1 and in test of nlvr1" in found.warnings


def test_exit_codes_table_and_json(tmp_path, capsys):
    broken = snli_ve(tmp_path / "e", {"gold_label": "yes"})
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(broken), "--json"])
    assert stop.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] is False and "line 2: gold_label" in told["errors"][0]
    karpathy(tmp_path / "k")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path / "k"), "--no-images", "--place", str(tmp_path / "k" / "images")])
    assert stop.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].endswith("sound, 0 errors, 0 warnings")
    assert [line.split() for line in shown[1:4]] == [
        ["karpathy", "records", "images", "texts", "too", "long"],
        ["train", "2", "2", "2", "0"],
        ["val", "1", "1", "1", "0"],
    ]


def test_every_error_is_printed(tmp_path, capsys):
    rows = [{"image": f"{number}.jpg", "text": "x"} for number in range(60)]
    picture(tmp_path / "other.jpg")
    with pytest.raises(SystemExit):
        main(["doctor", str(lines(tmp_path / "mine.jsonl", *rows))])
    shown = capsys.readouterr().out
    assert all(f"line {number}: image {number - 1}.jpg missing" in shown for number in range(1, 61))


def test_nothing_to_examine(tmp_path, capsys):
    with pytest.raises(DataError, match="no such file or folder"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no set of a known format"):
        diagnose(tmp_path)
    with pytest.raises(DataError, match="unknown format"):
        diagnose(written(tmp_path / "a.json", {"a": 1}))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path), "--task", "vqaa"])
    assert stop.value.code == 2 and "did you mean 'vqa'" in capsys.readouterr().err
