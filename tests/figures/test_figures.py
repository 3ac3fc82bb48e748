"""Figures: what is drawn is what was given, nothing of the data is read as markup, and files stay small."""

import base64
import importlib.util
import io
import shutil
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from PIL import Image

from vpworkbench import figures
from vpworkbench.figures import style, training
from vpworkbench.stats import Interval, bootstrap_interval
from vpworkbench.tasks.retrieval import RetrievalResult

GRID = 4
RANGE = Interval(*np.array([0.01, -0.01, 0.03, 8]))
HOSTILE = '<img src=x onerror="alert(1)"> & $x^2$'
SHOWN = '&lt;img src=x onerror="alert(1)"&gt; &amp; &#36;x^2&#36;'  # quotes are harmless in plotly's text


class HeldOut(NamedTuple):
    """Results with the fields of train.evaluate.HeldOut."""

    itm_accuracy: Interval = Interval(0.9, 0.85, 0.93, 50)
    itm_other_image: Interval = Interval(0.52, 0.49, 0.55, 50)
    mlm_with_image: Interval = Interval(0.6, 0.55, 0.66, 50)
    mlm_other_image: Interval = Interval(0.2, 0.15, 0.22, 50)
    mlm_ratio: Interval = Interval(3.0, 2.5, 3.7, 50)


def generator():
    return np.random.default_rng(0)


def image(px=96, *, noise=True):
    if noise:  # the worst case for a PNG
        return generator().integers(0, 256, (px, px, 3), dtype=np.uint8)
    return np.full((px, px, 3), 128, dtype=np.uint8)


def attention(tokens=GRID**2):
    return generator().dirichlet(np.ones(tokens), size=tokens)


def samples(examples=12, layers=3, scale=0.3):
    return scale * generator().random((examples, layers))


def metrics(lines):
    step = np.arange(1, lines + 1) * 20
    noise = generator().random(lines)
    return pd.DataFrame({"step": step, "mlm": 4 / step + noise, "itm": noise, "lr_share": step / step.max()})


def triangle(layers=3):
    flow = np.arange(layers**2, dtype=float).reshape(layers, layers) / 100
    flow[np.tril_indices(layers, -1)] = np.nan
    return flow


def found(shift):
    """Recall of six queries each way."""
    right = {cutoff: (np.arange(6) < cutoff // 2 + 2 - shift).astype(float) for cutoff in (1, 5, 10)}
    return RetrievalResult(right, right)


def recalls():
    return {name: found(shift).intervals() for shift, name in enumerate(("ours", "chance"))}


def every_figure():
    """One call of each public function."""
    picked = np.arange(GRID**2) < 3
    vision = np.arange(10) >= 4
    looked = attention()[0].reshape(GRID, GRID)
    return {
        "pictures": figures.pictures(np.stack([image(), image()]), ["one", ["two", "three"]]),
        "tokens": figures.tokens(image(), GRID),
        "parsing": figures.parsing(image(), attention(), [0, 5], GRID),
        "masks": figures.masks(image(), {"attention": picked, "random": ~picked}, pick=1, grid=GRID),
        "regions": figures.regions(image(), [[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 1.0, 1.0]]),
        "attention_on_image": figures.attention_on_image(image(), attention()[0], GRID, title="a"),
        "losses": figures.losses(metrics(60)),
        "held_out": figures.held_out(HeldOut()),
        "accuracy_bars": figures.accuracy_bars({"ours": Interval(0.7, 0.6, 0.8, 50)}, chance={"ours": 0.5}),
        "run_curves": figures.run_curves({"a": metrics(3), "b": metrics(60)}, "itm"),
        "forest": figures.forest({"a - b": (RANGE, RANGE)}, no_matter=0.01, title="Score", axis="difference"),
        "scores_against": figures.scores_against({"flow": {"a": ([0.1], [0.5])}}, title="Scores", score="score"),
        "grouped_bars": figures.grouped_bars(recalls(), title="Shares", axis="share"),
        "task_scores": figures.task_scores({"ours": found(0), "chance": found(1)}, title="Held-out score"),
        "answers": figures.answers([figures.Reviewed("a", "b", "c", 0.0, (image(),), (looked,))]),
        "flow_curves": figures.flow_curves(samples(), samples(), null_from_input=samples()),
        "flow_triangle": figures.flow_triangle(triangle()),
        "layer_curves": figures.layer_curves(samples(), title="Effect", axis="loss", level=("none", 0.0)),
        "layer_maps": figures.layer_maps({"flow": triangle(), "effect": triangle()}, title="Both", shares=["flow"]),
        "flow_directions": figures.flow_directions(samples(), samples()),
        "nmi": figures.nmi(samples()),
        "score_against_flow": figures.score_against_flow(
            {"ours": (Interval(0.4, 0.3, 0.5, 3), Interval(0.7, 0.6, 0.8, 3))},
            nulls={"ours": 0.3},
            seeds={"ours": [(0.4, 0.7)]},
            over="3 seeds",
            score="VQA",
        ),
        "modality_map": figures.modality_map(generator().random((10, 2)), vision, vision | True, layer=0),
    }


def traces(figure, kind, mode=None):
    return [trace for trace in figure.data if trace.type == kind and (mode is None or trace.mode == mode)]


def picture_of(trace):
    return Image.open(io.BytesIO(base64.b64decode(trace.source.partition(",")[2])))


def texts(figure):
    return " ".join(annotation.text for annotation in figure.layout.annotations)


def test_recalls_stand_side_by_side_with_their_intervals():
    figure = figures.task_scores({"ours": found(0), "chance": found(1)}, title="Retrieval")
    ours, other = traces(figure, "bar")
    assert list(ours.x) == [f"{way} R@{cutoff}" for way in ("TR", "IR") for cutoff in (1, 5, 10)]
    np.testing.assert_allclose(ours.y, [2 / 6, 4 / 6, 1] * 2)
    np.testing.assert_allclose(other.y[:2], [1 / 6, 3 / 6])
    assert ours.error_y.array[0] > 0 and "ours TR R@1 33.3%" in figure.layout.meta["alt"]


# ------------------------------------------------------------------------------------------ all figures alike


def test_every_figure_is_plain_small_described_and_clear():
    made = every_figure()
    public = {name for name, value in vars(figures).items() if callable(value) and _is_figure_function(value)}
    assert set(made) == public and len(made) == 23
    for name, figure in made.items():
        assert type(figure) is go.Figure, name
        alt = figure.layout.meta["alt"]
        assert alt.endswith(".") and len(alt) > 20 and "nan" not in alt, name
        assert len(figure.to_json()) < 200_000, name
        assert figure.layout.width <= 960, name
        assert figure.layout.height <= 450, name
        assert figure.layout.template.layout.paper_bgcolor.endswith(", 0)"), name  # both themes shine through


def _is_figure_function(value):
    returned = getattr(value, "__annotations__", {}).get("return")
    return returned == "go.Figure" and value is not figures.export  # which hands on the figure that it is given


def test_figures_take_tensors():
    weights = torch.from_numpy(attention())
    figure = figures.parsing(torch.from_numpy(image()), weights, torch.tensor([3]), GRID)
    np.testing.assert_array_equal(traces(figure, "heatmap")[0].z.ravel(), weights[3])


def luminance(colour):
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_text_and_curves_are_seen_on_both_backgrounds(background):
    def contrast(colour):
        dark, light = sorted([luminance(colour), luminance(background)])
        return (light + 0.05) / (dark + 0.05)

    assert contrast(style.GREY) > 4
    assert min(contrast(colour) for colour in style.PALETTE[:3]) > 3
    assert min(contrast(colour) for colour in style.PALETTE) > 2


# --------------------------------------------------------------------------------------------------- pictures


def test_pictures_embeds_the_pixels_and_places_them_side_by_side():
    images = np.stack([image(), image(noise=False), image(), image(), image()])
    figure = figures.pictures(images, ["one", "two", "three", "four", "five"])
    drawn = traces(figure, "image")
    for given, trace in zip(images, drawn, strict=True):
        assert trace.source.startswith("data:image/png;base64,") and trace.z is None
        np.testing.assert_array_equal(np.asarray(picture_of(trace)), given)
    first, second, fifth = (figure.layout[name].domain for name in ("xaxis", "xaxis2", "xaxis5"))
    assert first == fifth and first[1] < second[0]
    assert figure.layout.yaxis5.domain[1] < figure.layout.yaxis.domain[0]


def test_pictures_shows_captions_as_text():
    figure = figures.pictures([image()], [[HOSTILE, "a & b"]])
    assert [part.strip() for part in texts(figure).replace("<br>", " ").split("•")] == ["", SHOWN, "a &amp; b"]


def test_a_wrapped_caption_keeps_its_entities_whole():
    figure = figures.pictures([image()] * 4, ["x" * 17 + "<" * 40] * 4)
    lines = figure.layout.annotations[0].text.split("<br>")
    assert len(lines) > 1 and "".join(lines) == "x" * 17 + "&lt;" * 40


def test_a_large_photograph_is_made_small():
    figure = figures.tokens(image(1500), GRID)
    picture = picture_of(traces(figure, "image")[0])
    assert picture.format == "JPEG" and max(picture.size) <= 720
    assert traces(figure, "image")[0].dx * picture.width == pytest.approx(GRID)


def test_images_keep_their_proportions():
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    figure = figures.pictures([wide], ["wide"])
    x, y = figure.layout.xaxis, figure.layout.yaxis
    margin = figure.layout.margin
    across = (x.domain[1] - x.domain[0]) * figure.layout.width
    down = (y.domain[1] - y.domain[0]) * (figure.layout.height - margin.t - margin.b)
    assert across / down == pytest.approx(2)


def test_tokens_are_numbered_row_by_row():
    figure = figures.tokens(image(), 3)
    numbers = traces(figure, "scatter", "text")[0]
    assert list(numbers.text) == [str(token) for token in range(9)]
    assert (numbers.x[5], numbers.y[5]) == (2.5, 1.5)
    assert figure.layout.yaxis.range == (3, 0)  # row 0 on top


def test_parsing_darkens_by_the_row_of_each_pick():
    weights = attention()
    figure = figures.parsing(image(), weights, [0, 9], GRID)
    shades = traces(figure, "heatmap")
    for pick, shade in zip([0, 9], shades, strict=True):
        np.testing.assert_array_equal(shade.z.ravel(), weights[pick])
        assert shade.zmax == weights[pick].max()
    outline = next(trace for trace in figure.data if trace.name == "token 9")
    assert (min(outline.x), max(outline.x), min(outline.y), max(outline.y)) == (1, 2, 2, 3)
    assert outline.xaxis == shades[1].xaxis == "x3"  # after the plain image and the first pick


def test_masks_covers_the_masked_tokens_and_counts_them():
    hidden = np.zeros(GRID**2, dtype=bool)
    hidden[[1, 6, 7]] = True
    figure = figures.masks(image(), {"attention": hidden, "<b>none</b>": ~hidden}, pick=6, grid=GRID)
    for cover, mask in zip(traces(figure, "heatmap"), (hidden, ~hidden), strict=True):
        np.testing.assert_array_equal(np.isfinite(cover.z.ravel()), mask)  # nan draws nothing
        assert np.nansum(cover.z) == mask.sum()
    assert "attention: 3 of 16" in texts(figure) and "&lt;b&gt;none&lt;/b&gt;: 13 of 16" in texts(figure)
    assert len([trace for trace in figure.data if trace.name == "token 6"]) == 3


def test_attention_on_image_shades_by_the_weights():
    weights = attention()[2] * 0.4
    figure = figures.attention_on_image(image(), weights, GRID, title=HOSTILE)
    np.testing.assert_array_equal(traces(figure, "heatmap")[0].z.ravel(), weights)
    assert figure.layout.title.text == SHOWN
    assert "40.0% in all" in texts(figure)


# --------------------------------------------------------------------------------------------------- training


def test_losses_draws_each_quantity_over_the_steps():
    given = metrics(10).assign(colour=2.0, empty=np.nan)
    drawn = figures.losses(given).data
    assert [trace.name for trace in drawn] == ["mlm", "itm", "colour", "lr_share"]
    for trace in drawn:
        np.testing.assert_array_equal(trace.x, given["step"])
        np.testing.assert_array_equal(trace.y, given[trace.name])
    assert len({trace.yaxis for trace in drawn}) == 4


def test_losses_of_a_long_run_are_smoothed_over_faint_raw_values():
    given = metrics(100)
    drawn = {trace.name: trace for trace in figures.losses(given).data}
    np.testing.assert_array_equal(drawn["mlm"].y, given["mlm"])
    assert drawn["mlm"].opacity < 0.5
    mean = given["mlm"].rolling(8, center=True, min_periods=1).mean()
    np.testing.assert_allclose(drawn["mlm, mean"].y, mean)
    assert "lr_share, mean" not in drawn  # a schedule has no noise, only corners


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (4, (1, 4)), (6, (2, 3)), (8, (2, 4)), (9, (3, 3))])
def test_small_multiples_leave_few_gaps(count, shape):
    assert training._small_multiples(count) == shape


def test_held_out_draws_means_intervals_and_chance():
    values = HeldOut()
    figure = figures.held_out(values)
    itm, mlm = traces(figure, "bar")
    np.testing.assert_allclose(itm.y, [0.9, 0.52])
    np.testing.assert_allclose(mlm.y, [0.6, 0.2])
    np.testing.assert_allclose(itm.y + itm.error_y.array, [0.93, 0.55])
    np.testing.assert_allclose(itm.y - itm.error_y.arrayminus, [0.85, 0.49])
    (line,) = figure.layout.shapes
    assert (line.y0, line.y1, line.yref) == (0.5, 0.5, "y")
    assert "3.00 [2.50, 3.70] times" in figure.layout.xaxis2.title.text
    without = values._replace(mlm_other_image=Interval(0.0, 0.0, 0.0, 8))
    assert figures.held_out(without).layout.xaxis2.title.text == "none is correct with another image"


def test_held_out_has_the_fields_of_pretrain():
    from vpworkbench.train import evaluate

    assert evaluate.HeldOut._fields == HeldOut._fields
    assert evaluate.Interval is Interval


def test_accuracy_bars_takes_numbers_and_intervals():
    interval = bootstrap_interval(generator().random(50))
    values = {"alone": 0.25, HOSTILE: Interval(0.5, 0.4, 0.6, 50), "bootstrap": interval}
    figure = figures.accuracy_bars(values, chance={"bootstrap": 0.5}, title="Masks", axis="hidden tokens")
    (bars,) = traces(figure, "bar")
    np.testing.assert_allclose(bars.y, [0.25, 0.5, interval.mean])
    assert np.isnan(bars.error_y.array[0])
    np.testing.assert_allclose(bars.y[2] + bars.error_y.array[2], interval.high)
    labels = figure.layout.xaxis.ticktext
    assert "<img" not in labels[1] and "<b>50.0%</b><br>[40.0, 60.0]" in labels[1]
    assert figure.layout.yaxis.title.text == "hidden tokens"
    assert figure.layout.meta["alt"].startswith("Masks: alone 25.0%")
    chance = next(trace for trace in figure.data if trace.name == "chance")
    assert (tuple(chance.x), tuple(chance.y)) == ((2,), (0.5,))


# ----------------------------------------------------------------------------------------------------- probes


def test_flow_curves_draws_means_inside_bands_from_layer_one():
    from_input, within_layer = samples(), samples(scale=0.1)
    figure = figures.flow_curves(from_input, within_layer)
    for given, curve, band in zip(
        (from_input, within_layer), traces(figure, "scatter", "lines+markers"), figure.data[::2], strict=True
    ):
        interval = bootstrap_interval(given)
        np.testing.assert_array_equal(curve.x, [1, 2, 3])
        np.testing.assert_allclose(curve.y, given.mean(axis=0))
        high, low = band.y[:3], band.y[:2:-1]
        np.testing.assert_allclose([low, high], [interval.low, interval.high])
        assert (low < curve.y).all() and (curve.y < high).all()
    assert figure.layout.xaxis.tick0 == 1 and figure.layout.xaxis.range == (0.5, 3.5)


def test_flow_curves_draws_the_null_as_given():
    null = np.array([0.1, 0.2, 0.3])
    many = null + np.array([[-0.05], [0.05]])  # (example, layer)
    figure = figures.flow_curves(samples(), samples(), null_from_input=null, null_within_layer=many)
    dashed = [trace for trace in figure.data if trace.line.dash == "dash" and trace.x[0] is not None]
    for line in dashed:
        np.testing.assert_allclose(line.y, null)
    assert [line.xaxis for line in dashed] == ["x", "x2"]


def test_flow_curves_draws_the_live_part_of_every_span():
    live = np.stack([np.triu(np.full((3, 3), value)) + np.eye(3) for value in (0.1, 0.3)])  # (example, layer, layer)
    figure = figures.flow_curves(samples(), samples(), null_from_input=np.zeros(3), live=live)
    dotted = [trace for trace in figure.data if trace.line.dash == "dot" and trace.x[0] is not None]
    np.testing.assert_allclose([line.y for line in dotted], [[1.2, 0.2, 0.2], [1.2, 1.2, 1.2]])
    assert [line.xaxis for line in dotted] == ["x", "x2"]
    entries = [trace.name for trace in figure.data if trace.showlegend is not False and trace.mode == "lines"]
    assert entries == ["uniform attention", "can reach the read-out"]


def test_flow_curves_compares_models_of_any_depth():
    models = {"ours": samples(layers=3), HOSTILE: samples(layers=5)}
    figure = figures.flow_curves(models, models, null_from_input={"ours": np.zeros(3)})
    curves = traces(figure, "scatter", "lines+markers")
    assert [curve.name for curve in curves] == ["ours", SHOWN] * 2
    assert [len(curve.x) for curve in curves] == [3, 5, 3, 5]
    assert len({(curve.line.color, curve.marker.symbol) for curve in curves}) == 2
    assert sum(curve.showlegend for curve in curves) == 2


def test_curves_take_intervals_of_their_own():
    means = np.array([0.2, 0.3, 0.4])
    own = {HOSTILE: Interval(means, means - 0.1, means + 0.1, np.full(3, 2))}
    figure = figures.flow_curves(own, own, null_from_input={HOSTILE: means / 2}, over="2 seeds & 9 images")
    band, curve = figure.data[0], traces(figure, "scatter", "lines+markers")[0]
    np.testing.assert_allclose(curve.y, means)
    np.testing.assert_allclose(band.y, [*(means + 0.1), *(means - 0.1)[::-1]])
    assert "over 2 seeds &amp; 9 images" in figure.layout.title.text
    assert figures.nmi(own).data[1].y[2] == 0.4


def test_a_score_stands_against_the_flow_and_its_null():
    models = {HOSTILE: (Interval(0.4, 0.3, 0.5, 3), Interval(0.7, 0.65, 0.8, 3))}
    points = {"nulls": {HOSTILE: 0.3}, "seeds": {HOSTILE: [(0.35, 0.6), (0.45, 0.8)]}}
    figure = figures.score_against_flow(models, over="3 seeds", score="VQA", **points)
    null, seeds, point = figure.data
    assert list(null.x) == [0.3, 0.4] and list(seeds.y) == [0.6, 0.8] and point.name == SHOWN
    assert point.error_x.arrayminus[0] == pytest.approx(0.1) and point.error_y.array[0] == pytest.approx(0.1)
    assert "70.0% at 40.0%, null 30.0%" in figure.layout.meta["alt"]


def test_flow_triangle_is_empty_below_the_diagonal_and_counts_from_one():
    flow = triangle(4)
    flow[3, 0] = 0.5  # below the diagonal nothing is drawn
    (cells,) = figures.flow_triangle(flow).data
    np.testing.assert_array_equal(np.isnan(cells.z), np.tri(4, k=-1, dtype=bool))
    np.testing.assert_array_equal(np.triu(cells.z)[np.triu_indices(4)], flow[np.triu_indices(4)])
    assert (list(cells.x), list(cells.y)) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert cells.text[0][3] == "3.0" and cells.text[3][0] == ""


def test_layers_that_are_not_counted_are_named_below_the_figure():
    layers = ("model.layers.0", "model.layers.2", "tower.blocks.1")
    plain, noted = figures.flow_triangle(triangle(4)), figures.flow_triangle(triangle(4), uncounted=layers)
    assert not plain.layout.annotations and noted.layout.height > plain.layout.height
    (note,) = noted.layout.annotations
    text = "without softmax attention, and not counted: model.layers 0, 2; tower.blocks 1"
    assert note.text.replace("<br>", " ") == text and text in noted.layout.meta["alt"]
    curves = {name: np.full((3, 4), 0.2) for name in ("a", HOSTILE)}
    both = figures.flow_curves(curves, curves, uncounted={"a": (), HOSTILE: layers[:1]})
    assert both.layout.annotations[-1].text.startswith(SHOWN)


def test_maps_stand_side_by_side_in_units_of_their_own():
    effect = triangle() * -70
    figure = figures.layer_maps({"flow": triangle(), HOSTILE: effect}, title="Both", shares=["flow"])
    flow, lost = figure.data
    np.testing.assert_array_equal(lost.z, np.where(np.tri(3, k=-1), np.nan, effect))
    assert (flow.text[0][2], lost.text[0][2], lost.text[2][0]) == ("2.0", "-1.40", "")
    assert flow.zmid is None and lost.zmid == 0 and flow.colorbar.x < figure.layout.xaxis2.domain[0] < lost.colorbar.x
    assert SHOWN in texts(figure) and "flow from 0.0% to 8.0%" in figure.layout.meta["alt"]


def test_a_map_of_groups_by_layer_is_full():
    shares = samples(examples=2, layers=4)
    (cells,) = figures.layer_maps(
        {"restored": shares}, title="Patch", groups=["<b>", "[CLS]"], shares=["restored"]
    ).data
    np.testing.assert_array_equal(cells.z, shares)
    assert list(cells.y) == ["&lt;b&gt;", "[CLS]"] and list(cells.x) == [1, 2, 3, 4]


def test_curves_of_any_number_by_layer_stand_beside_a_level():
    values = samples()
    figure = figures.layer_curves(
        {"lost": values, HOSTILE: -values}, title="a", axis="b", first=0, level=("chance", 0.5)
    )
    for given, curve in zip((values, -values), traces(figure, "scatter", "lines+markers"), strict=True):
        np.testing.assert_allclose(curve.y, given.mean(axis=0))
        np.testing.assert_array_equal(curve.x, [0, 1, 2])
    (line,) = figure.layout.shapes
    assert line.y0 == line.y1 == 0.5 and "chance" in texts(figure)


def test_flow_directions_add_up():
    up, down = samples(), samples(scale=0.1)
    figure = figures.flow_directions(up, down)
    one, other = traces(figure, "bar")
    assert figure.layout.barmode == "stack" and list(one.x) == [1, 2, 3]
    np.testing.assert_allclose(one.y + other.y, (up + down).mean(axis=0))
    top = one.y + other.y + other.error_y.array
    np.testing.assert_allclose(top, bootstrap_interval(up + down).high)


def test_nmi_leaves_out_nan_examples_and_begins_with_the_input():
    values = samples(scale=1)
    values[0] = np.nan
    figure = figures.nmi(values)
    (curve,) = traces(figure, "scatter", "lines+markers")
    np.testing.assert_array_equal(curve.x, [0, 1, 2])
    np.testing.assert_allclose(curve.y, values[1:].mean(axis=0))
    low, high = figure.layout.yaxis.range
    assert low <= 0 and high >= 1


def test_modality_map_shows_real_tokens_by_modality():
    points = generator().random((6, 2))
    points[1] = np.nan
    vision = np.array([0, 0, 0, 1, 1, 0], dtype=bool)
    real = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    figure = figures.modality_map(points, vision, real, layer=2)
    language, visual = figure.data
    np.testing.assert_array_equal(language.customdata, [0, 2])
    np.testing.assert_array_equal(np.stack([visual.x, visual.y], axis=1), points[3:5])
    assert figure.layout.title.text == "Tokens by modality, layer 3"


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: figures.pictures([image()], ["a", "b"]), "longer"),
        (lambda: figures.pictures([], []), "at least one image"),
        (lambda: figures.parsing(image(), attention(), [0], 5), "size 16 into shape"),
        (lambda: figures.parsing(image(), 2 * attention(), [0], GRID), "sum to 1"),
        (lambda: figures.masks(image(), {"m": np.ones(9, bool)}, grid=4), "size 9 into shape"),
        (lambda: figures.attention_on_image(image(), np.ones(9), 4, title=""), "size 9 into shape"),
        (lambda: figures.losses(pd.DataFrame({"step": []})), r"not \['step'\]"),
        (lambda: figures.losses(pd.DataFrame({"mlm": [1.0]})), r"column `step` .* not \['mlm'\]"),
        (lambda: figures.accuracy_bars({"a": 89.0}), "'a' is 89; shares"),
        (lambda: figures.accuracy_bars({"a": 0.5}, chance={"b": 0.5}), "'b' is not in list"),
        (lambda: figures.flow_curves(np.zeros(3), np.zeros(3)), r"array \(example, layer\) for each model"),
        (lambda: figures.flow_curves(samples(), samples(), live=samples()), r"live needs .*\(example, layer, layer\)"),
        (lambda: figures.flow_directions(samples(), samples(layers=2)), "could not be broadcast"),
    ],
)
def test_what_does_not_agree_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("fault", [ValueError("kaleido package"), RuntimeError("Google Chrome")])
def test_without_kaleido_or_a_browser_only_the_page_is_saved(fault, monkeypatch, tmp_path, caplog):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(pio, "write_images", fail)
    figures.export({tmp_path / "figure.html": go.Figure()})
    assert (tmp_path / "figure.html").exists()
    assert "pip install kaleido; apt install chromium" in caplog.text and "camera button" in caplog.text


@pytest.mark.browser
@pytest.mark.skipif(
    importlib.util.find_spec("kaleido") is None or not any(map(shutil.which, ("chromium", "google-chrome"))),
    reason="needs kaleido and Chromium",
)
def test_png_is_transparent_and_shows_the_picture(tmp_path):
    red = np.full((32, 32, 3), (200, 0, 0), dtype=np.uint8)
    figure = figures.tokens(red, 2)
    figures.export({tmp_path / "figure.html": figure})
    png = Image.open(tmp_path / "figure.png").convert("RGBA")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert png.size == (2 * figure.layout.width, 2 * figure.layout.height)
    assert png.getpixel((1, png.height - 1))[3] == 0
    red_pixels = (np.asarray(png)[..., :3] == (200, 0, 0)).all(axis=-1).mean()
    assert red_pixels > 0.5
