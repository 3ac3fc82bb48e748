"""Visual families under equal conditions, and the arms of the paper's Table 5: which runs are compared, and by what.

Equal are fusion, text, objectives, data, steps, and the work by which each visual side was taught before: colours and
shapes of the same scenes (`weights.shipped_visual`). What is left to differ is how an image becomes visual tokens.
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
"""Held-out pictures of each run."""
LEARNT = ("itm_accuracy", "mlm_with_image", "mlm_other_image")  # in the summary of 01_pretrain
TEXT_ALONE = "baseline text only"  # in that of 04_finetune
FEW_SCENES = SceneSettings(images=64, val=32, test=4)  # of the demonstration


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes
    ----------
    label : str
        As figures and tables have it.
    visual, masking : str
        Parameters of `01_pretrain`.
    start : str
        The run of `09_visual_init` that it begins with, PREFIX-START; "" where it needs none: its weights ship, or its
        features are given.
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
"""Of the CNN behind the regions over the scenes, as of the Swin that ships."""
DEEPER_PASSES = 2
"""As the small CNN has, and so twice its work: after one pass the deeper tells 44% of the shapes."""
ARMS = {
    "swin-random": Arm("Swin, random MFR", "swin", "random"),
    "grid-random": Arm("grid CNN", "grid", "random"),
    "patch-random": Arm("patches", "patch", "random"),
    "regions-random": Arm("regions", "regions", "random"),
    "grid-code": Arm("grid CNN, codes (SOHO)", "grid", "code", overrides={"visual.dictionary": 2048}),
    "grid-none": Arm("small CNN (R50's place)", "grid", "none"),
    "deep-none": Arm("deeper CNN (R101's place)", "grid", "none", "deep", DEEPER),
    "swin-none": Arm("Swin, no MFR", "swin", "none"),
    "swin-attention": Arm("Swin, attention MFR", "swin", "attention"),
}
FAMILY_ARMS = ("swin-random", "grid-random", "patch-random", "regions-random", "grid-code")
"""The four families, alike in their objectives, as only Swin could mask by attention; last, the grid as SOHO has it,
with a dictionary and its objective, MVM in MFR's place."""
TABLE_5 = ("grid-none", "deep-none", "swin-none", "swin-random", "swin-attention")


class FamilyRun(NamedTuple):
    """One arm with one seed.

    Attributes
    ----------
    folder : Path
        Of its run of `01_pretrain`.
    score : Interval
        Of the scenes' VQA, over its questions.
    steps : tuple of int
        Of pre-training and of fine-tuning.
    tokens : tuple of float
        Visual tokens and words of an example, means.
    costs : dict
        `budget.Budget`, and how often the visual side told colours and shapes of held-out scenes right when it started,
        at tokens of objects (of regions: in their boxes).
    learnt : dict
        Held-out accuracies behind pre-training: ITM (`itm_accuracy`, chance 0.5), masked colour and shape words with
        their image (`mlm_with_image`) and with another (`mlm_other_image`); `text_alone`, the score of a model of the
        questions alone, scikit-learn's. Empty in a demonstration.
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


@dataclass(frozen=True)
class Compared:
    """What there is to be shown.

    Attributes
    ----------
    demonstration : bool
        Runs of so few steps are no result; what the intervals are over says so.
    """

    runs: tuple[FamilyRun, ...]
    demonstration: bool = False

    def of(self, arm: str) -> list[FamilyRun]:
        """Its seeds."""
        return [run for run in self.runs if run.arm == arm]

    def names(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, str]:
        """Of the arms that have runs, the label with its number of tokens."""
        return {arm: f"{ARMS[arm].label} ({found[0].tokens[0]:.3g} tokens)" for arm in arms if (found := self.of(arm))}

    def over(self, arms: Sequence[str] = FAMILY_ARMS) -> str:
        """What the intervals of these arms are over."""
        images = f"{len(self.runs[0].probed.examples)} images"
        if self.demonstration:
            return f"{images} ({self.runs[0].steps[0]} steps: a DEMONSTRATION)"
        counts = sorted({len(found) for arm in arms if (found := self.of(arm))})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        return f"{seeds} seed{'s' * (counts[-1] > 1)} and {images}"

    def costs(self) -> pd.DataFrame:
        """One row for each arm: its visual tokens in the mean, and `FamilyRun.costs`."""
        first = {ARMS[arm].label: self.of(arm)[0] for arm in ARMS if self.of(arm)}
        rows = {label: {"tokens": run.tokens[0], **run.costs} for label, run in first.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def learnt(self) -> pd.DataFrame:
        """One row for each run: `FamilyRun.learnt`, flow from the input to the last layer with its null, and VQA."""
        rows = {
            (ARMS[run.arm].label, run.seed): run.learnt
            | {"flow": run.probed.from_input[:, -1].mean(), "null": run.probed.null_from_input[:, -1].mean(),
               "vqa": float(run.score.mean)}
            for run in self.runs
        }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index=["arm", "seed"])

    @property
    def text_alone(self) -> float | None:
        """What questions alone reach in VQA; None in a demonstration."""
        told = [run.learnt["text_alone"] for run in self.runs if "text_alone" in run.learnt]
        return float(np.mean(told)) if told else None

    def curves(self, quantity: str) -> dict[str, Interval]:
        """Of each family, by layer: `from_input`, `within_layer` or a null of theirs (Fig. 3, 4), `nmi` (Fig. 5)."""
        return {
            name: over_seeds([getattr(run.probed, quantity) for run in self.of(arm)])
            for arm, name in self.names().items()
        }

    def nulls(self, quantity: str) -> dict[str, np.ndarray]:
        """Means of `null_from_input` or `null_within_layer`, (layer,)."""
        return {name: curve.mean for name, curve in self.curves(quantity).items()}

    def last_nulls(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, float]:
        """Flow from the input to the last layer under uniform attention."""
        return {
            name: float(np.mean([run.probed.null_from_input[:, -1].mean() for run in self.of(arm)]))
            for arm, name in self.names(arms).items()
        }

    @property
    def folders(self) -> list[Path]:
        """One run of `01_pretrain` of each arm."""
        return list({run.arm: run.folder for run in reversed(self.runs)}.values())

    def scores(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, tuple[Interval, Interval]]:
        """Flow from the input to the last layer, and the score downstream."""
        return {
            name: (over_seeds([run.probed.from_input[:, -1] for run in self.of(arm)]), _score(self.of(arm)))
            for arm, name in self.names(arms).items()
        }

    def single_scores(self, arms: Sequence[str] = FAMILY_ARMS) -> dict[str, list[tuple[float, float]]]:
        """The same of each seed."""
        return {
            name: [(run.probed.from_input[:, -1].mean(), float(run.score.mean)) for run in self.of(arm)]
            for arm, name in self.names(arms).items()
        }

    def table_5(self) -> pd.DataFrame:
        """The paper's Table 5 at this size: what an arm costs, F^{1,L} with its null, and VQA."""
        rows = []
        nulls, scores = self.last_nulls(TABLE_5), self.scores(TABLE_5)
        for arm, name in self.names(TABLE_5).items():
            flow, score = scores[name]
            rows.append(
                {"arm": ARMS[arm].label, "visual parameters": self.of(arm)[0].costs["visual_parameters"],
                 "visual multiply-adds": self.of(arm)[0].costs["visual_multiply_adds"],
                 "tokens": self.of(arm)[0].tokens[0], **flatten({"flow": flow}), "null": nulls[name],
                 **flatten({"vqa": score}), "seeds": len(self.of(arm))}
            )  # fmt: skip
        return pd.DataFrame(rows).set_index("arm") if rows else pd.DataFrame()


def _score(runs: Sequence[FamilyRun]) -> Interval:
    """As `over_seeds`; the variance over questions is read off each run's own interval."""
    own = np.mean([((run.score.high - run.score.low) / 3.92) ** 2 for run in runs])
    return seeds_and_samples_interval(np.array([float(run.score.mean) for run in runs]), own)


# --------------------------------------------------------------------------------------------------------- runs


def calls(settings: FamilyRunsSettings) -> list[str]:
    """The commands that make the runs, in their order; each goes on where it was stopped."""
    root, prefix = runs_root(), settings.prefix
    length = {"steps": settings.length, "checkpoint_every": 200}
    regions = root / "regions" / prefix
    lines = [["vpw", "regions", "scenes", str(regions), "--epochs", str(PASSES)]]
    lines.append(_call("09_visual_init", f"{prefix}-deep", visual="grid", images=0, epochs=DEEPER_PASSES,
                       checkpoint_every=200, overrides=DEEPER))  # fmt: skip
    for seed in range(settings.seeds):
        for key, arm in ARMS.items():
            name = f"{prefix}-{key}-{seed}"
            more: dict[str, Any] = {"overrides": arm.overrides}
            if arm.start:
                file = root / "09_visual_init" / f"{prefix}-{arm.start}" / "checkpoint" / "visual.safetensors"
                more["init_visual"] = str(file)
            if not FAMILIES[arm.visual].pixels:
                more["regions"] = str(regions)
            lines.append(_call("01_pretrain", name, visual=arm.visual, masking=arm.masking, seed=seed, **length,
                               **more))  # fmt: skip
            lines.append(_call("02_probe", name, checkpoint=name, images=PROBED))
            lines.append(_call("04_finetune", name, task="vqa", checkpoint=name, seed=seed, **length))
    return [shlex.join(line) for line in lines]


def _call(notebook: str, name: str, **parameters: Any) -> list[str]:
    given = {key: value for key, value in parameters.items() if value != {}}
    pairs = [("-p", key, json.dumps(value) if isinstance(value, dict) else str(value)) for key, value in given.items()]
    return ["vpw", "run", notebook, "--name", name, *(part for pair in pairs for part in pair)]


def compared(settings: FamilyRunsSettings, run: Run) -> Compared:
    """The finished runs of `calls`; where there is none, a demonstration of a few steps in the run's folder.

    Raises
    ------
    SettingsError
        For runs that were probed on different pictures, or trained for different lengths; for a folder given that has
        none.
    """
    root = Path(settings.runs).expanduser() if settings.runs else runs_root()
    runs = found_runs(settings.prefix, root)
    if settings.runs and not runs:
        raise SettingsError(
            f"runs: {root} holds no finished runs called {settings.prefix}-ARM-SEED, in folders 01_pretrain, 02_probe "
            "and 04_finetune; leave it empty for those of this workbench"
        )
    if len({run.probed.examples for run in runs}) > 1:
        raise SettingsError(f"prefix {settings.prefix!r}: its runs of 02_probe read different pictures; see `calls`")
    if len(lengths := {run.steps for run in runs}) > 1:
        raise SettingsError(
            f"prefix {settings.prefix!r}: its runs were pre-trained and fine-tuned for different numbers of steps "
            f"({', '.join(map(str, sorted(lengths)))}); see `calls`"
        )
    if runs and not {one.arm for one in runs} & set(FAMILY_ARMS):
        raise SettingsError(
            f"prefix {settings.prefix!r}: its finished runs are of Table 5's arms alone, none is of a family, as "
            f"{settings.prefix}-{FAMILY_ARMS[0]}-0 would be; see `calls`"
        )
    if runs:
        return Compared(tuple(runs))
    return Compared(tuple(demonstrate(settings, run.folder / "demonstration", progress=run.progress)), True)


def found_runs(prefix: str, root: Path) -> list[FamilyRun]:
    """Arms and seeds that are pre-trained, probed and fine-tuned to the end; of summaries, no model is opened.

    `root` holds the folders of the notebooks.
    """
    runs = []
    for arm in ARMS:
        for folder in sorted((root / "02_probe").glob(f"{prefix}-{arm}-*")):
            seed = re.fullmatch(rf"{re.escape(prefix)}-{arm}-(\d+)", folder.name)
            places = [root / notebook / folder.name for notebook in ("01_pretrain", "02_probe", "04_finetune")]
            if seed and all((place / "summary.json").exists() for place in places):
                trained = _summary(places[0], *LEARNT)
                probed = _summary(places[1], "visual_tokens", "words")
                tuned = _summary(places[2], TEXT_ALONE)
                score = Interval(*(np.array(tuned[f"vqa_score{part}"]) for part in ("", "_low", "_high")), np.array(0))
                costs = {name: trained.get(name) for name in Budget._fields} | _taught(root, prefix, ARMS[arm])
                learnt = {name: trained[name] for name in LEARNT} | {"text_alone": tuned[TEXT_ALONE]["vqa_score"]}
                runs.append(
                    FamilyRun(arm, int(seed[1]), places[0], Probed.load(folder / "probes.parquet"), score,
                              (_steps(places[0]), _steps(places[2])), (probed["visual_tokens"], probed["words"]), costs,
                              learnt)
                )  # fmt: skip
    return runs


def _summary(place: Path, *names: str) -> dict[str, Any]:
    """What a run has told of itself; these names of all."""
    summary = read_json(place / "summary.json")
    if missing := [name for name in names if name not in summary]:
        raise SettingsError(
            f"{place}: of an earlier version, without {missing[0]!r} in its summary.json; remove it and run it again"
        )
    return summary


def _taught(root: Path, prefix: str, arm: Arm) -> dict[str, float]:
    """What the run of `09_visual_init`, or of `vpw regions`, says that the visual side begins with."""
    made = root / "09_visual_init" / f"{prefix}-{arm.start}"
    if not arm.start:
        made = shipped_run().with_name(f"09_visual_init-tiny-{arm.visual}")
    if not FAMILIES[arm.visual].pixels:
        made = root / "regions" / prefix
    if not (made / "summary.json").exists():
        return {}
    summary = read_json(made / "summary.json")
    return {f"taught_{name}": summary[f"{name}_accuracy"] for name in ("colour", "shape")}


def _steps(folder: Path) -> int:
    return int(read_json(folder / "config.json")["settings"]["train"]["steps"])


def demonstrate(
    settings: FamilyRunsSettings, folder: Path, *, progress: Callable[[str, int, int], None] | None = None
) -> list[FamilyRun]:
    """A few steps of each family, from scratch, on a few scenes: the whole way, and no result."""
    make_regions(
        folder / "regions",
        RegionSettings(scenes=FEW_SCENES, width=32, train=TrainSettings(epochs=1, images=32), workers=0),
        progress=False,
    )
    scenes = {f"scenes.{key}": getattr(FEW_SCENES, key) for key in ("images", "val", "test")}
    short = {"train.images": 8}
    runs = []
    for number, arm in enumerate(FAMILY_ARMS):
        settings_of = pretrain_settings(
            visual=ARMS[arm].visual, masking=ARMS[arm].masking, init_visual="", steps=settings.steps,
            regions="" if FAMILIES[ARMS[arm].visual].pixels else str(folder / "regions"),
            overrides=short | ARMS[arm].overrides | {f"data.{key}": value for key, value in scenes.items()}
            | {"data.workers": 0},
        )  # fmt: skip
        run = open_folder(folder / arm, "01_pretrain", settings_of)
        prepared = prepare(settings_of)
        pretrain(run, prepared, settings_of)
        probed = probe(prepared.model, prepared.splits["val"], images=settings.images)
        task = finetune_settings(
            checkpoint=str(run.folder), steps=settings.steps,
            overrides=short | scenes | {"workers": 0, "answer_count": 2},
        )  # fmt: skip
        asked = prepare_task(task)
        finetune(open_folder(folder / f"{arm}-vqa", "04_finetune", task), asked, task)
        score = evaluate_task(asked.model, asked.splits["val"]).interval()
        subject = load(str(run.folder))
        tokens = token_counts(subject, [picture for picture in prepared.splits["val"] if picture.captions])
        runs.append(FamilyRun(arm, 0, run.folder, probed, score, (settings.steps, settings.steps), tokens,
                              budget(prepared.model)._asdict(), {}))  # fmt: skip
        if progress:
            progress("demonstration", number + 1, len(FAMILY_ARMS))
    return runs
