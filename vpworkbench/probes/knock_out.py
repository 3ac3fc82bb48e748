"""Attention knock-out: stop one modality from reading the other in some layers, and see what the model loses.

Flow says where attention goes; knock-out says whether an output depends on it. Pairs of query and key are blocked
before the softmax (Geva et al. 2023, "Dissecting Recall of Factual Associations"), in all heads or some, on fused
attention. If words are blocked from the image in every layer, another image changes no bit of their states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall, intercept_attention, run_model, unchanged
from vpworkbench.probes.formula import Modalities
from vpworkbench.probes.layers import LayerChoice, LayerNames, streams_of
from vpworkbench.probes.layouts import modalities_of
from vpworkbench.probes.readouts import ReadOut, read
from vpworkbench.stats import Interval, bootstrap_interval

Span = tuple[int, int]
"""First and last layer, counted from 0."""


def _from_to(queries: Tensor, keys: Tensor) -> Tensor:
    return queries[:, :, None] & keys[:, None]


WAYS: dict[str, Callable[[Modalities], Tensor]] = {
    "text_to_vision": lambda sets: _from_to(sets.language, sets.vision),
    "vision_to_text": lambda sets: _from_to(sets.vision, sets.language),
    "both": lambda sets: _from_to(sets.language, sets.vision) | _from_to(sets.vision, sets.language),
}
"""Name -> pairs that are blocked, bool (example, query, key)."""

SPANS: dict[str, Callable[[int], list[Span]]] = {
    "single": lambda layers: [(layer, layer) for layer in range(layers)],
    "from": lambda layers: [(layer, layers - 1) for layer in range(layers)],
    "to": lambda layers: [(0, layer) for layer in range(layers)],
    "triangle": lambda layers: list(combinations_with_replacement(range(layers), 2)),
}
"""Name -> spans of a model with this number of layers."""


@dataclass(frozen=True)
class KnockOut:
    """A read-out with and without some attention; float64 on the CPU.

    Attributes
    ----------
    spans : tuple of (int, int)
        First and last blocked layer, counted from 0.
    before : Tensor, shape (example,)
        The read-out of the plain forward.
    after : Tensor, shape (example, span)
        The read-out with the pairs blocked in the layers of the span.
    controls : Tensor, shape (draw, example, span), or None
        The read-out with as many random pairs of the same queries blocked.
    layers : tuple of str
        Names of the attention layers.
    """

    spans: tuple[Span, ...]
    before: Tensor
    after: Tensor
    controls: Tensor | None
    layers: tuple[str, ...]

    @property
    def effect(self) -> Tensor:
        """Before - after, (example, span): what the read-out loses."""
        return self.before[:, None] - self.after

    @property
    def triangle(self) -> Tensor:
        """The effect as (example, layer, layer), beside `InterModalityFlow.flow`; nan where no span was blocked."""
        square = self.after.new_full((len(self.after), len(self.layers), len(self.layers)), torch.nan)
        first, last = torch.tensor(self.spans).unbind(dim=1)
        square[:, first, last] = self.effect
        return square

    def interval(self, *, over_controls: bool = False, seed: int = 0) -> Interval:
        """Mean effect with its bootstrap 95% interval over examples, paired; (span,).

        With `over_controls`: how much larger than the effect of random pairs, averaged over the draws.
        """
        if over_controls and self.controls is None:
            raise ValueError("there are no controls; call knock_out with controls=n")
        effect = self.controls.mean(dim=0) - self.after if over_controls else self.effect
        return bootstrap_interval(effect.numpy(), seed)


@torch.no_grad()
def knock_out(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    readout: ReadOut,
    *,
    language: Tensor | None = None,
    way: str | Tensor = "text_to_vision",
    spans: str | Sequence[Span] = "single",
    heads: Sequence[int] | None = None,
    replace: str = "mask",
    controls: int = 0,
    seed: int = 0,
    layers: LayerNames | None = None,
) -> KnockOut:
    """Block attention between the modalities in spans of layers, and read the effect on an output.

    One forward for each span and draw, and two more; larger batches of examples make each cheaper. `model`, `inputs`,
    `vision`, `tokens`, `language` and `layers` are as in `inter_modality_flow`. Tokens in neither modality are not
    blocked, and can carry information around the block. A ValueError for spans or heads that the model does not have,
    and for a way that has no pairs in some example.

    Parameters
    ----------
    readout : callable
        From the model's outputs to one number for each example; `probes.readouts` has some.
    way : str or BoolTensor, shape (example, query, key)
        `text_to_vision` (words cannot read the image), `vision_to_text`, `both`, or the pairs to block.
    spans : str or list of (first, last)
        `single` (each layer), `from` (each layer to the last), `to` (the first to each), `triangle` (all), or a list.
    heads : sequence of int, optional
        Query heads in which the pairs are blocked; by default all.
    replace : str
        `mask`: blocked before the softmax, so the other weights sum to 1; a query without any other key reads nothing.
        `mean`: weights stay, and a blocked key gives the mean value of its modality over the batch.
    controls : int
        Draws in which each query has as many random keys blocked, of those that its layer allows.
    """
    for name, known in ((way, WAYS), (spans, SPANS), (replace, INSTEAD)):
        _refuse_unknown(name, known)
    sets = modalities_of(model, inputs, vision, tokens, language)
    survey = _survey(model, inputs, sets, layers)
    chosen, heads = _spans(spans, len(survey.kinds)), _heads(heads, survey.heads)
    blocked = survey.blocked(way, sets)
    with unchanged(model):  # also the random state: ViLT draws the same order of patches in every pass
        before = read(readout, run_model(model, inputs), len(vision))

    def after_one(pairs: Mapping[int, Tensor]) -> Tensor:
        if not pairs:
            return before
        with intercept_attention(model, Blocker(_choice(model, sets, layers), sets, pairs, heads, INSTEAD[replace])):
            outputs = run_model(model, inputs)
        return read(readout, outputs, len(vision))

    def after(pairs: Sequence[Tensor]) -> Tensor:
        of_spans = [range(first, last + 1) for first, last in chosen]
        return torch.stack([after_one({i: pairs[i] for i in span if pairs[i].any()}) for span in of_spans], dim=1)

    drawn = [after(pairs) for pairs in survey.random(blocked, controls, seed)]
    controlled = torch.stack(drawn) if drawn else None
    return KnockOut(tuple(chosen), before, after(blocked), controlled, tuple(survey.choice.names))


@contextmanager
def attention_blocked(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    way: str | Tensor = "text_to_vision",
    span: Span,
    layers: LayerNames | None = None,
) -> Iterator[None]:
    """In the block, all passes of `model` over these tokens run with a way blocked in a span of layers.

    Also those of other probes. The arguments and errors are those of `knock_out`; two more for a model of two streams,
    whose cross layers would have nothing left to attend to, and for one whose layers share a module (ALBERT).
    """
    if streams_of(model):
        raise ValueError(f"{type(model).__name__} has two streams of states: only knock_out can block its cross layers")
    _refuse_unknown(way, WAYS)
    sets = modalities_of(model, inputs, vision, tokens, language)
    survey = _survey(model, inputs, sets, layers)
    [(first, last)] = _spans([span], len(survey.kinds))
    pairs, modules, names = survey.blocked(way, sets), dict(model.named_modules()), survey.choice.names
    if len(set(names)) < len(names):
        raise ValueError(f"layers of {type(model).__name__} share one module: only knock_out can block some of them")
    blocked = {modules[names[layer]]: pairs[layer] for layer in range(first, last + 1)}

    def change(call: AttentionCall) -> AttentionCall:
        return call.without(blocked[call.module].to(call.query.device)) if call.module in blocked else call

    with intercept_attention(model, AttentionCall.output, change):
        yield


def _refuse_unknown(name: Any, known: Mapping[str, Any]) -> None:
    if isinstance(name, str) and name not in known:
        raise ValueError(f"{name!r} is not known; known are {', '.join(known)}")


def _spans(spans: str | Sequence[Span], layers: int) -> list[Span]:
    chosen = SPANS[spans](layers) if isinstance(spans, str) else list(spans)
    for span in chosen or [()]:
        if not isinstance(span, Sequence) or len(span) != 2 or not 0 <= span[0] <= span[1] < layers:
            raise ValueError(f"{span} is no span: give the first and the last layer, from 0 to {layers - 1}")
    return [tuple(span) for span in chosen]


def _heads(heads: Sequence[int] | None, count: int) -> list[int] | None:
    if heads is None:
        return None
    if not len(heads) or min(heads) < 0 or max(heads) >= count:
        raise ValueError(f"heads are {list(heads)}: name query heads of the layers, from 0 to {count - 1}")
    return list(heads)


# ----------------------------------------------------------------------------------------------- which pairs to block


class Survey:
    """Handles every attention of a pass in which nothing is blocked, and finds the pairs that could be."""

    def __init__(self, choice: LayerChoice, tokens: Tensor) -> None:
        self.choice, self.tokens = choice, tokens
        self.allowed: list[Tensor] = []  # bool (example, query, key), real tokens only; one for each kind of mask
        self.kinds: list[int] = []  # of each layer: its mask, as an index into `allowed`
        self.heads = 0  # that every layer has

    def __call__(self, call: AttentionCall) -> Tensor:
        block = self.choice.block(call)
        if block is not None:
            heads = call.query.shape[1]
            self.heads = min(self.heads or heads, heads)
            if block.is_first:
                self._joint = torch.zeros_like(_from_to(self.tokens, self.tokens))
            self._joint[:, block.queries, block.keys] = call.allowed().any(dim=1).to(self.tokens.device)
            if block.is_last:
                self._close_layer(self._joint & _from_to(self.tokens, self.tokens))
        return call.output()

    def blocked(self, way: str | Tensor, sets: Modalities) -> list[Tensor]:
        """The pairs of each layer that are blocked, bool (example, query, key)."""
        pairs = WAYS[way](sets) if isinstance(way, str) else way
        if pairs.dtype != torch.bool or pairs.shape != self.allowed[0].shape:
            raise ValueError(
                f"`way` is {pairs.dtype} {tuple(pairs.shape)}: a mask of pairs must be bool (example, query, key), "
                f"{tuple(self.allowed[0].shape)}"
            )
        by_kind = [pairs.to(allowed.device) & allowed for allowed in self.allowed]
        without = ~torch.stack(by_kind).any(dim=(0, 2, 3))
        if without.all() or (isinstance(way, str) and without.any()):
            name = way if isinstance(way, str) else "mask"
            raise ValueError(
                f"way {name}: in examples {without.nonzero().flatten().tolist()} no layer lets these queries attend to "
                "these keys, so nothing can be blocked. In a causal decoder an image that precedes the words never "
                "reads them"
            )
        return [by_kind[kind] for kind in self.kinds]

    def random(self, blocked: Sequence[Tensor], draws: int, seed: int) -> Iterator[list[Tensor]]:
        """Random pairs in place of those of each layer, as many for each query; layers of one mask have the same."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            noise = torch.rand(self.allowed[0].shape, generator=generator).to(self.tokens.device)
            by_kind = {}
            for kind, pairs in zip(self.kinds, blocked, strict=True):
                if kind not in by_kind:
                    order = noise.masked_fill(~self.allowed[kind], -1).argsort(dim=-1, descending=True)
                    by_kind[kind] = order.argsort(dim=-1) < pairs.sum(dim=-1, keepdim=True)
            yield [by_kind[kind] for kind in self.kinds]

    def _close_layer(self, allowed: Tensor) -> None:
        kind = next((kind for kind, known in enumerate(self.allowed) if known.equal(allowed)), len(self.allowed))
        self.allowed += [allowed] if kind == len(self.allowed) else []
        self.kinds.append(kind)


def _survey(model: nn.Module, inputs: Mapping[str, Any], sets: Modalities, layers: LayerNames | None) -> Survey:
    survey = Survey(_choice(model, sets, layers), sets.tokens)
    survey.choice.run(model, inputs, survey)
    return survey


def _choice(model: nn.Module, sets: Modalities, layers: LayerNames | None) -> LayerChoice:
    return LayerChoice(*sets.vision.shape, layers, model)


# -------------------------------------------------------------------------------------------------- the blocked pass

Instead = Callable[[AttentionCall, Tensor, Sequence[Tensor]], Tensor]
"""From a layer, its blocked pairs (example, query, key) and groups of its keys (example, key) to its output."""


def _without(call: AttentionCall, blocked: Tensor, groups: Sequence[Tensor]) -> Tensor:
    return call.output_without(blocked)


def _with_mean_values(call: AttentionCall, blocked: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Blocked keys keep their weights, and give the mean value of their group; per head and channel."""
    output, dtype = call.output(), torch.promote_types(call.value.dtype, torch.float32)
    value = call.value.to(dtype)
    change = torch.zeros_like(value)  # example key_head key channel
    for group in groups:
        mean = torch.einsum("ek,ehkc->hc", group.to(dtype), value) / group.sum().clamp(min=1)
        change = torch.where(group[:, None, :, None], mean[:, None] - value, change)
    examples, _, keys = call.lengths
    heads = call.query.shape[1]
    change = change.repeat_interleave(heads // change.shape[1], dim=1)
    size = max(1, 2**24 // (examples * heads * keys))  # at most 2^24 weights at a time
    for some in blocked.any(dim=2).any(dim=0).nonzero().flatten().split(size):
        weights = call.weights(some.expand(examples, -1)) * blocked[:, None, some]
        output[:, some] += (weights @ change.to(weights)).transpose(1, 2).to(output)
    return output


INSTEAD: dict[str, Instead] = {"mask": _without, "mean": _with_mean_values}
"""Name -> what blocked pairs are replaced by."""


class Blocker:
    """Handles every attention of one pass; where nothing is blocked, layers and heads run as usual."""

    def __init__(
        self,
        choice: LayerChoice,
        sets: Modalities,
        blocked: Mapping[int, Tensor],
        heads: Sequence[int] | None,
        instead: Instead,
    ) -> None:
        self.choice, self.blocked, self.heads, self.instead = choice, blocked, heads, instead
        self.groups = sets.vision, sets.language, sets.tokens & ~sets.vision & ~sets.language

    def __call__(self, call: AttentionCall) -> Tensor:
        block = self.choice.block(call)
        pairs = None if block is None else self.blocked.get(len(self.choice.names) - 1)
        if pairs is None or not (pairs := pairs[:, block.queries, block.keys]).any():
            return call.output()
        device = call.query.device
        groups = [group[:, block.keys].to(device) for group in self.groups]
        output = self.instead(call, pairs.to(device), groups)
        if self.heads is None:
            return output
        mixed = call.output()
        mixed[:, :, self.heads] = output[:, :, self.heads]
        return mixed
