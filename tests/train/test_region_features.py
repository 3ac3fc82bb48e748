"""Regions of true boxes: where things are drawn, what a crop's feature knows, files that are whole and kept."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from conftest import SCENES
from miniatures import nlvr1
from PIL import Image

from vpworkbench import subjects
from vpworkbench.cli import main
from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.doctor import diagnose
from vpworkbench.data.inputs import visual_input as input_of
from vpworkbench.data.nlvr1 import Item, drawn_at
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import read_npz, write_regions
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.explorer import explore
from vpworkbench.runs import open_folder, open_run
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings import PretrainSettings, RegionSettings, TrainSettings, pretrain_settings
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train.finetune import prepare_task
from vpworkbench.train.pretrain import prepare, pretrain
from vpworkbench.train.region_features import crops, make_regions, true_boxes

COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}


def settings(source: str = "scenes", **changes: object) -> RegionSettings:
    few = {"scenes": SCENES, "train": TrainSettings(epochs=20, images=20), "width": 16, "workers": 0}
    return RegionSettings(source=source, **(few | changes))


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "regions"
    make_regions(folder, settings())
    return folder


def test_every_image_has_its_true_boxes_and_the_pairs_too(regions, scenes):
    for picture in scenes:
        found = read_npz((regions / picture.image.name).with_suffix(".npz"))
        np.testing.assert_allclose(found.boxes * 96, [thing.box for thing in picture.scene.things], atol=1e-4)
        assert found.features.shape == (len(picture.scene.things), 16)
    pairs = list((regions / "images").glob("*-img?.npz"))
    assert len(pairs) == sum(count // 4 * 4 for count in (60, 20, 10))
    config = json.loads((regions / "config.json").read_text())
    assert config["settings"]["width"] == 16 and config["seed"] == 0 and config["versions"]["torch"]
    summary = json.loads((regions / "summary.json").read_text())
    assert summary["images"] == 90 and summary["colour_accuracy"] > 2 / 8  # chance 1/8; sixty steps


def test_the_same_call_keeps_what_is_there_and_mends_the_rest(regions, tmp_path):
    again = tmp_path / "again"
    make_regions(again, settings())
    files = sorted(path.relative_to(regions) for path in regions.rglob("*.npz"))
    assert [(again / file).read_bytes() for file in files] == [(regions / file).read_bytes() for file in files]
    lost, kept = again / files[3], again / files[5]
    content, written = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (again / "summary.json").unlink()
    make_regions(again, settings())
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == written
    assert not list(again.rglob(".*.npz")) and (again / "summary.json").exists()
    with pytest.raises(SettingsError, match="width: 16 there, 24 now"):
        make_regions(again, settings(width=24))


def few_steps(regions: Path) -> PretrainSettings:
    few = {f"data.scenes.{name}": count for name, count in (("images", 60), ("val", 20), ("test", 10))}
    few |= {"data.workers": 0, "train.images": 4, "fusion.layers": 1}
    return pretrain_settings(visual="regions", regions=str(regions), visual_tokens=3, steps=2, overrides=few)


def test_they_train_a_model_by_their_folder_alone(regions):
    chosen = few_steps(regions)
    assert (chosen.visual.region_width, chosen.visual.tokens, chosen.init_visual) == (16, 3, "")
    assert pretrain(open_run("01_pretrain", chosen), prepare(chosen), chosen) == 2


def test_regions_of_other_scenes_are_refused(regions, tmp_path):
    other = read_pictures(write_scenes(tmp_path / "other", SCENES.model_copy(update={"seed": 5})))
    files = input_of(pretrain_settings(visual="regions", regions=str(regions)).visual)
    with pytest.raises(DataError, match="regions of other scenes .*'seed': 0.* than .*train-000000.png .*'seed': 5"):
        files.check([picture.image for picture in other])
    with pytest.raises(DataError, match="regions of other scenes"):
        files.regions(other[0].image)
    chosen, run = few_steps(regions), tmp_path / "run"
    pretrain(open_folder(run, "01_pretrain", chosen), prepare(chosen), chosen)
    few = {"scenes.images": 60, "scenes.val": 20, "scenes.test": 10, "scenes.seed": 5}
    for task in ("vqa", "nlvr2", "retrieval"):
        with pytest.raises(DataError, match="regions of other scenes"):
            prepare_task(finetune_settings(task=task, checkpoint=str(run), overrides=few))
    with pytest.raises(DataError, match="regions of other scenes"):
        subjects.load(str(run)).prepare(other[:1], ["a ball"])
    with pytest.raises(DataError, match="regions of other scenes"):
        subjects.load(str(run), regions=str(regions)).prepare(other[:1], ["a ball"])
    make_regions(tmp_path / "theirs", settings(scenes=SCENES.model_copy(update={"seed": 5})))
    subject = subjects.load(str(run), regions=str(tmp_path / "theirs"))
    assert subject.prepare(other[:1], ["a ball"]).vision.sum() == min(3, len(other[0].scene.things))


def test_regions_are_for_models_that_read_them(regions, tmp_path, caplog):
    chosen, run = few_steps(regions), tmp_path / "run"
    pretrain(open_folder(run, "01_pretrain", chosen), prepare(chosen), chosen)
    shutil.copytree(regions, tmp_path / "moved")
    assert subjects.load(str(run), regions=str(tmp_path / "moved")).model.settings.visual.region_files == str(
        tmp_path / "moved"
    )
    for opened in (
        lambda: subjects.load("", regions=str(regions)),
        lambda: subjects.load_all(["", ""], regions=str(regions)),
    ):
        with pytest.raises(SettingsError, match="^regions: .* pixels; leave it empty"):
            opened()
    write_regions(tmp_path / "wide" / "1.npz", np.zeros((1, 24)), np.array([[0, 0, 5, 5]]), (9, 9))
    with pytest.raises(DataError, match="features of 24 channels where the model takes 16"):
        subjects.load(str(run), regions=str(tmp_path / "wide"))
    ours = subjects.load_all([str(run), ""], regions=str(tmp_path / "wide"))[0]
    assert ours.model.settings.visual.region_files == str(regions) and "keeps its own regions" in caplog.text
    view = explore(str(run), regions=str(tmp_path / "moved"), beside="", pictures=2)
    assert [reading.regions for reading in view.readings] == [True, False]
    view.close()


def test_missing_regions_are_refused_before_training(regions, scenes, tmp_path):
    some = shutil.copytree(regions, tmp_path / "some")
    for picture in (scenes[0], scenes[7], scenes[65], scenes[-1]):  # of all splits
        (some / picture.image.name).with_suffix(".npz").unlink()
    with pytest.raises(DataError, match=r"some: no features of 4 of 90 images \(.*, \.\.\.\)"):
        prepare(few_steps(some))
    chosen, run = few_steps(regions), tmp_path / "run"
    pretrain(open_folder(run, "01_pretrain", chosen), prepare(chosen), chosen)
    few = {"scenes.images": 60, "scenes.val": 20, "scenes.test": 10}
    for task in ("vqa", "retrieval"):
        with pytest.raises(DataError, match=r"some: no features of \d of \d+ images"):
            prepare_task(finetune_settings(task=task, checkpoint=str(run), overrides=few | {"regions": str(some)}))
        prepare_task(finetune_settings(task=task, checkpoint=str(run), overrides=few))


def test_the_doctor_reads_all_regions(regions, scenes, scenes_folder, tmp_path, capsys):
    assert diagnose(scenes_folder, images=False, regions=str(regions)).is_sound
    some = shutil.copytree(regions, tmp_path / "some")
    lost, cut, wide = ((some / scenes[row].image.name).with_suffix(".npz") for row in (0, 7, 65))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-30])
    write_regions(wide, np.zeros((1, 24)), np.array([[0, 0, 5, 5]]), (9, 9))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(scenes_folder), "--regions", str(some), "--no-images"])
    told = capsys.readouterr().out
    assert stopped.value.code == 1 and "3 errors" in told and "features of different widths, 16 of" in told
    assert f"{cut}: not a complete npz" in told and f"{scenes[0].image.name}: no features of this image" in told


def test_a_set_without_true_boxes_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("image,text\na.png,a dog\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: its true boxes are not known.*detector"):
        make_regions(tmp_path / "out", settings(str(tmp_path)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="holds no regions"):
        make_regions(tmp_path, settings())
    with pytest.raises(SystemExit) as stopped:
        main(["regions", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--images", "8"])
    assert stopped.value.code == 2 and "no such file or folder" in capsys.readouterr().err


def test_regions_of_nlvr1_come_from_its_folder(tmp_path):
    """Each of the six orders has its own boxes; a drawing that is not as its record says is named."""
    few = {"train": TrainSettings(epochs=1, images=60)}
    place = nlvr1(tmp_path / "set").parent
    with pytest.raises(DataError, match=r"dev-7-0-0.png: .* px, but something is drawn at .* restore it"):
        make_regions(tmp_path / "small", settings(str(place), **few))
    for file in place.rglob("*.png"):
        Image.new("RGB", (400, 100), "white").save(file)
    made = make_regions(tmp_path / "made", settings(str(place), **few))
    assert made["images"] == 12 and made["regions"] == 1
    for order, x in enumerate((10, 10, 160, 310, 160, 310)):  # where the first box stands
        found = read_npz(tmp_path / "made" / "2" / f"dev-7-1-{order}.npz")
        np.testing.assert_allclose(found.boxes * [400, 100, 400, 100], [[x, 10, x + 20, 30]], atol=1e-3)
    nothing = nlvr1(tmp_path / "nothing", {"structured_rep": [[], [], []]}).parent
    with pytest.raises(DataError, match="dev-7-1-0.png: nothing is drawn there"):
        make_regions(tmp_path / "none", settings(str(nothing), **few))
    assert not (tmp_path / "none").exists()


def test_a_feature_may_have_any_width(tmp_path):
    made = settings(width=12, train=TrainSettings(epochs=1, images=60))
    make_regions(tmp_path / "made", made)
    assert read_npz(next((tmp_path / "made").rglob("train-*.npz"))).features.shape[1] == 12


def test_a_crop_shows_its_box_and_a_little_around_it(scenes):
    picture = scenes[0]
    whole = crops(picture, [(0, 0, 96, 96)], 96)
    np.testing.assert_array_equal(whole[0], picture.image.pixels())
    assert crops(picture, true_boxes(picture), 32).shape == (len(picture.scene.things), 32, 32, 3)


def test_boxes_of_nlvr1_are_in_the_order_of_the_file():
    boxes = (Item("square", "black", 10, 20, 30),), (Item("circle", "black", 90, 0, 20),), ()
    assert drawn_at(boxes, 0) == [(10, 20, 40, 50), (240, 0, 250, 20)]  # cut at the wall
    assert drawn_at(boxes, 3) == [(90, 0, 100, 20), (310, 20, 340, 50)]  # boxes 1, 2, 0


def test_boxes_of_nlvr1_hold_the_drawn_things(real_data):
    """The pixel at the centre of every box has the recorded colour, in all six orders."""
    pictures: list[Picture] = read_pictures(real_data / "nlvr1")[:600]
    right = []
    for picture in pictures:
        pixels, order = picture.image.pixels(), int(picture.image.name[-5])
        shown = list(permutations(picture.boxes))[order]
        colours = [item.colour for box in shown for item in box]
        for (x0, y0, x1, y1), colour in zip(true_boxes(picture), colours, strict=True):
            seen = pixels[int(y0 + y1) // 2, int(x0 + x1) // 2].astype(int)
            right.append(np.abs(seen - COLOURS[colour]).max() < 40)
    assert len(right) > 3_000 and np.mean(right) > 0.99  # a few lie below others
