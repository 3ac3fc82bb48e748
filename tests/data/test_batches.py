"""Groups, word masks, and that nothing but image and words tells matched from unmatched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch.utils.data import DataLoader

from vpworkbench.data.batches import IGNORE, GroupBatches, mask_words
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.errors import DataError
from vpworkbench.model.visual import VisualTokens
from vpworkbench.scenes.language import decide
from vpworkbench.settings import DataSettings, PretrainSettings
from vpworkbench.train.objective import Pretraining, group_batches


def groups(model, scenes, **settings):
    return group_batches(scenes, model, DataSettings(**settings), images=8, seed=3)


def texts(model, batch) -> list[str]:
    ids = torch.where(batch.labels != IGNORE, batch.labels, batch.words)
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_two_matched_and_two_false_of_the_image(model, scenes):
    batches = groups(model, scenes)
    for step in range(6):
        batch, pictures = batches[step], batches.sampler[step]
        assert batch.image_index.tolist() == [row for row in range(8) for _ in range(4)]
        assert batch.matched.view(8, 4).tolist() == [[True, True, False, False]] * 8
        for row, text, match in zip(batch.image_index, texts(model, batch), batch.matched, strict=True):
            picture = pictures[row]
            assert (text in picture.captions) == bool(match)
            assert decide(text, picture.scene) is bool(match)


def test_without_ground_truth_the_plain_rule_holds(model, scenes):
    """A photograph's unmatched text is another image's caption, never one of its own nor an identical string."""
    plain = [Picture(p.id, p.image, p.split, p.captions) for p in scenes]
    plain[1] = Picture("twin", plain[1].image, "train", plain[0].captions)
    batches = groups(model, plain)
    for step in range(20):
        batch, pictures = batches[step], batches.sampler[step]
        for row, text, match in zip(batch.image_index, texts(model, batch), batch.matched, strict=True):
            assert (text in pictures[row].captions) == bool(match)


def test_case_makes_no_other_text(scenes):
    picture = Picture("p", scenes[0].image, "train", ("A dog runs.",))
    assert not picture.denies("a dog RUNS.") and picture.denies("a cat runs.")


def test_ungrouped_replaces_half_of_the_images(model, scenes):
    batches = groups(model, scenes, grouped=False)
    matched = torch.cat([batches[step].matched for step in range(60)])
    assert all(len(batches[step].images) == len(batches[step].matched) == 8 for step in range(3))
    assert abs(matched.float().mean() - 0.5) < 0.1


def statements(scenes, count: int = 40) -> list[Picture]:
    """As in NLVR v1: one statement for each image, true of the first images and false of the others."""
    true = [Picture(p.id, p.image, p.split, p.captions[:1]) for p in scenes[:count]]
    false = [
        Picture(f"f{p.id}", p.image, p.split, (), q.captions[:1])
        for p, q in zip(scenes[count : 2 * count], true, strict=True)
    ]
    return true + false


def test_own_false_statements_come_before_those_of_other_pictures(model, scenes):
    pictures = [replace(p, captions=p.captions[:1], foils=("a red square", "a blue moon")) for p in scenes[:20]]
    batch = groups(model, pictures)[0]
    found = {text for text, match in zip(texts(model, batch), batch.matched, strict=True) if not match}
    assert found == {"a red square", "a blue moon"}


def test_pictures_with_only_a_false_statement_start_no_group(model, scenes, caplog):
    batches = groups(model, statements(scenes), matched_per_image=1, unmatched_per_image=1)
    assert [picture.id for picture in batches.pictures] == [picture.id for picture in scenes[:40]]
    assert "40 of 80 pictures have no true text" in caplog.text
    for step in range(6):
        batch, pictures = batches[step], batches.sampler[step]
        assert batch.matched.view(8, 2).tolist() == [[True, False]] * 8
        for row, text, match in zip(batch.image_index, texts(model, batch), batch.matched, strict=True):
            assert (text in pictures[row].captions) == bool(match)


def test_ungrouped_statements_replace_their_image_by_one_they_are_false_of(model, scenes):
    batches = groups(model, statements(scenes), grouped=False)
    pixels = {picture.id: picture.image.pixels(96) for picture in statements(scenes)}
    shown = 0
    for step in range(6):
        batch = batches[step]
        for row, text, match in zip(batch.image_index, texts(model, batch), batch.matched, strict=True):
            if not match:
                stated = [picture for picture in statements(scenes) if text in picture.foils]
                image = batch.images[row].permute(1, 2, 0).numpy()
                assert any(np.array_equal(image, pixels[picture.id]) for picture in stated)
                shown += 1
    assert shown > 10


def test_counts_and_places_of_masks_do_not_tell_matched_from_unmatched(model, scenes):
    """A classifier on masked counts and places alone stays at chance."""
    batches, objective = groups(model, scenes), Pretraining(PretrainSettings(seed=3))
    features, labels = [], []
    parsing = torch.softmax(torch.randn(8, 1, 36, 36, generator=torch.Generator().manual_seed(0)), dim=-1)
    for step in range(60):
        batch = batches[step]
        words = torch.zeros(len(batch.matched), 32)
        words[:, : batch.words.shape[1]] = (batch.labels != IGNORE).float()
        vision = objective.masked(VisualTokens(torch.empty(0), parsing), batch).float()
        mask_ids = (batch.words == model.tokenizer.mask_token_id).sum(1, keepdim=True)
        features.append(torch.cat([words, words.sum(1, keepdim=True), mask_ids, vision], dim=1))
        labels.append(batch.matched)
    score = cross_val_score(LogisticRegression(max_iter=500), torch.cat(features), torch.cat(labels), cv=4).mean()
    assert abs(score - 0.5) < 0.06, score


def test_a_batch_is_a_function_of_seed_and_step(model, scenes):
    plain = [groups(model, scenes)[step] for step in range(4)]
    loader = DataLoader(groups(model, scenes), batch_size=None, sampler=range(4), num_workers=2)
    for one, other in zip(plain, loader, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_an_epoch_shows_each_image_once(model, scenes):
    batches = GroupBatches(scenes, model.words, DataSettings(), images=9, inputs=Pixels(96), vision=36, seed=0)
    seen = [number for step in range(10) for number in batches.sampler.rows(step)]
    assert sorted(seen) == list(range(90))


def test_micro_batches_are_the_batch(model, scenes):
    batch = groups(model, scenes)[0]
    parts = batch.micro_batches(4)
    assert [len(part.images) for part in parts] == [2] * 4
    assert torch.equal(torch.cat([part.words for part in parts]), batch.words)
    assert all(part.image_index.tolist() == [0] * 4 + [1] * 4 for part in parts)


def draws(rows: int = 20_000):
    """Texts of 3 to 12 words over 100 ids; 0 pad, 1 [CLS], 2 [SEP], 3 [MASK], words from 10."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 11, rows)
    words = np.zeros((rows, 12), dtype=np.int64)
    for row, length in zip(words, lengths, strict=True):
        row[: length + 2] = [1, *rng.integers(10, 100, length), 2]
    return words, words >= 10, rng


def test_mlm_statistics():
    words, maskable, rng = draws()
    masked = mask_words(words, maskable, rng, share=0.15, mask_id=3, vocabulary=100)
    hidden = masked.labels != IGNORE
    assert not hidden[~maskable].any(), "a special token or a pad was masked"
    assert hidden.any(axis=1).all(), "a text without a masked word"
    np.testing.assert_array_equal(masked.labels[hidden], words[hidden])
    np.testing.assert_array_equal(masked.words[~hidden], words[~hidden])
    long = maskable.sum(axis=1) == 10  # of ten words, one in ten texts had its word forced
    share = hidden[long].sum() / maskable[long].sum()
    assert share == pytest.approx(0.15 + 0.85**10 / 10, abs=0.006)
    to_mask = (masked.words[hidden] == 3).mean()
    kept = (masked.words[hidden] == words[hidden]).mean()
    assert to_mask == pytest.approx(0.8 + 0.1 / 100, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / 100, abs=0.01)


def test_unknown_words_stop_the_run(model):
    with pytest.raises(DataError, match="not in the vocabulary.*init_text"):
        model.words.check(["a red cube", "погода сегодня хорошая"], source="mine")


def test_long_text_is_cut_and_counted(model, scenes, caplog):
    long = " ".join(["a red square"] * 1_700)
    model.words.check([long, scenes[0].captions[0]], source="mine")
    assert "1 of 2 texts are cut at 32 tokens" in caplog.text
    assert model.words.pad([long]).shape == (1, 32)


def test_set_without_false_texts_is_refused(model, scenes):
    same = [Picture(str(i), p.image, "train", ("a red square",)) for i, p in enumerate(scenes[:9])]
    with pytest.raises(DataError, match="text false of"):
        groups(model, same)[0]


def test_set_without_true_texts_is_refused(model, scenes):
    with pytest.raises(DataError, match="1 pictures with a true text"):
        groups(model, statements(scenes)[39:])
