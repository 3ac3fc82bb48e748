"""The layers in which the modalities meet: their attention as one joint matrix, and their hidden states.

Most models attend over one joint sequence. In a model of two streams the joint sequence is the words, then the image,
and a layer consists of several attentions, each of them a block of the layer's joint matrix.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall, Handler, intercept_attention, run_model, unchanged
from vpworkbench.probes.model_parts import refuse_randomness, tower_config
from vpworkbench.probes.reading import Reading

LayerNames = str | Sequence[str] | Callable[[str], bool]
"""Names or prefixes of modules, or a predicate on names."""


class Block(NamedTuple):
    """One attention of a layer: rows `queries` and columns `keys` of the layer's joint matrix.

    The attentions of a layer all read the state that the layer before it left.
    """

    queries: slice
    keys: slice
    is_first: bool
    is_last: bool


Readings = Sequence[tuple[Block, Reading]]
"""Who may attend to whom in a layer: its attentions, without their queries and keys."""


class Streams(NamedTuple):
    """A model of two streams, words (0) and image (1): the attentions of its layers in their order."""

    inside: str  # regular expression: names of the modules in which the streams meet
    order: tuple[tuple[int, int, bool, bool], ...]  # stream of the queries, of the keys, is_first, is_last
    joined: bool = False  # True if its blocks take and return one state, the words and then the image


# Cross attention both ways, then each stream to itself: two layers.
_ACROSS_THEN_INSIDE = (0, 1, True, False), (1, 0, False, True), (0, 0, True, False), (1, 1, False, True)
# One line for each model of two streams.
TWO_STREAMS = {
    "LxmertXLayer": Streams(r"x_layers\.\d+\.", _ACROSS_THEN_INSIDE),
    "CoAttention": Streams(r"meeting\.\d+\.", _ACROSS_THEN_INSIDE, joined=True),  # ours
    "BridgeTowerBertCrossLayer": Streams(
        r"cross_modal_(text|image)_layers\.\d+\.",  # each stream to itself, then to the other one
        ((0, 0, True, False), (0, 1, False, False), (1, 1, False, False), (1, 0, False, True)),
    ),
}


def streams_of(model: nn.Module) -> Streams | None:
    """The streams of a model that has two; None for one joint sequence."""
    kinds = {type(module).__name__ for module in model.modules()}
    return next((streams for kind, streams in TWO_STREAMS.items() if kind in kinds), None)


def has_separate_states(model: nn.Module) -> bool:
    """True if each of two streams has its own states, so that no one state of a layer can be read or replaced."""
    return (streams := streams_of(model)) is not None and not streams.joined


class LayerChoice:
    """Chooses the attention layers in which the probed sequence attends to itself; for one forward pass.

    Other layers (a vision tower, cross attention to an encoder) run as usual. Where some of them have the same sequence
    length and are not of a tower, `layers` is needed: a prefix such as "language_model" will do.
    """

    def __init__(self, examples: int, tokens: int, layers: LayerNames | None, model: nn.Module) -> None:
        self.examples, self.tokens, self.layers, self.streams = examples, tokens, layers, streams_of(model)
        self._tower = None if layers else tower_config(model)
        self.names: list[str] = []  # of the chosen layers
        self._others: list[tuple[str, tuple[int, int, int]]] = []  # name and lengths
        self._attentions = 0  # of two streams
        self._words = 0  # length of the first of two streams

    def block(self, call: AttentionCall) -> Block | None:
        """The part of the joint matrix that this attention is; None if its layer is not chosen."""
        if not is_named(call.name, self.layers):
            return None
        if self.streams and re.search(self.streams.inside, call.name):
            return self._block_of_streams(call)
        fits = call.lengths == (self.examples, self.tokens, self.tokens) and not _is_of(self._tower, call)
        if not self.streams and fits:
            self._refuse_second_pass(call.name)
            self.names.append(call.name)
            return Block(slice(None), slice(None), is_first=True, is_last=True)
        self._others.append((call.name, call.lengths))
        return None

    def _block_of_streams(self, call: AttentionCall) -> Block:
        examples, queries, keys = call.lengths
        if not self._attentions:
            self._words = queries
        from_stream, to_stream, is_first, is_last = self.streams.order[self._attentions % len(self.streams.order)]
        self._attentions += 1
        if is_first:
            self.names.append(call.name)
        parts = slice(0, self._words), slice(self._words, self.tokens)
        lengths = [self._words, self.tokens - self._words]
        if (examples, queries, keys) != (self.examples, lengths[from_stream], lengths[to_stream]):
            raise ValueError(
                f"`vision` has {self.tokens} tokens in {self.examples} examples, but {call.name} attends from "
                f"{queries} to {keys} tokens in {examples}: it must cover the words and then the image, as the two "
                "streams of this model build them"
            )
        return Block(parts[from_stream], parts[to_stream], is_first, is_last)

    def _refuse_second_pass(self, name: str) -> None:
        """Layers that share a module follow each other; a stack that starts again is another pass."""
        if name in self.names and name != self.names[-1]:
            raise ValueError(
                f"{name} runs again after {self.names[-1]}: the encoder has several passes in one forward, and their "
                "layers are no one stack. Probe it with the inputs of one pass (one image), e.g. the model inside, "
                f"{name.split('.')[0]!r}"
            )

    def uncounted(self, model: nn.Module) -> tuple[str, ...]:
        """Parts of the chosen stack that mix tokens without softmax attention: what they carry is in no number.

        Whole blocks of linear attention, state space layers or convolutions (and blocks that only transform each token,
        since their code does not say which they are), and convolutions inside the blocks that are counted.
        """
        lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
        found = []
        for name in filter(None, dict.fromkeys(_list_of(layer, lists) for layer in self.names)):
            blocks = [f"{name}.{number}" for number in range(len(lists[name]))]
            found += [block for block in blocks if not any(layer.startswith(f"{block}.") for layer in self.names)]
            for part, module in model.named_modules():  # an outer part comes before those inside it
                known = tuple(f"{other}." for other in found)
                if part.startswith(f"{name}.") and _convolves(module) and not part.startswith(known):
                    found.append(part)
        return tuple(found)

    def run(self, model: nn.Module, inputs: Mapping[str, Any], handler: Handler) -> Any:
        """The outputs of the pass with `handler` at every attention layer; a ValueError unless one stack is chosen."""
        with intercept_attention(model, handler):
            outputs = run_model(model, inputs)
        self._raise_unless_one_stack()
        return outputs

    def _raise_unless_one_stack(self) -> None:
        """After the pass: refuse chosen layers that are not one stack of layers on one sequence."""
        if self.streams and self._attentions:
            return
        stacks = list(dict.fromkeys(_stack(name) for name in self.names))
        if not stacks:
            raise ValueError(self._nothing_chosen())
        if len(stacks) > 1 and self.layers is None:
            raise ValueError(
                f"{len(stacks)} stacks of attention layers run on {self.tokens} tokens: {', '.join(stacks)}; name "
                f"those in which the modalities meet, e.g. layers={stacks[-1].split('.*')[0]!r}"
            )
        blocks = {re.split(r"\.\d+\.", name)[0] for name in self.names}
        for name, (examples, queries, keys) in self._others:
            if (examples, queries) == (self.examples, self.tokens) and re.split(r"\.\d+\.", name)[0] in blocks:
                raise ValueError(
                    f"{name} attends from the {self.tokens} tokens of `vision` to {keys} others, only keys of a cross "
                    "attention: there is no joint sequence with them to probe. If they are the image, its flow is not "
                    "defined here"
                )
            if _stack(name) in stacks:
                raise ValueError(
                    f"{name} attends from {queries} to {keys} tokens in {examples} examples, but `vision` has "
                    f"{self.tokens} in {self.examples}: a flow needs one sequence throughout"
                )

    def _nothing_chosen(self) -> str:
        if not self._others:
            chosen = "" if self.layers is None else f" named by layers={self.layers!r}"
            return (
                f"no attention layer{chosen} goes through transformers' attention interface or is otherwise known "
                "here; pass the model's attention maps to flow_from_attention instead"
            )
        lengths = [
            f"{name}: {queries} queries x {keys} keys in {examples} examples"
            for name, (examples, queries, keys) in sorted({(_stack(name), size) for name, size in self._others})
        ]
        return (
            f"`vision` has {self.tokens} tokens in {self.examples} examples, but the model built sequences of other "
            f"lengths: {'; '.join(lengths)}. Tokens that its forward adds (image tokens, a class token) belong in "
            "`vision` and `tokens` too; a modality that is only in the keys of a cross attention has no joint sequence "
            "to probe"
        )


def reaching(readout_tokens: Tensor, layers: Sequence[Readings]) -> Tensor:
    """Tokens whose state after each layer can reach a read-out token; bool (example, layer, token).

    The residual keeps a token; in each later layer, a reached token may attend to others.
    """
    reached = [readout_tokens]  # after the last layer first
    for layer in reversed(layers[1:]):
        after, before = reached[-1], reached[-1].clone()
        for block, reading in layer:
            before[:, block.keys] |= reading.keys_of(after[:, block.queries]).to(before.device)
        reached.append(before)
    return torch.stack(reached[::-1], dim=1)


def _convolves(module: nn.Module) -> bool:
    """Whether it mixes neighbouring tokens, e.g. the short convolutions of keys and values in Inkling."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size != (1,)
    return type(module).__name__.endswith("Convolution")


def _list_of(layer: str, lists: Mapping[str, nn.ModuleList]) -> str:
    """Name of the innermost list of blocks that a layer is in; empty if it is in none."""
    return max((name for name in lists if layer.startswith(f"{name}.")), key=len, default="")


def _stack(name: str) -> str:
    """Name of a module without its layer's number: equal for all layers of one stack."""
    return re.sub(r"\d+", "*", name)


def _is_of(tower: type | None, call: AttentionCall) -> bool:
    """Whether a layer belongs to the vision tower, whose configuration is of the class `tower`."""
    return tower is not None and type(getattr(call.module, "config", None)) is tower


def is_named(name: str, layers: LayerNames | None) -> bool:
    """Whether `layers` chooses the module of this name; None chooses all."""
    if layers is None:
        return True
    if callable(layers):
        return bool(layers(name))
    prefixes = [layers] if isinstance(layers, str) else layers
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def visit_attention_maps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    shape: tuple[int, int],
    visit: Callable[[Tensor], None],
    *,
    layers: LayerNames | None = None,
) -> None:
    """Run `model` and pass the joint attention map of each chosen layer to `visit`, layer by layer.

    The map W is (example, head, query, key), softmax weights in float32 or better, which takes memory token^2. In a
    model of two streams 0.5 (I + W) is what the layer's attentions do together (Eq. 3); W is float64 there. `shape` has
    the examples and the tokens of the joint sequence.
    """
    choice = LayerChoice(*shape, layers, model)
    mixed = torch.empty(0)  # 0.5 (I + W) of the layer, example head query key

    def handler(call: AttentionCall) -> Tensor:
        nonlocal mixed
        block = choice.block(call)
        if block is None:
            return call.output()
        weights = call.weights()
        if block.is_first and block.is_last:
            visit(weights)
            return call.output()
        identity = torch.eye(shape[1], dtype=torch.float64, device=weights.device)
        if block.is_first:
            mixed = identity.repeat(*weights.shape[:2], 1, 1)
        mixed[:, :, block.queries] /= 2
        mixed[:, :, block.queries, block.keys] += weights / 2
        if block.is_last:
            visit(2 * mixed - identity)
        return call.output()

    choice.run(model, inputs, handler)


# -------------------------------------------------------------------------------------------------- hidden states


def hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], *, tokens: Tensor | None = None, layers: LayerNames | None = None
) -> tuple[Tensor, ...]:
    """Features at the input of the first layer and at the output of every layer.

    A transformers model returns its own `output_hidden_states`. In any other module with a transformers encoder inside
    (ours), they are read from the blocks of that encoder.

    Where a model has several stacks of layers, `tokens`, bool (example, token), or `layers` choose one.

    Returns
    -------
    tuple over layer + 1 of Tensor, shape (example, token, channel)
    """
    from transformers import PreTrainedModel  # importing it takes seconds

    if isinstance(model, PreTrainedModel) and layers is None:
        refuse_randomness(model)
        with unchanged(model), torch.no_grad():
            outputs = run_model(model, {**inputs, "output_hidden_states": True, "return_dict": True})
        if has_separate_states(model):
            return _joined_streams(model, outputs)
        if outputs.get("hidden_states"):
            return tuple(outputs["hidden_states"])
    stack = run_stack(model, inputs, tokens, layers)
    states = (output if torch.is_tensor(output) else output[0] for output in stack.outputs)
    return (stack.inputs[0], *states)


def _joined_streams(model: nn.Module, outputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Words and image of the layers that meet, joined: LXMERT lists its streams separately, BridgeTower in pairs."""
    words, image = outputs.get("language_hidden_states"), outputs.get("vision_hidden_states")
    if words and image:
        met = model.config.x_layers + 1
        pairs = zip(words[-met:], image[-met:], strict=True)
    else:
        pairs = outputs["hidden_states"][2]
    return tuple(torch.cat(pair, dim=1) for pair in pairs)


class Stack(NamedTuple):
    """A stack of layers of a model, and what passed through it in one forward; both lists by layer."""

    blocks: nn.ModuleList
    inputs: list[Tensor]  # (example, token, channel)
    outputs: list[Any]  # a state like the input, or a tuple that starts with it


def run_stack(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor | None = None, layers: LayerNames | None = None
) -> Stack:
    """Run `model` and find the one stack of layers that `tokens` or `layers` choose, as in `hidden_states`."""
    attended: list[str] = []
    streams, tower = streams_of(model), None if layers else tower_config(model)
    seen: defaultdict[str, list[tuple[Tensor, Any]]] = defaultdict(list)  # by name of a list of blocks

    def handler(call: AttentionCall) -> Tensor:
        fits = tokens is None or call.lengths[:2] == tuple(tokens.shape)
        if streams is not None and streams.joined:
            fits = re.search(streams.inside, call.name)
        if fits and is_named(call.name, layers) and not _is_of(tower, call):
            attended.append(call.name)
        return call.output()

    def remember(name: str, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen[name].append((args[0] if args else kwargs["hidden_states"], output))

    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    with intercept_attention(model, handler):
        for name, blocks in lists.items():
            for block in blocks:
                block.register_forward_hook(partial(remember, name), with_kwargs=True)
        run_model(model, inputs)
    owners = {_list_of(layer, seen) for layer in attended}
    if len(owners) != 1 or not owners <= set(seen):
        raise ValueError(
            f"{type(model).__name__} has {len(owners)} stacks of layers that match ({', '.join(sorted(owners))}); "
            "choose one by `tokens` or `layers`"
        )
    name = owners.pop()
    return Stack(lists[name], *map(list, zip(*seen[name], strict=True)))


def run_single_stack(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor | None = None, layers: LayerNames | None = None
) -> Stack:
    """`run_stack` for probes that replace states; a ValueError unless each layer has one state, and runs once."""
    if has_separate_states(model):
        raise ValueError(f"{type(model).__name__} has two streams of states: this probe needs one joint sequence")
    stack = run_stack(model, inputs, tokens, layers)
    if len(stack.inputs) != len(stack.blocks):
        raise ValueError(
            f"{type(model).__name__} runs its {len(stack.blocks)} layers {len(stack.inputs)} times in one forward: "
            "this probe needs each of them once"
        )
    return stack
