"""The view of an answer: what its widgets hold, another question, and models without places."""

from __future__ import annotations

import numpy as np
import pytest
from probes.tiny_models import llava_with_processor

from vpworkbench.answers import probe_answer
from vpworkbench.explorer.answer import COLUMNS, AnswerView, explore_answer

QUESTION = "what is on the left"
IMAGE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def opened():
    return llava_with_processor(QUESTION)


@pytest.fixture
def view(opened) -> AnswerView:
    view = explore_answer(*opened, IMAGE, QUESTION, answer="a red ball")
    yield view
    view.close()


def numbers(traits: bytes) -> np.ndarray:
    return np.frombuffer(traits, dtype="<f4")


def test_words_have_their_maps_and_numbers(view, opened):
    answer = probe_answer(*opened, IMAGE, QUESTION, answer="a red ball")
    assert [word.strip() for word in view.reader.words] == ["a", "red", "ball"]
    looks = numbers(view.reader.looks).reshape(3, 9)
    for word in range(3):
        np.testing.assert_allclose(looks[word], answer.map(word), atol=1e-6)
    assert len(view.table.rows) == 3 and all(len(row) == len(COLUMNS) for row in view.table.rows)
    assert view.table.rows[1][1] == f"{float(answer.log_probs[1].exp()):.1%}"
    assert view.shares.shape == [2, 3, 3]
    np.testing.assert_allclose(numbers(view.shares.values)[:9].reshape(3, 3), answer.image_share, atol=1e-6)


def test_rolled_out_and_without_sinks(view):
    plain = numbers(view.reader.looks)
    view.rolled.value = True
    rolled = numbers(view.reader.looks)
    assert not np.allclose(plain, rolled)
    view.rolled.value = False
    view.without_sinks.value = True
    kept = numbers(view.reader.looks)
    assert ((kept == plain) | (kept == 0)).all()


def test_another_question_and_an_error(view):
    view.question.value = "what is red"
    before = view.answer
    assert "Hover over a word" in view.status.text

    def refuse(text: str):
        raise ValueError("no answer")

    view._ask = refuse
    view.question.value = "what"
    assert view.status.text == "no answer" and view.answer is before
