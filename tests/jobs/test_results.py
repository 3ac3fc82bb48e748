"""What came of the runs: rows, differences, curves, links."""

import pytest
from conftest import SmallMask, SmallSettings

from vpworkbench import figures
from vpworkbench.errors import SettingsError
from vpworkbench.jobs import results
from vpworkbench.runs import open_run, shipped_run


@pytest.fixture
def three(runs_folder):
    """Two runs of one notebook that differ in two settings, one of them complete; one of another."""
    first = open_run("01_pretrain", SmallSettings(), name="first")
    second = open_run("01_pretrain", SmallSettings(seed=3, mask=SmallMask(budget=9)), name="second")
    other = open_run("02_probe", SmallSettings(), name="other")
    for step in (10, 20):
        first.log(step, itm=0.7 - step / 100, mlm=2.0)
        second.log(step, itm=0.6)
    second.log(30, itm=0.5, held_out_loss=4.0)
    first.write_summary(itm_accuracy=0.9)
    (first.folder / "01_pretrain.ipynb").touch()
    return [run.folder for run in (first, second, other)]


def test_runs_are_filtered_by_results_and_by_settings(three):
    assert results.find_runs()["name"].tolist() == ["first", "second", "other"]
    assert results.find_runs("02_probe")["name"].tolist() == ["other"]
    assert results.find_runs("01_pretrain", "itm_accuracy > 0.5")["name"].tolist() == ["first"]
    assert results.find_runs("01_pretrain", "mask_budget == 9 and seed == 3")["name"].tolist() == ["second"]
    with pytest.raises(SettingsError, match="where: 'colour > 2' cannot be evaluated.*mask_budget"):
        results.find_runs("01_pretrain", "colour > 2")


def test_a_run_that_cannot_be_read_keeps_its_row(run, runs_folder):
    run.write_summary(steps=10, flow={"first": 0.4})
    open_run("02_probe", SmallSettings(seed=5), name="b")
    spoilt = open_run("02_probe", SmallSettings(), name="c")
    (spoilt.folder / "config.json").write_text("{")
    (runs_folder / "gallery" / "example").mkdir(parents=True)
    (runs_folder / "gallery" / "example" / "config.json").write_text("{}")
    table = results.find_runs()
    assert table["name"].tolist() == ["a", "b", "c"] and table["complete"].tolist() == [True, False, False]
    assert table["seed"].tolist()[:2] == [0, 5] and table["flow.first"].iloc[0] == 0.4
    assert "config.json" in table["fault"].iloc[2]


def test_without_runs_the_table_is_empty(runs_folder):
    table = results.find_runs(where="seed == 0")
    assert table.empty and list(table.columns) == results.COLUMNS


def test_only_what_differs_is_shown(three):
    table = results.differences(three[:2])
    assert table.index.tolist() == ["seed", "mask.budget"]
    assert table.loc["mask.budget"].to_dict() == {"first": 7, "second": 9}
    assert results.differences(three[:1]).empty


def test_curves_lie_over_each_other(three):
    curves = results.curves(three, "itm")
    assert list(curves) == ["first", "second"] and curves["second"]["step"].tolist() == [10, 20, 30]
    figure = figures.run_curves(curves, "itm")
    assert [list(trace.y) for trace in figure.data] == [pytest.approx([0.6, 0.5]), pytest.approx([0.6, 0.6, 0.5])]
    assert results.curves(three, "held_out_loss")["second"]["step"].tolist() == [30]
    with pytest.raises(SettingsError, match="no run logged 'imt' .*itm, mlm"):
        results.curves(three, "imt")


def test_runs_of_one_name_are_told_apart_by_their_notebooks(three):
    tuned = open_run("04_finetune", SmallSettings(seed=8), name="first")
    tuned.log(5, itm=0.4)
    curves = results.curves([*three, tuned.folder], "itm")
    assert list(curves) == ["01_pretrain/first", "second", "04_finetune/first"]
    table = results.differences([three[0], tuned.folder])
    assert table.loc["seed"].to_dict() == {"01_pretrain/first": 0, "04_finetune/first": 8}


def test_a_run_that_cannot_be_read_has_no_differences(three):
    (three[1] / "config.json").write_text("{")
    assert list(results.differences([*three])) == ["first", "other"]


def test_a_run_without_the_setting_is_none_of_those_asked_for(three):
    run = open_run("01_pretrain", SmallSettings(), name="true")
    run.write_summary(good=True)
    assert results.find_runs("", "good")["name"].tolist() == ["true"]


def test_links_lead_from_one_folder_to_the_other(three):
    text = results.links(three, beside=three[2])
    assert text == "* [first: 01_pretrain.ipynb](../../01_pretrain/first/01_pretrain.ipynb)"


def test_the_committed_examples_are_found(runs_folder):
    table = results.find_runs("01_pretrain", gallery=True)
    assert shipped_run().name in table.index and table["complete"].all()
    assert len(results.curves(table["folder"], "itm")) == len(table) >= 2
