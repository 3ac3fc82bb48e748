"""Probes of many examples, batch by batch: saved, resumed, merged, and averaged with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from vpworkbench.data.records import Picture
from vpworkbench.data.splits import load_held_out
from vpworkbench.probes.flow import inter_modality_flow
from vpworkbench.probes.layers import LayerNames, hidden_states
from vpworkbench.probes.nmi import modality_nmi
from vpworkbench.stats import bootstrap_interval
from vpworkbench.subjects import Loadable, load
from vpworkbench.system import draft

SPANS = ("flow", "null", "text_to_vision", "vision_to_text")
_CONFIG = b"vpworkbench"  # key of the config in a file's schema


class ProbeInputs(Protocol):
    """A batch: keyword arguments of the model's forward; visual, real and language tokens as bool (example, token)."""

    forward: Mapping[str, Any]
    vision: Tensor
    tokens: Tensor
    language: Tensor


@dataclass(frozen=True)
class Probed:
    """Probes of a set of examples, as float64 arrays.

    Attributes
    ----------
    flow, null : array, (example, layer, layer)
        F_inter^{i,j} (paper Eq. 5) and its value under uniform attention; nan where j < i.
    text_to_vision, vision_to_text : array, (example, layer, layer)
        The two directions, which add up to `flow`.
    nmi : array, (example, layer + 1)
        Fig. 5; the first column is the embedding; nan where it is undefined. LXMERT attends twice in each layer, so its
        spans count half layers.
    examples : tuple of str
        Names, or else positions.
    config : dict
        The config given to `probe_dataset`; a list of all configs after a merge.
    """

    flow: np.ndarray
    null: np.ndarray
    text_to_vision: np.ndarray
    vision_to_text: np.ndarray
    nmi: np.ndarray
    examples: tuple[str, ...]
    config: Any = None

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
            quantities = {name: getattr(self, name) for name in SPANS} | {"excess": self.flow / self.null}
        rows = []
        for quantity, values in quantities.items():
            interval = bootstrap_interval(values, seed)
            for start, stop in zip(*np.triu_indices(values.shape[1]), strict=True):
                rows.append((quantity, start + 1, stop + 1, *(part[start, stop] for part in interval)))
        interval = bootstrap_interval(self.nmi, seed)
        rows += [("nmi", layer, layer, *(part[layer] for part in interval)) for layer in range(self.nmi.shape[1])]
        return pd.DataFrame(rows, columns=["quantity", "start", "stop", "mean", "low", "high", "count"])

    def table(self) -> pd.DataFrame:
        """Every number, one row each: `example`, `quantity`, `start`, `stop`, `value`; spans as in `means`."""
        starts, stops = np.triu_indices(self.flow.shape[1])
        layers = np.arange(self.nmi.shape[1])
        parts = [(name, starts + 1, stops + 1, getattr(self, name)[:, starts, stops]) for name in SPANS]
        parts.append(("nmi", layers, layers, self.nmi))
        frames = []
        for name, start, stop, values in parts:
            columns = {"example": np.repeat(self.examples, values.shape[1]), "quantity": name}
            columns |= {"start": np.tile(start, len(values)), "stop": np.tile(stop, len(values))}
            frames.append(pd.DataFrame(columns | {"value": values.ravel()}))
        return pd.concat(frames, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write `table` and the config as parquet, completely or not at all."""
        table = pa.Table.from_pandas(self.table(), preserve_index=False)
        config = {_CONFIG: json.dumps(self.config, sort_keys=True, default=str).encode()}
        with draft(Path(path), durable=False) as file:
            pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **config}), file)

    @classmethod
    def load(cls, path: str | Path) -> Probed:
        """Read what `save` wrote; ValueError for another file."""
        path = Path(path)
        try:
            read = pq.read_table(path)
            config = json.loads(read.schema.metadata[_CONFIG])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of probes ({error}); probe again") from None
        frame = read.to_pandas()
        examples = tuple(frame.loc[frame["quantity"] == "nmi", "example"].drop_duplicates())
        parts = {name: rows for name, rows in frame.groupby("quantity", sort=False)}
        layers = int(parts["flow"]["stop"].max())
        spans = np.triu_indices(layers)
        squares = {}
        for name in SPANS:
            squares[name] = np.full((len(examples), layers, layers), np.nan)
            squares[name][:, spans[0], spans[1]] = parts[name]["value"].to_numpy().reshape(len(examples), -1)
        nmi = parts["nmi"]["value"].to_numpy().reshape(len(examples), -1)
        return cls(**squares, nmi=nmi, examples=examples, config=config)

    @classmethod
    def merge(cls, parts: Sequence[Probed]) -> Probed:
        """The examples of several runs as one set; the runs must share their layers, but no example."""
        depths = {part.flow.shape[1] for part in parts}
        if len(depths) > 1:
            raise ValueError(f"models with {sorted(depths)} layers cannot be merged: compare them instead")
        examples = [name for part in parts for name in part.examples]
        if len(set(examples)) < len(examples):
            twice = next(name for name in examples if examples.count(name) > 1)
            raise ValueError(f"example {twice!r} is in more than one run: it would count twice")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*SPANS, "nmi")}
        return cls(**joined, examples=tuple(examples), config=[part.config for part in parts])


@torch.no_grad()
def probe_dataset(
    model: nn.Module,
    batches: Iterable[ProbeInputs],
    *,
    total: int,
    folder: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    examples: Sequence[str] | None = None,
    layers: LayerNames | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Probed:
    """Inter-Modality Flow and NMI of every example, batch by batch.

    Parameters
    ----------
    batches : iterable of ProbeInputs
        To resume a stopped call, give the same batches in the same order.
    total : int
        Number of batches, for the progress bar.
    folder : path, optional
        Gets `probes.parquet`, and one part for each batch until that is complete. The same call again continues after
        the last part, or reads the complete file. A folder with probes of another config is refused.
    config : mapping, optional
        Everything that decides the numbers; it is saved with them.
    examples : sequence of str, optional
        Name of each example, in order.
    layers : str, list of str or callable, optional
        See `inter_modality_flow`.
    """
    settings = json.loads(json.dumps({**(config or {}), "seed": seed}, default=str))
    folder = None if folder is None else Path(folder)
    parts = [] if folder is None else _parts(folder, settings)
    if folder is not None and (folder / "probes.parquet").exists():
        return parts[0]
    for number, inputs in enumerate(islice(batches, len(parts), None), start=len(parts)):
        before = sum(len(part.examples) for part in parts)
        part = _probe(model, inputs, layers, seed, first=before)
        if examples is not None:
            part = replace(part, examples=tuple(examples[before : before + len(part.examples)]))
        if len(part.examples) != len(part.nmi):
            raise ValueError(f"examples has {len(examples or ())} names for {before + len(part.nmi)} examples or more")
        parts.append(replace(part, config=settings))
        if folder is not None:
            parts[-1].save(folder / f"part-{number:06}.parquet")
        if progress:
            progress("probing", number + 1, total)
    if not parts:
        raise ValueError("batches is empty: nothing was probed")
    whole = replace(Probed.merge(parts), config=settings)
    if folder is not None:
        whole.save(folder / "probes.parquet")
        for file in folder.glob("part-*.parquet"):
            file.unlink()
    return whole


def _parts(folder: Path, settings: Mapping[str, Any]) -> list[Probed]:
    """Probes that an earlier call saved: the complete file, or its parts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "probes.parquet"
    files = [whole] if whole.exists() else sorted(folder.glob("part-*.parquet"))
    parts = [Probed.load(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.config != settings:
            raise ValueError(f"{file}: probes of another config ({part.config}, not {settings}); take another folder")
    return parts


def _probe(model: nn.Module, inputs: ProbeInputs, layers: LayerNames | None, seed: int, *, first: int) -> Probed:
    sets = inputs.vision, inputs.tokens
    flow = inter_modality_flow(model, inputs.forward, *sets, language=inputs.language, layers=layers)
    hidden = hidden_states(model, inputs.forward, tokens=inputs.tokens, layers=layers)
    nmi = modality_nmi(hidden, *sets, language=inputs.language, seed=seed)
    arrays = (flow.flow, flow.null, flow.text_to_vision, flow.vision_to_text, nmi)
    names = tuple(str(number) for number in range(first, first + len(nmi)))
    return Probed(*(array.double().cpu().numpy() for array in arrays), examples=names)


def probe(
    subject: Loadable = "",
    pictures: Sequence[Picture] | None = None,
    *,
    images: int = 64,
    special_tokens: Literal["language", "exclude"] = "language",
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Probed:
    """Inter-Modality Flow and NMI of pictures, each with the first text that is true of it.

    Parameters
    ----------
    subject
        A model or its name; see `subjects.load`.
    pictures
        Default: held-out pictures of the set that the model was trained on.
    images : int
        At most this many.
    special_tokens
        [CLS] and [SEP] count as language, or belong to neither modality.
    folder : Path or None
        See `probe_dataset`.
    """
    subject = load(subject)
    if pictures is None:
        pictures = load_held_out(subject.data, images=images)
    chosen = [picture for picture in pictures if picture.captions][:images]
    parts = [chosen[start : start + subject.batch] for start in range(0, len(chosen), subject.batch)]
    batches = (
        subject.prepare(part, [picture.captions[0] for picture in part], special_tokens=special_tokens)
        for part in parts
    )
    return probe_dataset(
        subject.model.eval(),
        batches,
        total=len(parts),
        folder=folder,
        config={"model": subject.name, "images": len(chosen), "special_tokens": special_tokens},
        examples=[f"{number}/{picture.id}" for number, picture in enumerate(chosen)],
        seed=seed,
        progress=progress,
    )
