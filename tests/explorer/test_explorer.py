"""The explorer without a browser: what its methods, its tables and its code say, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import ipywidgets
import numpy as np
import ot
import pandas as pd
import plotly.graph_objects as go
import psutil
import pytest
import torch
from conftest import narrow_model
from explorer.small_models import llava, vilt, wide_model
from PIL import Image
from plotly.callbacks import Points

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Pixels, prepare
from vpworkbench.data.objects import noise_on_objects, objects_of_pictures
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import write_regions
from vpworkbench.errors import DataError
from vpworkbench.explorer import Explorer, explore
from vpworkbench.explorer.readings import BLOCKED
from vpworkbench.explorer.widgets import Panels, Save
from vpworkbench.guides import open_source
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.readouts import fill_mask, match_probability
from vpworkbench.probes import flow_from_attention, knock_out
from vpworkbench.probes.readouts import masked_word, match_log_odds, task_answer
from vpworkbench.probing import probe
from vpworkbench.settings import MaskSettings, pretrain_settings
from vpworkbench.studies.examples import mask_errors
from vpworkbench.subjects import Subject
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel

EVIL = '<img src=x onerror="hacked()">'


@pytest.fixture
def view(model: VisualParsingModel, scenes: list[Picture]) -> Iterator[Explorer]:
    made = explore(model, scenes[:4])
    yield made
    made.close()


def png(side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "PNG")
    return stream.getvalue()


def grey(side: int) -> bytes:
    """The head of a PNG of any size."""
    head = struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def arrays(panels: Panels) -> np.ndarray:
    return np.frombuffer(panels.values, "<f4").reshape(len(panels.kinds), -1)


def below(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    return [widget, *(one for child in getattr(widget, "children", ()) for one in below(child))]


def test_four_views_and_one_plotly_figure(view: Explorer) -> None:
    tabs = next(one for one in below(view) if isinstance(one, ipywidgets.Tab))
    for place, figures in ((1, 0), (2, 1), (0, 1)):  # plotly is not asked for before the flow is
        tabs.selected_index = place
        assert sum(isinstance(one, go.FigureWidget) for one in below(view)) == figures
    assert list(tabs.titles) == ["Masks", "Words and patches", "Flow", "Try it"]


# ----------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("select", ["row", "column", "symmetric"])
def test_masks_are_the_top_of_the_parsing_attention(
    view: Explorer, model: VisualParsingModel, scenes: list[Picture], select: str
) -> None:
    view.pick(14, k=6, select=select, head=1)
    parsing = model.visual(prepare(model, scenes[:1], ["a"]).forward["images"]).parsing[0, 1].detach().numpy()
    ranked = {"row": parsing[14], "column": parsing[:, 14], "symmetric": parsing[14] + parsing[:, 14]}[select]
    others = [token for token in np.argsort(-ranked) if token != 14][:5]
    _, shade, mask, drawn = arrays(view.masks.panels[0])
    np.testing.assert_allclose(shade, ranked, atol=1e-6)
    assert set(np.flatnonzero(mask)) == {14, *others}
    assert drawn.sum() == 6 and drawn[14] == 1


def test_a_click_picks_and_draw_again_changes_the_random_mask_alone(view: Explorer) -> None:
    panels = view.masks.panels[0]
    panels.picked = 3
    first = arrays(panels)
    assert view.masks.pick == 3 and first[2, 3] == 1
    view.masks.again.click()
    second = arrays(panels)
    np.testing.assert_array_equal(first[:3], second[:3])
    assert not np.array_equal(first[3], second[3])
    panels.picked = -1  # Escape
    assert view.masks.pick == panels.picked == 3


def test_a_chosen_head_stays_with_the_next_picture(view: Explorer) -> None:
    view.pick(14, k=6, head=1)
    view.look(1)
    assert view.masks.head.value == 1


@pytest.mark.parametrize("kinds", [{}, {"family": "vit", "vit": "vit_tiny_patch16_224", "merge": 2, "image_px": 96}])
def test_a_model_in_half_precision_is_probed_and_explored(scenes: list[Picture], kinds: dict[str, object]) -> None:
    model = narrow_model(scenes, **kinds)
    flow = probe(model, scenes[:2]).from_input
    half = model.to(torch.bfloat16)
    np.testing.assert_allclose(probe(half, scenes[:2]).from_input, flow, atol=0.01)
    match = match_probability(half, prepare(half, scenes[:2], ["a", "a"]))
    assert match.dtype == torch.float32
    assert set(explore(half, scenes[:2]).tables()) >= {"masks", "looks"}


def test_reconstruction_errors_are_those_of_mfr(view: Explorer, model: VisualParsingModel) -> None:
    view.pick(8, k=5)
    table = view.tables()["masks"]
    masked = torch.from_numpy(table.attention_mask.to_numpy() > 0)[None]
    with torch.no_grad():
        forward = view.readings[0].inputs.forward
        joint = model.fuse(model.visual(forward["images"]), forward["words"], forward["word_tokens"], masked=masked)
        wanted = (model.mfr(joint.vision) - joint.visual.features).square().mean(dim=-1)[0]
    hidden = masked[0].numpy()
    np.testing.assert_allclose(table.attention_error[hidden], wanted.numpy()[hidden], rtol=1e-4)
    assert table.attention_error[~hidden].isna().all() and hidden.sum() == 5


def test_mean_errors_of_pictures_are_those_of_their_views(model: VisualParsingModel, scenes: list[Picture]) -> None:
    settings = pretrain_settings(init_visual="")
    found, means = mask_errors(model, scenes[:3], settings, seed=4), []
    noise = noise_on_objects(objects_of_pictures(scenes[:3], 6), seed=4)
    for picture, drawn in zip(scenes[:3], noise, strict=True):
        view = explore(model, [picture], views=("masks",)).say(picture.captions[0])
        table = view.pick(int(drawn.argmax()), k=settings.mask.tokens_of(settings.visual)).tables()["masks"]
        means.append(table.attention_error[table.attention_mask > 0].mean())
        view.close()
    assert found["attention"].mean == pytest.approx(np.mean(means), rel=1e-4)
    assert found["difference"].mean == pytest.approx(found["attention"].mean - found["random"].mean)


def test_share_of_the_mask_on_the_object(view: Explorer, scenes: list[Picture]) -> None:
    objects = scenes[0].object_map()
    cells = objects.reshape(6, 16, 6, 16).transpose(0, 2, 1, 3).reshape(36, -1)
    shares = np.array([np.bincount(cell, minlength=9)[1:9] / 256 for cell in cells])  # token object
    owner = np.where(shares.max(axis=1) >= 0.2, shares.argmax(axis=1) + 1, 0)
    token = int(np.flatnonzero(owner)[0])
    view.pick(token, k=4)
    mask = arrays(view.masks.panels[0])[2] > 0
    mask[token] = False
    wanted = (owner[mask] == owner[token]).mean()
    assert view.masks.numbers.rows[0][:3] == ["model", "attention", f"{100 * wanted:.0f}%"]
    size = int((owner == owner[token]).sum())
    expected = (size - 1) / 35  # any other token is equally likely
    assert view.masks.numbers.rows[1][2].endswith(f", {100 * expected:.0f}% expected")


def test_a_mask_as_large_as_the_object(view: Explorer) -> None:
    objects = view.masks._objects
    largest = int(objects[objects > 0].mode().values)
    view.pick(int((objects == largest).nonzero()[0]), head=1)
    view.masks.fit.click()
    size = int((objects == largest).sum())
    assert view.masks.k.value == size and f"({size} tokens)" in view.masks.numbers.names[2]
    assert view.masks.head.value == 1 and arrays(view.masks.panels[0])[2].sum() == size
    view.pick(int((objects == 0).nonzero()[0]))
    assert view.masks.fit.disabled and view.masks.numbers.rows[0][2] == "the pick is on background"


@pytest.mark.parametrize("wrong", [{"token": 36}, {"token": -1}, {"k": 0}, {"k": 37}, {"head": 9}, {"select": "best"}])
def test_picks_that_are_not_there(view: Explorer, wrong: dict) -> None:
    before = view.code
    with pytest.raises(ValueError, match=next(iter(wrong))):
        view.pick(**wrong)
    assert view.code == before


@pytest.mark.parametrize("rule", ["similar", "block", "object"])
def test_the_mask_hides_what_another_rule_ranks_first(view: Explorer, scenes: list[Picture], rule: str) -> None:
    """The best of each rule, by plain numbers; captions, table and the numbers beside it name the rule."""
    objects = objects_of_pictures(scenes[:1], 6)[0]
    pick = int((objects > 0).nonzero()[0])
    view.pick(pick, k=5, select=rule)
    hidden = np.flatnonzero(arrays(view.masks.panels[0])[2])
    features = view.masks._rankings[0].visual.features[0].double()
    place = np.stack([np.arange(36) // 6, np.arange(36) % 6], axis=1)
    scores = {
        "similar": torch.cosine_similarity(features, features[pick : pick + 1]).numpy(),
        "block": -np.linalg.norm(place - place[pick], axis=1).round(4),
    }
    scores["object"] = scores["block"] + 100 * (objects == objects[pick]).numpy()
    others = np.delete(scores[rule], hidden)
    assert len(hidden) == 5 and pick in hidden and scores[rule][hidden].min() >= others.max()
    assert view.masks.panels[0].captions[2] == f"{rule} mask"
    assert view.masks.errors[0].captions[0] == f"error under the {rule} mask"
    assert view.masks.numbers.rows[0][1] == rule and f"{rule}_mask" in view.tables()["masks"]
    assert f"select={rule!r}" in view.masks.code()


def test_the_object_under_the_pick_is_outlined(view: Explorer, scenes: list[Picture]) -> None:
    objects = objects_of_pictures(scenes[:1], 6)[0]
    for pick in (int(objects.argmax()), int((objects == 0).nonzero()[0])):
        view.pick(pick)
        wanted = ((objects == objects[pick]) & (objects > 0)).nonzero()[:, 0].tolist()
        assert view.masks.panels[0].outlined == wanted


# ----------------------------------------------------------------------------------------------- words, flow


def test_words_follow_layer_head_and_rollout(view: Explorer) -> None:
    reading, reader = view.readings[0], view.words.readers[0]
    for layer, head, rolled in [(0, 1, False), (1, None, False), (1, None, True)]:
        view.read(2, layer=layer, head=head, rolled=rolled)
        looks = np.frombuffer(reader.looks, "<f4").reshape(len(reading.words), -1)
        np.testing.assert_allclose(looks, reading.looks(layer, head, rolled=rolled), atol=1e-7)
        assert reader.pinned == 2
    view.words.maps[0].picked = [0, 1]  # a click
    view.words.rolled.value = False
    looks = np.frombuffer(reader.looks, "<f4").reshape(len(reading.words), -1)
    np.testing.assert_allclose(looks, reading.looks(0, 1), atol=1e-7)
    assert not view.words.mean.value
    for wrong in ({"place": 99}, {"layer": 2}, {"head": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            view.read(**wrong)


def test_words_follow_the_exact_plan_of_transport(view: Explorer) -> None:
    """Against POT on cosines written out; [CLS] and [SEP] have no mass, and the code brings the view back."""
    reading, reader = view.readings[0], view.words.readers[0]
    view.read(1, transport=True)
    words, states = range(1, len(reading.words) - 1), reading.hidden[-1][0].double().numpy()
    rows = states / np.linalg.norm(states, axis=1, keepdims=True)
    cost = 1 - rows[reading.language[1:-1]] @ rows[reading.vision].T
    plan = ot.emd(np.full(len(words), 1 / len(words)), np.full(cost.shape[1], 1 / cost.shape[1]), cost)
    looks = np.frombuffer(reader.looks, "<f4").reshape(len(reading.words), -1)
    np.testing.assert_allclose(looks[1:-1], len(words) * plan, atol=1e-5)
    np.testing.assert_allclose(looks.sum(axis=1), [0, *[1] * len(words), 0], atol=1e-6)
    assert "transport" in reader.label and view.words.code().endswith("transport=True)")
    assert set(view.words.tables()["looks"]["transport"]) > {0.0}
    view.read(1)
    assert view.words.way.value == "attention"


def test_span_shows_its_product(view: Explorer) -> None:
    view.span(0, 1, layer=1)
    shown = np.frombuffer(view.flow.maps[0].values, "<f4").reshape(view.flow.maps[0].shape)[0]
    np.testing.assert_allclose(shown, view.readings[0].span(0, 1)[0])
    points = [trace for trace in view.flow.figure.data if trace.meta == "points"]
    words = view.readings[0].modalities[0]
    np.testing.assert_allclose(points[0].x, view.readings[0].components[1][words, 0])
    for start, stop, layer in ((1, 0, None), (0, 2, None), (-1, 0, None), (0, 1, 3)):
        with pytest.raises(ValueError, match="not exist"):
            view.span(start, stop, layer=layer)


def test_spans_are_chosen_by_click_slider_and_code(view: Explorer) -> None:
    flow = view.flow
    flow.open()
    marker = flow.figure.data[6]
    triangle = flow.figure.data[0]
    for act, wanted in (
        (lambda: setattr(flow.spans, "value", (1, 2)), (0, 1)),
        (lambda: view.span(1, 1), (1, 1)),
        (lambda: flow._clicked(0, Points(ys=[1], xs=[1])), (0, 0)),
        (lambda: flow._clicked(0, Points(ys=[2], xs=[1])), (0, 0)),  # below the diagonal is no span
    ):
        act()
        assert flow.span == wanted and flow.spans.value == (wanted[0] + 1, wanted[1] + 1)
        assert (*marker.y, *marker.x) == flow.spans.value and f"view.span({wanted[0]}, {wanted[1]}" in view.code
        shown = np.frombuffer(flow.maps[0].values, "<f4").reshape(flow.maps[0].shape)[0]
        np.testing.assert_allclose(shown, view.readings[0].span(*wanted)[0])
    assert triangle.type == "heatmap" and (flow.spans.min, flow.spans.max) == (1, 2)
    assert flow.model.layout.display == "none"  # there is one


def test_two_models_share_a_span_and_take_turns_with_their_tokens(
    model: VisualParsingModel, scenes: list[Picture]
) -> None:
    deeper = wide_model(scenes, 6, layers=3)
    view = explore(Subject(EVIL, model, partial(prepare, model), base=model), scenes[:2], beside=deeper)
    flow = view.flow
    flow.open()
    assert flow.spans.max == flow.layer.max == 2 < view.readings[1].layers
    flow._clicked(1, Points(ys=[2], xs=[view.readings[1].layers]))  # beyond the first model
    assert flow.span == (1, 1) and flow.model.value == 1 and "model=1" in view.code
    flow.layer.value = 1
    points = [trace for trace in flow.figure.data if trace.meta == "points"]
    for number, name in enumerate(("&lt;img src=x onerror=…", "model")):
        flow.model.value = number
        words = view.readings[number].modalities[0]
        np.testing.assert_allclose(points[0].x, view.readings[number].components[1][words, 0])
        assert flow.figure.layout.annotations[-1].text == f"tokens: {name}, layer 1"
        assert Image.open(io.BytesIO(flow._still())).width > 600
    colours: dict[object, set[str]] = {}
    for trace in flow.figure.data:
        if trace.type == "scatter" and trace.marker.symbol != "square-open":  # what marks the span
            colours.setdefault(trace.legendgroup, set()).add(trace.line.color or trace.marker.color)
    assert len(colours) == 3 and not any(
        one & two for one, two in combinations(colours.values(), 2)
    )  # no colour means two things
    with pytest.raises(ValueError, match="model 2 does not exist"):
        view.span(0, 0, model=2)
    view.close()


def test_tables(view: Explorer, tmp_path: Path) -> None:
    tables, reading = view.tables(), view.readings[0]
    assert set(tables) == {"masks", "heads", "looks", "flow", "clusters", "answers"}
    for _, line in tables["flow"].iterrows():
        assert line.flow == reading.flow[line.from_layer - 1, line.to_layer - 1]
    np.testing.assert_array_equal(tables["clusters"].nmi, reading.nmi)
    looks = tables["looks"].pivot(index="place", columns="token", values="looks")
    layer, _ = view.words.maps[0].picked
    np.testing.assert_allclose(looks, reading.looks(layer))
    files = view.save_csv(tmp_path / "csv")
    assert {file.stem for file in files} == set(tables)
    assert len(pd.read_csv(tmp_path / "csv" / "masks.csv")) == 36


# ----------------------------------------------------------------------------------------------- input


def test_answers(view: Explorer, model: VisualParsingModel, scenes: list[Picture]) -> None:
    view.say("a [MASK] ball")
    told = view.tables()["answers"].set_index("asked").answer
    match = match_probability(model, prepare(model, scenes[:1], ["a [MASK] ball"]))[0]
    assert told.iloc[0] == f"{100 * match:.1f}%"
    for word, share in fill_mask(model, prepare(model, scenes[:1], ["a [MASK] ball"])):
        assert f"{word} {100 * share:.0f}%" in told.iloc[1]


def test_a_fine_tuned_model_answers(model: VisualParsingModel, scenes: list[Picture]) -> None:
    task = TaskModel(model, TASKS["vqa"], ("yes", "no", "red")).eval()
    view = explore(task, scenes[:2])
    view.say("is there a ball?")
    best, share = next(iter(task.predict(scenes[0].image, "is there a ball?").items()))
    answers = view.tables()["answers"]
    assert answers.answer[0].startswith(f"{best} {100 * share:.0f}%") and len(answers) == 1
    assert "fine-tuned: no ITM, fills no [MASK]" in answers.asked[0]
    inputs = view.block("text_to_vision").readings[0].inputs
    knocked = knock_out(model, inputs.forward, inputs.vision, inputs.tokens, task_answer(task, [best]), spans=[(0, 1)])
    assert f"{best} {100 * knocked.after[0, 0].exp():.0f}%" in view.tables()["answers"]["answer with the block"][0]
    view.close()


def test_a_statement_about_two_images_has_no_answer_here(model: VisualParsingModel, scenes: list[Picture]) -> None:
    view = explore(TaskModel(model, TASKS["nlvr2"], ("False", "True")), scenes[:2])
    assert "No answer: it judges statements about two images" in view.tables()["answers"].answer[0]
    view.close()


def test_another_sentence_and_picture_change_all_views(view: Explorer, scenes: list[Picture]) -> None:
    view.trial.text.value = "a red ball"  # typed and Enter
    assert view.readings[0].text == "a red ball" and view.words.readers[0].words[1:-1] == ["a", "red", "ball"]
    before = view.masks.panels[0].image
    view.look(2)
    assert view.readings[0].picture is scenes[2] and view.readings[0].text == scenes[2].captions[0]
    assert view.masks.panels[0].image != before != view.words.readers[0].image
    with pytest.raises(ValueError, match="picture"):
        view.look(4)


@pytest.mark.parametrize("text, told", [("", "empty"), ("  ", "empty"), ("ball " * 2000, "2,000 words")])
def test_sentences_that_cannot_be_read(view: Explorer, text: str, told: str) -> None:
    before = view.readings
    view.trial.text.value = "a red ball"
    view.trial.text.value = text
    assert told in view.trial.status.text and view.readings[0].text == "a red ball" and before
    view.trial.text.value = "a red star"  # still alive
    assert view.readings[0].text == "a red star" and not view.trial.status.text


def test_long_sentences_are_cut_and_it_is_said(view: Explorer, model: VisualParsingModel) -> None:
    view.say("ball " * 100)
    assert len(view.readings[0].words) == model.settings.text_tokens
    assert f"{model.settings.text_tokens} of 102" in view.trial.status.text


@pytest.mark.parametrize("way", BLOCKED)
def test_a_block_is_seen_in_the_attention_and_in_the_answers(view: Explorer, way: str) -> None:
    """In the first layer the plain attention without the blocked pairs is left; answers are those of `knock_out`."""
    view.say("a [MASK] ball")
    plain, told = view.readings[0], view.tables()["answers"]
    view.block(way, 0, 0)
    reading, tables = view.readings[0], view.tables()
    language, vision = (torch.from_numpy(part) for part in reading.modalities)
    ways = {"text_to_vision": language[:, None] & vision, "vision_to_text": vision[:, None] & language}
    pairs = {**ways, "both": ways["text_to_vision"] | ways["vision_to_text"]}[way]
    left = plain.attention[0].masked_fill(pairs, 0)
    torch.testing.assert_close(reading.attention[0], left / left.sum(dim=-1, keepdim=True))
    assert (reading.attention[1][:, pairs] > 0).all() and not torch.equal(reading.attention[1], plain.attention[1])
    np.testing.assert_allclose(reading.flow, flow_from_attention(reading.attention, vision, language=language))
    assert tables["answers"].answer.tolist() == told.answer.tolist()
    inputs, model = reading.inputs, reading.subject.base
    knocked = knock_out(
        model, inputs.forward, inputs.vision, inputs.tokens, match_log_odds(model), way=way, spans=[(0, 0)]
    )
    blocked = tables["answers"]["answer with the block"]
    assert blocked[0] == f"{100 * knocked.after[0, 0].sigmoid():.1f}%"
    word, share = blocked[1].split(", ")[0].split()
    right = masked_word(model, inputs.forward, [word])
    knocked = knock_out(model, inputs.forward, inputs.vision, inputs.tokens, right, way=way, spans=[(0, 0)])
    assert share == f"{100 * knocked.after[0, 0].exp():.0f}%"
    assert set(tables["flow"].block) == {str(reading.block)} and "block" not in tables["masks"]
    view.block()
    assert view.readings[0].block is None and view.readings[0].attention.equal(plain.attention)
    pd.testing.assert_frame_equal(view.tables()["answers"], told)


def test_blocked_pairs_are_hatched(view: Explorer, model: VisualParsingModel, tmp_path: Path) -> None:
    heads = model.settings.fusion.heads
    view.trial.way.value = "both"  # as by hand, in both layers
    assert view.words.maps[0].hatched == [[0, 0, 0, 2, heads], [1, 0, 0, 2, heads]]
    view.trial.layers.value = (2, 2)
    assert view.words.maps[0].hatched == [[0, 1, 0, 2, heads], [1, 1, 0, 2, heads]]
    words = len(view.readings[0].words)
    size, reader = words + 36, view.words.readers[0]
    for layer, rolled, blocked in ((0, False, False), (1, False, True), (1, True, False)):
        view.read(1, layer=layer, rolled=rolled)
        assert reader.looks_blocked == reader.reads_blocked == blocked
    for span, boxes in (((0, 1), []), ((1, 1), [[0, 0, words, words, size], [0, words, 0, size, words]])):
        view.span(*span)
        assert view.flow.maps[0].hatched == boxes
        for _, top, left, bottom, right in boxes:
            assert (view.readings[0].span(*span)[0][top:bottom, left:right] == 0).all()
    view.say("a red ball")  # the block stays
    told = "words and image cannot read each other in layer 2"
    assert str(view.readings[0].block) == told and told in view.trial.status.text
    text = view.save(tmp_path / "page.html").read_text()
    values = re.search(r'id="values">([^<]*)<', text)[1]
    kept = {one["name"]: one["traits"] for one in json.loads(gzip.decompress(base64.b64decode(values)))["values"]}
    assert f"while {told}</h1>" in text and kept["Maps"]["hatched"] == view.flow.maps[0].hatched
    assert kept["Reader"]["label"].endswith(told) and kept["Table"]["names"][-1] == "answer with the block"
    view.block("text_to_vision")
    assert view.words.maps[0].hatched == [[0, 0, 0, 2, heads]] and not reader.reads_blocked


@pytest.mark.parametrize(
    "block, match",
    [
        (("sideways",), "way 'sideways' is not known; known are text_to_vision, vision_to_text, both"),
        (("both", 0, 2), "layer 2 does not exist; there are 2"),
        (("both", 1, 0), "layer 1 does not exist; there are 1"),
        (("both", -1), "layer -1 does not exist"),
    ],
)
def test_blocks_that_are_not_there(view: Explorer, block: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        view.block(*block)
    assert view.readings[0].block is None and view.trial.block is None


def test_a_way_without_pairs_is_refused_and_the_switch_goes_back(scenes: list[Picture]) -> None:
    """In a causal decoder whose image precedes all words."""
    with closing(explore(llava(before=()), scenes[:2])) as view:
        view.block("text_to_vision", 1, 2)
        for act in (lambda: setattr(view.trial.way, "value", "vision_to_text"), lambda: view.block("vision_to_text")):
            with suppress(ValueError):
                act()
            assert view.trial.way.value == "text_to_vision" and view.trial.layers.value == (2, 3)
            assert view.readings[0].block == ("text_to_vision", 1, 2)
        with pytest.raises(ValueError, match="causal decoder"):
            view.block("vision_to_text")
        view.trial.way.value = "vision_to_text"
        assert "Not read: way vision_to_text" in view.trial.status.text


def test_uploads(view: Explorer) -> None:
    def drop(content: bytes, name: str) -> str:
        with view.trial.drop.hold_trait_notifications():
            view.trial.drop.file, view.trial.drop.file_name = content, name
            view.trial.drop.count += 1
        return view.trial.drop.message

    text = view.readings[0].text
    assert "is read" in drop(png(), "own.png")
    assert view.readings[0].picture.id == "own.png" and view.readings[0].text == text
    assert (view.readings[0].image[..., 0] > 200).all()
    reading = view.readings[0]
    for content in (b"", b"no picture", png()[:60], b"GIF89a"):
        assert "no picture that can be read" in drop(content, EVIL)
    for side in (5_000, 30_000):  # Pillow refuses the second by itself
        assert "pixels" in drop(grey(side), "huge.png")
    assert view.readings[0] is reading
    for name in ("a\0b.png", f"../{EVIL}/../../a.png"):  # names make no files
        assert "is read" in drop(png(), name)
    assert len(view.trial.choice.options) == 7 and view.trial.choice.value == 6
    view.look(0)
    assert view.readings[0].picture is not reading.picture
    assert "<img" not in view.trial.status.value


def test_text_is_escaped(view: Explorer) -> None:
    view.say(f"a ball {EVIL}")
    assert "<img" not in view.trial.status.value


# ----------------------------------------------------------------------------------------------- kept


def test_code_recreates_the_view(view: Explorer, model: VisualParsingModel, scenes: list[Picture]) -> None:
    view.look(1).say("a red ball").pick(9, k=8, select="symmetric", head=2, draw=3)
    view.read(2, layer=0, head=1).span(1, 1, layer=1).block("vision_to_text", 1, 1)
    names: dict[str, object] = {"model": model, "pictures": scenes[:4]}
    exec(view.code, names)  # the code that a reader would copy
    again = names["view"]
    assert again.code == view.code and repr(again) == repr(view)
    for one, two in (
        (again.masks.panels, view.masks.panels),
        (again.words.readers, view.words.readers),
        (again.flow.maps, view.flow.maps),
    ):
        ours, theirs = (widget[0].state()["traits"] for widget in (one, two))
        assert {key: value for key, value in ours.items() if key != "version"} == {
            key: value for key, value in theirs.items() if key != "version"
        }
    again.close()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"pictures": 3}, "explore(model=model, data=pictures, pictures=3)"),
        ({"views": ["flow", "masks"]}, "explore(model=model, data=pictures, views=('flow', 'masks'))"),
        ({"views": ("masks", "words", "flow", "try"), "pictures": 24}, "explore(model=model, data=pictures)"),
    ],
)
def test_code_says_how_the_explorer_was_opened(
    model: VisualParsingModel, scenes: list[Picture], options: dict, told: str
) -> None:
    view = explore(model, scenes[:4], **options)
    assert f"view = {told}" in view.code.splitlines()
    names: dict[str, object] = {"model": model, "pictures": scenes[:4]}
    exec(view.code, names)
    again = names["view"]
    assert again.code == view.code and len(again.trial.pictures) == len(view.trial.pictures)
    assert again._tabs.titles == view._tabs.titles
    view.close()
    again.close()


def test_code_of_an_own_image_says_what_is_missing(view: Explorer) -> None:
    view.trial.add_image(png(), "own.png")
    assert "own.png" in view.code
    compile(view.code, "code", "exec")


def test_shown_without_a_kernel(view: Explorer, tmp_path: Path) -> None:
    bundle = view._repr_mimebundle_()
    assert bundle["text/plain"] == repr(view) and " at 0x" not in repr(view)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.width >= 600 and len(picture.convert("L").getcolors()) > 50
    page = view.save(tmp_path / "page.html")
    text = page.read_text()
    assert page.stat().st_size < 8e6 and text.count("<img alt=") >= 3 and "http-equiv" in text


def test_the_page_asks_for_the_whole_as_one_file(view: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    (keep,) = (one for one in below(view) if isinstance(one, Save))
    sent = []
    monkeypatch.setattr(keep, "send", lambda content, buffers=None: sent.append((content, buffers)))
    keep._handle_custom_msg({"ask": "file"}, [])  # as a click in the page does
    ((told, (page,)),) = sent
    assert told == {"name": "explorer.html", "type": "text/html"}
    assert page.startswith(b"<!DOCTYPE html>") and page.count(b"<h2>") == 4
    view.trial.scratch.cleanup()
    with suppress(OSError):
        keep._handle_custom_msg({"ask": "file"}, [])
    assert "explorer.html" in sent[-1][0]["failed"]


def test_a_page_holds_the_errors_that_are_still_awaited(view: Explorer, tmp_path: Path) -> None:
    async def at_once() -> None:  # while an event loop runs, as in a notebook
        view.pick(9, k=8)
        assert view.masks.numbers.rows[0][-1] == "…"
        view.save(tmp_path / "page.html")

    asyncio.run(at_once())
    assert float(view.masks.numbers.rows[0][-1]) > 0
    assert "…</td>" not in (tmp_path / "page.html").read_text()


def test_what_a_second_model_does_not_have_it_leaves_as_it_is(model: VisualParsingModel, scenes: list[Picture]) -> None:
    with closing(explore(wide_model(scenes, 6, layers=3), scenes[:2], beside=model)) as view:
        assert "layer=2" in view.words.code()
        view.read(0, layer=2, head=1)
        assert [maps.picked for maps in view.words.maps] == [[2, 1], [1, 1]]


def test_the_panels_of_errors_follow_the_picture(view: Explorer) -> None:
    """They are drawn a moment later, and a click may come before."""

    async def look_and_pick() -> None:
        view.look(1).pick(3)
        await asyncio.sleep(0.6)

    asyncio.run(look_and_pick())
    assert view.masks.errors[0].image == view.masks.panels[0].image


def test_two_models_on_one_input(model: VisualParsingModel, scenes: list[Picture], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = narrow_model(scenes)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    view = explore(model, scenes[:2], beside=other)
    assert [len(part) for part in (view.masks.panels, view.words.readers, view.flow.maps)] == [2, 2, 2]
    view.masks.panels[1].picked = 7
    assert [panels.picked for panels in view.masks.panels] == [7, 7]
    assert not np.array_equal(*(arrays(panels)[2] for panels in view.masks.panels))
    np.testing.assert_array_equal(*(arrays(panels)[3] for panels in view.masks.panels))  # the same dice
    assert [panels.label for panels in view.masks.errors] == [
        f"{name}: error of hidden tokens" for name in ("model", "model (2)")
    ]
    view.words.readers[0].pinned = 3
    assert view.words.readers[1].pinned == 3
    assert view.tables()["flow"].model.nunique() == 2
    assert view.save(tmp_path / "two.html").exists()
    view.close()


def test_a_model_without_parsing_attention(scenes: list[Picture], tmp_path: Path) -> None:
    """It has the rules that need none; those of objects go where no object is known."""
    view = explore(wide_model(scenes, 6), scenes[:2])
    assert "only the Swin parser" in view.masks.status.text
    assert view.masks.select.options == ("similar", "block", "object") and view.masks.head.layout.display == "none"
    assert len(view.masks.select.tooltips) == 3
    view.pick(3, k=5, select="block")
    assert view.masks.panels[0].captions == ["the image", "nearness to the token", "block mask", "random mask"]
    assert arrays(view.masks.panels[0])[2:].sum() == 10 and np.isfinite(view.tables()["masks"].block_error).sum() == 5
    assert [cells[1] for cells in view.masks.numbers.rows] == ["block", "random"]
    with pytest.raises(ValueError, match="'row' is none of similar, block, object"):
        view.pick(3, select="row")
    view.save(tmp_path / "page.html")
    view.trial.add_image(png(), "own.png")
    assert view.masks.select.options == ("similar", "block") and view.masks.select.value == "block"
    view.close()


def test_two_models_of_which_one_has_attention(model: VisualParsingModel, scenes: list[Picture]) -> None:
    """By attention the other one has the random mask only; by features both have a mask of their own."""
    with closing(explore(model, scenes[:2], beside=wide_model(scenes, 6))) as view:
        assert [len(panels.kinds) for panels in view.masks.panels] == [4, 2]
        assert [len(panels.kinds) for panels in view.masks.errors] == [2, 1]
        view.pick(8, k=5, select="similar")
        assert [len(panels.kinds) for panels in view.masks.panels + view.masks.errors] == [4, 4, 2, 2]
        assert [cells[:2] for cells in view.masks.numbers.rows[::2]] == [["model", "similar"], ["model (2)", "similar"]]


@pytest.mark.parametrize("mode", ["attention", "similar"])
def test_the_source_of_a_run_ranks_as_in_its_training(
    model: VisualParsingModel, scenes: list[Picture], tmp_path: Path, mode: str
) -> None:
    """Patches of 6 x 6 tokens, masked by a parser of as many."""
    model.save_pretrained(tmp_path)
    base = wide_model(scenes, 6)
    subject = Subject("a", base, partial(prepare, base), base=base, mask=MaskSettings(mode=mode, source=str(tmp_path)))
    rule = "column" if mode == "attention" else mode
    with closing(explore(subject, scenes[:2])) as view, torch.no_grad():
        view.pick(14, k=6, select=rule)
        visual = model.visual(Pixels(96).stack([scenes[0].image]))
        cosine = torch.cosine_similarity(visual.features[0], visual.features[0, 14], dim=-1)
        wanted = visual.parsing[0].mean(dim=0)[:, 14] if mode == "attention" else cosine - cosine.min()
        np.testing.assert_allclose(arrays(view.masks.panels[0])[1], wanted.numpy(), rtol=1e-4, atol=1e-5)
        assert ("row" in view.masks.select.options) == (mode == "attention")
        assert f"a: {mode} is that of {tmp_path.name}, by which it was trained." in view.masks.status.text
        assert view.masks.section().paragraph.startswith(view.masks.status.text.splitlines()[0])
    shutil.rmtree(tmp_path)
    open_source.cache_clear()
    with closing(explore(subject, scenes[:2])) as view:
        assert "its mask.source cannot be loaded" in view.masks.status.text
        assert view.masks.select.options == ("similar", "block", "object")


@pytest.fixture
def regions(scenes: list[Picture], tmp_path: Path) -> Iterator[Explorer]:
    """Of a model whose visual tokens are the true boxes of the things."""
    rng = np.random.default_rng(0)
    for picture in scenes[:4]:
        boxes = [thing.box for thing in picture.scene.things]
        file = (tmp_path / picture.image.name).with_suffix(".npz")
        write_regions(file, rng.normal(size=(len(boxes), 8)), boxes, [picture.scene.image_px] * 2)
    model = narrow_model(scenes, family="regions", regions=9, region_width=8, region_files=str(tmp_path))
    made = explore(model, scenes[:4])
    yield made
    made.close()


def test_regions_are_boxes(regions: Explorer, scenes: list[Picture], tmp_path: Path) -> None:
    things, reading = scenes[0].scene.things, regions.readings[0]
    true = np.array([thing.box for thing in things]) / scenes[0].scene.image_px
    panels, reader = regions.masks.panels[0], regions.words.readers[0]
    for widget in (panels, reader):
        np.testing.assert_allclose(np.frombuffer(widget.boxes, "<f4").reshape(-1, 4), true, atol=1e-6)
    np.testing.assert_array_equal(reading.image, scenes[0].image.pixels())
    assert not reading.on_grid and regions.masks.select.options == ("similar", "block", "object")
    # Padding is nowhere: a word's attention goes to words and boxes alone.
    shares = reading.weights(0, 1)[np.ix_(reading.language, np.append(reading.language, reading.vision))]
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.frombuffer(reader.looks, "<f4").reshape(-1, len(true)), reading.looks(1), atol=1e-7)
    assert regions.masks._objects.tolist() == [thing.depth + 1 for thing in things]
    assert regions.save(tmp_path / "page.html").stat().st_size < 8e6 and len(regions.flow.maps) == 1
    assert len(Image.open(io.BytesIO(base64.b64decode(regions._repr_mimebundle_()["image/png"]))).getcolors(10**6)) > 50


@pytest.mark.parametrize("things", [1, 3])
def test_regions_that_look_like_a_grid_are_none(scenes: list[Picture], tmp_path: Path, things: int) -> None:
    """One, or three in a row: the model says what they are."""
    boxes = [[20, 30 * place, 80, 30 * (place + 1)] for place in range(things)]
    write_regions((tmp_path / scenes[0].image.name).with_suffix(".npz"), np.ones((things, 8)), boxes, (96, 96))
    model = narrow_model(scenes, family="regions", regions=9, region_width=8, region_files=str(tmp_path))
    view = explore(model, scenes[:1])
    assert not view.readings[0].on_grid
    assert not any(widget.on_grid for widget in (*view.words.readers, *view.masks.panels, *view.masks.errors))
    view.close()
    view = explore(narrow_model(scenes), scenes[:1], views=("words",))
    assert view.readings[0].on_grid and view.words.readers[0].on_grid
    view.close()


def test_regions_are_picked_and_hidden(regions: Explorer, model: VisualParsingModel, scenes: list[Picture]) -> None:
    things = len(scenes[0].scene.things)
    regions.masks.panels[0].picked = 1  # a click
    regions.pick(k=2)
    assert (arrays(regions.masks.panels[0])[2:].sum(axis=1) == 2).all()
    assert (arrays(regions.masks.panels[0])[2:, 1] == 1).all()
    table = regions.tables()["masks"]
    assert len(table) == things and np.isfinite(table.random_error).sum() == 2
    base, masked = regions.subjects[0].base, torch.zeros(1, 9, dtype=torch.bool)
    masked[0, :things] = torch.from_numpy(table.random_mask.to_numpy() > 0)
    with torch.no_grad():
        forward = regions.readings[0].inputs.forward
        joint = base.fuse(base.visual(forward["images"]), forward["words"], forward["word_tokens"], masked=masked)
        wanted = (base.mfr(joint.vision) - joint.visual.features).square().mean(dim=-1)[masked]
    np.testing.assert_allclose(table.random_error.dropna(), wanted, rtol=1e-4)
    regions.look(1)  # another number of boxes
    assert len(regions.readings[0].boxes) == len(scenes[1].scene.things)
    before = regions.readings[0]
    regions.trial.add_image(png(), "own.png")
    told = regions.trial.drop.message
    assert "your image has none" in told and regions.trial.scratch.name not in told
    assert regions.readings[0] is before and len(regions.trial.pictures) == 4


def test_without_a_cache_only_the_pictures_shown_are_generated(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VPW_CACHE", str(tmp_path))
    view = explore(pictures=3, views=("words",))
    assert len(view.trial.pictures) == 3
    (settings,) = tmp_path.glob("scenes-*/settings.json")
    assert json.loads(settings.read_text())["val"] == 3
    view.close()


@pytest.mark.parametrize("make", [vilt, llava])
def test_a_model_of_transformers(make, scenes: list[Picture], tmp_path: Path) -> None:
    view = explore(make(), scenes[:2])
    assert not view.masks.panels and "No mask by attention" in view.masks.status.text
    view.read(1, layer=2, head=3).span(0, 2)
    assert "no head" in view.tables()["answers"].answer[0]
    view.save(tmp_path / "page.html")
    exec(view.code, {"model": view.subjects[0], "pictures": scenes[:2]})
    view.close()


def test_models_that_cut_the_image_otherwise(
    model: VisualParsingModel, regions: Explorer, scenes: list[Picture]
) -> None:
    other = replace(regions.subjects[0], name="boxes")
    with closing(explore(model, scenes[:4], beside=other)) as view:
        assert "boxes cuts the image into other tokens; only the first model is shown here." in view.masks.status.text
        assert "No mask by attention" not in view.masks.status.text and len(view.masks.panels) == 1
    with closing(explore(wide_model(scenes, 6), scenes[:2], beside=wide_model(scenes, 8))) as view:
        assert view.masks.status.text == (
            "model (2) cuts the image into other tokens; only the first model is shown here.\n"
            "No mask by attention for model: only the Swin parser and ViTs have a parsing attention."
        )


def test_no_picture(model: VisualParsingModel, scenes: list[Picture], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no picture"):
        explore(model, [])
    gone = [replace(scenes[0], image=ImageFile(tmp_path, f"{name}.png")) for name in "ab"]
    widgets = set(ipywidgets.widgets.widget._instances)
    with pytest.raises(DataError, match="b.png: image missing"):
        explore(model, gone)
    assert set(ipywidgets.widgets.widget._instances) == widgets  # nothing half-built
    with closing(explore(model, [*gone, *scenes[:2]])) as view:
        assert view.readings[0].picture is scenes[0] and view.trial.choice.value == 2
        view.trial.choice.value = 0
        assert "Not read" in view.trial.status.text and view.readings[0].picture is scenes[0]


def test_twenty_explorers_leave_nothing(scenes: list[Picture]) -> None:
    model = wide_model(scenes, 20)  # 425 tokens

    def once() -> None:
        view = explore(model, scenes[:2])
        view.flow.open()  # plotly's figure comes with the tab
        view.close()

    for _ in range(3):
        once()
    gc.collect()
    process, widgets = psutil.Process(), len(ipywidgets.widgets.widget._instances)
    before = process.memory_info().rss
    for _ in range(20):
        once()
    gc.collect()
    assert process.memory_info().rss - before < 50e6
    assert len(ipywidgets.widgets.widget._instances) - widgets < 20


def test_closed(view: Explorer) -> None:
    view.close()
    assert repr(view) == "Explorer(closed)"
