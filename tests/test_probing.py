"""Probes over many pictures: streamed, saved, resumed, and averaged with intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vpworkbench.data.inputs import prepare
from vpworkbench.probes import inter_modality_flow, modality_nmi
from vpworkbench.probing import Probed, probe
from vpworkbench.stats import bootstrap_interval
from vpworkbench.subjects import Subject

ARRAYS = ("flow", "null", "text_to_vision", "vision_to_text", "nmi")


@pytest.fixture
def subject(model) -> Subject:
    """Batches of four."""
    return Subject("small", model.eval(), partial(prepare, model), batch=4, base=model)


@pytest.fixture
def probed(subject, scenes) -> Probed:
    return probe(subject, scenes[:12], special_tokens="exclude")


def same(one: Probed, other: Probed) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in ARRAYS)


def test_every_example_as_if_probed_alone(model, scenes, probed):
    assert probed.flow.shape == (12, 2, 2) and probed.nmi.shape == (12, 3) and len(probed.examples) == 12
    alone = prepare(model, scenes[5:6], [scenes[5].captions[0]], special_tokens="exclude")
    flow = inter_modality_flow(model, alone.forward, alone.vision, alone.tokens, language=alone.language)
    np.testing.assert_allclose(probed.flow[5], flow.flow[0].double(), atol=1e-6)
    with torch.no_grad():
        hidden = model(**alone.forward).hidden
    nmi = modality_nmi(hidden, alone.vision, alone.tokens, language=alone.language)
    np.testing.assert_allclose(probed.nmi[5], nmi[0].double(), atol=1e-6)


def test_means_have_bootstrap_intervals_for_every_span(probed):
    means = probed.means().set_index(["quantity", "start", "stop"])
    assert len(means) == 5 * 3 + 3
    mean, low, high, count = bootstrap_interval(probed.flow)
    row = means.loc["flow", 1, 2]
    expected = (part[0, 1] for part in (mean, low, high, count))
    assert (row["mean"], row["low"], row["high"], row["count"]) == tuple(expected)
    excess = (probed.flow / probed.null)[:, 1, 1].mean()
    assert means.loc["excess", 2, 2]["mean"] == pytest.approx(excess)
    assert means.loc["nmi", 0, 0]["mean"] == pytest.approx(probed.nmi[:, 0].mean())


def test_saved_with_its_config_and_read_back(subject, scenes, tmp_path):
    probed = probe(subject, scenes[:12], folder=tmp_path)
    read = Probed.load(tmp_path / "probes.parquet")
    names = tuple(f"{number}/{picture.id}" for number, picture in enumerate(scenes[:12]))
    assert same(read, probed) and read.examples == names
    assert read.config == {"model": "small", "images": 12, "special_tokens": "language", "seed": 0}
    assert json.loads(pq.read_schema(tmp_path / "probes.parquet").metadata[b"vpworkbench"])["model"] == "small"
    assert [file.name for file in tmp_path.iterdir()] == ["probes.parquet"]
    table = probed.table()
    assert len(table) == 12 * (4 * 3 + 3) and set(table["example"]) == set(names)


def test_models_whose_spans_and_features_differ_in_number_are_read_back(probed, tmp_path):
    """LXMERT attends twice in each layer."""
    halves = replace(probed, **{name: np.random.rand(12, 4, 4) for name in ARRAYS[:4]})
    for name in ARRAYS[:4]:
        getattr(halves, name)[:, *np.tril_indices(4, -1)] = np.nan
    halves.save(tmp_path / "halves.parquet")
    assert same(Probed.load(tmp_path / "halves.parquet"), halves)


def test_interrupted_it_goes_on_and_ends_the_same(subject, scenes, probed, tmp_path):
    def interrupt(name: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    call = partial(probe, subject, scenes[:12], special_tokens="exclude", folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        call(progress=interrupt)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    passes, shown = [], []
    subject.model.register_forward_pre_hook(lambda *args: passes.append(1))
    resumed = call(progress=lambda *state: shown.append(state))
    assert same(resumed, probed) and resumed.examples == probed.examples
    assert len(passes) == 2 and shown == [("probing", 3, 3)]  # flow and features of one batch
    assert same(call(), probed) and len(passes) == 2


def test_probes_of_another_config_are_not_taken_for_these(subject, scenes, tmp_path):
    probe(subject, scenes[:4], folder=tmp_path)
    with pytest.raises(ValueError, match="probes.parquet: probes of another config.*'small'.*'b'.*another folder"):
        probe(replace(subject, name="b"), scenes[:4], folder=tmp_path)


def test_probes_of_other_pictures_or_weights_are_not_taken_for_these(model, scenes, tmp_path):
    probe(model, scenes[:2], folder=tmp_path)
    with pytest.raises(ValueError, match="probes of other pictures .0/.*, not 0/.* take another folder"):
        probe(model, scenes[5:7], folder=tmp_path)
    torch.nn.init.normal_(model.mlm_bias)
    with pytest.raises(ValueError, match="probes of another config"):
        probe(model, scenes[:2], folder=tmp_path)


def test_a_model_in_training_goes_on_training(model, scenes):
    model.train()
    model.visual.eval()
    probe(model, scenes[:2])
    assert model.training and model.fusion.training and not model.visual.training


def test_refusals(subject, scenes, tmp_path):
    with pytest.raises(ValueError, match="none of the pictures has a caption"):
        probe(subject, [replace(scenes[0], captions=())])
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="x.parquet: not a file of probes"):
        Probed.load(tmp_path / "x.parquet")


def test_what_is_undefined_is_left_out_of_its_mean(probed):
    nmi = probed.nmi.copy()
    nmi[:4, 1], nmi[:, 2] = np.nan, np.nan
    means = replace(probed, nmi=nmi).means().set_index(["quantity", "start", "stop"])
    assert means.loc["nmi", 1, 1]["count"] == 8
    assert means.loc["nmi", 1, 1]["mean"] == pytest.approx(probed.nmi[4:, 1].mean())
    assert means.loc["nmi", 2, 2]["count"] == 0 and np.isnan(means.loc["nmi", 2, 2]["mean"])
