"""Layouts as published, and as people move and rename them; the doctor and the run read the same of all of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import LAYOUTS
from miniatures import coco, karpathy, nlvr1, nlvr2, picture, snli_ve, table, visual_genome, vqa, written, zipped

from vpworkbench.data import doctor
from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.doctor import diagnose
from vpworkbench.data.readers import format_of
from vpworkbench.data.splits import evaluation_records
from vpworkbench.data.task_readers import FORMATS, TASK_FILES, read_nlvr2, read_snli_ve
from vpworkbench.errors import DataError
from vpworkbench.tasks.nlvr import NLVR2

SPLITS = ("train", "val", "test")
MINIATURES = {
    "karpathy": (karpathy, "captions"),
    "coco": (coco, "captions"),
    "vg": (visual_genome, "captions"),
    "nlvr1": (nlvr1, "captions"),
    "table": (table, "captions"),
    "vqa": (vqa, "vqa"),
    "nlvr2": (nlvr2, "nlvr2"),
    "snli-ve": (snli_ve, "snli-ve"),
}
SETS = MINIATURES | {name: (write, use) for name, (write, use, _) in LAYOUTS.items()}


def read_for(use: str, path: Path) -> dict[str, list]:
    """The records that a run reads, by split."""
    if use != "captions":
        return TASK_FILES[use].read(path)
    pictures = read_pictures(path)
    return {split: [one for one in pictures if one.split == split] for split in SPLITS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_as_published(tmp_path, name):
    write, use, expected = LAYOUTS[name]
    write(tmp_path)
    splits = read_for(use, tmp_path)
    if any(expected.values()):
        assert {split: [one.id for one in splits[split]] for split in SPLITS} == expected
    assert all(image.pixels().shape == (4, 6, 3) for some in splits.values() for one in some for image in one.images)


# ------------------------------------------------------------------------------- the doctor and the run agree

ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".token", ".txt")


def annotations_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(ANNOTATIONS))


def as_it_is(folder: Path) -> Path:
    return folder


def nested(folder: Path) -> Path:
    shutil.move(folder, folder.parent / "outer" / "inner")
    return folder.parent / "outer"


def texts_moved(folder: Path) -> Path:
    for path in annotations_in(folder):
        target = folder / "texts" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder


def images_moved(folder: Path) -> Path:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".jpg", ".png", ".zip"):
            target = folder / "pictures" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return folder


def images_zipped(folder: Path) -> Path:
    for place in {path.parent for path in folder.rglob("*") if path.suffix in (".jpg", ".png")} - {folder}:
        zipped(place.parent / f"{place.name}.zip", *sorted(place.iterdir()), under=f"{place.name}/")
        place.rmdir()
    return folder


def renamed(folder: Path) -> Path:
    """Names of one's own, which still state the split; of VQA, also the two parts of a pair; suffixes in capitals."""
    for path in annotations_in(folder):
        path.rename(path.with_name(f"my_{path.stem}{path.suffix.upper()}"))
    return folder


def without_names(folder: Path) -> Path:
    """Names that state nothing: what was `val` trains now, or its answers are not found, for both."""
    for number, path in enumerate(annotations_in(folder)):
        path.rename(path.with_name(f"file{number}{path.suffix}"))
    return folder


def linked(folder: Path) -> Path:
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    return link


def beside_others(folder: Path) -> Path:
    """In one folder with files that are no annotations, and with a list of results."""
    written(folder / "config.json", {"a": [{"b": 1}]})
    written(folder / "results.json", [{"question_id": 1, "answer": "x"}])
    (folder / "empty.json").touch()
    (folder / "notes.csv").write_text("name,value\na,1\n")
    return folder


def cut(folder: Path) -> Path:
    path = annotations_in(folder)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return folder


def an_image_lost(folder: Path) -> Path:
    images = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    if images:
        images[0].unlink()
    return folder


def twice(folder: Path) -> Path:
    """A copy of an annotation file beside it."""
    path = annotations_in(folder)[-1]
    shutil.copy(path, path.with_name(f"copy_{path.name}"))
    return folder


def by_file(folder: Path) -> Path:
    """One file of the set, instead of its folder."""
    return next(path for path in annotations_in(folder) if format_or_none(path) not in (None, "vqa-answers"))


def format_or_none(path: Path) -> str | None:
    try:
        return format_of(path, FORMATS).name
    except DataError:
        return None


CHANGES: list[Callable[[Path], Path]] = [
    as_it_is,
    nested,
    texts_moved,
    images_moved,
    images_zipped,
    renamed,
    without_names,
    linked,
    beside_others,
    cut,
    an_image_lost,
    twice,
    by_file,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", SETS)
def test_the_doctor_and_the_run_agree(tmp_path, monkeypatch, name, change):
    """A set is sound where a run takes it, and nowhere else; then both have the same records."""
    monkeypatch.setattr(doctor, "_cut_texts", lambda *given: [])  # slow, and no part of the question
    write, use = SETS[name]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    path = change(tmp_path / "set")
    try:
        read, refused = read_for(use, path), ""
    except DataError as error:
        read, refused = {}, str(error)
    try:
        found = diagnose(path)
        errors = found.errors
    except DataError as error:
        errors = [str(error)]
    assert bool(refused) == bool(errors), f"run: {refused or 'reads it'}; doctor: {errors or 'sound'}"
    if not refused:
        (counts,) = found.tables.values()
        assert {split: row["records"] for split, row in counts.items()} == {
            split: len(some) for split, some in read.items() if some
        }
    if change in (as_it_is, nested, images_moved, linked, beside_others):
        assert not refused


@pytest.mark.parametrize("name", SETS)
def test_a_file_has_one_format_at_most(tmp_path, name):
    """So the order of formats decides nothing, and every reader recognises the same."""
    SETS[name][0](tmp_path)
    for path in annotations_in(tmp_path):
        fitting = []
        for form in FORMATS:
            try:
                fitting.append(format_of(path, [form]).name)
            except DataError:
                continue
        assert len(fitting) <= 1


# ------------------------------------------------------------------------------------- what each layout means


def written_layout(name: str, folder: Path) -> Path:
    LAYOUTS[name][0](folder)
    return folder


def test_the_questions_of_gqa_have_one_answer_each(tmp_path):
    splits = read_for("vqa", written_layout("gqa", tmp_path))
    assert splits["train"][0].answers == ("yes",)
    assert [one.id for one in splits["test"]] == ["04"]  # testdev; the questions whose answers are withheld are aside
    assert splits["train"][0].images[0].name.endswith("n1.jpg")


def test_a_okvqa_leaves_out_difficult_questions(tmp_path):
    splits = read_for("vqa", written_layout("a-okvqa", tmp_path))
    (asked,) = splits["val"]
    assert asked.answers == ("b",) * 9 + ("bee",) and asked.images[0].name == "000000000002.jpg"
    assert not splits["test"][0].answers
    path = tmp_path / "aokvqa_v1p0_val.json"
    path.write_text(path.read_text().replace("direct_answers", "answers_direct"))
    with pytest.raises(DataError, match=r"aokvqa_v1p0_val.json: \[0\] \(val-ab\): no direct_answers; only test"):
        read_for("vqa", tmp_path)


def test_a_record_of_gqa_that_is_none_is_named(tmp_path):
    written_layout("gqa", tmp_path)
    path = tmp_path / "questions1.2" / "train_balanced_questions.json"
    path.write_text(path.read_text()[:-1] + ', "07": [1]}')
    with pytest.raises(DataError, match='train_balanced_questions.json: "07": Input should be a valid dictionary'):
        read_for("vqa", tmp_path)
    path.write_text(path.read_text().replace("[1]", '{"imageId": "n6", "question": "Is it?"}'))
    with pytest.raises(DataError, match=r'"07" \(07\): no answer; only test may lack it'):
        read_for("vqa", tmp_path)


def test_lists_of_test_images_do_not_stop_an_exclusion(tmp_path):
    held_out = evaluation_records(written_layout("coco-annotations", tmp_path))
    assert [one.id for one in held_out] == ["000000000003.jpg", "000000000004.jpg"]


def test_vqa_cp_has_its_images_in_two_subsets_of_coco(tmp_path):
    splits = read_for("vqa", written_layout("vqa-cp", tmp_path))
    assert splits["test"][0].images[0].name.endswith("COCO_val2014_000000000020.jpg")
    assert splits["test"][0].origins == {"coco:20"} and len(splits["test"][0].answers) == 10


def test_karpathys_images_of_2014_are_found_in_the_folders_of_2017(tmp_path):
    splits = read_for("captions", written_layout("karpathy-2017", tmp_path))
    assert [str(one.image).rsplit("/", 2)[1:] for one in splits["train"]] == [
        ["train2017", "000000000001.jpg"],
        ["train2017", "000000000002.jpg"],
    ]
    assert splits["val"][0].origins == {"coco:3"}


def test_coco_of_2017_is_found_in_the_folders_of_2014(tmp_path):
    path = coco(tmp_path, subset="val2017")
    for image in sorted((tmp_path / "val2017").iterdir()):
        target = tmp_path / "train2014" / f"COCO_train2014_{image.name}"
        target.parent.mkdir(exist_ok=True)
        image.rename(target)
    assert len(read_pictures(path)) == 2


def test_karpathys_lists_have_every_caption(tmp_path):
    splits = read_for("captions", written_layout("karpathy-lists", tmp_path))
    assert splits["train"][0].captions == ("a dog 1 1", "a dog 1 2")
    assert splits["val"][0].captions == ("a dog 3", "a dog 3", "a cat")  # each is a query, as in Karpathy's own file
    assert splits["test"][0].origins == {"coco:4"}


@pytest.mark.parametrize("name, use, key", [("karpathy-lists", "captions", "caption"), ("blip-vqa", "vqa", "question")])
def test_a_list_whose_first_record_lacks_a_key_is_not_overlooked(tmp_path, name, use, key):
    written_layout(name, tmp_path)
    path = next(file for file in annotations_in(tmp_path) if file.name.endswith("_train.json"))
    records = json.loads(path.read_text())
    del records[0][key]
    written(path, records)
    with pytest.raises(DataError, match=rf"_train.json: \[0\]: (text|{key}): Field required"):
        read_for(use, tmp_path)


def test_a_path_of_another_machine_needs_one_folder_that_agrees(tmp_path):
    splits = read_for("captions", written_layout("albef-lists", tmp_path / "a"))
    assert splits["val"][0].image.name == "val2014/COCO_val2014_000000000002.jpg"
    assert splits["val"][0].origins == {"coco:2"}
    here, other = picture(tmp_path / "far" / "away" / "1.jpg", (9, 0, 0)), picture(tmp_path / "b" / "photos" / "1.jpg")
    read = [
        read_pictures(written(tmp_path / "b" / "train.json", [{"image": path, "caption": "x"}]))[0].image
        for path in (str(here), "/home/her/photos/1.jpg")
    ]
    assert [f"{image}" for image in read] == [str(here), str(other)]
    with pytest.raises(DataError, match=r"train.json: \[0\]: image /home/her/pictures/1.jpg missing"):
        read_pictures(written(tmp_path / "b" / "train.json", [{"image": "/home/her/pictures/1.jpg", "caption": "x"}]))
    alone = written(tmp_path / "c" / "train.json", [{"image": str(here), "caption": "x"}])  # no image beside it
    assert read_pictures(alone)[0].image.pixels().shape == (4, 6, 3)


def test_e_snli_ve_2_takes_the_caption_as_its_premise(tmp_path):
    path = written_layout("e-snli-ve-2", tmp_path)
    first = read_for("snli-ve", path)["train"][1]
    assert (first.text, first.label, first.origins) == ('He, "asleep".', "neutral", {"flickr:1"})
    assert read_snli_ve(path, premise=True)["test"][0].text == 'A man. He, "asleep".'


def test_flickr8k_is_split_by_its_lists(tmp_path, caplog):
    splits = read_for("captions", written_layout("flickr8k", tmp_path))
    assert splits["val"][0].captions == ("A child in 1001_aa.jpg 0 .", "A child in 1001_aa.jpg 1 .")
    assert splits["train"][0].origins == {"flickr:1000"}
    assert "1 images are in no list of a split and left out" in caplog.text


def test_flickr30k_without_lists_holds_out_a_tenth(tmp_path, caplog):
    splits = read_for("captions", written_layout("flickr30k", tmp_path))
    assert len(splits["train"]) + len(splits["val"]) == 12 and 1 <= len(splits["val"]) <= 4
    assert splits["train"][0].origins and "chosen by their names, validate" in caplog.text


def test_a_line_of_captions_that_is_broken_is_named(tmp_path):
    written_layout("flickr30k", tmp_path)
    with (tmp_path / "results_20130124.token").open("a") as file:
        file.write("1000.jpg no tab\n")
    with pytest.raises(
        DataError, match="results_20130124.token: line 25: not an image, #, a number, a tab and a caption"
    ):
        read_pictures(tmp_path)


def test_nlvr2s_subsets_are_scored_on_request(tmp_path):
    written_layout("nlvr2-repository", tmp_path)
    assert {one.kind for one in read_nlvr2(tmp_path)["val"]} == {""}
    examples = read_nlvr2(tmp_path, subsets=True)["val"]
    assert [one.kind for one in examples] == ["balanced", "unbalanced"]
    scores = NLVR2.more_scores(examples, {"dev-1-0-0": "True", "dev-2-0-0": "False"})
    assert scores == {"consistency": 0.5, "accuracy_balanced": 1.0, "accuracy_unbalanced": 0.0}
    balanced = tmp_path / "nlvr2" / "data" / "balanced"
    assert [one.id for one in TASK_FILES["nlvr2"].read(balanced / "balanced_dev.json", tmp_path / "images")["val"]] == [
        "dev-1-0-0"
    ]
    with pytest.raises(DataError, match=r"subsets are asked for, but there is no file balanced_\*.json"):
        read_nlvr2(tmp_path / "nlvr2" / "data" / "dev.json", images=tmp_path / "images", subsets=True)


def test_true_and_false_in_every_spelling(tmp_path):
    for label, expected in ((True, "True"), ("FALSE", "False"), (0, "False"), ("1", "True"), ("true", "True")):
        examples = TASK_FILES["nlvr2"].read(nlvr2(tmp_path, {"label": label}))["val"]
        assert examples[1].label == expected
        assert bool(read_pictures(nlvr1(tmp_path / "one", {"label": label}))[6].captions) == (expected == "True")
    for label in (2, 1.0, "yes", ""):
        with pytest.raises(DataError, match="dev.json: line 2: label"):
            TASK_FILES["nlvr2"].read(nlvr2(tmp_path, {"label": label}))


def test_ids_may_be_digits_in_quotes(tmp_path):
    path = coco(tmp_path, image={"id": "25"}, caption={"image_id": "25"})
    assert Counter(len(one.captions) for one in read_pictures(path)) == {1: 1, 3: 1}
    quoted = {"question_id": "262148001", "image_id": "262148"}
    second = TASK_FILES["vqa"].read(vqa(tmp_path / "q", question=quoted))["val"][1]
    assert (second.id, second.answers) == ("262148001", ("yes",))


def test_numbers_as_labels_are_announced(tmp_path, caplog):
    splits = read_for("snli-ve", written_layout("snli-ve-numbers", tmp_path))
    assert [splits[split][0].label for split in SPLITS] == ["entailment", "neutral", "contradiction"]
    assert "labels are numbers, read as 0 entailment, 1 neutral, 2 contradiction" in caplog.text
    with pytest.raises(DataError, match="line 2: gold_label"):
        TASK_FILES["snli-ve"].read(snli_ve(tmp_path / "x", {"gold_label": 3}))


def test_coco_as_published(real_data):
    """159 photographs of COCO 2017 with its own files, boxes beside the captions."""
    folder = real_data / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"no coco_mini at {real_data} (set VPW_DATA)")
    found = diagnose(folder, images=False)
    assert found.is_sound and {split: row["images"] for split, row in found.tables["coco"].items()} == {
        "train": 80,
        "val": 79,
    }
    assert [Path(line.split(": ")[0]).name for line in found.unread] == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    assert len(read_pictures(folder)) == 159
