"""The recursion behind `inter_modality_flow`: sums of products of attention, carried through one forward pass.

A^{i,j} = A^j ... A^i (Eq. 4) is only ever summed over blocks. Summing its columns over L is the product with the
indicator 1_L, so one column per start layer i is carried through the layers, u <- 0.5 (u + mean over heads of
softmax(Q K^T / sqrt(d)) u), as one more value of fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpworkbench.probes.attention import AttentionCall
from vpworkbench.probes.formula import both, crossing, crossing_by_head, crossing_by_token, indicators
from vpworkbench.probes.layers import LayerChoice, Place
from vpworkbench.probes.modality import Modalities


class Recorder:
    """Handles every attention of one pass and keeps sums, never a map."""

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
        self.sets = sets
        self.choice = choice
        self.rows = None if rows is None else Rows(rows)
        self.columns = None if columns is None else Columns(columns, sets.vision.shape[1])
        self.starts = starts
        self.spans: list[list[int]] = []  # per layer: start of each column carried through it
        self.crossed: list[tuple[Tensor, Tensor]] = []  # per layer: (example, start) each
        self.null: list[Tensor] = []  # per layer: (example, start)
        self.heads: list[Tensor] = []  # per layer: (example, head)
        self.token_flows: list[Tensor] | None = [] if per_token else None  # per layer: (example, token, start)
        self._padded = not bool(sets.tokens.all())
        self._two_sets: bool | None = None  # 1_V beside 1_L; known at the first layer that counts
        self._masks: list[Tensor | None] = []  # those whose padding was looked at
        self._reach = self._even = torch.empty(0)  # (example, token, start * set): with attention, with uniform

    def __call__(self, call: AttentionCall) -> Tensor:
        place = self.choice.place(call)
        if place is None:
            return call.output()
        self._move_to(call.query)
        self._look_at_padding(call, place)
        if place.opens:
            self._open_layer(call)
        source = self._reach[:, place.keys]
        extra = [] if self.columns is None else [self.columns.carried(source, place)]
        # Rows of attention sum to one, so the mean can go around the kernel: in half precision
        # only what differs between tokens is rounded.
        mean = source.mean(dim=1, keepdim=True)
        output, carried = call.carry(torch.cat([source - mean, *extra], dim=-1))
        per_head, extras = carried.tensor_split([mean.shape[-1]], dim=-1)
        self._attended(call, place, per_head.to(mean) + mean[:, :, None])
        if self.columns is not None:
            self.columns.attended(extras, place)
        if self.rows is not None:
            self.rows.attended(call, place)
        if place.closes:
            self._close_layer()
        return output

    def triangle(self, by_stop: list[Tensor]) -> Tensor:
        """(example, [token,] start) for each last layer -> (example, layer, layer[, token])."""
        layers, first = len(by_stop), by_stop[0]
        square = first.new_full((len(first), layers, layers, *first.shape[1:-1]), torch.nan)
        for stop, (starts, values) in enumerate(zip(self.spans, by_stop, strict=True)):
            square[:, starts, stop] = values.movedim(-1, 1).to(square)
        return square

    def raise_if_undefined(self) -> None:
        """Where the modalities never meet, or attention is nan."""
        apart = self.triangle(self.null).nan_to_num().amax(dim=(1, 2)) == 0
        if apart.any():
            raise ValueError(
                f"in examples {apart.nonzero().flatten().tolist()} the mask never lets one "
                "modality attend to the other: nothing can flow between them"
            )
        for layer, heads in enumerate(self.heads):
            if heads.isnan().any():
                broken = heads.isnan().any(dim=1).nonzero().flatten().tolist()
                raise ValueError(
                    f"attention is nan in {self.choice.names[layer]} (examples {broken}): the "
                    "model's hidden states are nan there, or a real token can attend to nothing"
                )

    def _move_to(self, query: Tensor) -> None:
        if self.sets.vision.device != query.device:  # also between the devices of a split model
            self.sets = Modalities(*(part.to(query.device) for part in self.sets))
        self._reach, self._even = self._reach.to(query.device), self._even.to(query.device)

    def _look_at_padding(self, call: AttentionCall, place: Place) -> None:
        """1 - 1_L is 1_V only where nobody looks at a token in neither set; padding may be one."""
        if any(call.mask is mask for mask in self._masks) or self._two_sets:
            return
        self._masks.append(call.mask)
        padding = ~self.sets.tokens[:, place.keys]
        seen = not self.sets.complete or call.can_attend(self.sets.tokens[:, place.queries], padding)
        if not place.is_everything:
            seen = seen or self._padded  # the other attentions of the layer are not known yet
        if seen and self._two_sets is False:
            raise ValueError(
                f"{call.name} attends to padding, which the layers before it mask: give `tokens` "
                "the positions that the model treats as real"
            )
        self._two_sets = seen

    def _open_layer(self, call: AttentionCall) -> None:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        fresh = indicators(self.sets, dtype)[..., : 2 if self._two_sets else 1]  # example token set
        carried: list[int] = []
        if self.spans:
            kept = [i for i, start in enumerate(self.spans[-1]) if self.starts is None or start in self.starts]
            carried = [self.spans[-1][i] for i in kept]
            self._reach = torch.cat([self._by_span(self._reach)[:, :, kept].flatten(2), fresh], dim=-1)
            self._even = torch.cat([self._by_span(self._even)[:, :, kept].flatten(2), fresh], dim=-1)
        else:
            self._reach = self._even = fresh
        self.spans.append([*carried, len(self.spans)])
        # What the layer leaves: starts as what it found, each attention replaces its rows.
        self._reach_after, self._even_after = self._reach.clone(), self._even.clone()
        heads = call.query.shape[1]
        self._within = fresh[:, :, None].expand(-1, -1, heads, -1).clone()  # example token head set

    def _attended(self, call: AttentionCall, place: Place, per_head: Tensor) -> None:
        """per_head : Tensor, shape (example, query, head, start * set): attention times `_reach`."""
        rows = place.queries
        newest = self._by_span(per_head)[..., -1, :]
        self._within[:, rows] = (self._within[:, rows] + newest) / 2
        reach = (self._reach_after[:, rows] + per_head.mean(dim=2)) / 2
        even = (self._even_after[:, rows] + call.uniform(self._even[:, place.keys])) / 2
        self._reach_after[:, rows] = self._without_empty_rows(reach, rows)
        self._even_after[:, rows] = self._without_empty_rows(even, rows)

    def _close_layer(self) -> None:
        self._reach, self._even = self._reach_after, self._even_after
        self.heads.append(crossing_by_head(both(self._within), self.sets))
        reach = both(self._by_span(self._reach))
        self.crossed.append(crossing(reach, self.sets))
        self.null.append(sum(crossing(both(self._by_span(self._even)), self.sets)))
        if self.token_flows is not None:
            self.token_flows.append(crossing_by_token(reach, self.sets))
        for picked in (self.columns, self.rows):
            if picked is not None:
                picked.close_layer()

    def _by_span(self, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, 2 if self._two_sets else 1))

    def _without_empty_rows(self, columns: Tensor, rows: slice) -> Tensor:
        """A padding query may see no key; some kernels answer nan, and 0 * nan would spread it."""
        if not self._padded:
            return columns
        return columns.masked_fill(~self.sets.tokens[:, rows, None] & columns.isnan(), 0.0)


class Columns:
    """Picked columns of attention: one-hot values, fresh at each layer and rolled out."""

    def __init__(self, picked: Tensor, tokens: int) -> None:
        self._onehot = torch.nn.functional.one_hot(picked, tokens).transpose(1, 2)  # example token picked
        self._rolled = self._onehot.float()
        self._after: Tensor | None = None
        self._fresh: Tensor | None = None  # example token head picked
        self.weights: list[Tensor] = []
        self.from_input: list[Tensor] = []

    def carried(self, like: Tensor, place: Place) -> Tensor:
        """(example, key, 2 * picked): fresh ones, then rolled ones."""
        self._onehot, self._rolled = self._onehot.to(like), self._rolled.to(like)
        return torch.cat([self._onehot[:, place.keys], self._rolled[:, place.keys]], dim=-1)

    def attended(self, carried: Tensor, place: Place) -> None:
        """carried : Tensor, shape (example, query, head, 2 * picked)."""
        fresh, rolled = carried.to(self._rolled).chunk(2, dim=-1)
        if self._after is None:
            self._after = self._rolled.clone()
            self._fresh = fresh.new_zeros(len(fresh), self._rolled.shape[1], *fresh.shape[2:])
        self._fresh[:, place.queries] += fresh
        self._after[:, place.queries] = (self._after[:, place.queries] + rolled.mean(dim=2)) / 2

    def close_layer(self) -> None:
        """Keep the layer's columns; what it left is rolled on."""
        self.weights.append(self._fresh.permute(0, 2, 3, 1))
        self.from_input.append(self._after.transpose(1, 2))
        self._rolled, self._after = self._after, None


@dataclass
class Rows:
    """Picked rows of attention, from queries and keys; these are kept for the roll-out, linear in tokens."""

    picked: Tensor
    weights: list[Tensor] = field(default_factory=list)
    _layers: list[list[tuple[AttentionCall, Place]]] = field(default_factory=list)
    _open: list[tuple[AttentionCall, Place]] = field(default_factory=list)

    def attended(self, call: AttentionCall, place: Place) -> None:
        """Remember one attention of the layer."""
        self._open.append((call, place))

    def close_layer(self) -> None:
        """The picked rows of the layer's joint matrix, (example, head, picked, token)."""
        tokens = self._tokens
        first = self._open[0][0]
        joint = first.query.new_zeros(*self.picked.shape, tokens, first.query.shape[1], dtype=torch.float32)
        joint = joint.permute(0, 3, 1, 2).contiguous()
        for call, place in self._open:
            self.picked = self.picked.to(call.query.device)
            begin, end, _ = place.queries.indices(tokens)
            inside = (self.picked >= begin) & (self.picked < end)
            weights = call.weights((self.picked - begin).clamp(0, end - begin - 1))
            joint[..., place.keys] += weights.to(joint) * inside[:, None, :, None]
        self.weights.append(joint)
        self._layers.append(self._open)
        self._open = []

    def from_input(self) -> Tensor:
        """Rows of A^{1,j}, from the last factor to the first; (example, layer, picked, token)."""
        examples, picked = self.picked.shape
        onehot = torch.nn.functional.one_hot(self.picked, self._tokens).to(self.weights[0])
        rolled = onehot.new_empty(examples, 0, self._tokens)  # example (stop picked) token
        for layer in reversed(self._layers):
            rolled = torch.cat([onehot.to(rolled), rolled], dim=1)
            rolled = self._times_layer(rolled.to(layer[0][0].query.device), layer)
        return rolled.unflatten(1, (len(self._layers), picked))

    @property
    def _tokens(self) -> int:
        calls = self._layers[0] if self._layers else self._open
        ends = [place.keys.stop for _, place in calls]
        return calls[0][0].lengths[2] if None in ends else max(ends)

    def _times_layer(self, rows: Tensor, layer: list[tuple[AttentionCall, Place]]) -> Tensor:
        """rows (example, row, token) times A of a layer, whose attentions each halve what was there before."""
        product = torch.zeros_like(rows)
        share = torch.ones(rows.shape[2], device=rows.device)  # of each query, still to be handed out
        for call, place in reversed(layer):
            share[place.queries] /= 2
            weighed = rows[:, :, place.queries] * share[place.queries]
            product[:, :, place.keys] += _rows_times_attention(weighed, call)
        return product + rows * share


def _rows_times_attention(rows: Tensor, call: AttentionCall, entries: int = 2**24) -> Tensor:
    """rows (example, row, query) times attention, its mean over heads; by blocks of queries."""
    examples, queries, keys = call.lengths
    size = max(1, entries // (examples * call.query.shape[1] * keys))
    product = rows.new_zeros(*rows.shape[:2], keys)
    for block in torch.arange(queries, device=rows.device).split(size):
        weights = call.weights(block.expand(examples, -1)).mean(dim=1)  # example block key
        product += rows[:, :, block] @ weights.to(rows)
    return product
