"""Retrieval: pairs without false negatives, one score matrix for both directions, the same as the whole model's."""

from __future__ import annotations

import itertools
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import narrow_model

from vpworkbench.data.inputs import Pixels, prepare
from vpworkbench.data.records import Picture
from vpworkbench.errors import DataError
from vpworkbench.metrics import recall_at
from vpworkbench.runs import Run, open_run
from vpworkbench.scenes.language import decide
from vpworkbench.settings import RetrievalSettings
from vpworkbench.studies.review import review
from vpworkbench.subjects import load_task
from vpworkbench.tasks.retrieval import (
    CANDIDATES,
    CUTOFFS,
    RETRIEVAL,
    WEIGHTS,
    Matching,
    RetrievalBatches,
    chance,
    owners_of,
    reranked,
    retrieval_result,
    score_matrix,
)
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.tasks.task import TaskModel, texts_of
from vpworkbench.train.finetune import evaluate_split, finetune, prepare_task


@pytest.fixture
def model(scenes) -> TaskModel:
    return TaskModel(narrow_model(scenes), RETRIEVAL, ("unmatched", "matched")).eval()


@pytest.fixture
def photographs(scenes) -> list[Picture]:
    """Pictures without ground truth."""
    return [Picture(picture.id, picture.image, "train", picture.captions) for picture in scenes]


def evaluated(model, pictures):
    return RETRIEVAL.evaluate(model, pictures, finetune_settings(task="retrieval"))


def batches(model, pictures, images=6):
    return RetrievalBatches(pictures, model.base.words, RetrievalSettings(), inputs=Pixels(96), images=images, seed=1)


def test_negatives_are_false_of_their_image(model, scenes):
    some = batches(model, scenes[:40])
    for step in range(10):
        batch = some[step]
        texts = model.base.tokenizer.batch_decode(batch.words, skip_special_tokens=True)
        shown = [next(p for p in scenes if (p.image.pixels(96) == pixels.permute(1, 2, 0).numpy()).all())
                 for pixels in batch.images]  # fmt: skip
        for image, text, matched in zip(batch.image_index, texts, batch.matched, strict=True):
            assert (text in shown[image].captions) == bool(matched)
            assert decide(text, shown[image].scene) is bool(matched)
        assert batch.matched.sum() == 6 and len(batch.matched) <= 18
    again = batches(model, scenes[:40])[3]
    assert torch.equal(again.words, some[3].words) and torch.equal(again.image_index, some[3].image_index)


def test_captions_said_of_several_images_are_no_negatives(model, scenes):
    twins = [Picture(str(n), scenes[n].image, "train", ("a red square",)) for n in range(6)]
    assert batches(model, twins)[0].matched.all()
    with pytest.raises(DataError, match="6 captioned images: a batch of 7"):
        batches(model, twins, images=7)


def test_scores_are_those_of_the_whole_model_pair_by_pair(model, scenes):
    pictures, captions = scenes[:5], texts_of(scenes[:5])
    seen = []
    model.base.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    scores = score_matrix(model, pictures, captions, pairs=7)
    assert seen == [5] and scores.shape == (5, 25)
    for row in (0, 3):
        inputs = prepare(model.base, [pictures[row]] * 25, captions)
        with torch.no_grad():
            logits = model.base.itm(model.base(**inputs.forward).cls)
        np.testing.assert_allclose(scores[row], (logits[:, 1] - logits[:, 0]).numpy(), atol=1e-5)


def test_the_last_layer_at_cls_alone_is_that_of_the_whole_forward(model):
    fusion = model.base.fusion.double()
    words = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(7) < torch.tensor([[7], [5], [2]])
    vision = torch.randn(3, 9, 32, dtype=torch.float64)
    for real in (tokens, torch.ones_like(tokens)):
        torch.testing.assert_close(fusion.cls_output(words, real, vision), fusion(words, real, vision)[-1][:, 0])
    torch.testing.assert_close(fusion.cls_output(words, tokens), fusion(words, tokens)[-1][:, 0])
    gradients = []
    for output in (fusion.cls_output(words, tokens, vision), fusion(words, tokens, vision)[-1][:, 0]):
        fusion.zero_grad()
        output.square().sum().backward()
        gradients.append(fusion.bert.encoder.layer[0].attention.self.query.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_bf16_is_refused_on_a_cpu(model, scenes):
    with pytest.raises(ValueError, match="need a GPU"):
        score_matrix(model, scenes[:2], texts_of(scenes[:2]), bf16=True)


def test_a_stopped_matrix_goes_on(model, scenes, tmp_path):
    pictures, captions = scenes[:40], texts_of(scenes[:40])[:30]
    whole = score_matrix(model, pictures, captions)

    def stop(what, done, total):
        raise KeyboardInterrupt

    file = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        score_matrix(model, pictures, captions, file=file, progress=stop)
    assert np.isnan(np.load(file)).sum() == 8 * 30
    seen = []
    model.base.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    np.testing.assert_array_equal(score_matrix(model, pictures, captions, file=file), whole)
    assert seen == [8]
    with pytest.raises(ValueError, match="scores of other weights, images or captions, or of other settings"):
        score_matrix(model, pictures, captions[:29], file=file)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(ValueError, match="scores of other weights, images or captions"):
        score_matrix(model, pictures[:39], captions, file=file)


def naive_recall(scores, owner, cutoff):
    """Sort and look: the share of images whose best texts hold one of their own, and of texts likewise."""
    text = [any(owner[n] == row for n in np.argsort(-line)[:cutoff]) for row, line in enumerate(scores)]
    image = [owner[n] in np.argsort(-line)[:cutoff] for n, line in enumerate(scores.T)]
    return np.mean(text), np.mean(image)


def test_recall_is_that_of_sorted_lists(photographs):
    pictures = photographs[:30]
    owner = np.repeat(np.arange(30), [len(picture.captions) for picture in pictures])
    scores = np.random.default_rng(0).normal(size=(30, len(owner))).astype(np.float32)
    scores[owner, np.arange(len(owner))] += 1.5
    found = retrieval_result(scores, pictures)
    assert found.by_truth is None
    for cutoff in CUTOFFS:
        expected = naive_recall(scores, owner, cutoff)
        assert (found.text[cutoff].mean(), found.image[cutoff].mean()) == pytest.approx(expected)
        assert 0 < expected[1] < 1
    summary = found.summary()
    each = [interval.mean for interval in found.intervals().values()]
    assert summary["mean_recall"] == pytest.approx(np.mean(each))
    recalls = [np.mean(list(ways.values()), axis=0) for ways in (found.text, found.image)]
    half = 1.96 * np.sqrt(sum(way.var(ddof=1) / len(way) for way in recalls)) / 2
    assert (summary["mean_recall_high"] - summary["mean_recall_low"]) / 2 == pytest.approx(half, rel=0.1)


def test_a_caption_that_an_image_has_twice_is_two_queries(model, photographs, tmp_path):
    text = photographs[1].captions[0]
    pictures = [photographs[0], replace(photographs[1], captions=(text, text)), photographs[2]]
    found, first = evaluated(model, pictures), len(pictures[0].captions)
    assert found.scores.shape[1] == len(found.image[1]) == sum(len(picture.captions) for picture in pictures)
    np.testing.assert_allclose(found.scores[:, first], found.scores[:, first + 1], atol=1e-6)
    assert found.image[1][first] == found.image[1][first + 1] == (found.scores[:, first].argmax() == 1)
    found.save(tmp_path / "found.csv")
    assert (tmp_path / "found.csv").read_text().count(f"IR,{text}") == 2
    assert sum(one.text == text for one in review(model, pictures, found)) == 2


def test_a_tie_counts_against_the_model(photographs):
    pictures = photographs[:4]
    flat = retrieval_result(np.zeros((4, 20)), pictures)
    assert flat.text[10].mean() == 0 and flat.image[1].mean() == 0  # 15 texts of others come first
    assert flat.image[5].mean() == 1  # three images come first
    scores = np.array([[1, 1, 0]])
    assert recall_at(scores, [[True, False, False]])[1].mean() == 0
    assert recall_at(scores, [[True, True, False]])[1].mean() == 1


def test_chance_is_what_random_orders_give(photographs):
    pictures, rng = photographs[:6], np.random.default_rng(0)
    captions, expected = texts_of(pictures), chance(pictures)
    draws = [retrieval_result(rng.normal(size=(6, len(captions))), pictures) for _ in range(400)]
    for cutoff, way in itertools.product(CUTOFFS, ("text", "image")):
        drawn = np.mean([getattr(draw, way)[cutoff].mean() for draw in draws])
        assert getattr(expected, way)[cutoff].mean() == pytest.approx(drawn, abs=0.03)


def test_a_caption_that_is_true_of_another_scene_is_right_by_truth(scenes):
    said = "there is a red square"
    true = [replace(picture, captions=(said,)) for picture in scenes if decide(said, picture.scene)][:2]
    untrue = next(picture for picture in scenes if decide(said, picture.scene) is False)
    false = replace(untrue, captions=untrue.captions[:1])
    swapped = np.array([[0, 9, 8], [9, 0, 8], [1, 1, 0]])
    result = retrieval_result(swapped, [*true, false])
    assert result.text[1].tolist() == [0, 0, 0] and result.by_truth.text[1].tolist() == [1, 1, 0]
    assert {"tr_r1", "tr_r1_low", "ir_r10_high", "ir_r1_by_truth"} <= set(result.summary())


def test_recall_of_both_directions(scenes):
    pictures = scenes[:4]
    own = np.repeat(np.eye(4), 5, axis=1)
    result = retrieval_result(own, pictures)
    assert all(interval.mean == 1 for interval in result.intervals().values())
    assert set(result.intervals()) == {f"{way} R@{k}" for way in ("TR", "IR") for k in (1, 5, 10)}
    wrong = np.roll(own, 5, axis=1)
    assert retrieval_result(wrong, pictures).intervals()["IR R@1"].mean == 0
    with pytest.raises(ValueError, match="20 captions"):
        retrieval_result(own[:, :19], pictures)


def test_matching_weighs_both_kinds_alike_however_it_is_accumulated(model, scenes):
    model = model.double()
    batch = batches(model, scenes)[0]
    objective, gradients, seen = Matching(), [], []
    counts = objective.counts(batch)
    model.base.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    for parts in (1, 3):
        model.zero_grad()
        for micro in batch.micro_batches(parts):
            sums = objective.losses(model, micro)
            sum(0.5 * value.double() / counts[name] for name, value in sums.items()).backward()
        gradients.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert seen == [6, 2, 2, 2]  # no image twice


def test_the_head_starts_as_that_of_pretraining(scenes):
    base = narrow_model(scenes)
    model = TaskModel(base, RETRIEVAL, ("unmatched", "matched"))
    assert torch.equal(model.head.weight, base.itm.weight) and model.head.weight is not base.itm.weight


FEW = {"scenes.images": 40, "scenes.val": 10, "scenes.test": 8, "train.images": 8, "train.log_every": 1, "workers": 0}


class Stopping(Run):
    """A run that is stopped in its second step, behind the checkpoint of the first."""

    def progress(self, what, done, total):
        if done == 2:
            raise KeyboardInterrupt


def test_a_stopped_run_ends_with_the_same_weights_and_scores(runs_folder):
    settings = finetune_settings(task="retrieval", steps=3, checkpoint_every=1, overrides=FEW)
    whole = open_run("04_finetune", settings, name="whole"), prepare_task(settings)
    assert finetune(*whole, settings) == 3
    stopped = open_run("04_finetune", settings, name="stopped")
    with pytest.raises(KeyboardInterrupt):
        finetune(Stopping(stopped.folder), prepare_task(settings), settings)
    resumed = stopped, prepare_task(settings)
    assert finetune(*resumed, settings) == 3
    results = [evaluate_split(*one, settings, "val") for one in (whole, resumed)]
    np.testing.assert_array_equal(results[0].scores, results[1].scores)
    np.testing.assert_array_equal(evaluated(load_task("whole"), whole[1].splits["val"]).scores,
                                  results[0].scores)  # fmt: skip
    lines = [(run.folder / "metrics.jsonl").read_text().count("\n") for run, _ in (whole, resumed)]
    assert lines == [3, 3]
    rows = (stopped.folder / "predictions-val.csv").read_text().splitlines()
    assert len(rows) == 10 + len(texts_of(whole[1].splits["val"])) and rows[0].startswith("TR,val-000000.png,")


def test_no_image_of_an_evaluation_split_is_trained_on(scenes_folder, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(scenes_folder, folder)
    file = next(folder.glob("dataset_*.json"))
    content = json.loads(file.read_text())
    content["images"][0]["split"] = "test"  # and a copy of it trains, under another name
    copy = {**content["images"][0], "split": "train", "filename": "copy.png"}
    with zipfile.ZipFile(folder / "images.zip", "a") as archive:
        archive.writestr("images/copy.png", archive.read(f"images/{content['images'][0]['filename']}"))
    content["images"].append(copy)
    file.write_text(json.dumps(content))
    splits, _ = RETRIEVAL.load(finetune_settings(task="retrieval", data=str(folder)))
    assert "copy.png" not in {picture.id for picture in splits["train"]} and len(splits["train"]) == 59
    few, _ = RETRIEVAL.load(
        finetune_settings(task="retrieval", data=str(folder), overrides={"retrieval.search_images": 3})
    )
    assert [len(few[split]) for split in ("train", "val", "test")] == [59, 3, 3]


def test_a_search_needs_two_images(scenes_folder, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(scenes_folder, folder)
    file = next(folder.glob("dataset_*.json"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"images": [image for image in content["images"] if image["split"] != "test"]}))
    with pytest.raises(DataError, match="0 captioned images in test; a search needs two"):
        RETRIEVAL.load(finetune_settings(task="retrieval", data=str(folder)))


def test_schedule_of_the_paper():
    settings = finetune_settings(task="retrieval", preset="paper", steps=0)
    assert settings.optim.lr_fusion == settings.optim.lr_visual == 5e-5 and settings.train.images == 32
    assert settings.train.epochs == 10 and settings.optim.decay_at == (0.5,) and settings.optim.decay == 0.5
    assert settings.retrieval.search_images == 0  # all


def test_searches_are_reviewed_with_the_image_found_and_the_own(model, scenes):
    pictures = scenes[:6]
    result = evaluated(model, pictures)
    for one in review(model, pictures, result, count=8):
        assert len(one.images) == len(one.attention) == 2
        assert one.right == (one.predicted == one.wanted)
        assert one.text in next(picture for picture in pictures if picture.id == one.wanted).captions


def test_a_fusion_ranks_the_candidates_of_a_dual_encoder_anew(photographs):
    """Written out naively: the sum decides among each query's 20 best, and the dual encoder's score beyond them."""
    rng, pictures = np.random.default_rng(0), photographs[:30]
    owner = owners_of(pictures)
    own = owner == np.arange(30)[:, None]
    first, second = (rng.normal(size=own.shape).astype(np.float32) + strength * own for strength in (1.5, 1.0))
    dual, fusion = ({"val": retrieval_result(scores, pictures)} for scores in (first, second))
    found = reranked(dual, fusion)["val"]
    assert found.weight in WEIGHTS and found.summary()["weight"] == found.weight > 0
    both = first / first.std() + found.weight * second / second.std()
    for scores, sums, right, recall in ((first, both, own, found.text), (first.T, both.T, own.T, found.image)):
        for query in range(len(scores)):
            best = np.argsort(-scores[query])[:CANDIDATES]
            order = [*best[np.argsort(-sums[query, best])], *np.argsort(-scores[query])[CANDIDATES:]]
            for cutoff in CUTOFFS:
                assert recall[cutoff][query] == right[query, order[:cutoff]].any()
    mean = found.summary()["mean_recall"]
    assert mean >= dual["val"].summary()["mean_recall"]  # weight 0 is among those that are tried
    useless = {"val": retrieval_result(np.zeros_like(first), pictures)}
    assert reranked(dual, useless)["val"].summary()["mean_recall"] == dual["val"].summary()["mean_recall"]
