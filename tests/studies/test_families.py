"""The comparison of families: the commands of its runs, tables of finished runs, intervals over seeds and images."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from vpworkbench import figures
from vpworkbench.errors import SettingsError
from vpworkbench.jobs.parameters import check_parameters, find_notebook, notebook_parameters, parse_parameters
from vpworkbench.model.visual import build_visual
from vpworkbench.probing import SPANS, Probed
from vpworkbench.runs import Run, open_folder, read_json, runs_root, shipped_run
from vpworkbench.settings import FamilyRunsSettings, RegionSettings, VisualSettings
from vpworkbench.studies import families as family_runs
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train.region_features import RegionNetwork


def test_the_calls_are_those_of_all_arms_and_seeds(runs_folder):
    """Each is accepted, every seed of every arm is there once, and nothing is used before it is made."""
    calls = [shlex.split(call) for call in family_runs.calls(FamilyRunsSettings(seeds=2))]
    assert calls[0][:3] == ["vpw", "regions", "scenes"] and "8" in calls[0]
    made, settings = {calls[0][3]}, {}
    for program, verb, notebook, option, name, *words in calls[1:]:
        assert (program, verb, option) == ("vpw", "run", "--name") and (notebook, name) not in settings
        given = dict(zip(words[1::3], words[2::3], strict=True))
        defaults = notebook_parameters(find_notebook(notebook))
        settings[notebook, name] = check_parameters(notebook, defaults, parse_parameters(given, defaults))
        needs = [given.get(key) for key in ("checkpoint", "regions", "init_visual")]
        assert {need for need in needs if need} <= made
        made |= {name, str(runs_folder / "09_visual_init" / name / "checkpoint" / "visual.safetensors")}
    taught = {name: value for (notebook, name), value in settings.items() if notebook == "09_visual_init"}
    assert set(taught) == {"families-deep"}
    trained = {name: value for (notebook, name), value in settings.items() if notebook == "01_pretrain"}
    assert set(trained) == {f"families-{arm}-{seed}" for arm in family_runs.ARMS for seed in (0, 1)}
    for notebook in ("02_probe", "04_finetune"):
        assert {name for known, name in settings if known == notebook} == set(trained)
    equal = {
        value.model_copy(update={"visual": None, "seed": 0, "init_visual": ""}).model_dump_json(
            exclude={"mask": {"mode"}, "optim": {"lr_visual"}}
        )
        for value in trained.values()
    }
    assert len(equal) == 1
    rates = {arm: trained[f"families-{arm}-0"].optim.lr_visual for arm in family_runs.ARMS}
    chosen = {"patch-random": 2e-4, "grid-code": 1e-5}  # the best on validation (docs/results.md)
    assert {arm: rate for arm, rate in rates.items() if rate != rates["swin-random"]} == chosen
    masks = [trained[f"families-{arm}-0"].mask.mode for arm in family_runs.FAMILY_ARMS]
    assert masks == ["random"] * 4 + ["code"] and trained["families-grid-code-0"].visual.dictionary == 2048


def test_any_list_of_arms_is_compared(runs_folder):
    """Names of known arms, and arms of one's own; their runs are found by the same names."""
    own = {"label": "wide, no MFR", "masking": "none", "overrides": {"fusion.width": 384}}
    settings = FamilyRunsSettings(arms=["vl-bert", "regions-random", own], seeds=1)
    calls = [shlex.split(call) for call in family_runs.calls(settings)]
    trained = {call[4]: dict(zip(call[6::3], call[7::3], strict=True)) for call in calls if call[2] == "01_pretrain"}
    assert list(trained) == ["families-vl-bert-0", "families-regions-random-0", "families-wide-no-MFR-0"]
    assert calls[0][:3] == ["vpw", "regions", "scenes"] and not any("09_visual_init" in call for call in calls)
    assert trained["families-vl-bert-0"]["system"] == "vl-bert" and "masking" not in trained["families-vl-bert-0"]
    assert json.loads(trained["families-wide-no-MFR-0"]["overrides"]) == own["overrides"]
    with pytest.raises(SettingsError, match="arms: no arm 'vlbert'; did you mean 'vl-bert'"):
        family_runs.arms_of(FamilyRunsSettings(arms=["vlbert"]))
    with pytest.raises(SettingsError, match="there are no finished runs of unified-vlp yet"):
        family_runs.compared(FamilyRunsSettings(arms=["unified-vlp"]))
    found = family_runs.compared(FamilyRunsSettings(arms=["regions-random"]))  # of those that ship
    assert list(found.names()) == ["regions-random"] and len(found.learnt()) == len(found.runs)


def test_visual_sides_are_taught_by_equal_work():
    """To a tenth, the multiply-adds of the eight passes of the shipped Swin; or eight passes, where they are less."""
    done, scenes = {}, []
    for family in ("swin", "grid", "patch"):
        made = read_json(shipped_run().with_name(f"09_visual_init-tiny-{family}") / "config.json")["settings"]
        images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
        done[family] = made["train"]["epochs"] * work(build_visual(VisualSettings(**made["visual"])), images)
        scenes.append({key: made["scenes"][key] for key in ("images", "seed", "difficulty", "image_px")})
        assert family == "grid" or made["train"]["epochs"] == family_runs.PASSES
    assert scenes[0] == scenes[1] == scenes[2]
    assert done["patch"] < done["swin"] == pytest.approx(done["grid"], rel=0.1)
    regions = RegionSettings()
    crops = torch.zeros(4, 3, regions.crop_px, regions.crop_px, dtype=torch.uint8)  # the most that a scene has
    assert family_runs.PASSES * work(RegionNetwork(regions), crops) < done["swin"]


def work(module: torch.nn.Module, given: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(given)
    return counter.get_total_flops() // 2


def finished(name: str, flow: float, score: float, pictures: str = "abcdef", steps: int = 400) -> None:
    """A run that is pre-trained, probed and fine-tuned, as its summaries say: no checkpoint is needed."""
    trained = runs_root() / "01_pretrain" / name
    trained.mkdir(parents=True)
    shutil.copy(shipped_run() / "config.json", trained)
    learnt = {"itm_accuracy": flow + 0.5, "mlm_with_image": 0.5, "mlm_other_image": 0.1}
    Run(trained).write_summary(visual_parameters=1_209_186, visual_multiply_adds=71_995_392, **learnt)
    rng = np.random.default_rng(0)
    spans = {span: np.full((6, 3, 3), np.nan) for span in SPANS}
    for span, values in spans.items():
        values[:, *np.triu_indices(3)] = (flow if span == "flow" else 0.3) + 0.01 * rng.random((6, 6))
    probed = Probed(**spans, nmi=rng.random((6, 4)), examples=tuple(pictures))
    (runs_root() / "02_probe" / name).mkdir(parents=True)
    probed.save(runs_root() / "02_probe" / name / "probes.parquet")
    asked = finetune_settings(checkpoint=name, steps=steps)
    open_folder(runs_root() / "04_finetune" / name, "04_finetune", asked)
    Run(runs_root() / "02_probe" / name).write_summary(images=6, visual_tokens=36.0, words=11.5)
    interval = {"vqa_score": score, "vqa_score_low": score - 0.02, "vqa_score_high": score + 0.02}
    baseline = {"baseline text only": {"vqa_score": score - 0.1}}
    Run(runs_root() / "04_finetune" / name).write_summary(**interval, **baseline)


def test_finished_runs_are_found_and_become_table_5(runs_folder):
    for seed, score in enumerate((0.5, 0.52)):
        finished(f"families-swin-random-{seed}", 0.4, score)
    finished("families-grid-none-0", 0.35, 0.4)
    finished("families-swin-none-0", 0.35, 0.4)
    (runs_folder / "04_finetune" / "families-swin-none-0" / "summary.json").unlink()  # still fine-tuning
    finished("others-swin-none-0", 0.35, 0.4)
    settings = FamilyRunsSettings()
    found = family_runs.compared(settings)
    assert [(run.arm, run.seed) for run in found.runs] == [("swin-random", 0), ("swin-random", 1), ("grid-none", 0)]
    assert {run.steps for run in found.runs} == {(6000, 400)}
    assert found.over() == "2 seeds and 6 images" and found.names() == {"swin-random": "Swin, random MFR (36 tokens)"}
    table = found.table_5()
    assert table.index.tolist() == ["small CNN (instead of R50)", "Swin, random MFR"]
    swin = table.loc["Swin, random MFR"]
    flow = np.mean([run.probed.from_input[:, -1].mean() for run in found.runs_of("swin-random")])
    assert swin["flow"] == pytest.approx(flow) and swin["null"] == pytest.approx(0.305, abs=0.005)
    between, questions = 0.01**2, (0.04 / 3.92) ** 2
    half = stats.t.ppf(0.975, (1 + questions / between) ** 2) * np.sqrt(between + questions)
    assert [swin["vqa"], swin["vqa_high"], swin["seeds"]] == pytest.approx([0.51, 0.51 + half, 2])
    assert found.over(family_runs.TABLE_5) == "1 to 2 seeds and 6 images"
    arms = found.scores(family_runs.TABLE_5)
    assert list(arms) == list(found.last_nulls(family_runs.TABLE_5)) == list(found.single_scores(family_runs.TABLE_5))
    assert list(arms) == ["small CNN (instead of R50) (36 tokens)", "Swin, random MFR (36 tokens)"]
    costs = found.costs()
    assert costs.index.tolist() == ["Swin, random MFR", "small CNN (instead of R50)"]
    taught = read_json(shipped_run().with_name("09_visual_init-tiny-swin") / "summary.json")
    swin = costs.loc["Swin, random MFR", ["tokens", "visual_parameters", "taught_shape"]]
    assert swin.tolist() == [36, 1_209_186, taught["shape_accuracy"]]
    learnt = found.learnt()
    second = learnt.loc[("Swin, random MFR", 1)]
    assert second[["itm_accuracy", "vqa", "text_only"]].tolist() == pytest.approx([0.9, 0.52, 0.42])
    assert learnt.loc["small CNN (instead of R50)", "flow"].tolist() == [found.runs[2].probed.from_input[:, -1].mean()]
    assert found.text_only == pytest.approx((0.4 + 0.42 + 0.3) / 3)
    points = {"nulls": found.last_nulls(), "seeds": found.single_scores(), "floor": found.text_only}
    figure = figures.score_against_flow(found.scores(), over=found.over(), score="VQA", **points)
    assert figure.layout.shapes[0].y0 == found.text_only and "text only 37.3%" in figure.layout.meta["alt"]
    assert sorted(figure.data[1].y) == [0.5, 0.52] and figure.data[2].y[0] == pytest.approx(0.51)
    curves = figures.flow_curves(found.curves("from_input"), found.curves("within_layer"), over=found.over())
    assert curves.data[1].y[-1] == pytest.approx(flow) and found.over() in curves.layout.title.text
    assert [folder.name for folder in found.folders] == ["families-grid-none-0", "families-swin-random-0"]
    there = FamilyRunsSettings(runs=str(runs_folder))
    assert family_runs.compared(there).runs[0].folder == found.runs[0].folder


def test_without_runs_the_committed_ones_are_shown(runs_folder):
    found = family_runs.compared(FamilyRunsSettings())
    assert len(found.names(tuple(family_runs.ARMS))) == len(family_runs.ARMS)
    assert found.folders[0].is_relative_to(shipped_run().with_name("08_families-tiny"))


def test_a_folder_without_runs_is_refused(tmp_path):
    settings = FamilyRunsSettings(runs=str(tmp_path))
    with pytest.raises(SettingsError, match=rf"runs: {tmp_path} holds no finished runs called families-ARM-SEED"):
        family_runs.compared(settings)


def test_runs_of_table_5_alone_are_refused(runs_folder):
    finished("families-grid-none-0", 0.4, 0.5)
    with pytest.raises(SettingsError, match="Table 5 only, none of a family such as families-swin-random-0"):
        family_runs.compared(FamilyRunsSettings())


def test_runs_on_different_pictures_are_refused(runs_folder):
    finished("families-swin-random-0", 0.4, 0.5)
    finished("families-swin-none-0", 0.4, 0.5, pictures="ghijkl")
    with pytest.raises(SettingsError, match="read different pictures"):
        family_runs.compared(FamilyRunsSettings())


def test_runs_of_different_lengths_are_refused(runs_folder):
    finished("families-swin-random-0", 0.4, 0.5)
    finished("families-swin-none-0", 0.4, 0.5, steps=300)
    with pytest.raises(SettingsError, match=r"different steps, \[\(6000, 300\), \(6000, 400\)\]"):
        family_runs.compared(FamilyRunsSettings())


def test_a_prefix_that_could_be_a_pattern_is_refused():
    for prefix in ("*", "fam*", "a/b", "../x", "x y", ""):
        with pytest.raises(ValueError, match="prefix"):
            FamilyRunsSettings(prefix=prefix)


def test_the_results_say_what_the_committed_runs_say():
    """Each row of the table in docs/results.md, from the summaries and probes in the gallery."""
    gallery = shipped_run().with_name("08_families-tiny")
    settings = FamilyRunsSettings(runs=str(gallery / "runs"))
    found = family_runs.compared(settings)
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    text = " ".join(text.split())
    scores = found.scores(tuple(family_runs.ARMS)).values()
    arms = [arm for arm in family_runs.ARMS if found.runs_of(arm)]
    assert arms == list(family_runs.ARMS)
    for arm, (flow, score) in zip(arms, scores, strict=True):
        runs = found.runs_of(arm)
        itm, words = (", ".join(f"{run.learnt[name]:.2f}" for run in runs) for name in family_runs.LEARNT[:2])
        each = ", ".join(f"{run.score.mean:.3f}" for run in runs)
        label, null = family_runs.ARMS[arm].label, np.mean([run.null.mean() for run in runs])
        cells = [label, f"{runs[0].tokens[0]:.3g}", itm, words, f"{each}: {score:.3f}"]
        assert f"| {' | '.join(cells)} | {flow:.3f} ({null:.3f}) |" in text
    assert f"text-only baseline of {found.text_only:.3f}" in text
    summaries = [read_json(file) for file in (gallery / "runs" / "04_finetune").glob("*/summary.json")]
    floor = np.mean([summary["baseline text only"]["vqa_score"] for summary in summaries])
    assert len(found.runs) == len(summaries) and found.text_only == pytest.approx(floor)
