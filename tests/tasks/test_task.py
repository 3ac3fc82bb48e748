"""Downstream tasks end to end on a few scenes: heads, targets, scores, files of predictions, checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import narrow_model, without_dropout
from miniatures import written

from vpworkbench import cli, subjects
from vpworkbench.data.records import Example
from vpworkbench.errors import CheckpointError, DataError, SettingsError
from vpworkbench.runs import open_run, runs_root, shipped_run
from vpworkbench.studies.baselines import baselines
from vpworkbench.subjects import load_task
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.predict import predict_table
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.tasks.task import PairAttention, TaskModel, TaskResult
from vpworkbench.tasks.vqa import VQA
from vpworkbench.train.engine import build_optimiser
from vpworkbench.train.finetune import PreparedTask, evaluate_split, finetune, prepare_task
from vpworkbench.train.pretrain import with_words_of

FEW = {"scenes.images": 80, "scenes.val": 20, "scenes.test": 8, "train.images": 8, "train.log_every": 1, "workers": 0,
       "answer_count": 2}  # fmt: skip


def few(**parameters):
    return finetune_settings(steps=2, overrides=FEW | parameters.pop("overrides", {}), **parameters)


def load_examples(settings):
    return TASKS[settings.task].load(settings)[0]


def batches_of(model, examples):
    return model.task.batches(examples, model, few(task=model.task.name))


def evaluated(model, examples):
    return model.task.evaluate(model, examples, few(task=model.task.name))


@pytest.fixture(params=["vqa", "nlvr2", "snli-ve"])
def task(request) -> str:
    return request.param


def test_trains_and_is_scored_saved_and_loaded(task, tmp_path):
    settings = few(task=task)
    run, prepared = open_run("04_finetune", settings, name=f"tested-{task}"), prepare_task(settings)
    assert finetune(run, prepared, settings) == 2
    result = evaluated(prepared.model, prepared.splits["val"])
    assert len(result.scores) == len(prepared.splits["val"]) and np.isin(result.scores, [0, 1]).mean() > 0.3
    summary = result.summary(prepared.splits["val"])
    assert ("vqa_score" in summary) == (task == "vqa") and ("consistency" in summary) == (task == "nlvr2")
    again = load_task(f"04_finetune/tested-{task}")
    assert again.labels == prepared.model.labels
    assert evaluated(again, prepared.splits["val"]).predicted == result.predicted
    example = prepared.splits["val"][0]
    shares = again.predict(example.images, example.text)
    assert next(iter(shares)) == result.predicted[example.id] and len(shares) == len(again.labels)


def test_a_name_of_two_runs_needs_its_notebook():
    settings = few(task="vqa")
    run, prepared = open_run("04_finetune", settings, name="twice"), prepare_task(settings)
    finetune(run, prepared, settings)
    assert subjects.load("twice").task_model is not None
    shutil.copytree(shipped_run(), runs_root() / "01_pretrain" / "twice")
    with pytest.raises(CheckpointError, match="twice is a run of two .* write 01_pretrain/twice or 04_finetune/twice"):
        subjects.load("twice")
    assert subjects.load("04_finetune/twice").task_model is not None
    assert subjects.load("01_pretrain/twice").task_model is None


def test_predictions_are_written_as_the_release_wants_them(tmp_path):
    of_gqa_and_vizwiz = {"02930152": "no", "VizWiz_test_00000000.jpg": "tea"}
    answers = TaskResult(TASKS["vqa"], np.zeros(3), {"262148000": "yes"} | of_gqa_and_vizwiz)
    answers.save(tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == [
        {"question_id": 262148000, "answer": "yes"},
        {"question_id": "02930152", "answer": "no"},
        {"image": "VizWiz_test_00000000.jpg", "answer": "tea"},
    ]
    TaskResult(TASKS["nlvr2"], np.zeros(1), {"dev-1-0-0": "True"}).save(tmp_path / "n.csv")
    with open(tmp_path / "n.csv") as file:
        assert list(csv.reader(file)) == [["dev-1-0-0", "True"]]


def test_what_is_not_told_is_not_scored(tmp_path, scenes, caplog):
    """A test set whose answers are withheld, and none at all: predictions, if any, but no score and no baselines."""
    for task, label in (("vqa", "yes"), ("nlvr2", "True")):
        model = TaskModel(narrow_model(scenes), TASKS[task], ("no", label))
        images = (scenes[0].image,) * (2 if task == "nlvr2" else 1)
        examples = [Example(f"test1-0-0-{number}", images, "is it red?", "test") for number in range(3)]
        settings = few(task=task)
        run = open_run("04_finetune", settings, name=f"withheld-{task}")
        prepared = PreparedTask({"train": examples, "val": [], "test": examples}, model)
        result = evaluate_split(run, prepared, settings, "test")
        assert len(result.predicted) == 3 and result.summary(examples) == prepared.test_summary(result) == {}
        assert not prepared.is_answered("test") and baselines(prepared, settings)["test"] == {}
        file = next(run.folder.glob("predictions-test.*"))
        assert caplog.messages[-1] == f"the answers of test are withheld: no score; the predictions are in {file}"
        caplog.clear()
        nothing = evaluate_split(run, prepared, settings, "val")
        assert not prepared.is_answered("val") and nothing.summary([]) == {} and not caplog.messages
        assert not list(run.folder.glob("predictions-val.*"))
        assert prepared.preview("test")[0].endswith("->  withheld")


def test_consistency_is_of_identifiers_as_released():
    own = [Example(f"mine, line {number}", (), "s", "test", label="True") for number in (2, 3)]
    result = TaskResult(TASKS["nlvr2"], np.ones(2), {example.id: "True" for example in own})
    assert set(result.summary(own)) == {"accuracy", "accuracy_low", "accuracy_high"}
    released = Example("dev-1-0-0", (), "s", "test", label="True")
    result = TaskResult(TASKS["nlvr2"], np.zeros(3), result.predicted | {released.id: "False"})
    assert result.summary([*own, released])["consistency"] == 0


def test_every_image_is_encoded_once_and_examples_do_not_depend_on_their_mates(scenes):
    settings = few(task="vqa")
    model = TaskModel(narrow_model(scenes), TASKS["vqa"], ("no", "yes")).eval()
    examples = load_examples(settings)["val"][:6]
    batches, seen = batches_of(model, examples), []
    model.base.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    with torch.no_grad():
        together = batches.batch(examples)
        logits = model(together.images, together.image_index, together.words, together.word_tokens)
        alone = batches.batch(examples[3:4])
        torch.testing.assert_close(
            model(alone.images, alone.image_index, alone.words, alone.word_tokens)[0], logits[3], rtol=0, atol=1e-5
        )
    assert seen[0] == len({image for example in examples for image in example.images}) < 6


def test_accumulation_gives_the_same_gradients(scenes):
    labels = ("entailment", "neutral", "contradiction")
    model = without_dropout(TaskModel(narrow_model(scenes), TASKS["snli-ve"], labels).double())
    examples = load_examples(few(task="snli-ve"))["train"][:8]
    batch = batches_of(model, examples).batch(examples)
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        for micro in batch.micro_batches(parts):
            (model.task.objective().losses(model, micro)["loss"].double() / 8).backward()
        gradients.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_targets_of_questions_are_the_official_scores(scenes):
    model = TaskModel(narrow_model(scenes), TASKS["vqa"], ("blue", "red"))
    image = scenes[0].image
    examples = [Example("1", (image,), "what colour", "train", answers=("red",) * 3 + ("Blue",) * 7),
                Example("2", (image,), "what colour", "train", answers=("green",) * 10)]  # fmt: skip
    targets = batches_of(model, examples).batch(examples).targets
    torch.testing.assert_close(targets, torch.tensor([[1.0, 0.9], [0.0, 0.0]]))


def with_list(file):
    return few(overrides={"answer_list": str(file)})


def test_answers_are_counted_once_a_question_as_published(tmp_path):
    """The rule that gives 3,129: the answer that stands for a question, over training and validation."""
    examples = [Example("1", (), "q", "train", answers=("red",) * 3 + ("Blue",) * 7),
                Example("2", (), "q", "val", answers=("the blue", "red")),
                Example("3", (), "q", "val", answers=("red",) * 10, answer="Blue")]  # fmt: skip
    assert VQA.labels(examples, few(overrides={"answer_count": 3})) == ("blue",)
    with pytest.raises(DataError, match="no answer occurs in 4 of 3 questions"):
        VQA.labels(examples, few(overrides={"answer_count": 4}))
    listed = written(tmp_path / "listed.json", ["Red", "two", "the red"])
    assert VQA.labels(examples, with_list(listed)) == ("red", "2")
    listed = tmp_path / "listed.txt"
    listed.write_text("Red\n\ntwo\n")
    assert VQA.labels(examples, with_list(listed)) == ("red", "2")
    for content in (["red", 2], ["red", " "], []):
        with pytest.raises(DataError, match="wrong.json: no list of answers"):
            VQA.labels(examples, with_list(written(tmp_path / "wrong.json", content)))


def test_a_list_of_answers_is_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "listed.json", ["yes", "no"])
    settings = few(task="vqa", overrides={"answer_list": "listed.json"})
    assert settings.answer_list == str(tmp_path / "listed.json")
    assert prepare_task(settings).model.labels == ("yes", "no")
    with pytest.raises(SettingsError, match="answer_list is for vqa, not for nlvr2"):
        few(task="nlvr2", overrides={"answer_list": "listed.json"})
    with pytest.raises(DataError, match="gone.txt: no such file"):
        prepare_task(few(task="vqa", overrides={"answer_list": "gone.txt"}))


def test_questions_without_a_known_answer_score_zero_and_withheld_ones_not_at_all(scenes):
    examples = [Example("1", (scenes[0].image,), "q", "val", answers=("green",) * 10),
                Example("2", (scenes[0].image,), "q", "test")]  # fmt: skip
    scores = VQA.scores(examples, {"1": "red", "2": "red"})
    assert scores[0] == 0 and np.isnan(scores[1])
    statement = Example("3", (scenes[0].image,), "s", "test")
    assert np.isnan(TASKS["nlvr1"].scores([statement], {"3": "True"})).all()


def test_images_shared_with_training_are_left_out_of_a_second_score(scenes):
    examples = [Example(str(n), (scenes[0].image,), "s", "test", label="True") for n in range(4)]
    model = TaskModel(narrow_model(scenes), TASKS["nlvr1"], ("False", "True"))
    result = TaskResult(TASKS["nlvr1"], np.array([1.0, 1.0, 0.0, 0.0]), dict.fromkeys("0123", "True"))
    prepared = PreparedTask({"test": examples}, model, frozenset("23"))
    summary = prepared.test_summary(result)
    assert (summary["accuracy"], summary["accuracy_unshared"], summary["shared"]) == (0.5, 1.0, 2)
    assert "shared" not in PreparedTask({"test": examples}, model).test_summary(result)
    every = PreparedTask({"test": examples}, model, frozenset("0123")).test_summary(result)
    assert (every["accuracy"], every["shared"]) == (0.5, 4) and "accuracy_unshared" not in every


def test_uniters_head_is_its_formula(scenes):
    torch.manual_seed(0)
    model = TaskModel(narrow_model(scenes), TASKS["nlvr2"], ("False", "True"), pairing="pair-attention").eval()
    head, width = model.head, model.base.settings.fusion.width
    left, right = torch.randn(2, 2, 5, width).double()
    tokens = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = head.double()(left, right, tokens, tokens)
    for example, length in ((0, 5), (1, 3)):
        pooled = []
        for attend, own, other in zip(head.across, (left, right), (right, left), strict=True):
            own, other = own[example, :length], other[example, :length]
            query, key, value = (
                part @ weight.T + bias
                for part, weight, bias in zip(
                    (own, other, other), attend.in_proj_weight.chunk(3), attend.in_proj_bias.chunk(3), strict=True
                )
            )
            heads = []
            for q, k, v in zip(*(part.chunk(attend.num_heads, dim=-1) for part in (query, key, value)), strict=True):
                heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
            seen = attend.out_proj(torch.cat(heads, dim=-1))
            joined = head.join(torch.cat([seen, own], dim=-1))
            pooled.append((head.weigh(joined).softmax(dim=0) * joined).sum(dim=0))
        torch.testing.assert_close(found[example], head.out(torch.cat(pooled)), rtol=0, atol=1e-10)


def test_uniters_head_trains_and_is_saved_with_its_kind(tmp_path):
    settings = few(task="nlvr2", overrides={"pairing": "pair-attention"})
    run, prepared = open_run("04_finetune", settings, name="tested-pairing"), prepare_task(settings)
    finetune(run, prepared, settings)
    again = load_task("tested-pairing")
    assert again.pairing == "pair-attention" and isinstance(again.head, PairAttention)
    examples = prepared.splits["val"]
    assert evaluated(again, examples).predicted == evaluated(prepared.model, examples).predicted


def test_a_head_can_read_the_mean_over_the_words(tmp_path):
    settings = few(task="vqa", overrides={"pool": "words", "head_dropout": 0.5})
    run, prepared = open_run("04_finetune", settings, name="tested-pool"), prepare_task(settings)
    model = prepared.model
    examples = prepared.splits["train"][:6]
    batch = model.task.batches(examples, model, settings).batch(examples)
    hidden = model.eval().base.fuse(
        model.base.encode(batch.images), *batch.inputs[2:], image_index=batch.image_index[:, 0]
    )
    means = [
        row[:length].mean(dim=0) for row, length in zip(hidden.hidden[-1], batch.word_tokens.sum(dim=1), strict=True)
    ]
    assert len({len(example.text.split()) for example in examples}) > 1  # so that padding would show
    torch.testing.assert_close(model(*batch.inputs), model.head(torch.stack(means)))
    assert not torch.equal(model.train()(*batch.inputs), model(*batch.inputs))
    finetune(run, prepared, settings)
    again = load_task("tested-pool")
    examples = prepared.splits["val"]
    assert again.pool == "words" and evaluated(again, examples).predicted == evaluated(model, examples).predicted


def test_answers_can_start_as_likely_as_one_of_them():
    model = prepare_task(few(task="vqa", overrides={"answer_prior": True})).model.eval()
    bias, plain = model.head[-1].bias, prepare_task(few(task="vqa")).model.head[-1].bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 1 / (len(model.labels) + 1)))
    assert (plain.sigmoid() - 0.5).abs().max() < 0.1


def test_validation_can_train_too():
    settings = few(task="vqa")
    apart, joined = prepare_task(settings), prepare_task(settings.with_overrides({"train_on_val": True}))
    assert joined.splits["train"] == [*apart.splits["train"], *apart.splits["val"]] and apart.splits["val"]
    assert joined.splits["val"] == [] and joined.splits["test"] == apart.splits["test"]
    assert joined.model.labels == apart.model.labels
    assert set(baselines(joined, settings)["test"]) >= {"another image", "text only"}


def test_pooling_is_of_questions_only():
    with pytest.raises(SettingsError, match="pool is for vqa, not for retrieval"):
        few(task="retrieval", overrides={"pool": "words"})


def test_new_words_of_a_task_get_rows_of_their_own(scenes):
    base = narrow_model(scenes)
    known = base.tokenizer.get_vocab()
    grown = with_words_of(base, ["how many zebras are there?", "zebras"])
    fresh = set(grown.tokenizer.get_vocab()) - set(known)
    assert {"?", "zebras"} <= fresh and all(grown.tokenizer.get_vocab()[word] == known[word] for word in known)
    assert grown.tokenizer.tokenize("zebras?") == ["zebras", "?"]
    inputs = base.prepare(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), [scenes[0].captions[0]]).forward
    with torch.no_grad():
        torch.testing.assert_close(grown(**inputs).cls, base(**inputs).cls, rtol=0, atol=0)
    assert with_words_of(base, [scenes[0].captions[0]]) is base


def test_the_learning_curve_is_the_score_on_the_step(scenes):
    model = TaskModel(narrow_model(scenes), TASKS["nlvr1"], ("False", "True")).train()
    examples = load_examples(few(task="nlvr2"))["train"][:8]
    examples = [Example(one.id, one.images[:1], one.text, "train", one.label) for one in examples]
    batch = batches_of(model, examples).batch(examples)
    watched = model.task.objective().watch(model.eval(), batch)
    assert watched == {"training_score": evaluated(model, examples).scores.mean()}


def test_fine_tuning_has_its_own_rate_for_the_visual_side(scenes):
    model = TaskModel(narrow_model(scenes), TASKS["nlvr1"], ("False", "True"))
    settings = finetune_settings(task="nlvr1")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimiser(model, settings.optim).param_groups:
        visual = {names[id(parameter)].startswith("base.visual.") for parameter in group["params"]}
        assert visual == {group["rate"] == settings.optim.lr_visual}


@pytest.mark.parametrize(
    "parameters, message",
    [({"task": "vqaa"}, "no task 'vqaa'; did you mean 'vqa'"), ({"preset": "papr"}, "no preset 'papr'"),
     ({"overrides": {"answer_counts": 3}}, "did you mean 'answer_count'")],
)  # fmt: skip
def test_wrong_settings_name_the_nearest(parameters, message):
    with pytest.raises(SettingsError, match=message):
        finetune_settings(**parameters)


def test_schedules_of_the_paper():
    vqa, nlvr2, snli = (finetune_settings(task=task, preset="paper", steps=0) for task in ("vqa", "nlvr2", "snli-ve"))
    assert vqa.train.epochs == 100 and vqa.optim.decay_at == (0.65, 0.75) and vqa.optim.decay == 0.1
    assert nlvr2.optim.decay == 0.5 and [round(80 * at) for at in nlvr2.optim.decay_at] == [60, 65, 70, 75, 78, 79]
    assert snli.optim.lr_fusion == 5e-5 and [round(25 * at) for at in snli.optim.decay_at] == [15, 20, 23]
    assert {one.train.images for one in (vqa, nlvr2, snli)} == {512}


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_examples(finetune_settings(task="vqa", data=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="holds no annotation file of a known format; known here: VQA v2"):
        load_examples(finetune_settings(task="vqa", data=str(tmp_path)))
    with pytest.raises(CheckpointError, match="no whole fine-tuned model"):
        load_task(tmp_path)


@pytest.fixture
def answering(scenes, tmp_path) -> TaskModel:
    """A model with random weights, and its folder `model` in the test's own."""
    model = TaskModel(narrow_model(scenes), TASKS["vqa"], ("no", "red", "yes")).eval()
    model.save_pretrained(tmp_path / "model")
    return model


def test_predictions_of_many_are_those_of_each(scenes, answering):
    images = [scenes[number % 3].image for number in range(40)]
    texts = [f"is there a red ring {'or a square ' * (number % 2)}?" for number in range(40)]
    together = answering.predict_all(images, texts)
    for image, text, shares in list(zip(images, texts, together, strict=True))[::13]:
        alone = answering.predict(image.pixels(), text)
        assert list(alone) == list(shares) and alone == pytest.approx(shares, abs=1e-5)


def test_a_table_is_predicted_in_its_order_or_refused_whole(scenes, scenes_folder, answering, tmp_path):
    names = [picture.image.name for picture in scenes[:3]]
    rows = [(name, "what is red?") for name in (names[2], names[0], names[1])]
    with open(tmp_path / "asked.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *rows])
    found = predict_table(answering, tmp_path / "asked.csv", images=[scenes[0].image.folder])
    assert [Path(name).name for name in found["image"]] == [Path(name).name for name, _ in rows]
    assert set(found["prediction"]) <= set(answering.labels) and found["probability"].between(0, 1).all()
    with open(tmp_path / "asked.csv", "a", newline="") as file:
        csv.writer(file).writerow(("absent.png", "what is red?"))
    with pytest.raises(DataError, match=r"asked.csv: .*absent\.png.* missing"):
        predict_table(answering, tmp_path / "asked.csv", images=[scenes[0].image.folder])


def test_a_table_is_predicted_without_a_word_of_splits(scenes, answering, tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(scenes[0].image.read())
    (tmp_path / "asked.csv").write_text("image,text,colour\na.png,what is red?,red\n")
    assert len(predict_table(answering, tmp_path / "asked.csv")) == 1
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["columns that are not read"]


@pytest.mark.parametrize(
    "task, row, told",
    [("vqa", "a.png,a.png", "line 3: 2 images, but vqa takes 1: leave image2 empty"),
     ("nlvr2", "a.png,", "line 3: 1 images, but nlvr2 takes 2: fill image and image2"),
     ("nlvr2", "a.png,cut.png", "line 3: .*cut.png: cannot be decoded")],
)  # fmt: skip
def test_a_row_that_cannot_be_predicted_is_named(scenes, tmp_path, monkeypatch, task, row, told):
    (tmp_path / "a.png").write_bytes(scenes[0].image.read())
    (tmp_path / "cut.png").write_bytes(b"cut")
    good = "a.png,a.png" if task == "nlvr2" else "a.png,"
    (tmp_path / "asked.csv").write_text(f"image,image2,text\n{good},what is red?\n{row},what is red?\n")
    model = TaskModel(narrow_model(scenes), TASKS[task], ("no", "yes"))
    monkeypatch.setattr(model, "predict_all", lambda *_: pytest.fail("something was predicted"))
    with pytest.raises(DataError, match=rf"asked.csv: {told}"):
        predict_table(model, tmp_path / "asked.csv")


def test_predict_refuses_what_it_cannot_answer(scenes, answering, tmp_path):
    with pytest.raises(DataError, match="vqa takes 1 images a text, not 2"):
        answering.predict([scenes[0].image, scenes[1].image], "what is red?")
    with pytest.raises(DataError, match="an empty text"):
        answering.predict(scenes[0].image, "  ")
    with pytest.raises(DataError, match="absent.png: image missing"):
        answering.predict(tmp_path / "absent.png", "what is red?")


def test_vpw_predict_answers_and_tells_what_is_wrong(scenes, answering, tmp_path, capsys):
    def vpw(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["predict", *map(str, arguments)])
        return stopped.value.code, *capsys.readouterr()

    image, model = tmp_path / "a.png", tmp_path / "model"
    image.write_bytes(scenes[0].image.read())
    code, told, _ = vpw(model, "--image", image, "--text", "what is red?")
    assert code == 0 and {line.split()[1] for line in told.splitlines()} == set(answering.labels)
    (tmp_path / "asked.jsonl").write_text('{"image": "a.png", "text": "what is red?"}\n')
    code, told, _ = vpw(model, "--table", tmp_path / "asked.jsonl")
    assert code == 0 and told.splitlines()[0] == "id,image,text,prediction,probability"
    code, _, wrong = vpw(tmp_path / "nowhere", "--image", image, "--text", "what?")
    assert code == 2 and "no whole fine-tuned model" in wrong
    pair, table = ("--image", image, "--text", "what?"), ("--table", tmp_path / "asked.jsonl")
    for mixed in (pair[:2], pair[2:], (*table, *pair[:2]), (*table, *pair[2:]), (*pair, "--place", tmp_path)):
        code, told, wrong = vpw(model, *mixed)
        assert code == 2 and not told and wrong.startswith("error: give --image and --text, or --table"), mixed
        assert len(wrong.splitlines()) == 1
