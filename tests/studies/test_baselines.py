"""What stands beside a score: simple classifiers, the drawn structure, runs from other starts and seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from miniatures import picture
from scipy import stats
from tasks.test_task import few

from vpworkbench.data.images import ImageFile
from vpworkbench.data.nlvr1 import Item
from vpworkbench.data.records import Example
from vpworkbench.errors import SettingsError
from vpworkbench.model.attentive import EveImage, Mac
from vpworkbench.runs import open_run
from vpworkbench.settings import FinetuneSettings, checked
from vpworkbench.studies.baselines import (
    ATTENTIVE,
    attentive_labels,
    baselines,
    maxent_on_structure,
    runs_by_start,
    start_intervals,
    with_other_images,
)
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel
from vpworkbench.train.finetune import PreparedTask, prepare_task


def test_they_know_the_majority_and_stay_near_chance_on_balanced_scenes():
    settings = few(task="nlvr2")
    found = baselines(prepare_task(settings), settings)["val"]
    names = {"another image", "most frequent", "text only", "image only", "text x pooled features", "MAC"}
    assert set(found) == names
    means = {name: result.scores.mean() for name, result in found.items()}
    assert means["most frequent"] == pytest.approx(0.5)
    assert means["text only"] == pytest.approx(0.5)  # each statement is true of one pair, false of one
    assert abs(means["image only"] - 0.5) < 0.2


def test_another_image_is_that_of_another_example():
    settings = few(task="vqa")
    prepared = prepare_task(settings)
    asked = prepared.splits["val"]
    given = with_other_images(asked)
    assert {one.images for one in given} == {one.images for one in asked}
    own = {one.images: set() for one in asked}
    for one, other in zip(asked, given, strict=True):
        assert other == replace(one, images=other.images) and other.images != one.images
        own[one.images].add(other.images)
    assert all(len(others) == 1 for others in own.values())
    found = baselines(prepared, settings)["val"]["another image"]
    assert found.predicted == prepared.model.task.evaluate(prepared.model, given, settings).predicted
    alone = replace(prepared, splits=prepared.splits | {"val": asked[:1]})
    assert "another image" not in baselines(alone, settings)["val"]


@pytest.fixture
def coloured(tmp_path) -> list[Example]:
    """Plain images, each asked for two colours, one of which it has: no word and no image alone tells the answer."""
    colours, examples = {"red": (250, 20, 20), "blue": (20, 20, 250), "green": (20, 200, 20)}, []
    rng = np.random.default_rng(0)
    for number in range(120):
        name, other = rng.permutation(list(colours))[:2]
        image = picture(tmp_path / f"{number}.png", tuple(int(c) for c in rng.normal(colours[name], 8).clip(0, 255)))
        for asked in (name, other):
            examples.append(Example(f"{number}-{asked}", (ImageFile(image.parent, image.name),), f"is it {asked}?",
                                    "train", answers=("yes" if asked == name else "no",) * 10))  # fmt: skip
    return examples


@pytest.mark.parametrize("alone, other", [("text only", "image only"), ("image only", "text only")])
def test_words_and_image_alone_answer_what_they_can(coloured, model, alone, other):
    """Whether red is asked for, or whether red is shown."""
    shown = [coloured[number - number % 2].text for number in range(len(coloured))]
    texts = [example.text for example in coloured] if alone == "text only" else shown
    told = [replace(example, answers=("yes" if "red" in text else "no",) * 10)
            for example, text in zip(coloured, texts, strict=True)]  # fmt: skip
    prepared = PreparedTask({"train": told[:160], "val": told[160:]}, TaskModel(model, TASKS["vqa"], ("no", "yes")))
    found = {name: result.scores.mean() for name, result in baselines(prepared, few(task="vqa"))["val"].items()}
    assert found[alone] > 0.95 and found[other] < 0.85


def test_a_product_answers_what_neither_words_nor_image_can_alone(coloured, model):
    settings = few(task="vqa")
    splits = {"train": coloured[:160], "val": coloured[160:]}
    prepared = PreparedTask(splits, TaskModel(model, TASKS["vqa"], ("no", "yes")))
    before = torch.get_rng_state()
    found = {name: result.scores.mean() for name, result in baselines(prepared, settings)["val"].items()}
    assert found["text x pooled features"] > 0.95
    assert max(found["text only"], found["image only"], found["most frequent"]) < 0.7
    assert torch.equal(torch.get_rng_state(), before)
    again = baselines(prepared, settings)["val"]["text x pooled features"]
    assert again.scores.mean() == found["text x pooled features"]


@pytest.mark.parametrize("network, epochs", [(partial(Mac, width=64), 60), (EveImage, 10)])
def test_attentive_networks_answer_what_neither_words_nor_image_can_alone(coloured, model, network, epochs):
    asked = [replace(example, answers=(), label=example.answers[0]) for example in coloured]
    labels = [example.label for example in asked]
    before = torch.get_rng_state()
    found = attentive_labels(network, model, asked[:160], labels[:160], asked[160:], seed=0, epochs=epochs)
    assert np.mean(np.array(found) == labels[160:]) > 0.8
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cells_of_mac_are_a_setting_of_its_tasks():
    """Runs from before the setting have no such key: at its default they are the same runs still."""
    assert "mac_steps" not in few(task="nlvr2").model_dump() and few(task="nlvr2").mac_steps == 4
    settings = few(task="nlvr1", overrides={"mac_steps": 12})
    assert settings.model_dump()["mac_steps"] == 12 == checked(FinetuneSettings, settings.model_dump()).mac_steps
    assert len(ATTENTIVE["nlvr1"]["MAC"](settings)(8, 9, 2).question) == 12
    with pytest.raises(SettingsError, match="mac_steps is for nlvr2 and nlvr1, not for vqa"):
        few(task="vqa", overrides={"mac_steps": 12})
    with pytest.raises(SettingsError, match="mac_steps"):
        few(task="nlvr2", overrides={"mac_steps": 0})


def counted(number: int, drawn: int) -> Example:
    boxes = tuple(tuple(Item("square", "black", 10.0 * i, 0.0, 10.0) for i in range(n)) for n in (drawn, 0, 0))
    text = f"there are exactly {('one', 'two', 'three', 'four')[number - 1]} black squares"
    return Example(f"{number}-{drawn}", (), text, "train", label=str(number == drawn), boxes=boxes)


def test_maxent_learns_to_compare_what_is_drawn_with_what_is_said():
    """Of each statement two in three are false: words alone would call all false."""
    examples = [counted(number, drawn) for number in range(1, 4) for drawn in range(1, 4)]
    labels = [example.label for example in examples]
    assert list(maxent_on_structure(examples * 3, labels * 3, examples)) == labels


def finished(**parameters) -> None:
    settings = few(task="vqa", **parameters)
    run = open_run("04_finetune", settings, name=f"{settings.pretrained}-{settings.seed}-{settings.answer_count}")
    run.write_summary(**{TASKS["vqa"].metric: 0.5 + 0.2 * settings.pretrained + 0.1 * settings.seed})


def test_runs_are_compared_that_differ_in_start_and_seed_alone(runs_folder):
    assert start_intervals(runs_by_start(few(task="vqa"))) == {}
    for seed in (0, 1):
        finished(seed=seed)
        finished(seed=seed, pretrained=False)
    finished(seed=2, checkpoint_every=10)  # no other training for that
    finished(overrides={"answer_count": 3})  # another run
    open_run("04_finetune", few(task="vqa", seed=9), name="unfinished")
    found = runs_by_start(few(task="vqa", seed=5))
    assert found["pretrained"].tolist() == [True] * 3 + [False] * 2
    intervals = start_intervals(found)
    values = [0.7, 0.8, 0.9]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert [*map(float, intervals["pre-trained"])] == pytest.approx([0.8, low, high, 3])
    assert [*map(float, intervals["difference"])] == pytest.approx([0.2, 0.2, 0.2, 2])
    assert json.loads((runs_folder / "04_finetune/True-2-2/config.json").read_text())["seed"] == 2


def test_runs_whose_answers_are_all_withheld_have_no_score(runs_folder):
    """VQA v2 as in the paper: validation trains, and the publisher keeps the answers of test."""
    settings = few(task="vqa", overrides={"train_on_val": True})
    open_run("04_finetune", settings, name="withheld").write_summary(test={})
    found = runs_by_start(settings)
    assert len(found) == 1 and found["score"].isna().all() and start_intervals(found) == {}
