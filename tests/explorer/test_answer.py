"""The view of an answer: what its widgets hold, other questions and images, the saved page, and errors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from probes.tiny_models import llava_with_processor

import vpworkbench as vpw
from vpworkbench.answers import probe_answer
from vpworkbench.errors import DataError
from vpworkbench.explorer.answer import COLUMNS, AnswerView
from vpworkbench.huggingface import as_read

QUESTION = "what is on the left"
IMAGE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def opened():
    return llava_with_processor(QUESTION)


@pytest.fixture
def view(opened) -> AnswerView:
    model, processor = opened
    view = vpw.explore(model, IMAGE, processor=processor, question=QUESTION, answer="a red ball")
    yield view
    view.close()


def numbers(traits: bytes) -> np.ndarray:
    return np.frombuffer(traits, dtype="<f4")


def test_words_have_their_maps_and_numbers(view, opened):
    answer = probe_answer(*opened, IMAGE, QUESTION, answer="a red ball")
    assert view.words.words == ["a", "red", "ball"] and view.answer.text == "a red ball"
    looks = numbers(view.words.looks).reshape(3, 9)
    for word in range(3):
        np.testing.assert_allclose(looks[word], answer.map(word), atol=1e-6)
    np.testing.assert_allclose(numbers(view.words.shares), answer.image_share.mean(dim=1), atol=1e-6)
    np.testing.assert_allclose(numbers(view.words.nulls), answer.null.mean(dim=1), atol=1e-6)
    assert len(view.table.rows) == 3 and all(len(row) == len(COLUMNS) for row in view.table.rows)
    probability = f"{float(answer.log_probs[1].exp()):.1%}"
    assert view.table.rows[1][1] == probability and f"Its probability is {probability}" in view.words.notes[1]
    assert view.shares.shape == [2, 3, 3]
    np.testing.assert_allclose(numbers(view.shares.values)[:9].reshape(3, 3), answer.image_share, atol=1e-6)


def test_layers_roll_out_and_pins(view):
    answer, plain = view.answer, numbers(view.words.looks)
    assert view.pin(0, 2, layer=1) is view and view.words.pinned == [0, 2]
    np.testing.assert_allclose(numbers(view.words.looks)[:9], answer.map(0, layer=1), atol=1e-6)
    view.pin(layer=0, head=1)
    np.testing.assert_allclose(numbers(view.words.looks)[:9], answer.map(0, layer=0, head=1), atol=1e-6)
    view.pin(rolled=True)
    np.testing.assert_allclose(numbers(view.words.looks)[:9], answer.map(0, rolled=True), atol=1e-6)
    view.pin()
    np.testing.assert_array_equal(numbers(view.words.looks), plain)
    with pytest.raises(ValueError, match="two words can be compared"):
        view.pin(0, 1, 2)
    with pytest.raises(ValueError, match="word 3"):
        view.pin(3)
    with pytest.raises(ValueError, match="head 9"):
        view.pin(head=9)


def test_another_question_and_an_error(view, monkeypatch):
    view.say("what is red")
    before = view.answer
    monkeypatch.setattr(view, "_ask", lambda image, question: (_ for _ in ()).throw(ValueError("no answer")))
    view.say("what")
    assert view.status.text == "Not answered: no answer" and view.answer is before
    view.pin(0, layer=0)
    assert view.words.label == f"what is red {before.text}"


def test_the_image_is_the_part_that_the_model_reads(opened):
    """A processor that crops: the boxes are shares of the middle third."""
    model, processor = opened
    wide = np.zeros((24, 72, 3), dtype=np.uint8)
    wide[:, 24:48] = 200
    view = vpw.explore(model, wide, processor=processor, question=QUESTION, answer="a red ball")
    assert view._image.shape == (24, 24, 3) and (abs(view._image.astype(int) - 200) <= 1).all()
    assert as_read(processor, IMAGE) is IMAGE
    view.close()


def test_an_image_may_be_a_file_and_anything_else_is_refused(opened, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "seen.png")
    model, processor = opened
    view = vpw.explore(model, str(tmp_path / "seen.png"), processor=processor, question=QUESTION, answer="a")
    np.testing.assert_array_equal(view.images["image"], IMAGE)
    view.close()
    with pytest.raises(DataError, match="array of float64"):
        vpw.explore(model, IMAGE / 255, processor=processor)
    with pytest.raises(TypeError, match="give vpw.explore its processor"):
        vpw.explore(model, IMAGE)


def test_a_folder_opens_the_same_view_and_its_page_needs_no_kernel(opened, tmp_path, view):
    model, processor = opened
    for part in opened:
        part.save_pretrained(tmp_path / "model")
    other = vpw.explore(str(tmp_path / "model"), Image.fromarray(IMAGE), question=QUESTION, answer="a red ball")
    np.testing.assert_allclose(numbers(other.words.looks), numbers(view.words.looks), atol=1e-6)
    other.close()
    page = view.pin(1).save(tmp_path / "answer.html").read_text()
    assert QUESTION in page and page.count("data:image/png") == 2 and "<td>red</td>" in page
    with pytest.raises(TypeError, match="only a decoder's answer has these options"):
        vpw.explore("", answer="a ball")
