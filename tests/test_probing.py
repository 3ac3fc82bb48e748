"""Probes over many examples: streamed, saved, resumed and merged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vpworkbench.data.inputs import prepare
from vpworkbench.probes import inter_modality_flow, modality_nmi
from vpworkbench.probing import Probed, probe_dataset
from vpworkbench.stats import bootstrap_interval


def batches(model, scenes, count: int = 3, *, stop_before: int | None = None):
    for number in range(count):
        if number == stop_before:
            raise KeyboardInterrupt
        pictures = scenes[4 * number : 4 * number + 4]
        yield prepare(model, pictures, [picture.captions[0] for picture in pictures], special_tokens="exclude")


def same(one: Probed, other: Probed) -> bool:
    arrays = ("flow", "null", "text_to_vision", "vision_to_text", "nmi")
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in arrays)


def test_every_example_as_if_probed_alone(model, scenes):
    probed = probe_dataset(model, batches(model, scenes), total=3)
    assert probed.flow.shape == (12, 2, 2) and probed.nmi.shape == (12, 3) and len(probed.examples) == 12
    alone = prepare(model, scenes[5:6], [scenes[5].captions[0]], special_tokens="exclude")
    flow = inter_modality_flow(model, alone.forward, alone.vision, alone.tokens, language=alone.language)
    np.testing.assert_allclose(probed.flow[5], flow.flow[0].double(), atol=1e-6)
    with torch.no_grad():
        hidden = model(**alone.forward).hidden
    nmi = modality_nmi(hidden, alone.vision, alone.tokens, language=alone.language)
    np.testing.assert_allclose(probed.nmi[5], nmi[0].double(), atol=1e-6)


def test_means_have_bootstrap_intervals_for_every_span(model, scenes):
    probed = probe_dataset(model, batches(model, scenes), total=3)
    means = probed.means().set_index(["quantity", "start", "stop"])
    assert len(means) == 5 * 3 + 3
    mean, low, high, count = bootstrap_interval(probed.flow[:, 0, 1])
    row = means.loc["flow", 1, 2]
    assert (row["mean"], row["low"], row["high"], row["count"]) == (mean, low, high, count)
    excess = (probed.flow / probed.null)[:, 1, 1].mean()
    assert means.loc["excess", 2, 2]["mean"] == pytest.approx(excess)
    assert means.loc["nmi", 0, 0]["mean"] == pytest.approx(probed.nmi[:, 0].mean())


def test_saved_with_its_config_and_read_back(model, scenes, tmp_path):
    names = [picture.id for picture in scenes[:12]]
    probed = probe_dataset(
        model, batches(model, scenes), total=3, folder=tmp_path, config={"model": "a"}, examples=names
    )
    read = Probed.load(tmp_path / "probes.parquet")
    assert same(read, probed) and read.examples == tuple(names) and read.config == {"model": "a", "seed": 0}
    assert json.loads(pq.read_schema(tmp_path / "probes.parquet").metadata[b"vpworkbench"])["model"] == "a"
    assert [file.name for file in tmp_path.iterdir()] == ["probes.parquet"]
    table = probed.table()
    assert len(table) == 12 * (4 * 3 + 3) and set(table["example"]) == set(names)


def test_interrupted_it_goes_on_and_ends_the_same(model, scenes, tmp_path):
    whole = probe_dataset(model, batches(model, scenes), total=3)
    with pytest.raises(KeyboardInterrupt):
        probe_dataset(model, batches(model, scenes, stop_before=2), total=3, folder=tmp_path)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    shown = []
    listen = {"progress": lambda *state: shown.append(state)}
    resumed = probe_dataset(model, batches(model, scenes), total=3, folder=tmp_path, **listen)
    assert same(resumed, whole) and resumed.examples == whole.examples
    assert len(passes) == 2 and shown == [("probing", 3, 3)]  # flow and features of one batch
    again = probe_dataset(model, iter(()), total=3, folder=tmp_path)
    assert same(again, whole) and len(passes) == 2


def test_probes_of_another_config_are_not_taken_for_these(model, scenes, tmp_path):
    probe_dataset(model, batches(model, scenes, 1), total=1, folder=tmp_path, config={"checkpoint": "a"})
    with pytest.raises(ValueError, match="probes.parquet: probes of another config.*'a'.*'b'.*another folder"):
        probe_dataset(model, batches(model, scenes, 1), total=1, folder=tmp_path, config={"checkpoint": "b"})


def test_runs_are_merged(model, scenes):
    whole = probe_dataset(model, batches(model, scenes), total=3)
    first = probe_dataset(model, batches(model, scenes, 1), total=1, config={"part": 1})
    rest = probe_dataset(model, batches(model, scenes[4:], 2), total=2, examples=[str(n) for n in range(4, 12)])
    merged = Probed.merge([first, rest])
    assert same(merged, whole) and merged.examples == whole.examples
    assert merged.config == [{"part": 1, "seed": 0}, {"seed": 0}]
    assert merged.means().equals(whole.means())
    with pytest.raises(ValueError, match="example '0' is in more than one run"):
        Probed.merge([first, whole])
    deeper = replace(whole, flow=np.zeros((12, 5, 5)))
    with pytest.raises(ValueError, match=r"models with \[2, 5\] layers"):
        Probed.merge([first, deeper])


def test_refusals(model, scenes, tmp_path):
    with pytest.raises(ValueError, match="nothing was probed"):
        probe_dataset(model, iter(()), total=0)
    with pytest.raises(ValueError, match="examples has 5 names for 8"):
        probe_dataset(model, batches(model, scenes), total=3, examples=list("abcde"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="x.parquet: not a file of probes"):
        Probed.load(tmp_path / "x.parquet")


def test_what_is_undefined_is_left_out_of_its_mean(model, scenes):
    probed = probe_dataset(model, batches(model, scenes), total=3)
    nmi = probed.nmi.copy()
    nmi[:4, 1], nmi[:, 2] = np.nan, np.nan
    means = replace(probed, nmi=nmi).means().set_index(["quantity", "start", "stop"])
    assert means.loc["nmi", 1, 1]["count"] == 8
    assert means.loc["nmi", 1, 1]["mean"] == pytest.approx(probed.nmi[4:, 1].mean())
    assert means.loc["nmi", 2, 2]["count"] == 0 and np.isnan(means.loc["nmi", 2, 2]["mean"])
