"""Models side by side on the same pictures and captions: ours, and any of transformers by its own processor.

ViLT, VisualBERT and LXMERT are opened as their encoders, whatever head a checkpoint has: nothing else is probed. The
latter two take regions, which a detector found before (`data.regions`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out
from vpworkbench.model.budget import budget_of
from vpworkbench.probing import Probed, probe
from vpworkbench.settings import CompareSettings, DataSettings, ProbeSettings
from vpworkbench.stats import Interval, flatten
from vpworkbench.subjects import Subject

log = logging.getLogger(__name__)


def held_out(settings: CompareSettings | ProbeSettings, subject: Subject | None = None) -> list[Picture]:
    """The held-out pictures on which models are probed, each with a caption.

    Parameters
    ----------
    subject : Subject or None
        The one that is probed, where the settings name no set: its own is taken.
    """
    data = settings.data
    if isinstance(settings, ProbeSettings):
        own = subject.data if subject else DataSettings()
        data = own.model_copy(update={"sets": settings.data}) if settings.data else own
    return [picture for picture in load_held_out(data) if picture.captions][: settings.images]


def table(probed: dict[str, Probed], counts: dict[str, tuple[float, float]], *, seed: int = 0) -> pd.DataFrame:
    """One row for each model: its tokens, and at the last layer flow from the input, its null, excess and NMI.

    Means with bootstrap 95% bounds, as `flow`, `flow_low`, `flow_high` and so on.
    """
    rows = []
    for name, result in probed.items():
        spans = result.means(seed=seed).set_index(["quantity", "start", "stop"])
        layers, features = result.flow.shape[1], result.nmi.shape[1] - 1
        row: dict[str, Any] = {
            "model": name,
            "layers": layers,
            "visual_tokens": counts[name][0],
            "words": counts[name][1],
        }
        for quantity, span in (("flow", (1, layers)), ("null", (1, layers)), ("excess", (1, layers)),
                               ("nmi", (features, features))):  # fmt: skip
            row |= flatten({quantity: Interval(**spans.loc[(quantity, *span)])})
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def means(probed: dict[str, Probed], *, seed: int = 0) -> pd.DataFrame:
    """`Probed.means` of every model in one table, column `model` first."""
    return pd.concat({name: result.means(seed=seed) for name, result in probed.items()}, names=["model"]).reset_index(
        level="model"
    )


def budgets(subjects: Sequence[Any], pictures: Sequence[Any]) -> pd.DataFrame:
    """One row for each model under comparison , by its name."""
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
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Probed]:
    """Probe every model on the same pictures; by the models' names. A stopped call continues from `folder`."""
    return {
        subject.name: probe(
            subject, pictures, images=len(pictures), seed=seed, folder=folder / f"model-{number}", progress=progress
        )
        for number, subject in enumerate(subjects)
    }
