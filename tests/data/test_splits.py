"""No image of an evaluation split is trained on: by the ids that sets have in common, and by content."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import pytest
from layouts import LAYOUTS
from miniatures import coco, karpathy, lines, picture, resized, snli_ve, table, visual_genome, vqa, written
from PIL import Image

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import skipping_missing, write_skipped
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import check_sizes, evaluation_records, load_held_out, load_splits, split_pictures
from vpworkbench.data.task_readers import VQA
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.settings import DataSettings, pretrain_settings
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train.finetune import prepare_task
from vpworkbench.train.pretrain import prepare


def ids(pictures):
    return [picture.id for picture in pictures]


def dropped(caplog):
    return [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]


def copy(source, target):
    target.write_bytes(source.read_bytes())


# ------------------------------------------------------------------------------------------- captioned sets


def test_held_out_scenes_do_not_depend_on_those_of_training(scratch):
    settings = DataSettings(scenes=SceneSettings(images=30, val=12, test=4))
    ours, theirs = load_held_out(settings), load_splits(settings)["val"]
    assert ids(ours) == ids(theirs) and len(ours) == 12
    assert [one.captions for one in ours] == [one.captions for one in theirs]
    assert Pixels(96).stack(ours).equal(Pixels(96).stack(theirs))


def test_training_images_of_an_evaluation_split_are_dropped(tmp_path, caplog):
    path = karpathy(tmp_path)
    copy(tmp_path / "images" / "101.jpg", tmp_path / "images" / "102.jpg")
    splits = split_pictures([read_pictures(path)])
    assert ids(splits["train"]) == ["100.jpg"] and ids(splits["val"]) == ["101.jpg"]
    assert dropped(caplog) == ["1 training images are also in val or test: dropped"]


def test_the_same_photograph_under_other_bytes_is_dropped_by_its_id(tmp_path, caplog):
    """COCO's 9 trains in one set and tests in the other, in another size: no hash would find it."""
    told = {
        "dataset": "coco",
        "images": [
            {
                "filename": "COCO_val2014_000000000009.jpg",
                "filepath": "val2014",
                "cocoid": 9,
                "split": "test",
                "sentences": [{"raw": "a bath"}],
            }
        ],
    }
    train2014 = coco(tmp_path / "c").parents[1] / "train2014"
    resized(train2014 / f"COCO_train2014_{9:012d}.jpg", tmp_path / "k" / "val2014" / f"COCO_val2014_{9:012d}.jpg")
    sets = [read_pictures(tmp_path / "c"), read_pictures(written(tmp_path / "k" / "dataset_coco.json", told))]
    splits = split_pictures(sets)
    assert ids(splits["train"]) == ["COCO_train2014_000000000025.jpg"]
    assert dropped(caplog) == ["1 training images are also in val or test: dropped"]


def test_ids_reach_round_corners(tmp_path, caplog):
    """Flickr30k holds 7025 out; Visual Genome's 2 says it is that and COCO's 25: so COCO's 25 leaves as well."""
    told = {"dataset": "flickr30k", "images": [{"filename": "7025.jpg", "split": "test", "sentences": [{"raw": "x"}]}]}
    path = coco(tmp_path / "c", image={"flickr_url": ""})
    genome = visual_genome(tmp_path / "v", data={"coco_id": 25, "flickr_id": 7025})
    photograph = path.parents[1] / "train2014" / f"COCO_train2014_{25:012d}.jpg"
    resized(photograph, tmp_path / "v" / "VG_100K" / "2.jpg")
    resized(resized(photograph, tmp_path / "small.jpg"), tmp_path / "f" / "7025.jpg")
    sets = [
        read_pictures(path),
        read_pictures(genome),
        read_pictures(written(tmp_path / "f" / "dataset_flickr30k.json", told)),
    ]
    splits = split_pictures(sets)
    assert ids(splits["train"]) == ["COCO_train2014_000000000009.jpg", "1"]
    assert dropped(caplog) == ["2 training images are also in val or test: dropped"]
    assert ids(split_pictures(sets[:1] + sets[2:])["train"]) == ids(sets[0])  # without Visual Genome nobody can know


def test_ids_and_contents_are_compared(tmp_path, caplog):
    path = coco(tmp_path / "c")
    held = coco(tmp_path / "h", subset="val2014", image={"id": 26, "file_name": "COCO_val2014_000000000026.jpg"})
    content = json.loads(held.read_text())
    content["annotations"] = [
        told | {"image_id": 26} if told["image_id"] == 25 else told for told in content["annotations"]
    ]
    written(held, content)
    names = [
        f"{folder}/COCO_{folder}_0000000000{number}.jpg" for folder, number in (("train2014", 25), ("val2014", 26))
    ]
    copy(tmp_path / "c" / names[0], tmp_path / "h" / names[1])
    (tmp_path / "h" / "val2014" / "COCO_val2014_000000000009.jpg").unlink()
    same = "000000000009.jpg"
    resized(tmp_path / f"c/train2014/COCO_train2014_{same}", tmp_path / f"h/val2014/COCO_val2014_{same}")
    content["images"][1]["flickr_url"] = ""
    written(held, content)
    assert not split_pictures([read_pictures(path), read_pictures(held)])["train"]
    assert dropped(caplog) == ["2 training images are also in val or test: dropped"]


def test_copies_in_training_become_one_picture(tmp_path, caplog):
    """Else one copy's caption could serve as an unmatched text of the other."""
    path = karpathy(tmp_path)
    copy(tmp_path / "images" / "100.jpg", tmp_path / "images" / "102.jpg")
    splits = split_pictures([read_pictures(path)])
    assert [picture.captions for picture in splits["train"]] == [("A dog runs 0 .", "A dog runs 2 .")]
    assert "1 training images are copies" in caplog.text


def test_copies_are_joined_by_id(tmp_path):
    coco(tmp_path / "c"), visual_genome(tmp_path / "v", data={"coco_id": 25})
    resized(tmp_path / f"c/train2014/COCO_train2014_{25:012d}.jpg", tmp_path / "v/VG_100K/2.jpg")
    sets = [read_pictures(tmp_path / "c"), read_pictures(tmp_path / "v")]
    training = split_pictures(sets)["train"]
    assert ids(training) == ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg", "1"]
    assert training[1].captions == (
        "A very clean bathroom 25 0.",
        "A very clean bathroom 25 1.",
        "the clock is 2",
        "a man",
    )


@pytest.mark.parametrize("known", [-1, 0, None, "", "-1", "null", float("nan")])
def test_a_placeholder_is_no_id(tmp_path, known):
    """Visual Genome writes so where it knows none."""
    visual_genome(tmp_path, data={"coco_id": known, "flickr_id": known})
    content = json.loads((tmp_path / "image_data.json").read_text())
    written(tmp_path / "image_data.json", [one | {"coco_id": known, "flickr_id": known} for one in content])
    pictures = read_pictures(tmp_path)
    assert not any(picture.origins for picture in pictures)
    assert len(split_pictures([pictures])["train"]) == 2


def test_an_id_of_images_that_do_not_look_alike_is_not_trusted(tmp_path, caplog):
    """Three of Visual Genome's images are said to be COCO's 25: none is joined, dropped or mixed up."""
    visual_genome(tmp_path, data={"coco_id": 25})
    content = json.loads((tmp_path / "image_data.json").read_text())
    written(tmp_path / "image_data.json", [one | {"coco_id": 25} for one in content])
    picture(tmp_path / "VG_100K" / "2.jpg", (250, 200, 0))
    held = coco(tmp_path / "h", subset="val2014")
    picture(tmp_path / "h" / "val2014" / f"COCO_val2014_{25:012d}.jpg", (0, 0, 250))
    splits = split_pictures([read_pictures(tmp_path / "region_descriptions.json"), read_pictures(held)])
    assert [(one.id, one.captions[0]) for one in splits["train"]] == [("1", "the clock is 1"), ("2", "the clock is 2")]
    assert "1 ids are given to images that do not look alike, which are kept apart: coco:25 (" in caplog.text
    assert not dropped(caplog)


def test_an_id_of_very_many_images_takes_no_time(tmp_path, monkeypatch):
    """It is a placeholder; not every pair of images is compared."""
    looked_at = []
    pixels = ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda image, *given, **more: looked_at.append(1) or pixels(image, *given))
    files = [ImageFile(tmp_path, f"{number}.png") for number in range(60)]
    for number, file in enumerate(files):
        picture(tmp_path / file.name, (7 * number % 250, 91 * number % 250, 0))
    records = [Picture(file.name, file, "train", ("x",), origins=frozenset({"coco:1"})) for file in files]
    assert len(split_pictures([records])["train"]) > 30 and len(looked_at) == 20


def test_photographs_in_two_sizes_look_alike_and_others_do_not(real_data, tmp_path):
    """Twenty photographs of COCO, each again a fifth larger and in another quality."""
    if not (real_data / "coco_mini").is_dir():
        pytest.skip(f"no coco_mini at {real_data} (set VPW_DATA)")
    pictures = [replace(one, split="train") for one in read_pictures(real_data / "coco_mini")[:20]]
    for number, one in enumerate(pictures):
        image = Image.fromarray(one.image.pixels())
        image.resize((image.width * 6 // 5, image.height * 6 // 5)).save(tmp_path / f"{number}.jpg", quality=60)
    copies = [replace(one, id=f"{k}", image=ImageFile(tmp_path, f"{k}.jpg")) for k, one in enumerate(pictures)]
    assert len(split_pictures([pictures, copies])["train"]) == 20
    wrong = [
        replace(one, origins=other.origins) for one, other in zip(copies, pictures[1:] + pictures[:1], strict=True)
    ]
    assert len(split_pictures([pictures, wrong])["train"]) == 40


def test_files_that_only_look_alike_at_a_glimpse_stay_apart(tmp_path):
    """CRC-32 of anything followed by its own CRC-32 is a constant: as every chunk of a PNG is."""
    path = karpathy(tmp_path)
    for number in range(3):
        data = bytes([number]) * 100
        (tmp_path / "images" / f"10{number}.jpg").write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    pictures = read_pictures(path)
    assert len({picture.image.glimpse() for picture in pictures}) == 1
    assert len(split_pictures([pictures])["train"]) == 2


def test_sets_that_are_not_trained_on_can_be_excluded(tmp_path, caplog):
    """Captioned sets and tasks alike: Flickr30k's val by its id, COCO's by VQA's questions, one's own by content."""
    flickr = karpathy(tmp_path / "f")  # 101.jpg is in val
    path = coco(tmp_path / "c", image={"flickr_url": "http://farm4.staticflickr.com/1/101_ab_z.jpg"})
    resized(tmp_path / "f/images/101.jpg", tmp_path / f"c/train2014/COCO_train2014_{25:012d}.jpg")
    validated = [{"image": f"photos/{number}.jpg", "text": "x", "split": "val"} for number in (2, 3)]
    sets = (str(path), str(table(tmp_path / "v", rows=validated)))
    assert len(load_splits(DataSettings(sets=sets))["train"]) == 2
    kept = load_splits(DataSettings(sets=sets, exclude=(str(flickr),)))["train"]
    assert ids(kept) == ["COCO_train2014_000000000009.jpg"]
    own = table(tmp_path / "t")  # photos/2.jpg is in val
    copy(tmp_path / "t" / "photos" / "2.jpg", tmp_path / "c" / "train2014" / "COCO_train2014_000000000009.jpg")
    with pytest.raises(DataError, match="no training images"):
        load_splits(DataSettings(sets=sets, exclude=(str(flickr), str(own))))
    assert dropped(caplog)[-1] == "2 training images are also in val or test: dropped"
    assert {record.split for record in evaluation_records(own)} == {"val"}


def test_all_that_a_folder_holds_out_is_excluded(tmp_path):
    vqa(tmp_path / "x")
    snli_ve(tmp_path / "x" / "y")
    written(tmp_path / "x" / "settings.json", {"a": 1})
    found = evaluation_records(tmp_path / "x")
    assert set().union(*(record.origins for record in found)) == {"coco:262148", "flickr:3416050480"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: coco(path), "no records of val or test to exclude"),
        (lambda path: written(path / "a.json", {"a": 1}), "no records of val or test to exclude"),
    ],
)
def test_nothing_to_exclude(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        evaluation_records(tmp_path / "x")
    with pytest.raises(DataError, match="unknown format"):
        evaluation_records(written(tmp_path / "a.json", {"a": 1}))


def test_images_in_a_place_of_their_own(tmp_path):
    path = karpathy(tmp_path / "set")
    (tmp_path / "set" / "images").rename(tmp_path / "elsewhere")
    splits = load_splits(DataSettings(sets=str(path), images=str(tmp_path / "elsewhere")))
    assert {name: len(pictures) for name, pictures in splits.items()} == {"train": 2, "val": 1, "test": 0}


# ---------------------------------------------------------------------------------- missing images, small sets


def many(folder, count=50, lost=(), broken=()):
    """A table of photographs, some of which are missing or cut off."""
    for number in range(count):
        path = picture(folder / f"{number}.jpg", (5 * number, 250 - 5 * number, 70))
        if number in broken:
            path.write_bytes(path.read_bytes()[:-200])
        if number in lost:
            path.unlink()
    rows = [
        {"image": f"{k}.jpg", "text": f"text {k}", "split": "val" if k % 10 == 9 else "train"} for k in range(count)
    ]
    return lines(folder / "mine.jsonl", *rows)


def test_missing_images_can_be_skipped(tmp_path, caplog):
    path = many(tmp_path, lost=(3,), broken=(9,))
    settings = DataSettings(sets=str(path))
    with pytest.raises(DataError, match="line 4: image 3.jpg missing"):
        load_splits(settings)
    with skipping_missing("skip", 0.05) as skipped:
        splits = load_splits(settings.with_overrides({"missing": "skip"}))
    assert {split: len(some) for split, some in splits.items()} == {"train": 44, "val": 4, "test": 0}
    assert "mine.jsonl: 2 of 50 images are missing or unreadable; left out: line 4, 9.jpg" in caplog.text
    write_skipped(skipped, tmp_path)
    told = (tmp_path / "skipped.csv").read_text().splitlines()
    assert told[0] == "record,reason" and len(told) == 3
    assert "mine.jsonl: line 4" in told[1] and "9.jpg: cannot be decoded" in told[2]


def test_only_five_are_named_and_too_many_stop_the_run(tmp_path, caplog):
    path = many(tmp_path, lost=range(7))
    settings = DataSettings(sets=str(path), missing="skip")
    with pytest.raises(DataError, match=r"mine.jsonl: 7 of 50 images are .* unreadable, .* missing_most = 0.05"):
        load_splits(settings)
    assert len(load_splits(settings.with_overrides({"missing_most": 0.2}))["train"]) == 38
    assert "left out: line 1, line 2, line 3, line 4, line 5, ..." in caplog.text


def test_images_are_counted_however_many_records_they_have(tmp_path):
    """Five captions each, one record a caption; five questions each, one record an image."""
    for number in range(1, 20):
        picture(tmp_path / "images" / f"{number}.jpg", (5 * number, 250 - 5 * number, 70))
    captions = "".join(f"{number}.jpg#{k}\ttext {number} {k}\n" for number in range(20) for k in range(5))
    (tmp_path / "results.token").write_text(captions)
    asked = [{"qa_id": 5 * n + k, "question": f"what {k}?", "answer": "it"} for n in range(20) for k in range(5)]
    written(tmp_path / "question_answers.json", [{"id": n, "qas": asked[5 * n : 5 * n + 5]} for n in range(20)])
    for read in (read_pictures, VQA.read):
        with skipping_missing("skip", 0.05):
            assert len(read(tmp_path)) in (19, 3)
        with skipping_missing("skip", 0.049), pytest.raises(DataError, match="1 of 20 images are missing"):
            read(tmp_path)


@pytest.mark.parametrize("make, task", [(vqa, "vqa"), (snli_ve, "snli-ve")])
def test_tasks_skip_missing_images_too(tmp_path, make, task):
    path = make(tmp_path)
    for image in tmp_path.rglob("*.jpg"):
        image.unlink()
    picture(tmp_path / "another.png")
    settings = finetune_settings(task=task, data=str(path), overrides={"missing": "skip", "missing_most": 0.5})
    with pytest.raises(DataError, match="1 of 1 images are missing or unreadable, more"):
        prepare_task(settings)


def test_a_broken_record_is_an_error_also_where_images_are_skipped(tmp_path):
    path = karpathy(tmp_path, {"sentences": []})
    with pytest.raises(DataError, match=r"images\[1\]: sentences"):
        load_splits(DataSettings(sets=str(path), missing="skip"))


def test_a_set_that_is_too_small_says_which_split_and_how_many(tmp_path):
    settings = pretrain_settings(data=str(karpathy(tmp_path)), init_visual="", steps=1)
    with pytest.raises(
        DataError, match=r"dataset_mine.json: 1 images with a true text in val; it needs 2, as the texts"
    ):
        prepare(settings)
    rows = [{"image": f"photos/{k}.jpg", "text": "A Dog" if k == 2 else "a dog", "split": "val"} for k in (2, 3)]
    pictures = read_pictures(table(tmp_path / "t", rows=rows))
    with pytest.raises(
        DataError, match=r"mine: no text of val is false of .*photos/2.jpg; it needs an image with other"
    ):
        check_sizes({"val": pictures}, "mine")
    retrieval = finetune_settings(task="retrieval", data=str(many(tmp_path / "m")), overrides={"train.images": 64})
    with pytest.raises(DataError, match=r"mine.jsonl: 45 images with a true text in train; it needs 64"):
        load_examples(retrieval)


def test_a_set_without_validation_holds_out_a_tenth(tmp_path, caplog):
    """Visual Genome has no splits; VQA-CP trains and tests only."""
    many(tmp_path)
    path = tmp_path / "mine.jsonl"
    path.write_text(path.read_text().replace('"val"', '"train"'))
    splits = load_splits(DataSettings(sets=str(path)))
    assert len(splits["train"]) + len(splits["val"]) == 50 and 1 <= len(splits["val"]) <= 12
    assert "no records of val" in caplog.text
    LAYOUTS["vqa-cp"][0](tmp_path / "cp")
    examples = load_examples(finetune_settings(task="vqa", data=str(tmp_path / "cp")))
    assert len(examples["train"]) + len(examples["val"]) == 12 and examples["val"] and len(examples["test"]) == 1
    assert {one.split for one in examples["val"]} == {"val"}


@pytest.mark.parametrize("make", [lambda: pretrain_settings(data=""), lambda: pretrain_settings(data=["scenes", " "])])
def test_a_set_without_a_name_is_refused(make):
    with pytest.raises(SettingsError, match=r"data.sets.*: '.*' names nothing; give 'scenes', or the folder or file"):
        make()
    with pytest.raises(SettingsError, match="data: '' names nothing"):
        finetune_settings(data="")


# ---------------------------------------------------------------------------------------------------- tasks


def load_examples(settings):
    return TASKS[settings.task].load(settings)[0]


def statements(folder, split, image, number, colour):
    picture(folder / f"{image}-img0.png", colour)
    picture(folder / f"{image}-img1.png", (0, *colour[:2]))
    line = {"sentence": "s s s", "label": "True", "identifier": f"{image}-{number}"}
    with (folder / f"{split}.json").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_no_image_of_an_evaluation_split_is_trained_on(tmp_path, caplog):
    statements(tmp_path, "train", "train-1-0", 0, (9, 9, 9))
    statements(tmp_path, "train", "train-2-0", 0, (8, 0, 0))
    statements(tmp_path, "dev", "dev-1-0", 0, (9, 9, 9))
    splits = load_examples(finetune_settings(task="nlvr2", data=str(tmp_path)))
    assert ids(splits["train"]) == ["train-2-0-0"] and ids(splits["val"]) == ["dev-1-0-0"]
    assert dropped(caplog) == ["1 training examples are about images of val or test: dropped"]


def test_a_chain_of_pairs_is_not_one_photograph(tmp_path):
    """Pairs share images: what shares none with val stays, though its neighbour leaves."""
    for number in range(4):
        picture(tmp_path / f"{number}.png", (60 * number, 0, 0))
    rows = [
        {
            "image": f"{k}.png",
            "image2": f"{k + 1}.png",
            "text": "x",
            "label": "true",
            "id": str(k),
            "split": "val" if k == 2 else "train",
        }
        for k in range(3)
    ]
    splits = load_examples(finetune_settings(task="nlvr2", data=str(lines(tmp_path / "mine.jsonl", *rows))))
    assert ids(splits["train"]) == ["0"]


def test_of_a_pair_the_names_tell_which_id_is_whose(tmp_path):
    """COCO's 5 in val has other bytes than in training: pairs with it leave; a pair with its mate 6 stays."""
    names = {}
    for number, (year, coco_id) in enumerate([(2014, 5), (2014, 6), (2017, 5), (2017, 7), (2014, 8), (2014, 9)]):
        prefix = f"COCO_train{year}_" if year == 2014 else ""
        names[year, coco_id] = f"train{year}/{prefix}{coco_id:012d}.jpg"
        picture(tmp_path / names[year, coco_id], (40 * number, 0, 0))
    resized(tmp_path / names[2014, 5], tmp_path / names[2017, 5])
    pairs = [((2014, 5), (2014, 6), "train"), ((2014, 6), (2014, 8), "train"), ((2017, 5), (2017, 7), "val")]
    rows = [
        {"image": names[one], "image2": names[other], "text": "x", "label": "true", "split": split, "id": str(k)}
        for k, (one, other, split) in enumerate(pairs)
    ]
    splits = load_examples(finetune_settings(task="nlvr2", data=str(lines(tmp_path / "mine.jsonl", *rows))))
    assert ids(splits["train"]) == ["1"]


def test_task_images_are_told_by_id(tmp_path, caplog):
    vqa(tmp_path, subset="train2014")
    vqa(tmp_path, subset="val2014", question={"question_id": 7}, answer={"question_id": 7})
    names = [f"{subset}/COCO_{subset}_000000262148.jpg" for subset in ("train2014", "val2014")]
    resized(tmp_path / names[0], tmp_path / names[1])
    with pytest.raises(DataError, match="every image of train is in val or test too"):
        load_examples(finetune_settings(task="vqa", data=str(tmp_path)))
    assert dropped(caplog) == ["2 training examples are about images of val or test: dropped"]


def test_the_files_of_a_task_and_where_there_is_none(tmp_path):
    """VQA's test2015 contains its test-dev."""
    for number, subset in enumerate(("train2014", "val2014", "test-dev2015", "test2015")):
        own = {"question_id": number, "image_id": number}
        file = vqa(tmp_path, subset=subset)
        content = json.loads(file.read_text())
        content["questions"] = content["questions"][:1]
        content["questions"][0] |= own
        written(file, content)
        told = tmp_path / f"v2_mscoco_{subset}_annotations.json"
        content = json.loads(told.read_text())
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0] |= own
        written(told, content)
        folder = subset.replace("-dev", "")
        picture(tmp_path / folder / f"COCO_{folder}_{number:012d}.jpg", (60 * number, 0, 0))
    splits = load_examples(finetune_settings(task="vqa", data=str(tmp_path)))
    assert {name: ids(examples) for name, examples in splits.items()} == {"train": ["0"], "val": ["1"], "test": ["3"]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no annotation file of a known format; known here: NLVR2 JSON"):
        load_examples(finetune_settings(task="nlvr2", data=str(tmp_path / "empty")))


def test_own_table_for_a_task_with_images_elsewhere(tmp_path):
    rows = [
        {"image": f"{k}.jpg", "text": "what?", "label": "red", "split": split}
        for k, split in enumerate(("train", "train", "val", "test"))
    ]
    for number in range(4):
        picture(tmp_path / "elsewhere" / f"{number}.jpg", (60 * number, 0, 0))
    lines(tmp_path / "set" / "mine.jsonl", *rows)
    settings = finetune_settings(
        task="vqa", data=str(tmp_path / "set"), overrides={"images": str(tmp_path / "elsewhere")}
    )
    splits = load_examples(settings)
    assert {name: ids(examples) for name, examples in splits.items()} == {
        "train": ["mine, line 1", "mine, line 2"],
        "val": ["mine, line 3"],
        "test": ["mine, line 4"],
    }


def test_an_id_in_two_files_of_one_split_is_refused(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.jpg", (len(name), 0, ord(name)))
        lines(tmp_path / f"{name}.jsonl", {"image": f"{name}.jpg", "text": "x", "label": "y", "id": 1, "split": "val"})
    with pytest.raises(DataError, match="1: a second record of this id"):
        load_examples(finetune_settings(task="vqa", data=str(tmp_path)))
