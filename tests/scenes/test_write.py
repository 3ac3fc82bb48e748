"""Generated data sets: what is written can be read, complete or not at all."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from vpworkbench.scenes.language import decide, decide_pair
from vpworkbench.scenes.scene import Scene
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings.scenes import SceneSettings

SMALL = SceneSettings(images=70, val=9, test=8, image_px=48, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", SMALL, processes=1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images_of(folder: Path) -> list[dict]:
    return json.loads((folder / "dataset_scenes.json").read_text())["images"]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path):
    again = write_scenes(tmp_path / "again", SMALL, processes=2)
    assert files_of(again) == files_of(folder)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path):
    few = write_scenes(tmp_path / "few", SMALL.model_copy(update={"images": 10}))
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
    with zipfile.ZipFile(folder / "images.zip") as pictures, zipfile.ZipFile(folder / "object_maps.zip") as maps:
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
    with pytest.raises(FileExistsError, match=r"scenes.*seed: 5 there, 6 requested.*delete"):
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

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(type(fault), match=match):
        write_scenes(tmp_path / "scenes", SMALL, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(folder: Path, tmp_path: Path, monkeypatch):
    def copy(*_: object) -> None:
        shutil.copytree(folder, tmp_path / "scenes")

    monkeypatch.setattr("vpworkbench.scenes.write._write_all", copy)
    assert files_of(write_scenes(tmp_path / "scenes", SMALL)) == files_of(folder)
    shutil.rmtree(tmp_path / "scenes")
    with pytest.raises(FileExistsError, match="seed: 5 there, 6 requested"):
        write_scenes(tmp_path / "scenes", SMALL.model_copy(update={"seed": 6}))
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_empty_evaluation_splits_are_possible(tmp_path: Path):
    settings = SceneSettings(images=3, val=0, test=0, image_px=32)
    folder = write_scenes(tmp_path / "scenes", settings)
    assert len(images_of(folder)) == 3


@pytest.mark.slow
def test_five_hundred_images_a_second(tmp_path: Path):
    """On two cores that are free; other work on them makes this fail."""
    settings = SceneSettings(images=4000, val=0, test=0)
    start = time.perf_counter()
    write_scenes(tmp_path / "scenes", settings, processes=2)
    speed = 4000 / (time.perf_counter() - start)
    print(f"{speed:.0f} images/s with load {os.getloadavg()[0]:.1f}")
    assert speed >= 500


def test_workers_end_with_their_parent(tmp_path):
    """Also where it is killed, so that it can stop nobody."""
    code = (
        "from pathlib import Path; from vpworkbench.scenes.write import write_scenes; "
        "from vpworkbench.settings.scenes import SceneSettings; "
        f"write_scenes(Path({str(tmp_path / 'made')!r}), SceneSettings(images=20_000), processes=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parent, until = psutil.Process(process.pid), time.monotonic() + 60
    while len(workers := parent.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) == 2
    time.sleep(0.5)  # they work
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
