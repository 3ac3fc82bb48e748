"""The official metrics, on cases worked out by hand and on the edges of the official evaluation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from vpworkbench.metrics import (
    accuracy,
    answer_targets,
    caption_bleu,
    consistency,
    normalised_answer,
    recall_at,
    vqa_score,
)


@pytest.mark.parametrize(
    "answer, compared",
    [
        ("Two", "2"),
        ("none", "0"),
        ("The  red\tball", "red ball"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # the table knows words that lost one apostrophe
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # as there
        ("Im", "im"),  # the table has it in capitals, the answer is in small letters by then
        ("t-shirt", "t shirt"),
        ("what?", "what"),
        ("no !", "no"),
        ("1,000", "1000"),
        ("x,y", "x y"),
        ("3.5", "3.5"),
        ("U.S.A.", "USA".lower()),
        ("yes.\n", "yes"),
        (" an apple ", "apple"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_officially(answer, compared):
    assert normalised_answer(answer) == compared


def test_vqa_score_leaves_one_out():
    """Of ten people three agree: 7 of 10 others find 3, 3 of 10 find 2: (7 * 1 + 3 * 2/3) / 10."""
    given = ["red"] * 3 + ["blue"] * 7
    assert vqa_score("red", given) == pytest.approx(0.9)
    assert vqa_score("blue", given) == 1
    assert vqa_score("green", given) == 0
    assert vqa_score("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_score("Red.", given) == pytest.approx(0.9)


def test_where_all_agree_it_must_be_written_so():
    assert vqa_score("two", ["two"] * 10) == 1
    assert vqa_score("2", ["two"] * 10) == 0
    assert vqa_score("2", ["two"] * 9 + ["2"]) == 1
    assert vqa_score("a dog\n", ["a dog "] * 10) == 1


@pytest.mark.parametrize("given", [["A dog."], ["a dog", "cat"], ["cat", "dog", "dog"]])
def test_one_to_three_answers_are_matched_exactly(given):
    """The official score leaves one person out: of one answer nothing would be left."""
    assert vqa_score("dog", given) == 1 and vqa_score("The dog", given) == 1 and vqa_score("horse", given) == 0
    assert set(answer_targets(given).values()) == {1.0} and "dog" in answer_targets(given)


def test_four_answers_are_scored_officially():
    assert vqa_score("dog", ["dog"] * 4) == 1 and vqa_score("dog", ["dog", "a", "b", "c"]) == pytest.approx(0.25)


def test_targets_are_the_scores_of_the_answers():
    targets = answer_targets(["yes"] * 8 + ["Yes."] + ["no"])
    assert targets == {"yes": 1.0, "no": pytest.approx(0.3)}


def test_accuracy_needs_a_prediction_of_each_label():
    assert accuracy(["a", "b"], ["a", "c"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="zip"):
        accuracy(["a", "b"], ["a"])


def test_consistency_asks_for_every_pair_of_a_statement():
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "True", "dev-2-0-0": "True"}
    predicted = {**labels, "dev-1-1-0": "True"}
    assert consistency(labels, labels) == 1
    assert consistency(predicted, labels) == pytest.approx(2 / 3)
    with pytest.raises(KeyError, match="dev-2-0-0"):
        consistency({key: value for key, value in labels.items() if key != "dev-2-0-0"}, labels)


def test_recall_is_top_k_accuracy_and_ties_count_against():
    rng = np.random.default_rng(0)
    scores = rng.random((40, 12))
    truth = rng.integers(0, 12, 40)
    relevant = np.arange(12) == truth[:, None]
    for cutoff, found in recall_at(scores, relevant).items():
        assert found.mean() == pytest.approx(top_k_accuracy_score(truth, scores, k=cutoff, labels=range(12)))
    assert recall_at(np.zeros((1, 12)), relevant[:1])[10].tolist() == [0]
    several = np.array([[False, True, True, False]])
    assert recall_at([[3.0, 1.0, 2.0, 0.0]], several, [1, 2]) == {1: [0], 2: [1]}
    with pytest.raises(ValueError, match="nan"):
        recall_at([[np.nan, 1.0]], [[True, False]])


def test_bleu_is_the_formula_of_its_paper():
    """Counts of all captions, clipped by the most in any reference; the closest length, the shorter of two."""
    captions = ["A red ball left of a blue cube", "a green cone on the table on the floor", "a small grey ball"]
    references = [
        ["a red ball left of the blue cube", "a red ball and a blue cube on the left"],
        ["a green cone on the table"],
        ["a small grey ball"],
    ]
    logs, length, closest = [], 0, 0
    for size in range(1, 5):
        right = total = 0
        for caption, given in zip(captions, references, strict=True):
            counts, known = ngrams(caption, size), [ngrams(one, size) for one in given]
            right += sum(min(count, max(one[gram] for one in known)) for gram, count in counts.items())
            total += sum(counts.values())
        logs.append(math.log(right / total))
    for caption, given in zip(captions, references, strict=True):
        words = len(caption.split())
        length += words
        closest += min((abs(len(one.split()) - words), len(one.split())) for one in given)[1]
    expected = math.exp(sum(logs) / 4) * min(1.0, math.exp(1 - closest / length))
    assert caption_bleu(captions, references) == pytest.approx(expected, abs=1e-12) and 0 < expected < 1
    assert caption_bleu(captions, [[one] for one in captions]) == pytest.approx(1)
    with pytest.raises(ValueError, match="3 captions, 2 sets of references"):
        caption_bleu(captions, references[:2])
    for wrong in ("a small grey ball", []):
        with pytest.raises(ValueError, match=r"captions \[2\]: give each caption a list"):
            caption_bleu(captions, [*references[:2], wrong])


def ngrams(text: str, size: int) -> Counter:
    words = text.lower().split()
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))
