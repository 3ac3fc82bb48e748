"""Visual families under equal conditions, and the arms of the paper's Table 5: the runs, and tables of them.

Fusion, text, objectives, data and steps are equal. So is the work that taught each visual side colours and shapes of
the same scenes before (`weights.shipped_visual`). Only the way from an image to visual tokens differs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vpworkbench.errors import SettingsError
from vpworkbench.model.budget import Budget, budget
from vpworkbench.probing import Probed, probe
from vpworkbench.runs import Run, open_folder, read_json, runs_root, shipped_run
from vpworkbench.settings import FamilyRunsSettings, RegionSettings, TrainSettings, pretrain_settings
from vpworkbench.settings.families import FAMILIES
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.stats import Interval, flatten, over_seeds, seeds_and_samples_interval
from vpworkbench.subjects import load, token_counts
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.tasks.task import evaluate_task
from vpworkbench.train.finetune import finetune, prepare_task
from vpworkbench.train.pretrain import prepare, pretrain
from vpworkbench.train.region_features import make_regions

PROBED = 128
"""Held-out pictures probed in each run."""
LEARNT = ("itm_accuracy", "mlm_with_image", "mlm_other_image")  # in the summary of 01_pretrain
FEW_SCENES = SceneSettings(images=64, val=32, test=4)  # of the demonstration


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes
    ----------
    label : str
        Its name in figures and tables.
    visual, masking : str
        Parameters of `01_pretrain`.
    start : str
        Its visual side starts from the run PREFIX-START of `09_visual_init`. Empty: from shipped weights, or from given
        features.
    overrides : dict
        Further settings.
    """

    label: str
    visual: str
    masking: str
    start: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)


DEEPER = {"visual.backbone": "resnet18"}  # twice the blocks of tiny's resnet10t, of the same kind: R101 beside R50
PASSES = 8
"""Epochs over the scenes for the CNN that makes region features; the shipped Swin had as many."""
DEEPER_PASSES = 2
"""As many epochs as the small CNN, so twice its FLOPs: after one epoch the deeper CNN recognises 44% of the shapes."""
ARMS = {
    "swin-random": Arm("Swin, random MFR", "swin", "random"),
    "grid-random": Arm("grid CNN", "grid", "random"),
    "patch-random": Arm("patches", "patch", "random"),
    "regions-random": Arm("regions", "regions", "random"),
    "grid-code": Arm("grid CNN, codes (SOHO)", "grid", "code", overrides={"visual.dictionary": 2048}),
    "grid-none": Arm("small CNN (instead of R50)", "grid", "none"),
    "deep-none": Arm("deeper CNN (instead of R101)", "grid", "none", "deep", DEEPER),
    "swin-none": Arm("Swin, no MFR", "swin", "none"),
    "swin-attention": Arm("Swin, attention MFR", "swin", "attention"),
}
FAMILY_ARMS = ("swin-random", "grid-random", "patch-random", "regions-random", "grid-code")
"""The four families with equal objectives (random masks, as only Swin could mask by attention). Last, the grid as in
SOHO: with a dictionary, and MVM instead of MFR."""
TABLE_5 = ("grid-none", "deep-none", "swin-none", "swin-random", "swin-attention")


class FamilyRun(NamedTuple):
    """One arm with one seed.

    Attributes
    ----------
    folder : Path
        The run of `01_pretrain`.
    score : Interval
        VQA on the scenes, over questions.
    steps : tuple of int
        Of pre-training and of fine-tuning.
    tokens : tuple of float
        Mean numbers of visual tokens and of words.
    costs : dict
        `budget.Budget`, and how well the visual side recognised colours and shapes of held-out scenes when it started:
        at tokens of objects, or in the boxes of regions.
    learnt : dict
        Held-out accuracies after pre-training: ITM (`itm_accuracy`, chance 0.5), masked colour and shape words with
        their image (`mlm_with_image`) and with another one (`mlm_other_image`). `text_only` is the VQA score of
        logistic regression on the questions. Empty in a demonstration.
    """

    arm: str
    seed: int
    folder: Path
    probed: Probed
    score: Interval
    steps: tuple[int, int]
    tokens: tuple[float, float]
    costs: dict[str, Any]
    learnt: dict[str, float]

    @property
    def flow(self) -> np.ndarray:
        """Flow from the input to the last layer, (example,)."""
        return self.probed.from_input[:, -1]

    @property
    def null(self) -> np.ndarray:
        """The same under uniform attention."""
        return self.probed.null_from_input[:, -1]


@dataclass(frozen=True)
class Compared:
    """Runs side by side; a dict has one entry for each arm with runs, by the label with its number of tokens.

    Attributes
    ----------
    demonstration : bool
        The runs have too few steps to be a result. The text of the intervals says so.
    """

    runs: tuple[FamilyRun, ...]
    demonstration: bool = False

    def runs_of(self, arm: str) -> list[FamilyRun]:
        """One run for each seed."""
        return [run for run in self.runs if run.arm == arm]

    def names(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, str]:
        """Each arm that has runs -> its label with its number of tokens."""
        found = {arm: runs[0] for arm in arms if (runs := self.runs_of(arm))}
        return {arm: f"{ARMS[arm].label} ({run.tokens[0]:.3g} tokens)" for arm, run in found.items()}

    def over(self, arms: Sequence[str] = FAMILY_ARMS) -> str:
        """Numbers of seeds and images that the intervals of these arms are over."""
        images = f"{len(self.runs[0].probed.examples)} images"
        if self.demonstration:
            return f"{images} ({self.runs[0].steps[0]} steps: a DEMONSTRATION)"
        counts = sorted({len(self.runs_of(arm)) for arm in self.names(arms)})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        return f"{seeds} seed{'s' * (counts[-1] > 1)} and {images}"

    @property
    def folders(self) -> list[Path]:
        """One run of `01_pretrain` for each arm."""
        return list({run.arm: run.folder for run in reversed(self.runs)}.values())

    @property
    def text_only(self) -> float | None:
        """Mean VQA score of a model of the questions only; None in a demonstration."""
        return None if self.demonstration else float(np.mean([run.learnt["text_only"] for run in self.runs]))

    def costs(self) -> pd.DataFrame:
        """One row for each arm: its mean number of visual tokens, and `FamilyRun.costs`."""
        first = {ARMS[arm].label: self.runs_of(arm)[0] for arm in self.names(tuple(ARMS))}
        rows = {label: {"tokens": run.tokens[0], **run.costs} for label, run in first.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def learnt(self) -> pd.DataFrame:
        """One row for each run: `FamilyRun.learnt`, flow from the input to the last layer with its null, and VQA."""
        rows = {
            (ARMS[run.arm].label, run.seed): run.learnt
            | {"flow": run.flow.mean(), "null": run.null.mean(), "vqa": float(run.score.mean)}
            for run in self.runs
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index=["arm", "seed"])

    def curves(self, quantity: str) -> dict[str, Interval]:
        """A property of `Probed` by layer for each family, such as `from_input` (Fig. 3) or `nmi` (Fig. 5)."""
        return self._by_name(lambda runs: over_seeds([getattr(run.probed, quantity) for run in runs]), FAMILY_ARMS)

    def nulls(self, quantity: str) -> dict[str, np.ndarray]:
        """Means of `null_from_input` or `null_within_layer`, (layer,)."""
        return {name: curve.mean for name, curve in self.curves(quantity).items()}

    def last_nulls(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, float]:
        """Flow from the input to the last layer under uniform attention."""
        return self._by_name(lambda runs: float(np.mean([run.null.mean() for run in runs])), arms)

    def scores(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, tuple[Interval, Interval]]:
        """Flow from the input to the last layer, and the VQA score."""
        return self._by_name(lambda runs: (over_seeds([run.flow for run in runs]), _score(runs)), arms)

    def single_scores(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, list[tuple[float, float]]]:
        """The same for each seed."""
        return self._by_name(lambda runs: [(run.flow.mean(), float(run.score.mean)) for run in runs], arms)

    def table_5(self) -> pd.DataFrame:
        """The paper's Table 5 at this size: cost of an arm, F^{1,L} with its null, and VQA."""
        rows = {}
        nulls, scores = self.last_nulls(TABLE_5), self.scores(TABLE_5)
        for arm, name in self.names(TABLE_5).items():
            runs = self.runs_of(arm)
            rows[ARMS[arm].label] = {
                "visual parameters": runs[0].costs["visual_parameters"],
                "visual multiply-adds": runs[0].costs["visual_multiply_adds"],
                "tokens": runs[0].tokens[0],
                **flatten({"flow": scores[name][0]}),
                "null": nulls[name],
                **flatten({"vqa": scores[name][1]}),
                "seeds": len(runs),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    def _by_name(self, measure: Callable[[list[FamilyRun]], Any], arms: Sequence[str]) -> dict[str, Any]:
        return {name: measure(self.runs_of(arm)) for arm, name in self.names(arms).items()}


def _score(runs: Sequence[FamilyRun]) -> Interval:
    """Interval over seeds and questions; the variance over questions comes from each run's own interval."""
    variance = np.mean([((run.score.high - run.score.low) / 3.92) ** 2 for run in runs])
    return seeds_and_samples_interval(np.array([float(run.score.mean) for run in runs]), variance)


# ------------------------------------------------------------------------------------------------ the runs to make


def calls(settings: FamilyRunsSettings) -> list[str]:
    """The commands that make the runs, in order. Each continues where it was stopped."""
    root, prefix = runs_root(), settings.prefix
    regions, deep = root / "regions" / prefix, root / "09_visual_init" / f"{prefix}-deep"
    taught = {"visual": "grid", "images": 0, "epochs": DEEPER_PASSES, "checkpoint_every": 200, "overrides": DEEPER}
    lines = [
        ["vpw", "regions", "scenes", str(regions), "--epochs", str(PASSES)],
        _call("09_visual_init", deep.name, **taught),
    ]
    length = {"steps": settings.length, "checkpoint_every": 200}
    for seed in range(settings.seeds):
        for key, arm in ARMS.items():
            name = f"{prefix}-{key}-{seed}"
            trained = {"visual": arm.visual, "masking": arm.masking, "seed": seed, **length, "overrides": arm.overrides}
            if arm.start:
                start = deep.with_name(f"{prefix}-{arm.start}")
                trained["init_visual"] = str(start / "checkpoint" / "visual.safetensors")
            if not FAMILIES[arm.visual].pixels:
                trained["regions"] = str(regions)
            lines.append(_call("01_pretrain", name, **trained))
            lines.append(_call("02_probe", name, checkpoint=name, images=PROBED))
            lines.append(_call("04_finetune", name, task="vqa", checkpoint=name, seed=seed, **length))
    return [shlex.join(line) for line in lines]


def _call(notebook: str, name: str, **parameters: Any) -> list[str]:
    given = {key: value for key, value in parameters.items() if value != {}}
    pairs = [("-p", key, json.dumps(value) if isinstance(value, dict) else str(value)) for key, value in given.items()]
    return ["vpw", "run", notebook, "--name", name, *(part for pair in pairs for part in pair)]


# ------------------------------------------------------------------------------------------------- the runs found


def compared(settings: FamilyRunsSettings, run: Run) -> Compared:
    """The finished runs of `calls`; without any, a demonstration of a few steps in the run's folder.

    A `SettingsError` says why runs cannot be compared: other pictures, other numbers of steps, no family among them.
    """
    root = Path(settings.runs).expanduser() if settings.runs else runs_root()
    runs, prefix = found_runs(settings.prefix, root), settings.prefix
    if settings.runs and not runs:
        raise SettingsError(
            f"runs: {root} holds no finished runs called {prefix}-ARM-SEED in 01_pretrain, 02_probe and 04_finetune; "
            "leave it empty for the runs of this workbench"
        )
    if not runs:
        return Compared(tuple(demonstrate(settings, run.folder / "demonstration", progress=run.progress)), True)
    if len({run.probed.examples for run in runs}) > 1:
        raise SettingsError(f"prefix {prefix!r}: its runs of 02_probe read different pictures; see `calls`")
    if len(lengths := {run.steps for run in runs}) > 1:
        steps = ", ".join(map(str, sorted(lengths)))
        raise SettingsError(f"prefix {prefix!r}: its runs have different numbers of steps ({steps}); see `calls`")
    if not {run.arm for run in runs} & set(FAMILY_ARMS):
        wanted = f"{prefix}-{FAMILY_ARMS[0]}-0"
        raise SettingsError(f"prefix {prefix!r}: it has runs of Table 5 only, none of a family such as {wanted}")
    return Compared(tuple(runs))


def found_runs(prefix: str, root: Path) -> list[FamilyRun]:
    """Arms and seeds that are pre-trained, probed and fine-tuned, from their summaries: no model is opened.

    `root` holds the folders of the notebooks.
    """
    runs = []
    for arm in ARMS:
        for folder in sorted((root / "02_probe").glob(f"{prefix}-{arm}-*")):
            seed = re.fullmatch(rf"{re.escape(prefix)}-{arm}-(\d+)", folder.name)
            places = [root / notebook / folder.name for notebook in ("01_pretrain", "02_probe", "04_finetune")]
            if seed and all((place / "summary.json").exists() for place in places):
                runs.append(_found_run(arm, int(seed[1]), *places, _recognised(root, prefix, ARMS[arm])))
    return runs


def _found_run(arm: str, seed: int, pretrained: Path, probed: Path, tuned: Path, recognised: dict) -> FamilyRun:
    learnt, counts, vqa = (read_json(place / "summary.json") for place in (pretrained, probed, tuned))
    score = Interval(*(np.array(vqa[f"vqa_score{part}"]) for part in ("", "_low", "_high")), np.array(0))
    text_only = vqa["baseline text only"]["vqa_score"]
    return FamilyRun(
        arm,
        seed,
        pretrained,
        Probed.load(probed / "probes.parquet"),
        score,
        steps=(_steps(pretrained), _steps(tuned)),
        tokens=(counts["visual_tokens"], counts["words"]),
        costs={name: learnt.get(name) for name in Budget._fields} | recognised,
        learnt={name: learnt[name] for name in LEARNT} | {"text_only": text_only},
    )


def _recognised(root: Path, prefix: str, arm: Arm) -> dict[str, float]:
    """Colours and shapes that the visual side recognises at its start, from the run that trained it."""
    if not FAMILIES[arm.visual].pixels:
        trained = root / "regions" / prefix
    elif arm.start:
        trained = root / "09_visual_init" / f"{prefix}-{arm.start}"
    else:
        trained = shipped_run().with_name(f"09_visual_init-tiny-{arm.visual}")
    if not (trained / "summary.json").exists():
        return {}
    summary = read_json(trained / "summary.json")
    return {f"taught_{name}": summary[f"{name}_accuracy"] for name in ("colour", "shape")}


def _steps(folder: Path) -> int:
    return int(read_json(folder / "config.json")["settings"]["train"]["steps"])


# ------------------------------------------------------------------------------------------------- demonstration


def demonstrate(
    settings: FamilyRunsSettings, folder: Path, *, progress: Callable[[str, int, int], None] | None = None
) -> list[FamilyRun]:
    """A few steps of each family, from scratch, on a few scenes: all stages of a run, but no result."""
    train = TrainSettings(epochs=1, images=32)
    region_settings = RegionSettings(scenes=FEW_SCENES, width=32, train=train, workers=0)
    make_regions(folder / "regions", region_settings, progress=False)
    runs = []
    for number, arm in enumerate(FAMILY_ARMS):
        runs.append(_short_run(settings, arm, folder))
        if progress:
            progress("demonstration", number + 1, len(FAMILY_ARMS))
    return runs


def _short_run(settings: FamilyRunsSettings, arm: str, folder: Path) -> FamilyRun:
    scenes = {f"scenes.{key}": getattr(FEW_SCENES, key) for key in ("images", "val", "test")}
    overrides = {"train.images": 8, **ARMS[arm].overrides, **{f"data.{key}": value for key, value in scenes.items()}}
    trained = pretrain_settings(
        visual=ARMS[arm].visual,
        masking=ARMS[arm].masking,
        init_visual="",
        steps=settings.steps,
        regions="" if FAMILIES[ARMS[arm].visual].pixels else str(folder / "regions"),
        overrides=overrides | {"data.workers": 0},
    )
    run, prepared = open_folder(folder / arm, "01_pretrain", trained), prepare(trained)
    pretrain(run, prepared, trained)
    held_out = prepared.splits["val"]
    probed = probe(prepared.model, held_out, images=settings.images)
    overrides = {"train.images": 8, **scenes, "workers": 0, "answer_count": 2}
    tuned = finetune_settings(checkpoint=str(run.folder), steps=settings.steps, overrides=overrides)
    task = prepare_task(tuned)
    finetune(open_folder(folder / f"{arm}-vqa", "04_finetune", tuned), task, tuned)
    return FamilyRun(
        arm,
        0,
        run.folder,
        probed,
        evaluate_task(task.model, task.splits["val"]).interval(),
        steps=(settings.steps, settings.steps),
        tokens=token_counts(load(str(run.folder)), [picture for picture in held_out if picture.captions]),
        costs=budget(prepared.model)._asdict(),
        learnt={},
    )
