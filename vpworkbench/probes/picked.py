"""Picked rows and columns of attention, of each layer and rolled out; never a whole map."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vpworkbench.probes.attention import AttentionCall
from vpworkbench.probes.layers import Block


class PickedColumns:
    """Picked columns of attention: one-hot values, fresh at each layer and rolled out."""

    def __init__(self, picked: Tensor, tokens: int) -> None:
        self._onehot = one_hot(picked, tokens).transpose(1, 2)  # example token picked
        self._rolled = self._onehot.float()
        self.weights: list[Tensor] = []
        self.from_input: list[Tensor] = []

    def carried(self, like: Tensor, block: Block) -> Tensor:
        """(example, key, 2 * picked): fresh ones, then rolled ones."""
        self._onehot, self._rolled = self._onehot.to(like), self._rolled.to(like)
        return torch.cat([self._onehot[:, block.keys], self._rolled[:, block.keys]], dim=-1)

    def add(self, carried: Tensor, block: Block) -> None:
        """carried : Tensor, shape (example, query, head, 2 * picked)."""
        fresh, rolled = carried.to(self._rolled).chunk(2, dim=-1)
        if block.is_first:
            self._after = self._rolled.clone()
            self._fresh = fresh.new_zeros(len(fresh), self._rolled.shape[1], *fresh.shape[2:])
        self._fresh[:, block.queries] += fresh  # example token head picked
        self._after[:, block.queries] = (self._after[:, block.queries] + rolled.mean(dim=2)) / 2
        if block.is_last:
            self.weights.append(self._fresh.permute(0, 2, 3, 1))
            self.from_input.append(self._after.transpose(1, 2))
            self._rolled = self._after


class PickedRows:
    """Picked rows of attention, from queries and keys; these are kept for the roll-out, linear in tokens."""

    def __init__(self, picked: Tensor, tokens: int) -> None:
        self.picked, self.tokens = picked, tokens
        self.weights: list[Tensor] = []  # per layer: (example, head, picked, token)
        self._layers: list[list[tuple[AttentionCall, Block]]] = []

    def add(self, call: AttentionCall, block: Block) -> None:
        """The picked rows that lie in this attention."""
        self.picked = self.picked.to(call.query.device)
        if block.is_first:
            (examples, picked), heads = self.picked.shape, call.query.shape[1]
            self.weights.append(call.query.new_zeros(examples, heads, picked, self.tokens, dtype=torch.float32))
            self._layers.append([])
        begin, end, _ = block.queries.indices(self.tokens)
        inside = (self.picked >= begin) & (self.picked < end)
        weights = call.weights((self.picked - begin).clamp(0, end - begin - 1))
        self.weights[-1][..., block.keys] += weights.to(self.weights[-1]) * inside[:, None, :, None]
        self._layers[-1].append((replace(call, value=call.value.new_empty(0)), block))

    def from_input(self) -> Tensor:
        """Rows of A^{1,j}, from the last factor to the first; (example, layer, picked, token)."""
        examples, picked = self.picked.shape
        onehot = one_hot(self.picked, self.tokens).to(self.weights[0])
        rolled = onehot.new_empty(examples, 0, self.tokens)  # example (stop picked) token
        for layer in reversed(self._layers):
            rolled = torch.cat([onehot.to(rolled), rolled], dim=1)
            rolled = self._times_layer(rolled.to(layer[0][0].query.device), layer)
        return rolled.unflatten(1, (len(self._layers), picked))

    def _times_layer(self, rows: Tensor, layer: list[tuple[AttentionCall, Block]]) -> Tensor:
        """rows (example, row, token) times A of a layer, whose attentions each halve the state before them."""
        product = torch.zeros_like(rows)
        share = torch.ones(rows.shape[2], device=rows.device)  # of each query, not yet distributed
        for call, block in reversed(layer):
            share[block.queries] /= 2
            weighed = rows[:, :, block.queries] * share[block.queries]
            for some, weights in call.mean_weights():
                product[:, :, block.keys] += weighed[:, :, some] @ weights.to(rows)
        return product + rows * share
