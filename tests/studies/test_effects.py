"""Effects of blocking over many pictures: what is asked, batches joined, and what follows from exact blocking."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import narrow_model

from vpworkbench.probes import KnockOut, inter_modality_flow, knock_out
from vpworkbench.probes.patching import Patched
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.stats import bootstrap_interval
from vpworkbench.studies import effects
from vpworkbench.studies.questions import ask, examples, known
from vpworkbench.subjects import load
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.tasks.task import TaskModel, right_answer


@pytest.fixture(scope="module")
def pictures(scenes):
    return [picture for picture in scenes if picture.captions][:7]


@pytest.fixture(scope="module")
def subject(scenes):
    """A narrow model with random weights, which takes four pairs at a time."""
    model = narrow_model(scenes)
    torch.nn.init.normal_(model.itm.weight, std=1.0)
    return replace(load(model), batch=4)


@pytest.fixture(scope="module")
def measured(subject, pictures):
    told = []
    found = {
        what: effects.measure(subject, pictures, what, progress=lambda *told_now: told.append(told_now))
        for what in known(subject)
    }
    assert told[-1] == ("blocking, word", 2, 2) and "forward" not in vars(subject.base.visual)
    return found


def test_each_text_is_asked_of_its_picture_and_of_one_that_denies_it(subject, pictures):
    asked = examples(subject, pictures, "match")
    assert len(asked) == 14
    for own, other, picture in zip(asked[::2], asked[1::2], pictures, strict=True):
        assert own.picture is picture and own.is_true and not other.is_true
        assert own.text == other.text == picture.captions[0] and other.picture.denies(own.text)
    for one in examples(subject, pictures, "word"):
        assert one.word in ATTRIBUTE_WORDS and one.word in one.text.split()
    assert {one.is_true for one in examples(subject, pictures, "word")} == {True}
    assert examples(subject, pictures[:1], "match") == []  # no other picture


def test_read_outs_are_those_of_the_heads(subject, pictures):
    asked = examples(subject, pictures, "match")
    question = ask(subject, asked)
    joint = subject.model(**question.inputs.forward)
    odds = joint.cls @ (subject.base.itm.weight[1] - subject.base.itm.weight[0]) + subject.base.itm.bias.diff()
    right = torch.tensor([1.0, -1.0] * 7)
    torch.testing.assert_close(question.readout(joint), odds * right, rtol=1e-4, atol=1e-5)
    assert question.places.nonzero().tolist() == [[example, 0] for example in range(14)]  # [CLS]
    asked = examples(subject, pictures, "word")
    question = ask(subject, asked)
    joint = subject.model(**question.inputs.forward)
    places = question.places[:, : joint.text.shape[1]]
    assert (question.places.sum(dim=1) == 1).all() and question.places.sum() == places.sum()
    logits = subject.base.word_logits(joint.text[places]).double().log_softmax(dim=-1)
    ids = subject.base.tokenizer.convert_tokens_to_ids([one.word for one in asked])
    torch.testing.assert_close(question.readout(joint), logits[range(7), ids])


def test_batches_are_joined(subject, pictures, measured):
    """The same numbers as for one batch of all."""
    for what, found in measured.items():
        question = ask(subject, examples(subject, pictures, what))
        inputs, options = question.inputs, {"model": subject.model, **question.options}
        flow = inter_modality_flow(
            subject.model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language
        )
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False, "equal_nan": True}
        torch.testing.assert_close(found.flow, flow.flow, **close)
        torch.testing.assert_close(found.null, flow.null, **close)
        torch.testing.assert_close(found.live, flow.live(question.places), **close)
        whole = knock_out(**options, spans="triangle")
        assert isinstance(found.blocked, KnockOut) and found.blocked.spans == whole.spans
        torch.testing.assert_close(found.blocked.after, whole.after, **close)
        torch.testing.assert_close(found.reverse.after, knock_out(**options, way="vision_to_text").after, **close)
        assert found.alone.controls.shape == (effects.DRAWS, len(whole.before), found.layers)
        assert found.random.mean(dim=1).std(dim=0).min() > 0  # each draw is another
        assert found.mean.after.shape == (len(whole.before), found.layers)


def test_what_follows_from_exact_blocking(measured):
    match, word = measured["match"], measured["word"]
    torch.testing.assert_close(
        match.everywhere[::2], -match.everywhere[1::2], rtol=0, atol=1e-6
    )  # blind to the picture
    blind = match.interval((match.everywhere > 0).double())
    assert blind.mean == 0.5 and int(blind.count) == 7
    assert len(word.other) == 7 and len(match.other) == 0 and (word.other != word.blocked.before).any()
    for found in measured.values():
        torch.testing.assert_close(found.lens[:, -1], found.blocked.before, rtol=1e-5, atol=1e-5)
        assert (found.reverse.effect[:, -1] == 0).all()  # dead flow
        assert (found.live.nan_to_num() <= found.flow.nan_to_num() + 1e-6).all()
        alone = found.single["words cannot read the image"]
        np.testing.assert_allclose(alone.mean, found.blocked.triangle.diagonal(dim1=1, dim2=2).mean(dim=0))
        assert set(alone.count) == {7}


def test_texts_are_the_samples(measured):
    found = measured["match"]
    values = found.blocked.effect.numpy().reshape(7, 2, -1).mean(axis=1)
    np.testing.assert_allclose(found.interval(found.blocked.effect), bootstrap_interval(values))


def test_the_effect_in_one_number_is_that_of_the_last_span(subject, pictures, measured):
    found = measured["match"]
    one = effects.match_effect(subject, pictures, found.layers)
    np.testing.assert_allclose(one, found.interval(found.blocked.before - found.everywhere), rtol=1e-4, atol=1e-6)
    assert np.isnan(effects.match_effect(subject, pictures[:1], found.layers).mean)
    with pytest.raises(ValueError, match="none of the 1 pictures can be asked for 'word'; take more"):
        effects.measure(subject, pictures[:1], "word")


def test_the_table_has_every_span_from_one(measured):
    table = effects.table(measured).set_index(["read_out", "quantity", "start", "stop"])
    found, layers = measured["word"], measured["word"].layers
    assert len(table) == 2 * (4 * layers * (layers + 1) // 2 + (3 + effects.DRAWS) * layers + layers + 1)
    row = table.loc["word", "effect", 1, layers]
    assert row["mean"] == pytest.approx(float((found.blocked.before - found.everywhere).mean()))
    assert row["low"] <= row["mean"] <= row["high"] and row["count"] == 7
    assert table.loc[("word", "lens", 1, layers), "mean"] == pytest.approx(float(found.blocked.before.mean()))


def test_conclusions_state_the_numbers(measured):
    restored = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]] * 2)
    patched = Patched(("image", "word"), torch.ones(2), torch.zeros(2), restored)
    said = effects.conclusions(measured, patched)
    assert len(said) == 7 and "50.0% [50.0%, 50.0%] without the image (chance 50%)" in said[0]
    lost = measured["match"].single["words cannot read the image"].mean
    assert f"Layer {lost.argmax() + 1} alone costs most, {lost.max():.2f} [" in said[1]
    draws = measured["match"].random.mean(dim=1)[:, int(lost.argmax())]
    assert f", 3 draws from {draws.min():.2f} to {draws.max():.2f}); layer" in said[1]
    assert said[-1].endswith("by the image before the first layer (100%), and by the word before the last (75%).")


@pytest.mark.parametrize("layers, count", [(3, 0), (13, 3 * 13 - 3)])
def test_deep_models_are_not_blocked_in_every_span(layers, count):
    spans = effects._spans(layers)
    assert spans == "triangle" if not count else len(set(spans)) == count and (0, layers - 1) in spans


def test_a_fine_tuned_model_is_asked_held_out_questions_of_its_task(scenes, scenes_folder):
    settings = finetune_settings(data=str(scenes_folder))
    torch.manual_seed(0)
    task_model = TaskModel(narrow_model(scenes), TASKS["vqa"], ("yes", "no", "2"))
    assert known(load(task_model)) == ("match", "word")  # where its questions are is not known
    subject = replace(load(task_model), batch=4, task_settings=settings)
    asked = examples(subject, scenes[:5], "answer")
    assert known(subject)[-1] == "answer" and len({one.picture for one in asked}) == 5
    splits, _ = TASKS["vqa"].load(settings)
    held_out = {(one.images[0], one.text, right_answer(one)) for one in splits["val"]}
    assert {(one.picture, one.text, one.answer) for one in asked} <= held_out
    found = effects.measure(subject, scenes[:5], "answer")
    for pictures, values in (("picture", found.blocked.before), ("other", found.other)):
        given = task_model.predict_all([getattr(one, pictures) for one in asked], [one.text for one in asked])
        expected = [np.log(shares[one.answer]) for shares, one in zip(given, asked, strict=True)]
        np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert effects.conclusions({"answer": found}, None)[0].startswith("Answer: the right one has probability")


@pytest.mark.parametrize("pool", ["cls", "words"])
def test_the_places_of_an_answer_are_the_tokens_that_the_head_reads(scenes, scenes_folder, pool):
    torch.manual_seed(0)
    task_model = TaskModel(narrow_model(scenes), TASKS["vqa"], ("yes", "no", "2"), pool=pool)
    subject = replace(load(task_model), task_settings=finetune_settings(data=str(scenes_folder)))
    question = ask(subject, examples(subject, scenes[:5], "answer"))
    joint = task_model.base(**question.inputs.forward)
    states = joint.hidden[-1].detach().requires_grad_()
    question.readout(joint._replace(hidden=(*joint.hidden[:-1], states))).sum().backward()
    assert torch.equal(question.places, (states.grad != 0).any(dim=-1))
