"""Probes of many pictures, batch by batch: saved, resumed, and averaged with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from vpworkbench.data.inputs import Progress
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out
from vpworkbench.model.model import evaluating
from vpworkbench.model.weights import digest
from vpworkbench.probes.flow import inter_modality_flow
from vpworkbench.probes.layers import hidden_states
from vpworkbench.probes.nmi import modality_nmi
from vpworkbench.settings.model import SpecialTokens
from vpworkbench.stats import bootstrap_interval
from vpworkbench.subjects import Loadable, Subject, load
from vpworkbench.system import draft

SPANS = ("flow", "null", "text_to_vision", "vision_to_text")
QUANTITIES = (*SPANS, "nmi")
PROBES_FILE = "probes.parquet"
_CONFIG, _UNCOUNTED = b"vpworkbench", b"vpworkbench uncounted"  # keys of a file's schema


@dataclass(frozen=True)
class Probed:
    """Probes of a set of examples, as float64 arrays.

    LXMERT attends twice in each layer, so its spans count half layers.
    """

    flow: np.ndarray  # F_inter^{i,j} (paper Eq. 5), (example, layer, layer); nan where j < i
    null: np.ndarray  # the same under uniform attention
    text_to_vision: np.ndarray  # this and the next are the two directions, which add up to `flow`
    vision_to_text: np.ndarray
    nmi: np.ndarray  # Fig. 5, (example, layer + 1), the embedding first; nan where it is undefined
    examples: tuple[str, ...]  # position and name of each picture
    config: Mapping[str, Any] | None = None  # what decided the numbers: model, count of images, special tokens, seed
    uncounted: tuple[str, ...] = ()  # layers that mix tokens without being counted, see `InterModalityFlow`

    @property
    def from_input(self) -> np.ndarray:
        """F^{1,j} (Fig. 3), (example, layer)."""
        return self.flow[:, 0]

    @property
    def within_layer(self) -> np.ndarray:
        """F^{i,i} (Fig. 4), (example, layer)."""
        return np.diagonal(self.flow, axis1=1, axis2=2)

    @property
    def null_from_input(self) -> np.ndarray:
        """F^{1,j} under uniform attention, (example, layer)."""
        return self.null[:, 0]

    @property
    def null_within_layer(self) -> np.ndarray:
        """F^{i,i} under uniform attention, (example, layer)."""
        return np.diagonal(self.null, axis1=1, axis2=2)

    def summary(self) -> dict[str, float]:
        """Means over the examples: F^{1,L} with its null, and NMI at the last layer."""
        last = {"flow_from_input": self.from_input, "null_from_input": self.null_from_input, "nmi": self.nmi}
        return {f"{name}_last_layer": float(np.nanmean(values[:, -1])) for name, values in last.items()}

    def means(self, *, seed: int = 0) -> pd.DataFrame:
        """Mean over the examples with a bootstrap 95% interval, one row for each quantity and span of layers.

        Columns `quantity` (flow, null, excess, text_to_vision, vision_to_text, nmi), `start` and `stop` (layers from
        1 as in the paper; for nmi both are the layer, and 0 is the embedding), `mean`, `low`, `high`, `count`.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = self.flow / self.null
        quantities = {name: getattr(self, name) for name in SPANS} | {"excess": excess, "nmi": self.nmi}
        tables = []
        for quantity, values in quantities.items():
            start, stop, cells = _spans(values)
            interval = bootstrap_interval(values, seed)._asdict()
            columns = {"start": start, "stop": stop} | {name: part[cells] for name, part in interval.items()}
            tables.append(pd.DataFrame({"quantity": quantity, **columns}))
        return pd.concat(tables, ignore_index=True)

    def table(self) -> pd.DataFrame:
        """Every number, one row each: `example`, `quantity`, `start`, `stop`, `value`; spans as in `means`."""
        tables = []
        for name in QUANTITIES:
            start, stop, cells = _spans(getattr(self, name))
            values = getattr(self, name)[:, *cells]  # example span
            columns = {"start": np.tile(start, len(values)), "stop": np.tile(stop, len(values))}
            columns = {"example": np.repeat(self.examples, len(start)), "quantity": name, **columns}
            tables.append(pd.DataFrame({**columns, "value": values.ravel()}))
        return pd.concat(tables, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write `table` and the config as parquet, completely or not at all."""
        table = pa.Table.from_pandas(self.table(), preserve_index=False)
        config = {_CONFIG: json.dumps(self.config, sort_keys=True, default=str).encode()}
        config[_UNCOUNTED] = json.dumps(self.uncounted).encode()
        with draft(Path(path), durable=False) as file:
            pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **config}), file)

    @classmethod
    def load(cls, path: str | Path) -> Probed:
        """Read what `save` wrote; ValueError for another file."""
        path = Path(path)
        try:
            read = pq.read_table(path)
            config = json.loads(read.schema.metadata[_CONFIG])
            uncounted = tuple(json.loads(read.schema.metadata.get(_UNCOUNTED, b"[]")))  # older files have none
            frame = read.to_pandas()
            parts = dict(list(frame.groupby("quantity")))
            layers = parts["flow"]["stop"].max()
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of probes ({error}); probe again") from None
        examples = tuple(frame["example"].unique())
        arrays = {name: np.full((len(examples), layers, layers), np.nan) for name in SPANS}
        arrays["nmi"] = np.empty((len(examples), parts["nmi"]["stop"].max() + 1))
        for name, array in arrays.items():
            array[:, *_spans(array)[2]] = parts[name]["value"].to_numpy().reshape(len(examples), -1)
        return cls(**arrays, examples=examples, config=config, uncounted=uncounted)


def _spans(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """First and last layer of each number of an example, as in `Probed.means`, and the indices of the number."""
    if values.ndim == 2:
        layers = np.arange(values.shape[1])
        return layers, layers, (layers,)
    cells = np.triu_indices(values.shape[1])
    return cells[0] + 1, cells[1] + 1, cells


@torch.no_grad()
def probe(
    subject: Loadable = "",
    pictures: Sequence[Picture] | None = None,
    *,
    images: int = 64,
    special_tokens: SpecialTokens = "language",
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Inter-Modality Flow and NMI of pictures, each with the first text that is true of it.

    `subject` is a model or its name, see `subjects.load`. Of `pictures`, by default held-out ones of the set that the
    model was trained on, at most `images` are probed. `folder` gets `probes.parquet`, and one part for each batch until
    that is complete. The same call again continues after the last part, or reads the complete file. A folder with
    probes of another config, of other pictures or, for a model in memory, of other weights is refused. Such a model is
    afterwards in the mode that it was in.
    """
    config = {"special_tokens": special_tokens, "seed": seed}
    if not isinstance(subject, nn.Module):
        return _probed(load(subject), pictures, images, config, folder, progress)
    if folder is not None:
        config["weights"] = digest(subject)
    with evaluating(subject):
        return _probed(load(subject), pictures, images, config, folder, progress)


def _probed(
    subject: Subject,
    pictures: Sequence[Picture] | None,
    images: int,
    config: dict[str, Any],
    folder: Path | None,
    progress: Progress | None,
) -> Probed:
    special_tokens, seed = config["special_tokens"], config["seed"]
    if pictures is None:
        pictures = load_held_out(subject.data, images=images)
    chosen = [picture for picture in pictures if picture.captions][:images]
    if not chosen:
        raise ValueError("none of the pictures has a caption: there is nothing to probe")
    names = tuple(f"{number}/{picture.id}" for number, picture in enumerate(chosen))
    config = {"model": subject.name, "images": len(chosen), **config}
    parts = [] if folder is None else _saved(folder, config, names)
    if folder is not None and (folder / PROBES_FILE).exists():
        return parts[0]
    starts = range(0, len(chosen), subject.batch)
    for number in range(len(parts), len(starts)):
        some = slice(starts[number], starts[number] + subject.batch)
        arrays, uncounted = _probe(subject, chosen[some], special_tokens, seed)
        parts.append(Probed(**arrays, examples=names[some], config=config, uncounted=uncounted))
        if folder is not None:
            parts[-1].save(folder / f"part-{number:06}.parquet")
        if progress:
            progress("probing", number + 1, len(starts))
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in QUANTITIES}
    probed = Probed(**joined, examples=names, config=config, uncounted=parts[0].uncounted)
    if folder is not None:
        probed.save(folder / PROBES_FILE)
        for file in folder.glob("part-*.parquet"):
            file.unlink()
    return probed


def _saved(folder: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> list[Probed]:
    """Probes that an earlier call saved: the complete file, or its parts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / PROBES_FILE] if (folder / PROBES_FILE).exists() else sorted(folder.glob("part-*.parquet"))
    parts = [Probed.load(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.config != config:
            raise ValueError(f"{file}: probes of another config ({part.config}, not {config}); take another folder")
        if part.examples != (own := names[: len(part.examples)]):
            other = next(pair for pair in zip(part.examples, own, strict=True) if pair[0] != pair[1])
            raise ValueError(f"{file}: probes of other pictures ({other[0]}, not {other[1]}); take another folder")
        names = names[len(own) :]
    return parts


def _probe(
    subject: Subject, pictures: Sequence[Picture], special_tokens: str, seed: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of `Probed` of one batch, and the layers that are not counted."""
    texts = [picture.captions[0] for picture in pictures]
    inputs = subject.prepare(pictures, texts, special_tokens=special_tokens)
    sets = {"vision": inputs.vision, "tokens": inputs.tokens, "language": inputs.language}
    model = subject.model.eval()
    flow = inter_modality_flow(model, inputs.forward, **sets)
    hidden = hidden_states(model, inputs.forward, tokens=inputs.tokens)
    found = {name: getattr(flow, name) for name in SPANS} | {"nmi": modality_nmi(hidden, **sets, seed=seed)}
    return {name: array.double().cpu().numpy() for name, array in found.items()}, flow.uncounted
