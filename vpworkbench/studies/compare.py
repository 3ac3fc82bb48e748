"""Models side by side on the same pictures and captions: ours, and any transformers model with its own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vpworkbench.data.inputs import Progress
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out
from vpworkbench.model.budget import budget_of
from vpworkbench.probing import Probed, probe
from vpworkbench.settings import CompareSettings, DataSettings, ProbeSettings
from vpworkbench.stats import Interval, flatten
from vpworkbench.subjects import Subject


def held_out(settings: CompareSettings | ProbeSettings, subject: Subject | None = None) -> list[Picture]:
    """Held-out pictures with captions, for probing: of the set in the settings, or else of the model's own set."""
    data = settings.data
    if isinstance(settings, ProbeSettings):
        own = subject.data if subject else DataSettings()
        data = own.model_copy(update={"sets": settings.data}) if settings.data else own
    return [picture for picture in load_held_out(data) if picture.captions][: settings.images]


def table(
    probed: dict[str, Probed], counts: dict[str, tuple[float, float]], effects: dict[str, Interval], *, seed: int = 0
) -> pd.DataFrame:
    """One row for each model: its tokens, and at the last layer flow from the input, its null, excess and NMI.

    Means with bootstrap 95% bounds, as `flow`, `flow_low`, `flow_high` and so on; `match_effect` from `effects`.
    """
    rows = {}
    for name, result in probed.items():
        spans = result.means(seed=seed).set_index(["quantity", "start", "stop"])
        last, features = result.flow.shape[1], result.nmi.shape[1] - 1
        found = {quantity: Interval(**spans.loc[quantity, 1, last]) for quantity in ("flow", "null", "excess")}
        found["nmi"] = Interval(**spans.loc["nmi", features, features])
        found["match_effect"] = effects[name]
        visual_tokens, words = counts[name]
        rows[name] = {"layers": last, "visual_tokens": visual_tokens, "words": words, **flatten(found)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def means(probed: dict[str, Probed], *, seed: int = 0) -> pd.DataFrame:
    """`Probed.means` of every model in one table, column `model` first."""
    tables = {name: result.means(seed=seed) for name, result in probed.items()}
    return pd.concat(tables, names=["model"]).reset_index(level="model")


def budgets(subjects: Sequence[Subject], pictures: Sequence[Picture]) -> pd.DataFrame:
    """Cost of each model for one picture and its caption (`model.budget.Budget`), by its name."""
    rows = {}
    for subject in subjects:
        inputs = subject.prepare(pictures[:1], [pictures[0].captions[0]])
        rows[subject.name] = budget_of(subject.model, inputs.forward, inputs.vision)._asdict()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def probe_all(
    subjects: Sequence[Subject],
    pictures: Sequence[Picture],
    *,
    seed: int = 0,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, Probed]:
    """Probe every model on the same pictures; by name of the model. A stopped call continues from `folder`."""
    options = {"images": len(pictures), "seed": seed, "progress": progress}
    return {
        subject.name: probe(subject, pictures, folder=folder / f"model-{number}", **options)
        for number, subject in enumerate(subjects)
    }
