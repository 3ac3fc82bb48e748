"""Inter-Modality Flow as the paper prints it (Sec. 3.2, Eq. 2-6), for attention maps at hand.

`flow_from_attention` is the definition. `vpworkbench.probes.flow` gives the same numbers for a model without any
attention map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpworkbench.probes.modality import Modalities, both_modalities


def flow_from_attention(attention: Tensor, vision: Tensor, *, language: Tensor | None = None) -> Tensor:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    Parameters
    ----------
    attention : Tensor, shape (layer, head, query, key)
        Softmax weights of one example without padding: rows sum to 1.
    vision : BoolTensor, shape (token,)
        True at visual tokens.
    language : BoolTensor, shape (token,), optional
        Every other token where not given; tokens in neither set count in neither sum.

    Returns
    -------
    Tensor, shape (layer, layer)
        `flow[i, j]` in [0, 1], from the input of layer i to the output of layer j; nan where j < i.

    Raises
    ------
    ValueError
        If one modality has no token: the share would be 0 whatever the model does.
    """
    if attention.ndim != 4 or attention.shape[2:] != (len(vision), len(vision)):
        raise ValueError(
            f"attention must be (layer, head, query, key) over the {len(vision)} tokens of "
            f"`vision`, not {tuple(attention.shape)}"
        )
    given = None if language is None else language[None]
    sets = both_modalities(vision[None], torch.ones_like(vision)[None], given)
    weights = attention.mean(dim=1)  # layer query key
    flow = weights.new_full((len(weights), len(weights)), torch.nan)
    for start in range(len(weights)):
        reach = indicators(sets, weights.dtype)[0]  # token set
        for stop in range(start, len(weights)):
            reach = (reach + weights[stop] @ reach) / 2  # the residual keeps half, Eq. 3
            flow[start, stop] = sum(crossing(reach[None], sets))
    return flow


def crossing_share(matrix: Tensor, vision: Tensor, language: Tensor | None = None) -> Tensor:
    """Eq. 5-6 for any matrix (query, key) of one example; rows that are nan do not count."""
    language = ~vision if language is None else language
    matrix = matrix.nan_to_num()
    same = vision[:, None] & vision | language[:, None] & language
    cross = vision[:, None] & language | language[:, None] & vision
    return matrix[cross].sum() / matrix[cross | same].sum()


def indicators(sets: Modalities, dtype: torch.dtype) -> Tensor:
    """1_L and 1_V: (example, token, set)."""
    return torch.stack([sets.language, sets.vision], dim=-1).to(dtype)


def both(reach: Tensor) -> Tensor:
    """Add the share that ends on vision where only the share that ends on language is carried."""
    return reach if reach.shape[-1] == 2 else torch.cat([reach, 1 - reach], dim=-1)


def crossing(reach: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """Eq. 5-6: text to vision and vision to text, each over inter + intra.

    Parameters
    ----------
    reach : Tensor, shape (example, token, ..., set)
        Share of each query's attention that ends on language (0) and on vision (1).

    Returns
    -------
    tuple of two Tensor, shape (example, ...)
    """
    from_language, from_vision = _sums(reach, sets)
    total = (from_language + from_vision).sum(dim=-1)
    return from_language[..., 1] / total, from_vision[..., 0] / total


def crossing_by_head(reach: Tensor, sets: Modalities) -> Tensor:
    """Flow of each head, (example, head), from `reach` (example, token, head, set).

    Inter over the heads' mean of inter + intra: where some attention ends in neither set the heads
    weigh differently, and only so is their mean the flow of the layer.
    """
    from_language, from_vision = _sums(reach, sets)
    total = (from_language + from_vision).sum(dim=-1).mean(dim=1, keepdim=True)
    return (from_language[..., 1] + from_vision[..., 0]) / total


def _sums(reach: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """`reach` (example, token, ..., set) summed over the queries in L and over those in V."""
    return tuple(torch.einsum("et,et...->e...", queries.to(reach), reach) for queries in (sets.language, sets.vision))


def crossing_by_token(reach: Tensor, sets: Modalities) -> Tensor:
    """Share of each token's own attention that crosses, (example, token, ...); else nan."""
    to_language, to_vision = (reach / reach.sum(dim=-1, keepdim=True)).unbind(dim=-1)
    flow = torch.where(sets.vision[..., None], to_language, to_vision)
    return flow.masked_fill(~(sets.vision | sets.language)[..., None], torch.nan)
