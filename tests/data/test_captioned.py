"""Readers of captioned sets: miniatures of the formats as published, generated scenes, the real sets."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from miniatures import coco, karpathy, nlvr1, picture, table, visual_genome, written, zipped

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import collected_findings
from vpworkbench.data.nlvr1 import Item
from vpworkbench.errors import DataError
from vpworkbench.scenes.language import decide


def told(pictures):
    return {picture.id: (picture.split, picture.captions) for picture in pictures}


def test_karpathy(tmp_path):
    path = karpathy(tmp_path)
    pictures = read_pictures(path)
    assert told(pictures) == {
        "100.jpg": ("train", ("A dog runs 0 .",)),
        "101.jpg": ("val", ("A dog runs 1 .",)),
        "102.jpg": ("train", ("A dog runs 2 .",)),
    }
    assert pictures[2].image.pixels().shape == (4, 6, 3) and pictures[0].scene is None
    assert pictures[0].origins == {"flickr:100"}
    assert told(read_pictures(tmp_path)) == told(pictures)


def test_karpathys_captions_count_twice_where_they_are_searched(tmp_path):
    """Published queries: a caption that an image has twice is two of them. Training has it once."""
    twice = [{"raw": "A dog ."}, {"raw": "A  dog ."}, {"raw": "B ."}]
    for split, captions in (("train", 2), ("restval", 2), ("val", 3), ("test", 3)):
        pictures = read_pictures(karpathy(tmp_path, {"sentences": twice, "split": split}))
        assert len(pictures[1].captions) == captions


def test_karpathy_of_coco_has_its_ids_and_folders(tmp_path):
    for folder in ("train2014", "val2014"):  # the same name in both, as in no release: `filepath` decides
        picture(tmp_path / folder / "COCO_val2014_000000000042.jpg", (len(folder), 0, 0))
    record = {
        "filepath": "val2014",
        "sentids": [1],
        "filename": "COCO_val2014_000000000042.jpg",
        "imgid": 0,
        "split": "restval",
        "sentences": [{"raw": "x"}],
        "cocoid": 42,
    }
    (only,) = read_pictures(written(tmp_path / "dataset_coco.json", {"images": [record], "dataset": "coco"}))
    assert (only.split, only.origins) == ("train", {"coco:42"})
    assert only.image.folder.name == "val2014"


@pytest.mark.parametrize("subset, split", [("train2014", "train"), ("val2014", "val"), ("val2017", "val")])
def test_coco_captions(tmp_path, subset, split):
    path = coco(tmp_path, subset=subset)
    first, second = read_pictures(path)
    assert first.captions == ("A very clean bathroom 9 0.", "A very clean bathroom 9 1.") and first.split == split
    assert second.origins == {"coco:25", "flickr:7025"}
    assert second.image.pixels()[0, 0, 1] > 70
    assert told(read_pictures(tmp_path)) == told([first, second])


def test_coco_straight_from_its_zip_and_from_a_named_place(tmp_path):
    path = coco(tmp_path / "a")
    places = sorted((tmp_path / "a" / "train2014").iterdir())
    archive = zipped(tmp_path / "b" / "train2014.zip", *places, under="train2014/")
    assert [p.image.folder for p in read_pictures(path, images=[archive])] == [archive, archive]
    archive.rename(tmp_path / "a" / "train2014.zip")
    assert read_pictures(path)[0].image.in_zip


def test_an_image_of_coco_without_a_caption_is_left_out(tmp_path, caplog):
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:2]
    assert len(read_pictures(written(path, content))) == 1
    assert "1 images without a caption are left out" in caplog.text


def test_visual_genome(tmp_path):
    path = visual_genome(tmp_path, data={"coco_id": 25, "flickr_id": 7025})
    first, second = read_pictures(path)
    assert (first.id, first.split, first.captions) == ("1", "train", ("the clock is 1", "a man"))
    assert (first.image.folder.name, second.image.folder.name) == ("VG_100K_2", "VG_100K")
    assert not first.origins and second.origins == {"coco:25", "flickr:7025"}
    assert told(read_pictures(tmp_path)) == told([first, second])


def test_visual_genome_without_image_data_or_phrases(tmp_path, caplog):
    path = visual_genome(tmp_path, image={"regions": []})
    (tmp_path / "image_data.json").unlink()
    assert [picture.id for picture in read_pictures(path)] == ["1"]
    assert "image_data.json: missing" in caplog.text and "1 images without a caption" in caplog.text


def test_broken_image_data_is_not_said_to_be_absent(tmp_path):
    path = visual_genome(tmp_path)
    written(tmp_path / "image_data.json", [{"image_id": "x"}])
    with collected_findings() as findings:
        read_pictures(path)
    assert len(findings.faults) == 1 and "image_data.json: [0]: image_id" in findings.faults[0]
    assert not findings.remarks


def test_nlvr1(tmp_path):
    path = nlvr1(tmp_path)
    pictures = read_pictures(path)
    assert len(pictures) == 12 and {picture.split for picture in pictures} == {"train"}
    assert pictures[0].captions == ("There is a black circle",) and not pictures[0].foils
    assert pictures[6].foils == ("There is a black circle",) and not pictures[6].captions
    assert pictures[0].boxes == ((Item("circle", "black", 10, 10, 20),), (), ())
    assert pictures[6].denies("There is a black circle") and not pictures[0].denies("There is a black circle")


def test_nlvr1s_hidden_set_tests(tmp_path):
    path = nlvr1(tmp_path)
    for image in (tmp_path / "images" / "2").iterdir():
        image.rename(image.with_name(image.name.replace("dev", "hidden")))
    pictures = read_pictures(path.rename(tmp_path / "hidden.json"))
    assert [picture.split for picture in pictures] == ["test", "test"]


def test_nlvr1_as_its_repository_has_it(tmp_path):
    nlvr1(tmp_path / "dev")
    assert len(read_pictures(tmp_path)) == 12


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_table(tmp_path, kind):
    first, second = read_pictures(table(tmp_path, kind=kind))
    assert (first.id, first.split) == ("photos/é 1.jpg", "train")
    assert (first.captions, first.foils) == (("a red square",), ("a blue one, really",))
    assert (second.id, second.split, second.captions) == ("photos/2.jpg", "val", ("a circle",))


def test_own_table_without_labels_and_splits_holds_out_the_same_tenth(tmp_path, caplog):
    names = [f"{number}.png" for number in range(60)]
    for number, name in enumerate(names):
        picture(tmp_path / name, (number, 0, 0))
    (tmp_path / "mine.csv").write_text("text,image\n" + "".join(f"a b c,{name}\n" for name in names))
    held_out = {picture.id for picture in read_pictures(tmp_path) if picture.split == "val"}
    assert 1 <= len(held_out) <= 15 and f"{len(held_out)} images, chosen by their names, validate" in caplog.text
    (tmp_path / "mine.csv").write_text("text,image\n" + "".join(f"a b c,{name}\n" for name in names[:40]))
    fewer = {picture.id for picture in read_pictures(tmp_path) if picture.split == "val"}
    assert fewer == held_out & set(names[:40])


def test_of_a_few_images_one_validates(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png", (ord(name), 0, 0))
    (tmp_path / "mine.csv").write_text("text,image\n" + "".join(f"a b c,{name}.png\n" for name in "abc"))
    assert Counter(picture.split for picture in read_pictures(tmp_path)) == {"train": 2, "val": 1}


def test_own_tables_by_the_split_in_their_names(tmp_path):
    for split in ("train", "validation"):
        picture(tmp_path / f"{split}.png")
        (tmp_path / f"{split}.csv").write_text(f"image,text\n{split}.png,a b c\n")
    assert told(read_pictures(tmp_path)) == {"train.png": ("train", ("a b c",)), "validation.png": ("val", ("a b c",))}


def test_an_image_in_two_splits_of_a_table_is_two_pictures(tmp_path):
    """The one that trains is dropped when sets are joined, as in every set."""
    pictures = read_pictures(table(tmp_path, {"split": "val"}))
    assert [(picture.id, picture.split) for picture in pictures] == [
        ("photos/é 1.jpg", "train"),
        ("photos/é 1.jpg (val)", "val"),
        ("photos/2.jpg", "val"),
    ]


def test_paths_that_are_no_set(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no annotation file of a known format; known here: Karpathy"):
        read_pictures(tmp_path)
    with pytest.raises(DataError, match="dataset_x.json: unknown format .*known here: Karpathy's JSON"):
        read_pictures(written(tmp_path / "dataset_x.json", {"pictures": []}))


# ------------------------------------------------------------------------------------------- generated scenes


def as_coco(folder, pictures):
    images = [{"id": number, "file_name": picture.id} for number, picture in enumerate(pictures)]
    captions = [(number, text) for number, picture in enumerate(pictures) for text in picture.captions]
    told = [{"id": k, "image_id": number, "caption": text} for k, (number, text) in enumerate(captions)]
    return written(folder / "captions_train.json", {"images": images, "annotations": told})


def as_table(folder, pictures):
    rows = [{"image": picture.id, "text": text} for picture in pictures for text in picture.captions]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


@pytest.mark.parametrize("write", [as_coco, as_table])
def test_scenes_as_another_set_are_the_same_pictures(tmp_path, scenes, write):
    few = [picture for picture in scenes if picture.split == "train"][:8]
    again = read_pictures(write(tmp_path, few), images=[few[0].image.folder])
    assert [(p.id, p.captions, p.image) for p in again] == [(p.id, p.captions, p.image) for p in few]


def test_scenes_as_visual_genome(tmp_path, scenes):
    few = scenes[:4]
    for number, scene in enumerate(few):
        (tmp_path / "VG_100K").mkdir(exist_ok=True)
        (tmp_path / "VG_100K" / f"{number}.jpg").write_bytes(scene.image.read())
    regions = [
        {"id": number, "regions": [{"region_id": 5 * number + k, "phrase": text} for k, text in enumerate(p.captions)]}
        for number, p in enumerate(few)
    ]
    again = read_pictures(written(tmp_path / "region_descriptions.json", regions))
    assert [(p.captions, p.image.digest()) for p in again] == [(p.captions, p.image.digest()) for p in few]


def test_scenes_are_read_with_their_truth(scenes):
    assert Counter(picture.split for picture in scenes) == {"train": 60, "val": 20, "test": 10}
    assert all(len(picture.captions) == 5 for picture in scenes)
    assert all(decide(text, picture.scene) is True for picture in scenes for text in picture.captions)
    objects = scenes[0].object_map()
    assert objects.shape == (96, 96) and objects.max() == len(scenes[0].scene.things)


# ----------------------------------------------------------------------------------------------- the real sets


def test_flickr_1k(real_data):
    pictures = read_pictures(real_data / "flickr1k")
    assert Counter(picture.split for picture in pictures) == {"train": 800, "val": 100, "test": 100}
    assert all(len(picture.origins) == 1 for picture in pictures)  # Flickr8k names its files by Flickr's ids
    assert pictures[0].image.pixels(64).shape == (64, 64, 3)


def test_nlvr_v1_is_split_by_directory(real_data):
    pictures = read_pictures(real_data / "nlvr1")
    assert Counter(p.split for p in pictures) == {"train": 6 * (989 - 163), "val": 163, "test": 990}
    statements = {p.id.rsplit("-", 2)[0] for p in pictures if p.split == "train"}
    assert len(statements) > 150
