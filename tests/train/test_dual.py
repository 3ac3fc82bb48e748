"""Dual encoders: the losses as printed, frozen features once, the frozen and the trained one on a few scenes."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import narrow_model

from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.errors import SettingsError
from vpworkbench.runs import open_run
from vpworkbench.scenes.language import decide
from vpworkbench.settings import RetrievalSettings
from vpworkbench.tasks.retrieval import RetrievalBatches, owners_of
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.tasks.task import texts_of
from vpworkbench.train.dual import (
    DualBatches,
    DualEncoder,
    Projection,
    build_dual,
    dual_scores,
    max_of_hinges,
    near_captions,
    symmetric_contrastive,
)
from vpworkbench.train.finetune import finetune, prepare_task


def batches(model, pictures, images=6):
    return RetrievalBatches(pictures, model.words, RetrievalSettings(), inputs=Pixels(96), images=images, seed=1)


@pytest.fixture
def dual(model) -> DualEncoder:
    return DualEncoder(model.visual, model.fusion.bert, model.words)


@pytest.fixture
def cosine() -> torch.Tensor:
    return torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_contrastive_loss_is_the_printed_one(cosine):
    negative = torch.ones(5, 5, dtype=torch.bool)
    negative[1, 3] = False
    total = 0.0
    for own in range(5):
        for line, allowed in ((cosine[own], negative[own]), (cosine[:, own], negative[:, own])):
            against = sum(math.exp(10 * line[n]) for n in range(5) if n == own or allowed[n])
            total -= math.log(math.exp(10 * line[own]) / against) / 2
    torch.testing.assert_close(symmetric_contrastive(cosine, torch.tensor(10.0), negative).item(), total)


def test_hinges_take_the_hardest_negative_of_either_side(cosine):
    negative = torch.ones(5, 5, dtype=torch.bool)
    negative[0, 2] = negative[4, 1] = False
    total = 0.0
    for own in range(5):
        texts = max(cosine[own, n].item() for n in range(5) if n != own and negative[own, n])
        images = max(cosine[n, own].item() for n in range(5) if n != own and negative[n, own])
        total += sum(max(0.0, 0.2 + hardest - cosine[own, own].item()) for hardest in (texts, images))
    assert max_of_hinges(cosine, negative).item() == pytest.approx(total) and total > 0
    far = torch.eye(5) * 0.5
    assert max_of_hinges(far, negative) == 0
    assert max_of_hinges(cosine, torch.zeros(5, 5, dtype=torch.bool)) == 0  # no negative, no loss


def test_a_caption_that_fits_two_images_is_no_negative_of_either(model, scenes):
    twins = [Picture(str(n), scenes[n].image, "train", ("a red square" if n < 3 else f"{n} rings",)) for n in range(6)]
    batch = DualBatches(batches(model, twins))[0]
    said = batches(model, twins).draw(0)[1]
    for row, text in enumerate(said):
        assert [bool(one) for one in batch.targets[row]] == [other != text for other in said]


def test_frozen_features_are_those_of_the_pixels(dual, scenes):
    pictures = scenes[:12]
    features, pairs = dual.features(pictures), batches(dual, pictures)
    pixels, pooled = DualBatches(pairs)[1], DualBatches(pairs, features)[1]
    with torch.no_grad():
        torch.testing.assert_close(dual.visual(pixels.inputs[0]).mean(), pooled.inputs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(dual.pooled_texts(*pixels.inputs[1:]), pooled.inputs[1], rtol=0, atol=1e-5)
        dual.eval()
        torch.testing.assert_close(dual(*pixels.inputs), dual.projection(*pooled.inputs), rtol=0, atol=1e-5)
    assert torch.equal(pixels.targets, pooled.targets)


def test_padding_does_not_count(dual):
    short, both = dual.words.tensors(["a red ring"]), dual.words.tensors(["a red ring", "a red ring is above a cross"])
    dual.eval()
    with torch.no_grad():
        torch.testing.assert_close(dual.pooled_texts(*short)[0], dual.pooled_texts(*both)[0], rtol=0, atol=1e-5)


def test_a_projection_finds_what_is_linear():
    """Texts that are a rotation of their images are told apart."""
    torch.manual_seed(0)
    images = torch.randn(40, 8)
    texts = images @ torch.linalg.qr(torch.randn(8, 8)).Q
    projection, negative = Projection(8, 8, width=16, dropout=0.0), torch.ones(40, 40, dtype=torch.bool)
    optimiser = torch.optim.Adam(projection.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        symmetric_contrastive(projection(images, texts), projection.log_scale.exp(), negative).backward()
        optimiser.step()
    assert (projection(images, texts).argmax(dim=1) == torch.arange(40)).float().mean() > 0.9


def test_both_are_trained_once_and_kept(scenes, tmp_path):
    settings = finetune_settings(task="retrieval", steps=2, overrides={"train.images": 8, "workers": 0})
    pictures, pairs = scenes[60:70], batches(build_dual(settings), scenes[:30], images=8)
    found = dual_scores(pairs, pictures, settings, folder=tmp_path)
    assert set(found) == {"frozen dual projection", "trained dual encoder", "SCAN"}
    assert all(scores.shape == (10, len(texts_of(pictures))) for scores in found.values())
    assert not any(np.array_equal(*pair) for pair in combinations(found.values(), 2))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    again = dual_scores(pairs, pictures, settings, folder=tmp_path)
    for name, scores in found.items():
        np.testing.assert_array_equal(again[name], scores)
    assert len(written) == 3 and all(path.stat().st_mtime_ns == before for path, before in written.items())


def test_nearest_captions_are_those_of_the_sorted_cosines(dual, scenes):
    pictures = scenes[:9]
    features, owner = dual.features(pictures), owners_of(pictures)
    found, scores = dual.projection.nearest(features, owner, 0.2), dual.projection.scores(features)
    for row, places in enumerate(found):
        others = [place for place in np.argsort(-scores[row]) if owner[place] != row]
        assert len(places) == 9 and list(places) == others[:9]


def test_hard_negatives_come_from_the_nearest_captions(model, scenes):
    some = batches(model, scenes[:30])
    some.near = np.arange(150).reshape(30, 5)[::-1]  # of picture 0 those of picture 29
    captions = texts_of(scenes[:30])
    for step in range(4):
        batch, rows = some[step], some.draw(step)[0]
        texts = model.tokenizer.batch_decode(batch.words, skip_special_tokens=True)
        for image, text, matched in zip(batch.image_index, texts, batch.matched, strict=True):
            picture = some.pictures[rows[image]]
            near = [captions[place] for place in some.near[rows[image]]]
            assert text in (picture.captions if matched else near)
            assert decide(text, picture.scene) is bool(matched)
        assert (~batch.matched).sum() > 6


def test_hard_negatives_are_found_once(runs_folder):
    few = {"scenes.images": 40, "scenes.val": 10, "scenes.test": 8, "train.images": 8, "workers": 0,
           "retrieval.hard": 0.1}  # fmt: skip
    settings = finetune_settings(task="retrieval", steps=1, overrides=few)
    run, prepared = open_run("04_finetune", settings, name="hard"), prepare_task(settings)
    assert finetune(run, prepared, settings) == 1
    near = np.load(run.folder / "near.npy")
    assert near.shape == (40, 20) and not (owners_of(prepared.splits["train"])[near] == np.arange(40)[:, None]).any()


def test_hard_negatives_are_not_found_by_several_processes(model, scenes, tmp_path, monkeypatch):
    settings = finetune_settings(task="retrieval", overrides={"retrieval.hard": 0.1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="use train.processes, not torchrun"):
        near_captions(batches(model, scenes), settings, folder=tmp_path)


def test_features_are_made_where_the_projection_was_trained(dual, scenes):
    """`meta` instead of a GPU: it has no values, which can then not be fetched."""
    dual.projection.to("meta")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        dual.features(scenes[:2])
    assert {parameter.device.type for parameter in dual.parameters()} == {"meta"}


def test_it_begins_where_pretraining_began():
    dual = build_dual(finetune_settings(task="retrieval"))
    narrow = narrow_model([])
    assert type(dual.visual) is type(narrow.visual) and dual.text.config.hidden_size == 192
