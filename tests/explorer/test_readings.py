"""What the explorer knows of one input: attention, products and flow, against plain computations."""

from __future__ import annotations

from functools import partial
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from conftest import narrow_model
from explorer.small_models import llava, opened, vilt, wide_model
from probes.tiny_models import bridgetower
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.inputs import prepare
from vpworkbench.data.records import Picture
from vpworkbench.explorer import readings as module
from vpworkbench.explorer.readings import Reading, read
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.probes import flow_from_attention, inter_modality_flow
from vpworkbench.subjects import Subject, load
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.task import TaskModel


@pytest.fixture
def reading(model: VisualParsingModel, scenes: list[Picture]) -> Reading:
    return read(load(model), scenes[0], scenes[0].captions[0])


def product(attention: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Eq. 3-4 as printed, in float64."""
    result = identity = torch.eye(attention.shape[-1], dtype=torch.float64)
    for layer in attention[start : stop + 1].double():
        result = (identity + layer.mean(dim=0)) / 2 @ result
    return result


def test_attention_is_that_of_the_eager_model(reading: Reading, model: VisualParsingModel) -> None:
    found = []

    def keep(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        found.append(output[1][0])

    model.fusion.bert.set_attn_implementation("eager")
    for layer in model.fusion.bert.encoder.layer:
        layer.attention.self.register_forward_hook(keep)
    with torch.no_grad():
        model(**reading.inputs.forward)
    torch.testing.assert_close(reading.attention, torch.stack(found), atol=1e-5, rtol=1e-4)


def test_flow_is_that_of_the_maps_and_of_the_probe(reading: Reading, model: VisualParsingModel) -> None:
    language, vision = (torch.from_numpy(part) for part in reading.modalities)
    printed = flow_from_attention(reading.attention.double(), vision, language=language)
    np.testing.assert_allclose(reading.flow, printed, atol=1e-6)
    inputs = prepare(model, [reading.picture], [reading.text])
    probed = inter_modality_flow(model, inputs.forward, inputs.vision, inputs.tokens)
    np.testing.assert_allclose(reading.null, probed.null[0], atol=1e-6)


def test_products_looks_and_reads(reading: Reading) -> None:
    for start, stop in combinations_with_replacement(range(reading.layers), 2):
        wanted = product(reading.attention, start, stop)
        matrix, (border,) = reading.span(start, stop)  # words stand first in this model
        np.testing.assert_allclose(matrix, wanted, atol=1e-6)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert border == len(reading.words)
    words, tokens = len(reading.words), reading.tokens
    one, mean = reading.attention[1, 0], reading.attention[1].mean(dim=0)
    np.testing.assert_allclose(reading.looks(1, 0), one[:words, words:])
    np.testing.assert_allclose(reading.reads(1, 0), one[words:, :words])
    np.testing.assert_allclose(reading.looks(1), mean[:words, words:], atol=1e-6)
    np.testing.assert_allclose(
        reading.looks(1, rolled=True), product(reading.attention, 0, 1)[:words, words:], atol=1e-6
    )
    assert reading.looks(0).shape == (words, tokens - words) == reading.reads(0).T.shape


def test_grid_of_layers_and_heads(reading: Reading) -> None:
    words = len(reading.words)
    for layer, head in np.ndindex(reading.layers, reading.heads):
        weights = reading.attention[layer, head].double().numpy()
        entropy = -(weights * np.log(weights)).sum(axis=1).mean() / np.log(reading.tokens)
        wanted = weights[:words, words:].sum(axis=1).mean(), weights[words:, :words].sum(axis=1).mean(), entropy
        np.testing.assert_allclose(reading.grid[:, layer, head], wanted, atol=1e-5)


@torch.no_grad()
def test_nmi_and_components(reading: Reading, model: VisualParsingModel) -> None:
    hidden = model(**reading.inputs.forward).hidden
    for layer, states in enumerate(hidden):
        clusters = KMeans(2, n_init=10, random_state=0).fit_predict(states[0].double().numpy())
        wanted = normalized_mutual_info_score(reading.modalities[1], clusters)
        assert reading.nmi[layer] == pytest.approx(wanted, abs=1e-6), layer
    hidden = hidden[-1][0].double()
    hidden = hidden - hidden.mean(dim=0)
    _, values, axes = torch.linalg.svd(hidden, full_matrices=False)
    np.testing.assert_allclose(np.abs(reading.components[-1]), (hidden @ axes[:2].T).abs().numpy(), atol=1e-3)


def test_words_boxes_and_image(reading: Reading, model: VisualParsingModel) -> None:
    assert reading.words == ["[CLS]", *model.tokenizer.tokenize(reading.text), "[SEP]"]
    grid = model.settings.visual.grid
    np.testing.assert_allclose(reading.boxes, grid_boxes(grid, grid))
    assert reading.image.shape == (96, 96, 3) and reading.image.dtype == np.uint8


@pytest.mark.parametrize("make, words, patches", [(vilt, 7, 10), (llava, 4, 9)])
def test_models_of_transformers(make, words: int, patches: int, scenes: list[Picture]) -> None:
    model = make()
    reading = read(load(model), scenes[0], "a red ball")
    assert (len(reading.words), len(reading.vision)) == (words, patches)
    language, vision = (torch.from_numpy(part) for part in reading.modalities)
    np.testing.assert_allclose(reading.attention.sum(dim=-1), 1, atol=1e-5)
    wanted = flow_from_attention(reading.attention.double(), vision, language=language)
    np.testing.assert_allclose(reading.flow, wanted, atol=1e-5)
    matrix, (border,) = reading.span(0, 2)
    order = np.concatenate([np.flatnonzero(part) for part in reading.modalities])
    np.testing.assert_allclose(matrix, product(reading.attention, 0, 2)[np.ix_(order, order)], atol=1e-6)
    assert border == words
    # the patches tile the image; ViLT's class token covers all of it
    areas = np.prod(reading.boxes[:, 2:] - reading.boxes[:, :2], axis=1)
    assert areas.sum() == pytest.approx(1 if make is llava else 2, abs=1e-5)


def test_entropies_are_shares_also_where_a_layer_attends_to_one_modality(scenes: list[Picture]) -> None:
    """BridgeTower: W = 2 A - I has -0.5 on the diagonal of its cross layers."""
    family = bridgetower()
    inputs = {name: value[:1] for name, value in family.inputs.items()}
    entropy = read(opened(family.model, inputs), scenes[0], "a").grid[2]
    assert (entropy >= 0).all() and (entropy <= 1 + 1e-6).all()


def test_vilt_is_read_in_one_order_of_its_patches(scenes: list[Picture]) -> None:
    """It draws a new order in every forward; boxes and attention must be of the same one."""
    model = vilt()
    reading = read(load(model), scenes[0], "a red ball")
    places = len(reading.words) + 1 + np.arange(9)
    rows = reading.attention[0, 0][0, places]
    states = reading.hidden[0][0, places]
    again = read(load(model), scenes[0], "a red ball")
    match = [int(np.abs(reading.boxes[1:] - box).sum(axis=1).argmin()) for box in again.boxes[1:]]
    torch.testing.assert_close(again.attention[0, 0][0, places], rows[match], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.hidden[0][0, places], states[match], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("specials", ["language", "exclude"])
def test_places_in_neither_modality_have_words_but_no_part_in_the_flow(
    model: VisualParsingModel, scenes: list[Picture], specials: str
) -> None:
    reading = read(
        Subject("model", model, partial(prepare, model, special_tokens=specials), base=model), scenes[0], "a red ball"
    )
    assert reading.words[0] == "[CLS]" and reading.modalities[0, 0] == (specials == "language")
    matrix, (border,) = reading.span(0, 1)
    assert border == len(reading.words) - 2 * (specials == "exclude") and len(matrix) == reading.modalities.sum()


def test_six_hundred_tokens(scenes: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model(scenes, 25)
    whole = read(load(model), scenes[0], scenes[0].captions[0])
    assert whole.tokens > 625 and whole.attention.dtype == torch.float32
    monkeypatch.setattr(module, "HALF_ABOVE", 2**20)
    half = read(load(model), scenes[0], scenes[0].captions[0])
    assert half.attention.dtype == torch.float16
    np.testing.assert_allclose(half.span(0, 1)[0], whole.span(0, 1)[0], atol=1e-4)
    np.testing.assert_allclose(half.looks(1, 2), whole.looks(1, 2), atol=1e-4)
    np.testing.assert_allclose(half.flow, whole.flow, atol=1e-7)


@pytest.mark.parametrize("text", ["a red ball", "a large red ball"])  # 5 and 6 tokens
def test_large_maps_are_pooled_by_modality(
    model: VisualParsingModel, scenes: list[Picture], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    reading = read(load(model), scenes[0], text)
    whole, (border,) = reading.span(0, 1)
    monkeypatch.setattr(module, "LARGEST_MAP", 30)
    pooled, (edge,) = reading.span(0, 1)
    assert len(pooled) <= 32 < len(whole)
    np.testing.assert_allclose(pooled.sum(axis=1), 1, atol=1e-5)
    # no cell mixes words and patches: what the words give the image stays what it was
    to_vision = whole[:border, border:].sum(axis=1)
    counts = [min(2, border - first) for first in range(0, border, 2)]
    np.testing.assert_allclose(
        np.average(pooled[:edge, edge:].sum(axis=1), weights=counts), to_vision.mean(), atol=1e-6
    )


def test_refusals(model: VisualParsingModel, scenes: list[Picture]) -> None:
    with pytest.raises(ValueError, match="empty sentence"):
        read(load(model), scenes[0], "  ")

    def blind(pictures: list[Picture], texts: list[str]) -> Inputs:
        inputs = prepare(model, pictures, texts)
        return Inputs(inputs.forward, torch.zeros_like(inputs.vision), inputs.tokens, inputs.language)

    with pytest.raises(ValueError, match="no visual token"):
        read(Subject("blind", model, blind), scenes[0], "a red ball")
    with pytest.raises(TypeError, match="vpw.load"):
        load(torch.nn.Linear(2, 2))


def test_subjects(model: VisualParsingModel, scenes: list[Picture]) -> None:
    task = TaskModel(model, TASKS["nlvr1"], ("False", "True"))
    found = load(task)
    assert found.base is model and found.task_model is task and "nlvr1" in found.name
    assert load(found) is found
    other = narrow_model(scenes, family="patch", stride=32)
    one, two = (read(load(each), scenes[0], "a red ball") for each in (model, other))
    assert one.same_boxes(one) and not one.same_boxes(two)
