"""Readers on hand-made miniatures of the published formats, on scenes, and on the real sets."""

from __future__ import annotations

import json
import zlib
from collections import Counter

import pytest
from PIL import Image

from vpworkbench.data.formats import read_pictures, split_pictures
from vpworkbench.data.records import DataError


def karpathy(folder, **changes):
    """A Karpathy json of three images, as dataset_flickr30k.json has it; `changes` go into the second record."""
    (folder / "images").mkdir()
    images = []
    for number, split in enumerate(("train", "val", "restval")):
        Image.new("RGB", (5, 5), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        raw = f"A dog  runs {number} ."
        sentence = {"raw": raw, "tokens": raw.lower().split(), "imgid": number, "sentid": number}
        images.append(
            {"filename": f"{number}.png", "imgid": number, "split": split, "sentids": [number], "sentences": [sentence]}
        )
    images[1] |= changes
    path = folder / "dataset_mine.json"
    path.write_text(json.dumps({"dataset": "mine", "images": images}))
    return path


def test_karpathy(tmp_path):
    path = karpathy(tmp_path)
    pictures = read_pictures(path)
    assert [picture.id for picture in pictures] == ["0.png", "1.png", "2.png"]
    assert [picture.split for picture in pictures] == ["train", "val", "train"]
    assert pictures[0].captions == ("A dog runs 0 .",) and pictures[0].truth is None
    assert pictures[2].image.pixels().shape == (5, 5, 3)
    assert [p.id for p in read_pictures(tmp_path)] == [p.id for p in pictures]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sentences": [{"text": "wrong key"}]}, r"images\[1\].*sentences.0.raw.*required"),
        ({"sentences": [{"raw": "   "}]}, r"images\[1\] \(1.png\).*empty caption"),
        ({"sentences": [{"raw": 7}]}, r"images\[1\].*string"),
        ({"sentences": []}, r"images\[1\].*sentences"),
        ({"split": "training"}, r"images\[1\].*split"),
        ({"filename": "../1.png"}, r"images\[1\].*leaves the image folder"),
        ({"filename": "gone.png"}, r"images\[1\] \(gone.png\).*missing"),
        ({"filename": "0.png"}, r"0.png: a second record"),
    ],
)
def test_broken_record_names_file_and_record(tmp_path, changes, message):
    path = karpathy(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as error:
        read_pictures(path)
    assert str(tmp_path) in str(error.value)


def test_path_and_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no dataset_"):
        read_pictures(tmp_path)
    (tmp_path / "dataset_x.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="list `images`"):
        read_pictures(tmp_path)
    (tmp_path / "dataset_x.json").write_text('{"images": [')
    with pytest.raises(DataError, match="line 1 is not json|no images beside"):
        read_pictures(tmp_path)


NLVR1 = {
    "sentence": "There is a black circle", "label": "true", "identifier": "7-0", "directory": "2",
    "evals": {"r0": "true"},
    "structured_rep": [[{"y_loc": 10, "type": "circle", "color": "Black", "x_loc": 10, "size": 20}], [], []],
}  # fmt: skip


def nlvr1(folder, **changes):
    (folder / "images" / "2").mkdir(parents=True)
    for number in range(2):
        for order in range(6):
            Image.new("RGB", (8, 2), (number, order, 0)).save(folder / "images" / "2" / f"dev-7-{number}-{order}.png")
    false = NLVR1 | {"identifier": "7-1", "label": "false"} | changes
    (folder / "dev.json").write_text(json.dumps(NLVR1) + "\n" + json.dumps(false) + "\n")
    return folder


def test_nlvr1(tmp_path):
    pictures = read_pictures(nlvr1(tmp_path))
    assert len(pictures) == 12 and {picture.split for picture in pictures} == {"train"}
    assert pictures[0].captions == ("There is a black circle",) and not pictures[0].foils
    assert pictures[6].foils == ("There is a black circle",) and not pictures[6].captions
    assert pictures[0].truth("There is a black circle") is True
    assert pictures[0].denies("There is a yellow circle")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": "maybe"}, "line 2: label"),
        ({"identifier": 3}, "line 2: identifier"),
        ({"structured_rep": [[{"type": "cone"}], [], []]}, r"line 2 \(7-1\)"),
        ({"identifier": "8-1"}, r"line 2 \(8-1\): image .* missing"),
    ],
)
def test_broken_nlvr1_record(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_pictures(nlvr1(tmp_path, **changes))


def test_training_images_of_an_evaluation_split_are_dropped(tmp_path, caplog):
    path = karpathy(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    splits = split_pictures([read_pictures(path)])
    assert [picture.id for picture in splits["train"]] == ["0.png"]
    assert "1 training images are also in val or test" in caplog.text


def test_copies_in_training_become_one_picture(tmp_path, caplog):
    """Else one copy's caption could serve as an unmatched text of the other."""
    path = karpathy(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    splits = split_pictures([read_pictures(path)])
    assert [picture.captions for picture in splits["train"]] == [("A dog runs 0 .", "A dog runs 2 .")]
    assert "1 training images are copies of others" in caplog.text


def test_files_that_only_look_alike_at_a_glimpse_stay_apart(tmp_path):
    """CRC-32 of anything followed by its own CRC-32 is a constant: as every chunk of a PNG is."""
    path = karpathy(tmp_path)
    for number in range(3):
        data = bytes([number]) * 100
        (tmp_path / "images" / f"{number}.png").write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    pictures = read_pictures(path)
    assert len({picture.image.glimpse() for picture in pictures}) == 1
    assert len(split_pictures([pictures])["train"]) == 2


def test_scenes_are_read_with_their_truth(scenes):
    assert Counter(picture.split for picture in scenes) == {"train": 60, "val": 20, "test": 10}
    assert all(len(picture.captions) == 5 for picture in scenes)
    assert all(picture.truth(text) is True for picture in scenes for text in picture.captions)
    objects = scenes[0].object_map()
    assert objects.shape == (96, 96) and objects.max() == len(scenes[0].scene.things)


def test_flickr_1k(real_data):
    splits = split_pictures([read_pictures(real_data / "flickr1k")])
    assert {name: len(pictures) for name, pictures in splits.items()} == {"train": 800, "val": 100, "test": 100}
    assert splits["val"][0].image.pixels(64).shape == (64, 64, 3)


def test_nlvr_v1_is_split_by_directory(real_data):
    pictures = read_pictures(real_data / "nlvr1")
    statements = {
        split: {p.id.rsplit("-", 2)[0] for p in pictures if p.split == split and not p.id.startswith("t")}
        for split in ("train", "val")
    }
    assert Counter(p.split for p in pictures)["train"] == 6 * (989 - 163)
    assert len(statements["train"]) > 150
    assert Counter(p.split for p in pictures)["val"] == 163
