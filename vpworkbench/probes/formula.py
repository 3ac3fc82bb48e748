"""The sets V and L, and Inter-Modality Flow as the paper prints it (Sec. 3.2, Eq. 2-6) for attention maps at hand.

`flow_from_attention` is the definition. `vpworkbench.probes.flow` gives the same numbers without any attention map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Modalities(NamedTuple):
    """The sets V and L of a batch; all bool (example, token), padding in neither."""

    vision: Tensor
    language: Tensor
    tokens: Tensor

    @property
    def one_sided(self) -> Tensor:
        """(example,) bool: True where V or L is empty."""
        return ~(self.vision.any(dim=1) & self.language.any(dim=1))

    def indicators(self, dtype: torch.dtype) -> Tensor:
        """1_L and 1_V: (example, token, set)."""
        return torch.stack([self.language, self.vision], dim=-1).to(dtype)


def modalities(vision: Tensor, tokens: Tensor, language: Tensor | None = None) -> Modalities:
    """The sets V and L; by default every token that is not visual is language.

    Parameters
    ----------
    vision, tokens, language : BoolTensor, shape (example, token)
        `vision` and `language` may cover padding, which is in neither set; they must not overlap.
    """
    for name, value in {"vision": vision, "tokens": tokens, "language": language}.items():
        if value is not None and (value.dtype != torch.bool or value.ndim != 2 or value.shape != vision.shape):
            raise ValueError(
                f"vision is {tuple(vision.shape)} and {name} is {value.dtype} {tuple(value.shape)}: each must be bool, "
                "(example, token), over the sequence on which the attention runs"
            )
    tokens, vision = tokens.to(vision.device), vision & tokens.to(vision.device)
    language = ~vision if language is None else language.to(vision.device)
    if (vision & language).any():
        raise ValueError("vision and language overlap: a token belongs to one modality at most")
    return Modalities(vision, language & tokens, tokens)


def both_modalities(vision: Tensor, tokens: Tensor, language: Tensor | None = None) -> Modalities:
    """As `modalities`, and refuse examples that lack one: their flow would be 0 in any model."""
    sets = modalities(vision, tokens, language)
    for kind, part in (("visual", sets.vision), ("language", sets.language)):
        lacking = (~part.any(dim=1)).nonzero().flatten().tolist()
        if lacking:
            raise ValueError(
                f"examples {lacking} have no {kind} token; check `vision`, `tokens` and `language`, or leave these "
                "examples out"
            )
    return sets


def flow_from_attention(attention: Tensor, vision: Tensor, *, language: Tensor | None = None) -> Tensor:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    Parameters
    ----------
    attention : Tensor, shape (layer, head, query, key)
        Softmax weights of one example without padding: rows sum to 1.
    vision : BoolTensor, shape (token,)
        True at visual tokens.
    language : BoolTensor, shape (token,), optional
        Every other token by default; tokens in neither set count in neither sum.

    Returns
    -------
    Tensor, shape (layer, layer)
        `flow[i, j]` in [0, 1], from the input of layer i to the output of layer j; nan where j < i.
    """
    if attention.ndim != 4 or attention.shape[2:] != (len(vision), len(vision)):
        raise ValueError(
            f"attention must be (layer, head, query, key) over the {len(vision)} tokens of `vision`, not "
            f"{tuple(attention.shape)}"
        )
    sets = both_modalities(vision[None], torch.ones_like(vision)[None], None if language is None else language[None])
    weights = attention.mean(dim=1)  # layer query key
    flow = weights.new_full((len(weights), len(weights)), torch.nan)
    for start in range(len(weights)):
        ends_in = sets.indicators(weights.dtype)[0]  # token set: share of its attention that ends in L, in V
        for stop in range(start, len(weights)):
            ends_in = (ends_in + weights[stop] @ ends_in) / 2  # the residual keeps half, Eq. 3
            flow[start, stop] = sum(crossing(ends_in[None], sets))
    return flow


def crossing_share(matrix: Tensor, vision: Tensor, language: Tensor | None = None) -> Tensor:
    """Eq. 5-6 for any matrix (query, key) of one example; nan entries do not count."""
    language = ~vision if language is None else language
    matrix = matrix.nan_to_num()
    same = vision[:, None] & vision | language[:, None] & language
    cross = vision[:, None] & language | language[:, None] & vision
    return matrix[cross].sum() / matrix[cross | same].sum()


# ------------------------------------------------------------------------- Eq. 5-6 from each token's share in L and V
# `ends_in` (example, token, ..., set) is the share of each query's attention that ends in L (0) and in V (1). If only L
# is given, the rest ends in V.


def crossing(ends_in: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """Text to vision and vision to text, each over inter + intra; (example, ...) both."""
    from_language, from_vision = _sums(ends_in, sets)
    total = (from_language + from_vision).sum(dim=-1)
    return from_language[..., 1] / total, from_vision[..., 0] / total


def crossing_by_query(ends_in: Tensor, sets: Modalities) -> Tensor:
    """What each query adds to the flow, (example, token, ...); 0 for tokens in neither set."""
    from_language, from_vision = _sums(ends_in, sets)
    total = (from_language + from_vision).sum(dim=-1)
    beside = (...,) + (None,) * (ends_in.ndim - 3)
    to_language = ends_in[..., 0]
    to_vision = 1 - to_language if ends_in.shape[-1] == 1 else ends_in[..., 1]
    crossed = torch.where(sets.language[beside], to_vision, to_language)
    return crossed.masked_fill(~(sets.language | sets.vision)[beside], 0) / total[:, None]


def crossing_by_head(ends_in: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """Text to vision and vision to text of each head, (example, head) both, from `ends_in` (example, token, head, set).

    Inter over the heads' mean of inter + intra, so that the mean over heads is the flow of the layer also where some
    attention ends in neither set.
    """
    from_language, from_vision = _sums(ends_in, sets)
    total = (from_language + from_vision).sum(dim=-1).mean(dim=1, keepdim=True)
    return from_language[..., 1] / total, from_vision[..., 0] / total


def _sums(ends_in: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """`ends_in` summed over the queries in L, and over those in V; (example, ..., set) both."""
    if ends_in.shape[-1] == 1:
        ends_in = torch.cat([ends_in, 1 - ends_in], dim=-1)
    queries = (sets.language.to(ends_in), sets.vision.to(ends_in))
    return tuple(torch.einsum("et,et...->e...", query, ends_in) for query in queries)
