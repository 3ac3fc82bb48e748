"""Inter-Modality Flow of a model (paper Sec. 3.2, Eq. 2-6): how much attention crosses between the modalities.

A^{i,j} = A^j ... A^i (Eq. 4) is only ever summed over blocks. Summing its columns over L is the product with the
indicator 1_L, so one column for each start layer i is carried through the layers,

    u <- 0.5 (u + mean over heads of softmax(Q K^T / sqrt(d)) u),

as one more channel of the values of fused attention. One forward pass gives every span of layers, without any attention
map. `vpworkbench.probes.exactness` compares it with the formula as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vpworkbench.probes.attention import AttentionCall, intercept_attention, run_model
from vpworkbench.probes.formula import (
    Modalities,
    both_modalities,
    crossing,
    crossing_by_head,
    crossing_by_token,
    indicators,
    with_vision,
)
from vpworkbench.probes.layers import Block, LayerChoice, LayerNames, streams_of
from vpworkbench.probes.layouts import patches_recorded


@dataclass(frozen=True)
class InterModalityFlow:
    """Inter-Modality Flow of a batch; layers count from 0, the residual (Eq. 3) is included.

    Attributes
    ----------
    text_to_vision, vision_to_text : Tensor, shape (example, layer, layer)
        Share of attention from language queries to visual keys and the reverse, [b, i, j] from the input of layer i to
        the output of layer j; nan where j < i. They add up to `flow`.
    null : Tensor, shape (example, layer, layer)
        `flow` if every query spread its attention evenly over the keys that its mask allows.
    per_head : Tensor, shape (example, layer, head)
        Within one layer, each head's inter over the heads' mean of inter + intra; the mean is `within_layer`.
    layers : tuple of str
        Names of the attention layers.
    per_token : Tensor, shape (example, layer, layer, token), or None
        Share of each query's attention that crosses; nan at tokens in neither set.
    rows, columns : Tensor, shape (example, layer, head, picked, token), or None
        Softmax weights of the picked queries (which tokens they attend to) and of the picked keys (which tokens attend
        to them), without residual.
    rows_from_input, columns_from_input : Tensor, shape (example, layer, picked, token), or None
        The same rows and columns of A^{1,j} (Eq. 4).
    boxes : Tensor, shape (example, token, 4), or None
        For ViLT, which draws a new order of its patches in every forward: the boxes of this pass, as in
        `modality_masks`. Rows and columns follow them.
    """

    text_to_vision: Tensor
    vision_to_text: Tensor
    null: Tensor
    per_head: Tensor
    layers: tuple[str, ...]
    per_token: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    rows_from_input: Tensor | None = None
    columns_from_input: Tensor | None = None
    boxes: Tensor | None = None

    @cached_property
    def flow(self) -> Tensor:
        """F_inter^{i,j} (Eq. 5), (example, layer, layer); nan where j < i."""
        return self.text_to_vision + self.vision_to_text

    @property
    def from_input(self) -> Tensor:
        """F_inter^{1,j}, (example, layer): Fig. 3."""
        return self.flow[:, 0]

    @property
    def within_layer(self) -> Tensor:
        """F_inter^{i,i}, (example, layer): Fig. 4."""
        return self.flow.diagonal(dim1=1, dim2=2)

    @property
    def excess(self) -> Tensor:
        """Flow over null, (example, layer, layer): comparable across token counts; nan where the null is 0."""
        return self.flow / self.null.masked_fill(self.null == 0, torch.nan)


def inter_modality_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    rows: Tensor | Sequence[int] | None = None,
    columns: Tensor | Sequence[int] | None = None,
    per_token: bool = False,
    starts: Sequence[int] | None = None,
    layers: LayerNames | None = None,
) -> InterModalityFlow:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    One forward pass without gradients on fused attention; no attention map is stored.

    Parameters
    ----------
    model : nn.Module
        Any module whose attention layers go through transformers' attention interface, and the families in
        `probes.attention` that do not. For a model of two streams (LXMERT, BridgeTower) the sequence is the words, then
        the image.
    inputs : mapping
        Keyword arguments of the model's forward.
    vision, tokens : BoolTensor, shape (example, token)
        Visual tokens and real (non-padding) positions of the sequence on which the attention runs.
    language : BoolTensor, shape (example, token), optional
        `tokens & ~vision` by default; positions in neither set count in neither sum.
    rows, columns : LongTensor, shape (example, picked) or (picked,), optional
        Tokens whose rows and columns of attention are wanted. Rows rolled out from the input cost about one eager pass
        more, in bounded memory; everything else is nearly free.
    per_token : bool
        Also return each token's own flow.
    starts : sequence of int, optional
        Layers at which spans start, by default all; spans of one layer are always included. `starts=[0]` gives
        `from_input` and `within_layer` for the least work.
    layers : str, list of str or callable, optional
        Names (or prefixes) of the attention layers in which the modalities meet, or a predicate on names; needed only
        where other layers have the same sequence length.
    """
    sets = both_modalities(vision, tokens, language)
    options = {
        "rows": _picked(rows, sets, "rows"),
        "columns": _picked(columns, sets, "columns"),
        "per_token": per_token,
        "starts": starts,
    }
    with patches_recorded(model) as shuffled:
        recorder = recorded_pass(model, inputs, sets, layers, **options)
    recorder.raise_if_undefined()
    return recorder.result(shuffled.boxes(vision.shape[1]) if shuffled.order else None)


def recorded_pass(
    model: nn.Module, inputs: Mapping[str, Any], sets: Modalities, layers: LayerNames | None = None, **options: Any
) -> FlowRecorder:
    """One forward pass with a `FlowRecorder` at every attention layer; `options` are those of the recorder."""
    recorder = FlowRecorder(sets, LayerChoice(*sets.vision.shape, layers, streams_of(model)), **options)
    with intercept_attention(model, recorder):
        recorder.outputs = run_model(model, inputs)
    recorder.choice.raise_unless_one_stack(model, inputs)
    return recorder


def _picked(picked: Tensor | Sequence[int] | None, sets: Modalities, name: str) -> Tensor | None:
    if picked is None:
        return None
    examples, tokens = sets.vision.shape
    picked = torch.as_tensor(picked, device=sets.vision.device)
    picked = picked.expand(examples, -1) if picked.ndim == 1 else picked
    if picked.is_floating_point() or picked.ndim != 2 or len(picked) != examples:
        raise ValueError(
            f"{name} must hold token positions, (picked,) or ({examples}, picked), not "
            f"{picked.dtype} {tuple(picked.shape)}"
        )
    if picked.numel() == 0 or picked.min() < 0 or picked.max() >= tokens:
        raise ValueError(f"{name} must hold positions from 0 to {tokens - 1}")
    return picked.long()


# --------------------------------------------------------------------------------------------------- the recursion


class FlowRecorder:
    """Handles every attention of one pass and keeps sums, never a map."""

    outputs: Any = None  # of the model

    def __init__(
        self,
        sets: Modalities,
        choice: LayerChoice,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        per_token: bool = False,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.sets, self.choice, self.starts = sets, choice, starts
        self.rows = None if rows is None else PickedRows(rows)
        self.columns = None if columns is None else PickedColumns(columns, sets.vision.shape[1])
        self.spans: list[list[int]] = []  # per layer: start of each column carried through it
        self.crossed: list[tuple[Tensor, Tensor]] = []  # per layer: (example, start) each
        self.null: list[Tensor] = []  # per layer: (example, start)
        self.heads: list[Tensor] = []  # per layer: (example, head)
        self.token_flows: list[Tensor] | None = [] if per_token else None  # per layer: (example, token, start)
        self._padded = not bool(sets.tokens.all())
        self._two_sets: bool | None = None  # whether 1_V is carried beside 1_L; known at the first chosen layer
        self._checked_masks: list[Tensor | None] = []
        # Share of each token's attention that ends in L (and V), with the model's attention and with a uniform one.
        self._ends_in = self._ends_in_uniform = torch.empty(0)  # example token (start set)

    def __call__(self, call: AttentionCall) -> Tensor:
        block = self.choice.block(call)
        if block is None:
            return call.output()
        self._move_to(call.query)
        self._check_padding(call, block)
        if block.is_first:
            self._open_layer(call)
        source = self._ends_in[:, block.keys]
        extra = [] if self.columns is None else [self.columns.carried(source, block)]
        # Rows of attention sum to one, so the mean can bypass the kernel: in half precision only differences between
        # tokens are rounded.
        mean = source.mean(dim=1, keepdim=True)
        output, carried = call.output_and_columns(torch.cat([source - mean, *extra], dim=-1))
        per_head, extras = carried.tensor_split([mean.shape[-1]], dim=-1)
        self._add(call, block, per_head.to(mean) + mean[:, :, None])
        if self.columns is not None:
            self.columns.add(extras, block)
        if self.rows is not None:
            self.rows.add(call, block)
        if block.is_last:
            self._close_layer()
        return output

    def result(self, boxes: Tensor | None) -> InterModalityFlow:
        """What was recorded in the pass."""
        rows, columns = self.rows, self.columns
        return InterModalityFlow(
            text_to_vision=self._triangle([to_vision for to_vision, _ in self.crossed]),
            vision_to_text=self._triangle([to_text for _, to_text in self.crossed]),
            null=self._triangle(self.null),
            per_head=torch.stack(self.heads, dim=1),
            layers=tuple(self.choice.names),
            per_token=None if self.token_flows is None else self._triangle(self.token_flows),
            rows=None if rows is None else torch.stack(rows.weights, dim=1),
            columns=None if columns is None else torch.stack(columns.weights, dim=1),
            rows_from_input=None if rows is None else rows.from_input(),
            columns_from_input=None if columns is None else torch.stack(columns.from_input, dim=1),
            boxes=boxes,
        )

    def raise_if_undefined(self) -> None:
        """Refuse examples in which the modalities never meet, or attention is nan."""
        apart = self._triangle(self.null).nan_to_num().amax(dim=(1, 2)) == 0
        if apart.any():
            raise ValueError(
                f"in examples {apart.nonzero().flatten().tolist()} the mask never lets one modality attend to the "
                "other: nothing can flow between them"
            )
        for layer, heads in enumerate(self.heads):
            if heads.isnan().any():
                broken = heads.isnan().any(dim=1).nonzero().flatten().tolist()
                raise ValueError(
                    f"attention is nan in {self.choice.names[layer]} (examples {broken}): the model's hidden states "
                    "are nan there, or a real token can attend to nothing"
                )

    def _triangle(self, by_stop: list[Tensor]) -> Tensor:
        """(example, [token,] start) for each last layer -> (example, layer, layer[, token])."""
        layers, first = len(by_stop), by_stop[0]
        square = first.new_full((len(first), layers, layers, *first.shape[1:-1]), torch.nan)
        for stop, (starts, values) in enumerate(zip(self.spans, by_stop, strict=True)):
            square[:, starts, stop] = values.movedim(-1, 1).to(square)
        return square

    def _move_to(self, query: Tensor) -> None:
        if self.sets.vision.device != query.device:  # also between the devices of a split model
            self.sets = Modalities(*(part.to(query.device) for part in self.sets))
        self._ends_in, self._ends_in_uniform = self._ends_in.to(query.device), self._ends_in_uniform.to(query.device)

    def _check_padding(self, call: AttentionCall, block: Block) -> None:
        """1 - 1_L is 1_V only if no token in neither set, such as padding, is attended to."""
        if any(call.mask is mask for mask in self._checked_masks) or self._two_sets:
            return
        self._checked_masks.append(call.mask)
        padding = ~self.sets.tokens[:, block.keys]
        attended = not self.sets.complete or call.can_attend(self.sets.tokens[:, block.queries], padding)
        if not block.is_whole_layer:
            attended = attended or self._padded  # the other attentions of the layer are not known yet
        if attended and self._two_sets is False:
            raise ValueError(
                f"{call.name} attends to padding, which the layers before it mask: pass the positions that the model "
                "treats as real as `tokens`"
            )
        self._two_sets = attended

    def _open_layer(self, call: AttentionCall) -> None:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        fresh = indicators(self.sets, dtype)[..., : 2 if self._two_sets else 1]  # example token set
        carried: list[int] = []
        if self.spans:
            kept = [i for i, start in enumerate(self.spans[-1]) if self.starts is None or start in self.starts]
            carried = [self.spans[-1][i] for i in kept]
            self._ends_in, self._ends_in_uniform = (
                torch.cat([self._by_span(columns)[:, :, kept].flatten(2), fresh], dim=-1)
                for columns in (self._ends_in, self._ends_in_uniform)
            )
        else:
            self._ends_in = self._ends_in_uniform = fresh
        self.spans.append([*carried, len(self.spans)])
        # The layer's result starts as its input; each attention of the layer replaces the rows of its queries.
        self._after, self._after_uniform = self._ends_in.clone(), self._ends_in_uniform.clone()
        heads = call.query.shape[1]
        self._within = fresh[:, :, None].expand(-1, -1, heads, -1).clone()  # example token head set

    def _add(self, call: AttentionCall, block: Block, per_head: Tensor) -> None:
        """per_head : Tensor, shape (example, query, head, start * set): attention times `_ends_in`."""
        rows = block.queries
        newest = self._by_span(per_head)[..., -1, :]
        self._within[:, rows] = (self._within[:, rows] + newest) / 2
        after = (self._after[:, rows] + per_head.mean(dim=2)) / 2
        uniform = (self._after_uniform[:, rows] + call.uniform_attention(self._ends_in_uniform[:, block.keys])) / 2
        self._after[:, rows] = self._without_empty_rows(after, rows)
        self._after_uniform[:, rows] = self._without_empty_rows(uniform, rows)

    def _close_layer(self) -> None:
        self._ends_in, self._ends_in_uniform = self._after, self._after_uniform
        self.heads.append(crossing_by_head(with_vision(self._within), self.sets))
        ends_in = with_vision(self._by_span(self._ends_in))
        self.crossed.append(crossing(ends_in, self.sets))
        self.null.append(sum(crossing(with_vision(self._by_span(self._ends_in_uniform)), self.sets)))
        if self.token_flows is not None:
            self.token_flows.append(crossing_by_token(ends_in, self.sets))
        for picked in (self.columns, self.rows):
            if picked is not None:
                picked.close_layer()

    def _by_span(self, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, 2 if self._two_sets else 1))

    def _without_empty_rows(self, columns: Tensor, rows: slice) -> Tensor:
        """A padding query may have no key; some kernels return nan, and 0 * nan would spread it."""
        if not self._padded:
            return columns
        return columns.masked_fill(~self.sets.tokens[:, rows, None] & columns.isnan(), 0.0)


# ------------------------------------------------------------------------------------------ picked rows and columns


class PickedColumns:
    """Picked columns of attention: one-hot values, fresh at each layer and rolled out."""

    def __init__(self, picked: Tensor, tokens: int) -> None:
        self._onehot = one_hot(picked, tokens).transpose(1, 2)  # example token picked
        self._rolled = self._onehot.float()
        self._after: Tensor | None = None
        self._fresh: Tensor | None = None  # example token head picked
        self.weights: list[Tensor] = []
        self.from_input: list[Tensor] = []

    def carried(self, like: Tensor, block: Block) -> Tensor:
        """(example, key, 2 * picked): fresh ones, then rolled ones."""
        self._onehot, self._rolled = self._onehot.to(like), self._rolled.to(like)
        return torch.cat([self._onehot[:, block.keys], self._rolled[:, block.keys]], dim=-1)

    def add(self, carried: Tensor, block: Block) -> None:
        """carried : Tensor, shape (example, query, head, 2 * picked)."""
        fresh, rolled = carried.to(self._rolled).chunk(2, dim=-1)
        if self._after is None:
            self._after = self._rolled.clone()
            self._fresh = fresh.new_zeros(len(fresh), self._rolled.shape[1], *fresh.shape[2:])
        self._fresh[:, block.queries] += fresh
        self._after[:, block.queries] = (self._after[:, block.queries] + rolled.mean(dim=2)) / 2

    def close_layer(self) -> None:
        """Keep the layer's columns, and roll its result on."""
        self.weights.append(self._fresh.permute(0, 2, 3, 1))
        self.from_input.append(self._after.transpose(1, 2))
        self._rolled, self._after = self._after, None


@dataclass
class PickedRows:
    """Picked rows of attention, from queries and keys; these are kept for the roll-out, linear in tokens."""

    picked: Tensor
    weights: list[Tensor] = field(default_factory=list)
    _layers: list[list[tuple[AttentionCall, Block]]] = field(default_factory=list)
    _open: list[tuple[AttentionCall, Block]] = field(default_factory=list)

    def add(self, call: AttentionCall, block: Block) -> None:
        """Keep one attention of the layer."""
        self._open.append((call, block))

    def close_layer(self) -> None:
        """Compute the picked rows of the layer's joint matrix, (example, head, picked, token)."""
        tokens, first = self._tokens, self._open[0][0]
        joint = first.query.new_zeros(*self.picked.shape, tokens, first.query.shape[1], dtype=torch.float32)
        joint = joint.permute(0, 3, 1, 2).contiguous()
        for call, block in self._open:
            self.picked = self.picked.to(call.query.device)
            begin, end, _ = block.queries.indices(tokens)
            inside = (self.picked >= begin) & (self.picked < end)
            weights = call.weights((self.picked - begin).clamp(0, end - begin - 1))
            joint[..., block.keys] += weights.to(joint) * inside[:, None, :, None]
        self.weights.append(joint)
        self._layers.append(self._open)
        self._open = []

    def from_input(self) -> Tensor:
        """Rows of A^{1,j}, from the last factor to the first; (example, layer, picked, token)."""
        examples, picked = self.picked.shape
        onehot = one_hot(self.picked, self._tokens).to(self.weights[0])
        rolled = onehot.new_empty(examples, 0, self._tokens)  # example (stop picked) token
        for layer in reversed(self._layers):
            rolled = torch.cat([onehot.to(rolled), rolled], dim=1)
            rolled = self._times_layer(rolled.to(layer[0][0].query.device), layer)
        return rolled.unflatten(1, (len(self._layers), picked))

    @property
    def _tokens(self) -> int:
        calls = self._layers[0] if self._layers else self._open
        ends = [block.keys.stop for _, block in calls]
        return calls[0][0].lengths[2] if None in ends else max(ends)

    def _times_layer(self, rows: Tensor, layer: list[tuple[AttentionCall, Block]]) -> Tensor:
        """rows (example, row, token) times A of a layer, whose attentions each halve the state before them."""
        product = torch.zeros_like(rows)
        share = torch.ones(rows.shape[2], device=rows.device)  # of each query, not yet distributed
        for call, block in reversed(layer):
            share[block.queries] /= 2
            weighed = rows[:, :, block.queries] * share[block.queries]
            product[:, :, block.keys] += _rows_times_attention(weighed, call)
        return product + rows * share


def _rows_times_attention(rows: Tensor, call: AttentionCall, entries: int = 2**24) -> Tensor:
    """rows (example, row, query) times attention, averaged over heads; by blocks of queries."""
    examples, queries, keys = call.lengths
    size = max(1, entries // (examples * call.query.shape[1] * keys))
    product = rows.new_zeros(*rows.shape[:2], keys)
    for some in torch.arange(queries, device=rows.device).split(size):
        weights = call.weights(some.expand(examples, -1)).mean(dim=1)  # example some key
        product += rows[:, :, some] @ weights.to(rows)
    return product
