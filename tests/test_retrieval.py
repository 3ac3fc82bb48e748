"""Retrieval: pairs without false negatives, one score matrix for both directions, the same as the whole model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vpworkbench.data.records import DataError, Picture
from vpworkbench.retrieval import (
    Matching,
    RetrievalBatches,
    captions_of,
    retrieval_result,
    score_matrix,
)


def batches(model, pictures, **options):
    given = {"images": 6, "image_px": 96, "negatives": 2, "seed": 1} | options
    return RetrievalBatches(pictures, model.words, **given)


def test_negatives_are_false_of_their_image(model, scenes):
    some = batches(model, scenes[:40])
    for step in range(10):
        batch = some[step]
        texts = model.tokenizer.batch_decode(batch.words, skip_special_tokens=True)
        shown = [next(p for p in scenes if (p.image.pixels(96) == pixels.permute(1, 2, 0).numpy()).all())
                 for pixels in batch.images]  # fmt: skip
        for image, text, matched in zip(batch.image_index, batch.text_index, batch.matched, strict=True):
            assert (texts[text] in shown[image].captions) == bool(matched)
            assert shown[image].truth(texts[text]) is bool(matched)
        assert batch.matched.sum() == 6 and len(batch.matched) <= 18
    again = batches(model, scenes[:40])[3]
    assert torch.equal(again.words, some[3].words) and torch.equal(again.image_index, some[3].image_index)


def test_captions_said_of_several_images_are_no_negatives(model, scenes):
    twins = [Picture(str(n), scenes[n].image, "train", ("a red square",)) for n in range(6)]
    assert batches(model, twins)[0].matched.all()
    with pytest.raises(DataError, match="6 captioned images: a batch of 7"):
        batches(model, twins, images=7)


def test_scores_are_those_of_the_whole_model_pair_by_pair(model, scenes):
    pictures, captions = scenes[:5], captions_of(scenes[:5])
    seen = []
    model.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    scores = score_matrix(model, pictures, captions, pairs=7)
    assert seen == [5] and scores.shape == (5, 25)
    for row in (0, 3):
        inputs = model.prepare([pictures[row]] * 25, captions)
        with torch.no_grad():
            logits = model.itm(model(**inputs.forward).cls)
        np.testing.assert_allclose(scores[row], (logits[:, 1] - logits[:, 0]).numpy(), atol=1e-5)


def test_a_stopped_matrix_goes_on(model, scenes, tmp_path):
    pictures, captions = scenes[:40], captions_of(scenes[:40])[:30]
    whole = score_matrix(model, pictures, captions)

    def stop(what, done, total):
        raise KeyboardInterrupt

    file = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        score_matrix(model, pictures, captions, file=file, progress=stop)
    assert np.isnan(np.load(file)).sum() == 8 * 30
    seen = []
    model.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    np.testing.assert_array_equal(score_matrix(model, pictures, captions, file=file), whole)
    assert seen == [8]
    with pytest.raises(ValueError, match=r"scores of \(40, 30\), now \(40, 29\)"):
        score_matrix(model, pictures, captions[:29], file=file)


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
    objective, gradients = Matching(), []
    counts = objective.counts(batch)
    for parts in (1, 3):
        model.zero_grad()
        for micro in batch.micro_batches(parts):
            sums = objective.losses(model, micro)
            sum(0.5 * value.double() / counts[name] for name, value in sums.items()).backward()
        gradients.append(model.itm.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
