"""Does the flow matter? What a model's answers lose if words cannot read the image, beside Inter-Modality Flow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vpworkbench.data.inputs import Progress
from vpworkbench.data.minimal_pairs import load_pairs
from vpworkbench.data.records import Picture
from vpworkbench.probes import KnockOut, Patched, inter_modality_flow, knock_out, lens, patch
from vpworkbench.probes.attention import forwards_replaced, run_model
from vpworkbench.probes.readouts import match_log_odds, read
from vpworkbench.settings import PairSettings
from vpworkbench.stats import Interval, bootstrap_interval
from vpworkbench.studies.patching import patch_inputs
from vpworkbench.studies.questions import PER_TEXT, Example, ask, batches, known
from vpworkbench.subjects import Subject

ALL_SPANS = 12  # layers; deeper models are blocked in single layers, from each layer on, and up to each layer
DRAWS = 3  # of random pairs, in single layers


@dataclass(frozen=True)
class Effects:
    """One read-out (`questions.READ_OUTS`) with and without some attention; float64 on the CPU."""

    blocked: KnockOut  # words cannot read the image, in every span of at most 12 layers
    alone: KnockOut  # the same in single layers, with draws of as many random pairs
    mean: KnockOut  # blocked keys give their mean value, in single layers
    reverse: KnockOut | None  # the image cannot read the words, layer by layer; None if the image comes first (causal)
    flow: Tensor  # Inter-Modality Flow, (example, layer, layer)
    null: Tensor  # the same under uniform attention
    live: Tensor  # the part of `flow` that can reach the read-out
    lens: Tensor  # the read-out of every layer's state, the input first; (example, state)
    other: Tensor  # with another picture, (example,); empty for `match`, whose examples have both pictures
    per_text: int  # examples in a row that share a text: they count as one sample

    @property
    def layers(self) -> int:
        """Layers in which the modalities meet."""
        return self.flow.shape[1]

    @property
    def random(self) -> Tensor:
        """What is lost by blocking as many random pairs in one layer, (draw, example, layer)."""
        return self.alone.before[:, None] - self.alone.controls

    @property
    def everywhere(self) -> Tensor:
        """The read-out with words blocked from the image in all layers, (example,)."""
        return self.blocked.after[:, self.blocked.spans.index((0, self.layers - 1))]

    @property
    def single(self) -> dict[str, Interval]:
        """What is lost by blocking each layer alone, (layer,), by what is blocked."""
        found = {
            "words cannot read the image": self.alone.effect,
            "words read its mean value": self.mean.effect,
            "random pairs": self.random.mean(dim=0),
        }
        if self.reverse is not None:
            found["the image cannot read the words"] = self.reverse.effect
        return {name: self.interval(values) for name, values in found.items()}

    def interval(self, values: Tensor) -> Interval:
        """Mean with its 95% interval over texts; `values` is (example, ...)."""
        return bootstrap_interval(values.double().unflatten(0, (-1, self.per_text)).mean(dim=1).numpy())


def measure(
    subject: Subject, pictures: Sequence[Picture], what: str, *, seed: int = 0, progress: Progress | None = None
) -> Effects:
    """One of the `known` read-outs, each picture with its first caption, batch by batch; `seed` draws random pairs."""
    parts = defaultdict(list)
    of_batches = batches(subject, pictures, what)
    if not of_batches:
        raise ValueError(f"{subject.name}: none of the {len(pictures)} pictures can be asked for {what!r}; take more")
    for number, some in enumerate(of_batches):
        with _visual_side_once(subject):
            found = _measured(subject, some, seed + number)
        for name, part in found.items():
            parts[name].append(part)
        if progress:
            progress(f"blocking, {what}", number + 1, len(of_batches))
    return Effects(**{name: _joined(of_name) for name, of_name in parts.items()}, per_text=PER_TEXT[what])


def match_effect(subject: Subject, pictures: Sequence[Picture], layers: int) -> Interval:
    """What `match` loses if words are blocked from the image in all `layers`, in three passes; nan if not known."""
    lost = []
    for some in batches(subject, pictures, "match") if "match" in known(subject) else ():
        question = ask(subject, some)
        with _visual_side_once(subject):
            lost.append(knock_out(subject.model, **question.options, spans=[(0, layers - 1)]).effect)
    if not lost:
        return Interval(*[np.array(np.nan)] * 3, np.array(0))
    return bootstrap_interval(torch.cat(lost).view(-1, PER_TEXT["match"]).mean(dim=1).numpy())


def patched_pairs(subject: Subject) -> Patched | None:
    """24 minimal pairs patched for ITM; None if the model has no such head, or cannot read the pairs."""
    if "match" not in known(subject) or subject.reads_regions:
        return None
    ids = subject.base.words.ids
    alike = [
        pair
        for pair in load_pairs(PairSettings(pairs=24))
        if len({len(ids(text)) for text in pair.texts}) == 1  # another vocabulary may split one of the words
    ]
    if not alike:
        return None
    runs = patch_inputs(subject, alike)
    return patch(subject.model, runs.clean, runs.corrupt, match_log_odds(subject.base), runs.groups)


def table(effects: dict[str, Effects]) -> pd.DataFrame:
    """Means with 95% bounds over texts; a row for each read-out, quantity and span of layers, which count from 1."""
    rows = []
    for what, found in effects.items():
        cells = np.triu_indices(found.layers)
        decoded = found.lens.shape[1] - 1  # states after the input; one for two layers of two streams
        every, alone = list(zip(*cells, strict=True)), [(layer, layer) for layer in range(found.layers)]
        quantities = {
            "flow": (every, found.flow[:, *cells]),
            "null": (every, found.null[:, *cells]),
            "live flow": (every, found.live[:, *cells]),
            "effect": (found.blocked.spans, found.blocked.effect),
            "effect of random pairs": (alone, found.random.mean(dim=0)),
            **{f"effect of random pairs, draw {n + 1}": (alone, one) for n, one in enumerate(found.random)},
            "effect of mean values": (alone, found.mean.effect),
            "lens": ([(0, number * found.layers // decoded - 1) for number in range(decoded + 1)], found.lens),
        }
        if found.reverse is not None:
            quantities["effect of the reverse"] = alone, found.reverse.effect
        for quantity, (spans, values) in quantities.items():
            start, stop = np.array(spans).T + 1
            columns = {"read_out": what, "quantity": quantity, "start": start, "stop": stop}
            rows.append(pd.DataFrame(columns | found.interval(values)._asdict()))
    return pd.concat(rows, ignore_index=True)


def conclusions(effects: dict[str, Effects], patched: Patched | None) -> list[str]:
    """What the numbers say, one sentence each."""
    said = []
    for what, found in effects.items():
        before, after = found.blocked.before, found.everywhere
        if what == "match":
            own, blind = (f"{found.interval((values > 0).double()):.1%}" for values in (before, after))
            said.append(f"Match: {own} of the decisions are right, and {blind} without the image (chance 50%).")
        else:
            own, blind, other = (f"{found.interval(values.exp()):.1%}" for values in (before, after, found.other))
            said.append(
                f"{what.capitalize()}: the right one has probability {own}, {blind} without the image, and {other} "
                "with another image."
            )
        lost = found.single["words cannot read the image"]
        within = found.flow.diagonal(dim1=1, dim2=2).mean(dim=0)
        most, least = int(lost.mean.argmax()), int(lost.mean.argmin())
        live = found.live[:, 0, -1].mean() / found.flow[:, 0, -1].mean()
        said += [
            f"Layer {most + 1} alone costs most, {lost.at(most):.2f} ({_by_chance(found, most)}); layer {least + 1} "
            f"least, {lost.at(least):.2f} ({_by_chance(found, least)}). Their own flow is {within[most]:.1%} and "
            f"{within[least]:.1%}; most flow is in layer {int(within.argmax()) + 1}.",
            f"{live:.1%} of the flow into the last layer can reach this read-out. The lens reads "
            f"{found.lens[:, -2].mean():.2f} before the last layer, and {found.lens[:, -1].mean():.2f} after it.",
        ]
    if patched is not None:
        shares = patched.interval().mean
        first, last = ((patched.groups[int(layer.argmax())], layer.max()) for layer in (shares[0], shares[-1]))
        said.append(
            f"Patching restores most by the {first[0]} before the first layer ({first[1]:.0%}), and by the {last[0]} "
            f"before the last ({last[1]:.0%})."
        )
    return said


def _visual_side_once(subject: Subject) -> AbstractContextManager[None]:
    """In the block the visual side of our models, half of their cost, runs once for each tensor of images."""
    sides = [subject.base.visual] if subject.base is not None else []
    return forwards_replaced({side: cache(side.forward) for side in sides})  # a tensor is its own key


def _measured(subject: Subject, some: Sequence[Example], seed: int) -> dict[str, Any]:
    """The fields of `Effects` of one batch."""
    question = ask(subject, some)
    inputs, blocked = question.inputs, partial(knock_out, subject.model, **question.options)
    flow = inter_modality_flow(subject.model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language)
    reads_words = bool((flow.vision_to_text.nan_to_num() > 0).any())
    return {
        "blocked": blocked(spans=_spans(flow.flow.shape[1])),
        "alone": blocked(controls=DRAWS, seed=seed),
        "mean": blocked(replace="mean"),
        "reverse": blocked(way="vision_to_text") if reads_words else None,
        "flow": flow.flow,
        "null": flow.null,
        "live": flow.live(question.places),
        "lens": lens(subject.model, inputs.forward, question.readout, tokens=inputs.tokens),
        "other": _with_another_picture(subject, [one for one in some if one.word or one.answer]),
    }


@torch.no_grad()
def _with_another_picture(subject: Subject, some: Sequence[Example]) -> Tensor:
    if not some:
        return torch.empty(0)
    inputs, readout, _ = ask(subject, [one._replace(picture=one.other) for one in some])
    return read(readout, run_model(subject.model, inputs.forward), len(some))


def _spans(layers: int) -> str | list[tuple[int, int]]:
    if layers <= ALL_SPANS:
        return "triangle"
    return sorted({span for i in range(layers) for span in ((i, i), (i, layers - 1), (0, i))})


def _joined(parts: list[Any]) -> Any:
    """Results of several batches as one."""
    first = parts[0]
    if first is None:
        return None
    if torch.is_tensor(first):
        return torch.cat([part.double().cpu() for part in parts])
    before, after = torch.cat([part.before for part in parts]), torch.cat([part.after for part in parts])
    controls = None if first.controls is None else torch.cat([part.controls for part in parts], dim=1)
    return replace(first, before=before, after=after, controls=controls)


def _by_chance(found: Effects, layer: int) -> str:
    draws = found.random.mean(dim=1)[:, layer]
    pairs = found.single["random pairs"].at(layer)
    return f"random pairs {pairs:.2f}, {len(draws)} draws from {draws.min():.2f} to {draws.max():.2f}"
