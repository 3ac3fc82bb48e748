"""The tasks' official metrics: VQA score, accuracy and consistency, recall at K; BLEU-4. Scores lie in [0, 1]."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import ArrayLike

# The official evaluation's tables (VQA v2, vqaEval.py), spelled anew: what it does to an answer before it compares.
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at 'twas shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
).split()
# A word that lost one of its apostrophes gets it back; the table takes one away from "somebody'd", and so do we.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


FEWEST_ANSWERS = 4
"""With fewer answers to a question, the official score could not reach 1."""


def normalised_answer(answer: str) -> str:
    """An answer as VQA's official evaluation compares it.

    Line breaks and tabs to spaces, punctuation out, number words to digits, articles out, contractions as written
    with an apostrophe.
    """
    text = kept = _tidy(answer)
    for mark in _PUNCTUATION:
        removed = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        kept = kept.replace(mark, "" if removed else " ")
    kept = _PERIOD.sub("", kept, count=32)  # no more, as there
    words = (_NUMBERS.get(word, word) for word in kept.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_score(answer: str, given: Sequence[str]) -> float:
    """Mean over people of min(1, others who gave this answer / 3): the official score of one question.

    `given` are people's answers, ten in VQA v2. They are normalised, the prediction `answer` too, unless all people
    wrote the same: then it must be written so. Of one to three answers (fewer than `FEWEST_ANSWERS`) one must be given
    exactly: without one person none would be left.
    """
    theirs = [_tidy(text) for text in given]
    if len(set(theirs)) == 1 and len(given) >= FEWEST_ANSWERS:
        return _leave_one_out(theirs, _tidy(answer))
    return _leave_one_out([normalised_answer(text) for text in given], normalised_answer(answer))


def answer_targets(given: Sequence[str]) -> dict[str, float]:
    """Soft targets of one question: each normalised answer with its official score."""
    tidy = [normalised_answer(text) for text in given]
    return {answer: _leave_one_out(tidy, answer) for answer in dict.fromkeys(tidy)}


def most_given(given: Sequence[str]) -> str:
    """What most people answered, normalised; of equals the one written first, and nothing where there is none."""
    counts = Counter(map(normalised_answer, given))
    return counts.most_common(1)[0][0] if counts else ""


def _leave_one_out(given: Sequence[str], answer: str) -> float:
    if len(given) < FEWEST_ANSWERS:
        return float(answer in given)
    agreeing = [text == answer for text in given]
    return float(np.mean([min(1.0, (sum(agreeing) - own) / 3) for own in agreeing]))


def accuracy(predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """1 where right, 0 elsewhere, by example; its mean is the accuracy."""
    return np.array([float(one == other) for one, other in zip(predicted, labels, strict=True)])


def caption_bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a set of captions, each with its own references; words as they are, in lower case.

    Corpus counts, the closest reference length and no smoothing, as in COCO's evaluation; by sacrebleu.
    """
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise ModuleNotFoundError("BLEU needs its package: pip install sacrebleu") from None
    if not captions or len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, {len(references)} sets of references: give each caption its own")
    if wrong := [place for place, given in enumerate(references) if isinstance(given, str) or not given]:
        raise ValueError(f"references of captions {wrong}: give each caption a list of one text or more")
    by_place = list(zip_longest(*references))  # the first references of all captions, then the second, ...
    options = {"lowercase": True, "tokenize": "none", "smooth_method": "none", "force": True}
    return corpus_bleu(list(captions), by_place, **options).score / 100


NLVR2_IDENTIFIER = r"^(.+-[0-9]+)-[0-9]+-([0-9]+)$"
"""Identifiers of NLVR2's release, `split-set-pair-sentence`; its groups are the split's set, and the sentence."""


def consistency(predicted: Mapping[str, str], labels: Mapping[str, str]) -> float:
    """NLVR2's: share of statements that are judged rightly for every pair of images they were asked of.

    Both map identifiers as in the release (`NLVR2_IDENTIFIER`) to labels: examples of one set and sentence share a
    statement.
    """
    right: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for identifier, label in labels.items():
        right[re.search(NLVR2_IDENTIFIER, identifier).groups()].append(predicted[identifier] == label)
    return float(np.mean([all(parts) for parts in right.values()]))


def recall_at(scores: ArrayLike, relevant: ArrayLike, cutoffs: Sequence[int] = (1, 5, 10)) -> dict[int, np.ndarray]:
    """Whether one of the K best is relevant, by query; its mean is R@K.

    `scores` and `relevant`, a bool with at least one True in each row, are (query, candidate). A tie counts against the
    model: a relevant candidate ranks after all others with the same score.
    """
    scores, relevant = np.asarray(scores, dtype=np.float32), np.asarray(relevant, dtype=bool)
    if np.isnan(scores).any():
        raise ValueError("scores hold nan")
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    rank = ((scores >= best) & ~relevant).sum(axis=1)
    return {cutoff: (rank < cutoff).astype(float) for cutoff in cutoffs}
