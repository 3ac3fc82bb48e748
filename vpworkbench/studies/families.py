"""Visual families under equal conditions, and the arms of the paper's Table 5: the runs, and tables of them.

Fusion, text, objectives, data and steps are equal. So is the work that taught each visual side colours and shapes of
the same scenes before (`train.scene_labels`). Only the way from an image to visual tokens differs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vpworkbench.errors import SettingsError
from vpworkbench.model.budget import Budget
from vpworkbench.probing import Probed
from vpworkbench.runs import read_json, runs_root, saved_settings, shipped_run
from vpworkbench.settings import FamilyRunsSettings
from vpworkbench.settings.base import known
from vpworkbench.settings.families import FAMILIES
from vpworkbench.settings.notebooks import Arm
from vpworkbench.settings.presets import SYSTEMS
from vpworkbench.stats import Interval, flatten, over_seeds, seeds_and_samples_interval

PROBED = 128
"""Held-out pictures probed in each run."""
LEARNT = ("itm_accuracy", "mlm_with_image", "mlm_other_image")  # in the summary of 01_pretrain
DEEPER = {"visual.backbone": "resnet18"}  # twice the blocks of tiny's resnet10t, of the same kind: R101 beside R50
PASSES = 8
"""Epochs over the scenes for the CNN that makes region features; the shipped Swin had as many."""
DEEPER_PASSES = 2
"""As many epochs as the small CNN, so twice its FLOPs: after one epoch the deeper CNN recognises 44% of the shapes."""


def _arm(label: str, visual: str, masking: str = "", **options: Any) -> Arm:
    return Arm(label=label, visual=visual, masking=masking, **options)


ARMS = {
    "swin-random": _arm("Swin, random MFR", "swin", "random"),
    "grid-random": _arm("grid CNN", "grid", "random"),
    "patch-random": _arm("patches", "patch", "random", overrides={"visual.frozen": False, "optim.lr_visual": 2e-4}),
    "regions-random": _arm("regions", "regions", "random"),
    "grid-code": _arm(
        "grid CNN, codes (SOHO)", "grid", "code", overrides={"visual.dictionary": 2048, "optim.lr_visual": 1e-5}
    ),
    "grid-none": _arm("small CNN (instead of R50)", "grid", "none"),
    "deep-none": _arm("deeper CNN (instead of R101)", "grid", "none", start="deep", overrides=DEEPER),
    "swin-none": _arm("Swin, no MFR", "swin", "none"),
    "swin-attention": _arm("Swin, attention MFR", "swin", "attention"),
}
"""The arms of this notebook. Visual sides are frozen but for two, whose rate was chosen (docs/results.md)."""
OTHER_ARMS = {
    name: _arm(label, "regions", system=name)
    for name, label in zip(SYSTEMS, ("ViLBERT", "VL-BERT", "Unicoder-VL", "Unified VLP"), strict=True)
}
"""Further arms that `arms` may name: the systems that have a preset, with regions as in their papers."""
FAMILY_ARMS = ("swin-random", "grid-random", "patch-random", "regions-random", "grid-code")
"""The four families with equal objectives (random masks, as only Swin could mask by attention). Last, the grid as in
SOHO: with a dictionary, and MVM instead of MFR."""
TABLE_5 = ("grid-none", "deep-none", "swin-none", "swin-random", "swin-attention")


def arms_of(settings: FamilyRunsSettings) -> dict[str, Arm]:
    """The arms of a comparison by name: those that `arms` lists, else `ARMS`."""
    named, chosen = ARMS | OTHER_ARMS, {}
    for one in settings.arms:
        if isinstance(one, Arm):
            chosen[re.sub(r"[^\w.]+", "-", one.label)] = one  # in the names of its runs
        else:
            chosen[one] = named[known(one, named, "arms: no arm")]
    return chosen or ARMS


class FamilyRun(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path  # the run of 01_pretrain
    probed: Probed
    score: Interval  # VQA on the scenes, over questions
    steps: tuple[int, int]  # of pre-training and of fine-tuning
    tokens: tuple[float, float]  # mean numbers of visual tokens and of words
    # `budget.Budget`, and how well the visual side recognised colours and shapes of held-out scenes when it started: at
    # tokens of objects, or in the boxes of regions.
    costs: dict[str, Any]
    # Held-out accuracies after pre-training: ITM (`itm_accuracy`, chance 0.5), masked colour and shape words with their
    # image (`mlm_with_image`) and with another one (`mlm_other_image`). `text_only` is the VQA score of logistic
    # regression on the questions.
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
    """Runs side by side; a dict has one entry for each arm with runs, by the label with its number of tokens."""

    runs: tuple[FamilyRun, ...]
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    families: Sequence[str] = FAMILY_ARMS  # the arms that are shown where none are named

    def runs_of(self, arm: str) -> list[FamilyRun]:
        """One run for each seed."""
        return [run for run in self.runs if run.arm == arm]

    def names(self, arms: Sequence[str] = ()) -> dict[str, str]:
        """Each arm that has runs -> its label with its number of tokens; by default of the `families`."""
        tokens = {run.arm: run.tokens[0] for run in reversed(self.runs)}
        shown = [arm for arm in arms or self.families if arm in tokens]
        return {arm: f"{self.arms[arm].label} ({tokens[arm]:.3g} tokens)" for arm in shown}

    def over(self, arms: Sequence[str] = ()) -> str:
        """Numbers of seeds and images that the intervals of these arms are over."""
        images = f"{len(self.runs[0].probed.examples)} images"
        counts = sorted({len(self.runs_of(arm)) for arm in self.names(arms)})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        return f"{seeds} seed{'s' * (counts[-1] > 1)} and {images}"

    @property
    def folders(self) -> list[Path]:
        """One run of `01_pretrain` for each arm."""
        return list({run.arm: run.folder for run in reversed(self.runs)}.values())

    @property
    def text_only(self) -> float:
        """Mean VQA score of a model of the questions only."""
        return float(np.mean([run.learnt["text_only"] for run in self.runs]))

    def costs(self) -> pd.DataFrame:
        """One row for each arm: its mean number of visual tokens, and `FamilyRun.costs`."""
        first = {self.arms[arm].label: self.runs_of(arm)[0] for arm in self.names(tuple(self.arms))}
        rows = {label: {"tokens": run.tokens[0], **run.costs} for label, run in first.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def learnt(self) -> pd.DataFrame:
        """One row for each run: `FamilyRun.learnt`, flow from the input to the last layer with its null, and VQA."""
        rows = {
            (self.arms[run.arm].label, run.seed): run.learnt
            | {"flow": run.flow.mean(), "null": run.null.mean(), "vqa": float(run.score.mean)}
            for run in self.runs
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index=["arm", "seed"])

    def curves(self, quantity: str) -> dict[str, Interval]:
        """A property of `Probed` by layer for each family, such as `from_input` (Fig. 3) or `nmi` (Fig. 5)."""
        return self._by_name(lambda runs: over_seeds([getattr(run.probed, quantity) for run in runs]), ())

    def nulls(self, quantity: str) -> dict[str, np.ndarray]:
        """Means of `null_from_input` or `null_within_layer`, (layer,)."""
        return {name: curve.mean for name, curve in self.curves(quantity).items()}

    def last_nulls(self, arms: Sequence[str] = ()) -> dict[str, float]:
        """Flow from the input to the last layer under uniform attention."""
        return self._by_name(lambda runs: float(np.mean([run.null.mean() for run in runs])), arms)

    def scores(self, arms: Sequence[str] = ()) -> dict[str, tuple[Interval, Interval]]:
        """Flow from the input to the last layer, and the VQA score."""
        return self._by_name(lambda runs: (over_seeds([run.flow for run in runs]), _score(runs)), arms)

    def single_scores(self, arms: Sequence[str] = ()) -> dict[str, list[tuple[float, float]]]:
        """The same for each seed."""
        return self._by_name(lambda runs: [(run.flow.mean(), float(run.score.mean)) for run in runs], arms)

    def table_5(self) -> pd.DataFrame:
        """The paper's Table 5 at this size: cost of an arm, F^{1,L} with its null, and VQA."""
        rows, nulls, scores = {}, self.last_nulls(TABLE_5), self.scores(TABLE_5)
        for arm, name in self.names(TABLE_5).items():
            runs, (flow, score) = self.runs_of(arm), scores[name]
            rows[self.arms[arm].label] = {
                "visual parameters": runs[0].costs["visual_parameters"],
                "visual multiply-adds": runs[0].costs["visual_multiply_adds"],
                "tokens": runs[0].tokens[0],
                **flatten({"flow": flow}),
                "null": nulls[name],
                **flatten({"vqa": score}),
                "seeds": len(runs),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    def _by_name(self, measure: Callable[[list[FamilyRun]], Any], arms: Sequence[str]) -> dict[str, Any]:
        return {name: measure(self.runs_of(arm)) for arm, name in self.names(arms).items()}


def _score(runs: Sequence[FamilyRun]) -> Interval:
    """Interval over seeds and questions; the variance over questions comes from each run's own interval."""
    variance = np.mean([((run.score.high - run.score.low) / 3.92) ** 2 for run in runs])
    return seeds_and_samples_interval(np.array([float(run.score.mean) for run in runs]), variance)


def calls(settings: FamilyRunsSettings) -> list[str]:
    """The commands that make the runs, in order. Each continues where it was stopped."""
    root, prefix = runs_root(), settings.prefix
    regions, deep = root / "regions" / prefix, root / "09_visual_init" / f"{prefix}-deep"
    taught = {"visual": "grid", "images": 0, "epochs": DEEPER_PASSES, "checkpoint_every": 200, "overrides": DEEPER}
    arms, lines = arms_of(settings), []
    if not all(FAMILIES[arm.visual].pixels for arm in arms.values()):
        lines.append(["vpw", "regions", "scenes", str(regions), "--epochs", str(PASSES)])
    if any(arm.start for arm in arms.values()):
        lines.append(_call("09_visual_init", deep.name, **taught))
    length = {"steps": settings.length, "checkpoint_every": 200}
    for seed in range(settings.seeds):
        for key, arm in arms.items():
            name = f"{prefix}-{key}-{seed}"
            trained = {"visual": arm.visual, "masking": arm.masking, "system": arm.system, "seed": seed, **length}
            trained["overrides"] = arm.overrides
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
    words = ["vpw", "run", notebook, "--name", name]
    for key, value in parameters.items():
        if value not in ({}, ""):
            words += ["-p", key, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def compared(settings: FamilyRunsSettings) -> Compared:
    """The finished runs of `calls`; where there are none yet, those that ship with the repository.

    A `SettingsError` says why runs cannot be compared: other pictures, other numbers of steps, no family among them.
    """
    root, prefix = Path(settings.runs).expanduser() if settings.runs else runs_root(), settings.prefix
    arms, families = arms_of(settings), tuple(arms_of(settings)) if settings.arms else FAMILY_ARMS
    runs = found_runs(prefix, root, arms)
    if settings.runs and not runs:
        raise SettingsError(
            f"runs: {root} holds no finished runs called {prefix}-ARM-SEED in 01_pretrain, 02_probe and 04_finetune; "
            "leave it empty for the runs of this workbench"
        )
    runs = runs or found_runs("families", shipped_run().with_name("08_families-tiny") / "runs", arms)
    if not runs:
        raise SettingsError(f"prefix {prefix!r}: there are no finished runs of {', '.join(arms)} yet; see `calls`")
    if len({run.probed.examples for run in runs}) > 1:
        raise SettingsError(f"prefix {prefix!r}: its runs of 02_probe read different pictures; see `calls`")
    if len(steps := {run.steps for run in runs}) > 1:
        raise SettingsError(f"prefix {prefix!r}: its runs have different steps, {sorted(steps)}; see `calls`")
    if not {run.arm for run in runs} & set(families):
        wanted = f"{prefix}-{families[0]}-0"
        raise SettingsError(f"prefix {prefix!r}: it has runs of Table 5 only, none of a family such as {wanted}")
    return Compared(tuple(runs), arms, families)


def found_runs(prefix: str, root: Path, arms: Mapping[str, Arm] = ARMS) -> list[FamilyRun]:
    """Arms and seeds that are pre-trained, probed and fine-tuned, from their summaries: no model is opened.

    `root` holds the folders of the notebooks.
    """
    runs = []
    for arm in arms:
        for folder in sorted((root / "02_probe").glob(f"{prefix}-{arm}-*")):
            seed = folder.name.removeprefix(f"{prefix}-{arm}-")
            places = [root / notebook / folder.name for notebook in ("01_pretrain", "02_probe", "04_finetune")]
            if seed.isdigit() and all((place / "summary.json").exists() for place in places):
                runs.append(_found_run(arm, int(seed), *places, _recognised(root, prefix, arms[arm])))
    return runs


def _found_run(arm: str, seed: int, pretrained: Path, probed: Path, tuned: Path, recognised: dict) -> FamilyRun:
    learnt, counts, vqa = (read_json(place / "summary.json") for place in (pretrained, probed, tuned))
    trained = [saved_settings(place)["train"] for place in (pretrained, tuned)]
    return FamilyRun(
        arm,
        seed,
        pretrained,
        Probed.load(probed / "probes.parquet"),
        Interval(*(np.array(vqa[f"vqa_score{part}"]) for part in ("", "_low", "_high")), np.array(0)),
        steps=tuple(int(one["steps"]) for one in trained),
        tokens=(counts["visual_tokens"], counts["words"]),
        costs={name: learnt.get(name) for name in Budget._fields} | recognised,
        learnt={name: learnt[name] for name in LEARNT} | {"text_only": vqa["baseline text only"]["vqa_score"]},
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
