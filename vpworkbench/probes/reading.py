"""Who may attend to whom in an attention layer: its mask, without its queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Additive masks in use: -inf, the smallest number of the dtype, BERT's old -10,000 (-9,984 in bfloat16).
MASKED_BELOW = -5000.0


class Reading(NamedTuple):
    """Which keys the queries of an attention layer may attend to."""

    mask: Tensor | None  # (example or 1, 1, query or 1, key), as that of a call
    causal: bool
    keys: int

    def keys_of(self, queries: Tensor) -> Tensor:
        """Keys that some of `queries` may attend to; bool (example, query) -> bool (example, key)."""
        if self.mask is None and self.causal:
            return queries.flip(1).cumsum(dim=1).flip(1) > 0  # all keys up to the last query
        if self.mask is None:
            return queries.any(dim=1, keepdim=True).expand(-1, self.keys)
        queries = queries.to(self.mask.device)
        if same_for_every_query(self.mask):
            return allowed_by(self.mask[:, 0, 0]) & queries.any(dim=1, keepdim=True)
        masks = self.mask.expand(len(queries), -1, -1, -1)
        return torch.stack([allowed_by(mask[0, rows]).any(dim=0) for mask, rows in zip(masks, queries, strict=True)])


def allowed_by(mask: Tensor) -> Tensor:
    """The pairs that a mask allows, bool, in its shape."""
    return mask if mask.dtype == torch.bool else mask > MASKED_BELOW


def same_for_every_query(mask: Tensor) -> bool:
    """Whether all queries have one row; mask (example, head, query, key)."""
    return mask.shape[2] == 1 or mask.stride(2) == 0
