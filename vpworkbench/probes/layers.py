"""Which attention layers of a pass count for a flow, and which part of the joint sequence each of them is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from vpworkbench.probes.attention import AttentionCall

LayerNames = str | Sequence[str] | Callable[[str], bool]


class Place(NamedTuple):
    """One attention of one layer: rows `queries` and columns `keys` of that layer's joint matrix.

    Most layers are one attention over everything. In a model of two streams a layer of the joint sequence (words,
    then image) takes several, and the attentions of a layer all read what the layer before it left.
    """

    queries: slice
    keys: slice
    opens: bool
    closes: bool

    @property
    def is_everything(self) -> bool:
        """Whether this one attention is the layer."""
        return self.opens and self.closes


class Streams(NamedTuple):
    """How a model of two streams, words (0) and image (1), goes: the attentions of its layers in their order."""

    inside: str  # regular expression: names of the modules that meet the other stream
    order: tuple[tuple[int, int, bool, bool], ...]  # queries' stream, keys' stream, opens, closes


# One more model of two streams is one more line here.
TWO_STREAMS = {
    "LxmertXLayer": Streams(
        r"x_layers\.\d+\.",  # cross attention both ways, then each stream to itself: two layers
        ((0, 1, True, False), (1, 0, False, True), (0, 0, True, False), (1, 1, False, True)),
    ),
    "BridgeTowerBertCrossLayer": Streams(
        r"cross_modal_(text|image)_layers\.\d+\.",  # both streams: to itself, then to what the other was
        ((0, 0, True, False), (0, 1, False, False), (1, 1, False, False), (1, 0, False, True)),
    ),
}


def streams_of(model: nn.Module) -> Streams | None:
    """How a model of two streams goes; None for one joint sequence."""
    kinds = {type(module).__name__ for module in model.modules()}
    return next((streams for kind, streams in TWO_STREAMS.items() if kind in kinds), None)


@dataclass
class LayerChoice:
    """Which attention layers of a pass count: those in which the probed sequence attends to itself.

    Parameters
    ----------
    examples, tokens : int
        Size of the probed batch; other layers (a vision tower, cross attention) run plainly.
    layers : str, list of str or callable, optional
        Names of modules (a prefix such as "language_model" will do) or a predicate on names, where
        the length alone does not tell the layers apart.
    streams : Streams, optional
        Of a model of two streams.
    """

    examples: int
    tokens: int
    layers: LayerNames | None = None
    streams: Streams | None = None
    names: list[str] = field(default_factory=list)
    _others: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    _attentions: int = 0
    _words: int = 0  # length of the first of two streams

    def place(self, call: AttentionCall) -> Place | None:
        """Where in the joint sequence this attention stands, None if it does not count; remembers it for `close`."""
        named = self.layers is None or is_named(call.name, self.layers)
        if named and self.streams and re.search(self.streams.inside, call.name):
            return self._place_in_streams(call)
        everything = call.lengths == (self.examples, self.tokens, self.tokens)
        if named and not self.streams and everything:
            self.names.append(call.name)
            return Place(slice(None), slice(None), opens=True, closes=True)
        if named:
            self._others.append((call.name, call.lengths))
        return None

    def _place_in_streams(self, call: AttentionCall) -> Place:
        examples, queries, keys = call.lengths
        if not self._attentions:
            self._words = queries
        attends, attended, opens, closes = self.streams.order[self._attentions % len(self.streams.order)]
        self._attentions += 1
        if opens:
            self.names.append(call.name)
        parts = slice(0, self._words), slice(self._words, self.tokens)
        lengths = [self._words, self.tokens - self._words]
        if (examples, queries, keys) != (self.examples, lengths[attends], lengths[attended]):
            raise ValueError(
                f"`vision` has {self.tokens} tokens in {self.examples} examples, but {call.name} attends from "
                f"{queries} to {keys} tokens in {examples}: it must cover the words and then the image, as the two "
                "streams of this model build them"
            )
        return Place(parts[attends], parts[attended], opens, closes)

    def close(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """After the pass: raise where the layers that counted are not one stack of layers."""
        if self.streams and self._attentions:
            return
        stacks = list(dict.fromkeys(stack(name) for name in self.names))
        if not stacks:
            raise ValueError(self._nothing_counted(model, inputs))
        if len(stacks) > 1 and self.layers is None:
            raise ValueError(
                f"{len(stacks)} stacks of attention layers run on {self.tokens} tokens: "
                f"{', '.join(stacks)}; name those in which the modalities meet, e.g. "
                f"layers={stacks[-1].split('.*')[0]!r}"
            )
        changed = [(name, size) for name, size in self._others if stack(name) in stacks]
        if changed:
            name, (examples, queries, keys) = changed[0]
            raise ValueError(
                f"{name} attends from {queries} to {keys} tokens in {examples} examples, but "
                f"`vision` has {self.tokens} tokens in {self.examples}: a flow needs "
                "one sequence throughout"
            )

    def _nothing_counted(self, model: nn.Module, inputs: Mapping[str, Any]) -> str:
        kind = type(model).__name__
        if not self._others:
            chosen = "" if self.layers is None else f" chosen by layers={self.layers!r}"
            return (
                f"no attention layer of {kind}{chosen} went through transformers' attention interface, and its own "
                "attention is not one that is known here; pass its attention maps to flow_from_attention instead"
            )
        return (
            f"`vision` has {self.tokens} tokens in {self.examples} examples, but {kind} built "
            f"sequences of other lengths from the inputs ({', '.join(_shapes(inputs))}): "
            f"{'; '.join(self._lengths_seen())}. What the model's forward adds to its inputs (image tokens, a class "
            "token) belongs in `vision` and `tokens` too; where one modality only ever sits in the keys of a cross "
            "attention, there is no joint sequence to probe"
        )

    def _lengths_seen(self) -> Iterator[str]:
        sizes = {(stack(name), size) for name, size in self._others}
        for name, (examples, queries, keys) in sorted(sizes):
            yield f"{name}: {queries} queries x {keys} keys in {examples} examples"


def _shapes(inputs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in inputs.items():
        if torch.is_tensor(value):
            yield f"{name} {tuple(value.shape)}"


def stack(name: str) -> str:
    """Name of a module without its layer's number: equal for all layers of one stack."""
    return re.sub(r"\d+", "*", name)


def is_named(name: str, layers: LayerNames) -> bool:
    """Whether `layers` chooses the module of this name."""
    if callable(layers):
        return bool(layers(name))
    prefixes = [layers] if isinstance(layers, str) else layers
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
