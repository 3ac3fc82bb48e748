"""The world: what is drawn is what is stated, and what is written can be read."""

import errno
import io
import json
import os
import time
import zipfile
from collections import Counter
from math import hypot
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vpworkbench.data import scenes as scenes_module
from vpworkbench.data.language import captions, decide, decide_pair
from vpworkbench.data.scenes import (
    COLOURS,
    COVERED,
    LEVELS,
    MATERIALS,
    SHAPES,
    SIZES,
    Scene,
    SceneSettings,
    Thing,
    gap,
    render,
    sample_scene,
    scene_of,
    write_scenes,
)

LEVEL_NAMES = ("easy", "medium", "hard")
SMALL = SceneSettings(images=70, val=9, test=8, image_px=48, seed=5)


def some_scenes(difficulty: str, count: int, image_px: int = 96) -> list[Scene]:
    settings = SceneSettings(difficulty=difficulty, image_px=image_px, seed=1)
    return [scene_of(settings, "train", i) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", SMALL, processes=1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def images_of(folder: Path) -> list[dict]:
    return json.loads((folder / "dataset_scenes.json").read_text())["images"]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The world


def test_words_are_enough_and_single():
    assert len(SHAPES) >= 8 and len(COLOURS) >= 8 and len(SIZES) == 3 and len(MATERIALS) == 2
    for word in (*SHAPES, *COLOURS, *SIZES, *MATERIALS):
        assert word.isalpha() and word.islower()
    assert COVERED not in SHAPES


@pytest.mark.parametrize("difficulty", LEVEL_NAMES)
def test_counts_and_attributes_follow_the_difficulty(difficulty: str):
    sample = some_scenes(difficulty, 300)
    counts = Counter(len(scene.things) for scene in sample)
    low, high = LEVELS[difficulty].things
    assert set(counts) == set(range(low, high + 1))
    things = [thing for scene in sample for thing in scene.things]
    shapes = Counter(thing.shape for thing in things if not thing.covered)
    colours = Counter(thing.colour for thing in things)
    for frequencies in (shapes, colours):
        assert len(frequencies) == 8
        assert max(frequencies.values()) < 1.6 * min(frequencies.values())
    assert {thing.size for thing in things} == set(SIZES)
    assert 0.2 < np.mean([any(t.covered for t in scene.things) for scene in sample]) < 0.4
    for scene in sample:
        assert [thing.depth for thing in scene.things] == list(range(len(scene.things)))


@pytest.mark.parametrize("difficulty", LEVEL_NAMES)
def test_every_thing_is_in_the_picture_and_visible_enough(difficulty: str):
    for seed, scene in enumerate(some_scenes(difficulty, 60)):
        _, object_map = render(scene, seed)
        for number, thing in enumerate(scene.things, start=1):
            visible = object_map == number
            _, alone = render(Scene((thing,), scene.image_px), seed)
            assert visible.sum() >= LEVELS[difficulty].visible * (alone == 1).sum()
            rows, columns = np.nonzero(visible)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.box == box
            assert 0 <= box[0] and 0 <= box[1] and max(box[2:]) <= scene.image_px
            assert not alone[0].any() and not alone[-1].any()  # nothing is cut by the edge


def test_pixels_have_the_colour_of_their_thing():
    names = list(COLOURS)
    palette = np.array(list(COLOURS.values()), dtype=float)
    for seed, scene in enumerate(some_scenes("easy", 60)):
        image, object_map = render(scene, seed)
        for number, thing in enumerate(scene.things, start=1):
            middle = np.median(image[object_map == number].astype(float), axis=0)
            nearest = names[np.linalg.norm(palette - middle, axis=1).argmin()]
            assert nearest == thing.colour


def test_grounds_are_far_from_all_colours():
    palette = np.array(list(COLOURS.values()), dtype=float)
    for seed, scene in enumerate(some_scenes("easy", 60)):
        image, object_map = render(scene, seed)
        ground = np.median(image[object_map == 0].astype(float), axis=0)
        assert np.linalg.norm(palette - ground, axis=1).min() > 60


def test_gap_agrees_with_the_drawn_pixels():
    """Pixel masks know the distance to about one pixel."""
    checked = 0
    for scene in some_scenes("hard", 10, image_px=128):
        masks = [render(Scene((thing,), 128), 0)[1] == 1 for thing in scene.things]
        points = [np.argwhere(mask) for mask in masks]
        for i in range(len(points)):
            for j in range(i):
                drawn = min(np.hypot(*(points[j] - point).T).min() for point in points[i])
                stated = gap(scene.things[i], scene.things[j])
                if drawn == 0:
                    assert stated < 0.5
                elif stated < 5:
                    assert abs(drawn - 1 - max(stated, 0)) < 2.0
                    checked += 1
                else:
                    assert stated < drawn + 1
    assert checked > 10


def test_gap_of_two_balls_in_closed_form():
    for distance in (18.0, 20.0, 23.0, 60.0):
        left, right = (
            Thing("ball", "red", "small", "matte", x, 40.3, 10.0, 0.0, 0)
            for x in (20, 20 + distance)
        )
        outline = 0.92 if distance < 60 else 1.0  # far away the enclosing circle is enough
        assert gap(left, right) == pytest.approx(distance - 20 * outline, abs=0.6)


def test_touching_and_inside_occur():
    sample = some_scenes("easy", 400)
    closest = [
        min(gap(a, b) for a in scene.things for b in scene.things if a is not b) for scene in sample
    ]
    assert 0.1 < np.mean([value < 1.2 for value in closest]) < 0.5
    inside = [
        scene
        for scene in sample
        if any(
            a.shape == "ring" and a is not b and hypot(a.x - b.x, a.y - b.y) < 3
            for a in scene.things
            for b in scene.things
        )
    ]
    assert len(inside) > 12


def test_scene_survives_json():
    for scene in some_scenes("hard", 20):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
        assert hash(scene) == hash(Scene.from_json(scene.to_json()))


def test_scenes_are_a_function_of_the_seed():
    for difficulty in LEVEL_NAMES:
        first, second, other = (
            sample_scene(np.random.default_rng(seed), image_px=64, difficulty=difficulty)
            for seed in (3, 3, 4)
        )
        assert first == second != other
        for one, two in zip(render(first, 9), render(second, 9), strict=True):
            np.testing.assert_array_equal(one, two)
    settings = SceneSettings()
    assert scene_of(settings, "train", 0) != scene_of(settings, "val", 0)
    assert scene_of(settings, "train", 0) == scene_of(SceneSettings(images=7), "train", 0)


# The files


def test_files_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path):
    again = write_scenes(tmp_path / "again", SMALL, processes=2)
    assert files_of(again) == files_of(folder)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path):
    few = write_scenes(tmp_path / "few", SMALL.model_copy(update={"images": 10}), progress=False)
    of_train = [entry for entry in images_of(folder) if entry["split"] == "train"]
    assert [e for e in images_of(few) if e["split"] == "train"] == of_train[:10]
    with zipfile.ZipFile(few / "images.zip") as a, zipfile.ZipFile(folder / "images.zip") as b:
        assert {a.read(name) == b.read(name) for name in a.namelist()} == {True}
    for name in ("nlvr2/train.json", "snli_ve_train.jsonl"):
        lines = json_lines(few / name)
        assert lines and lines == json_lines(folder / name)[: len(lines)]
    name = "v2_OpenEnded_scenes_train_questions.json"
    few_asked, asked = (json.loads((f / name).read_text())["questions"] for f in (few, folder))
    assert few_asked == asked[: len(few_asked)]


def test_karpathy_file_and_images(folder: Path):
    entries = images_of(folder)
    assert Counter(entry["split"] for entry in entries) == {"train": 70, "val": 9, "test": 8}
    assert len({entry["imgid"] for entry in entries}) == len(entries)
    with (
        zipfile.ZipFile(folder / "images.zip") as pictures,
        zipfile.ZipFile(folder / "object_maps.zip") as maps,
    ):
        assert {info.compress_type for info in pictures.infolist()} == {zipfile.ZIP_STORED}
        for entry in entries:
            image = Image.open(io.BytesIO(pictures.read(f"images/{entry['filename']}")))
            object_map = Image.open(io.BytesIO(maps.read(f"object_maps/{entry['filename']}")))
            assert image.mode == "RGB" and object_map.mode == "L"
            assert image.size == object_map.size == (48, 48)
            scene = Scene.from_json(entry)
            assert set(np.unique(object_map)) == set(range(len(scene.things) + 1))
            assert len(entry["sentences"]) == 5
            assert entry["sentids"] == [sentence["sentid"] for sentence in entry["sentences"]]
            for sentence in entry["sentences"]:
                assert set(sentence) == {"raw", "tokens", "imgid", "sentid"}
                assert " ".join(sentence["tokens"]) == sentence["raw"]
                assert decide(sentence["raw"], scene) is True


def test_vqa_files(folder: Path):
    for split in ("train", "val", "test"):
        asked = json.loads((folder / f"v2_OpenEnded_scenes_{split}_questions.json").read_text())
        answered = json.loads((folder / f"v2_scenes_{split}_annotations.json").read_text())
        assert asked["data_subtype"] == answered["data_subtype"] == split
        ids = [question["question_id"] for question in asked["questions"]]
        assert len(set(ids)) == len(ids) > 0
        assert ids == [annotation["question_id"] for annotation in answered["annotations"]]
        known = {entry["imgid"] for entry in images_of(folder) if entry["split"] == split}
        for question, annotation in zip(asked["questions"], answered["annotations"], strict=True):
            assert set(question) == {"image_id", "question", "question_id"}
            assert set(annotation) == {
                "question_id",
                "image_id",
                "question_type",
                "answer_type",
                "multiple_choice_answer",
                "answers",
            }
            assert question["image_id"] == annotation["image_id"] in known
            assert question["question"].startswith(annotation["question_type"])
            answers = annotation["answers"]
            assert [answer["answer_id"] for answer in answers] == list(range(1, 11))
            given = Counter(answer["answer"] for answer in answers)
            assert given[annotation["multiple_choice_answer"]] >= 8
            assert {a["answer_confidence"] for a in answers} <= {"yes", "maybe", "no"}


def test_nlvr2_files(folder: Path):
    scene_named = {entry["filename"]: Scene.from_json(entry) for entry in images_of(folder)}
    with zipfile.ZipFile(folder / "nlvr2" / "images.zip") as archive:
        names = {Path(name).name for name in archive.namelist()}
        for split, source in (("train", "train"), ("dev", "val"), ("test1", "test")):
            lines = json_lines(folder / "nlvr2" / f"{split}.json")
            assert len({line["identifier"] for line in lines}) == len(lines) > 0
            labels_of_sentence: dict[tuple[str, str], list[str]] = {}
            labels_of_pair: dict[str, list[str]] = {}
            for line in lines:
                pair, sentence = line["identifier"].rsplit("-", 1)
                assert {f"{pair}-img0.png", f"{pair}-img1.png"} <= names
                assert pair.startswith(f"{split}-")
                sides = [scene_named[line[f"{side}_url"]] for side in ("left", "right")]
                assert line["left_url"].startswith(source)
                assert decide_pair(line["sentence"], *sides) is (line["label"] == "True")
                group = pair.rsplit("-", 1)[0]
                labels_of_sentence.setdefault((group, sentence), []).append(line["label"])
                labels_of_pair.setdefault(pair, []).append(line["label"])
            for labels in (*labels_of_sentence.values(), *labels_of_pair.values()):
                assert sorted(labels) == ["False", "True"]


def test_snli_ve_files(folder: Path):
    scene_named = {Path(e["filename"]).stem: Scene.from_json(e) for e in images_of(folder)}
    for split in ("train", "dev", "test"):
        lines = json_lines(folder / f"snli_ve_{split}.jsonl")
        assert len({line["pairID"] for line in lines}) == len(lines)
        for line in lines:
            scene = scene_named[line["Flickr30K_ID"]]
            assert any(thing.covered for thing in scene.things)
            assert decide(line["sentence1"], scene) is True
            truth = {"entailment": True, "neutral": None, "contradiction": False}
            assert decide(line["sentence2"], scene) is truth[line["gold_label"]]
            assert line["annotator_labels"] == [line["gold_label"]]
    assert json_lines(folder / "snli_ve_train.jsonl")


# Refusals


def test_same_settings_return_at_once_and_others_are_refused(folder: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_scenes(folder, SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(FileExistsError, match=r"scenes.*seed: 5 there, 6 asked.*delete"):
        write_scenes(folder, SMALL.model_copy(update={"seed": 6}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="mine.*choose another folder"):
        write_scenes(tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "fault, match",
    [
        (OSError(errno.ENOSPC, "No space left"), "No space left.*unfinished files were removed"),
        (KeyboardInterrupt("stop"), "stop"),
    ],
)
def test_nothing_is_left_behind(tmp_path, monkeypatch, fault, match: str, processes: int):
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(scenes_module, "_store", fail)
    with pytest.raises(type(fault), match=match):
        write_scenes(tmp_path / "scenes", SMALL, processes=processes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"images": -1},
        {"val": -1},
        {"image_px": 31},
        {"difficulty": "impossible"},
        {"seed": -1},
        {"imags": 10},
    ],
)
def test_wrong_settings_are_refused(wrong: dict):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SceneSettings(**wrong)


def test_empty_evaluation_splits_are_possible(tmp_path: Path):
    settings = SceneSettings(images=3, val=0, test=0, image_px=32)
    folder = write_scenes(tmp_path / "scenes", settings)
    assert len(images_of(folder)) == 3


@pytest.mark.slow
def test_five_hundred_images_a_second(tmp_path: Path):
    """On two cores that are free; other work on them makes this fail."""
    settings = SceneSettings(images=4000, val=0, test=0)
    start = time.perf_counter()
    write_scenes(tmp_path / "scenes", settings, processes=2, progress=False)
    speed = 4000 / (time.perf_counter() - start)
    print(f"{speed:.0f} images/s with load {os.getloadavg()[0]:.1f}")
    assert speed >= 500


def test_captions_cost_little():
    """CPU time, so that other work does not matter: a generous bound of 10 ms an image."""
    sample = some_scenes("medium", 50)
    start = time.process_time()
    for seed, scene in enumerate(sample):
        captions(scene, np.random.default_rng(seed))
        render(scene, seed)
    assert time.process_time() - start < 0.01 * len(sample)
