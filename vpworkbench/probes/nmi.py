"""Do the features of the two modalities form two clusters? (paper Sec. 4.4, Fig. 5)

For each example and layer: k-means with k = 2 on the token features, then the normalised mutual information (NMI)
between clusters and modalities. k-means only needs inner products, and an example has fewer tokens than channels: all
restarts of all examples run at once on the products of tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpworkbench.probes.formula import Modalities, modalities

RESTARTS = 10
_ITERATIONS, _TOLERANCE, _TRIALS = 300, 1e-4, 2  # scikit-learn's; 2 + log(k) trials of k-means++
# Features and products of examples at a time: small enough for a processor's cache.
_CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30}


class Clusters(NamedTuple):
    """The best of all restarts, for every example."""

    labels: Tensor  # (example, token) 0 or 1; -1 at tokens left out
    inertia: Tensor  # (example,) sum of squared distances to the nearest centre


def modality_nmi(
    hidden_states: Sequence[Tensor],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    seed: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """NMI between two k-means clusters and the two modalities, per example and layer (paper Fig. 5).

    The best of 10 runs of Lloyd's algorithm from k-means++, like scikit-learn's `KMeans(2, n_init=10)`; the same
    starting centres give the same labels and NMI.

    Parameters
    ----------
    hidden_states : sequence over layers of Tensor, shape (example, token, channel)
        See `vpworkbench.probes.hidden_states`.
    vision, tokens : BoolTensor, shape (example, token)
    language : BoolTensor, shape (example, token), optional
        `tokens & ~vision` by default; tokens in neither set are left out.
    seed : int
        Seed of the starting centres, which depend neither on the other examples of the batch nor on padding.
    starts : Tensor, shape (layer, example, restart, 2, channel), optional
        Starting centres instead of k-means++.

    Returns
    -------
    Tensor, shape (example, layer)
        float64, in [0, 1]; 1 if the clusters are the modalities. nan, with a warning, for examples with only one
        modality.
    """
    sets = _checked_sets(hidden_states, vision, tokens, language)
    counted, found = sets.vision | sets.language, []
    for layer, hidden in enumerate(hidden_states):
        given = None if starts is None else starts[layer]
        found.append(_nmi(cluster_tokens(hidden, counted, seed=seed + layer * 1_000_003, starts=given).labels, sets))
    return torch.stack(found, dim=1)


def cluster_tokens(hidden: Tensor, tokens: Tensor, *, seed: int = 0, starts: Tensor | None = None) -> Clusters:
    """k-means with two clusters on the tokens of each example of one layer.

    `hidden` is (example, token, channel), `tokens` bool (example, token). `starts`, (example, restart, 2, channel), are
    starting centres instead of k-means++.
    """
    examples, length, channels = hidden.shape
    size = max(1, _CHUNK_BYTES.get(hidden.device.type, 2**28) // (8 * length * (length + channels)))
    parts = []
    for begin in range(0, examples, size):
        chunk = slice(begin, begin + size)
        real = tokens.to(hidden.device)[chunk]
        centred, mean = _centred(hidden[chunk], real)
        products = (centred @ centred.transpose(1, 2)).double()  # differences of squares below need the digits
        if starts is None:
            first = _plus_plus(products, real, seed)
        else:
            centres = starts[chunk].to(products) - mean[:, None, None].to(products)
            towards = torch.einsum("etc,erkc->etrk", centred.to(products), centres)
            first = _Centres(towards, centres.square().sum(dim=-1))
        parts.append(_lloyd(products, real, first, _TOLERANCE / channels))
    return Clusters(*(torch.cat(part) for part in zip(*parts, strict=True)))


class PrincipalComponents(NamedTuple):
    """Two principal components of the tokens of each example and layer."""

    coordinates: Tensor  # (example, layer, token, 2); nan at tokens left out
    explained: Tensor  # (example, layer, 2) share of the variance


def modality_pca(
    hidden_states: Sequence[Tensor], vision: Tensor, tokens: Tensor, *, language: Tensor | None = None
) -> PrincipalComponents:
    """Tokens on their first two principal components; parameters as for `modality_nmi`.

    The sign of each component makes its largest loading positive, as in scikit-learn.
    """
    sets = _checked_sets(hidden_states, vision, tokens, language)
    coordinates, explained = [], []
    for hidden in hidden_states:
        real = (sets.vision | sets.language).to(hidden.device)
        centred, _ = _centred(hidden, real)
        left, singular, loadings = torch.linalg.svd(centred, full_matrices=False)
        left, loadings = left[..., :2], loadings[:, :2]
        largest = loadings.gather(2, loadings.abs().argmax(dim=2, keepdim=True))[..., 0]
        both = left * (singular[:, :2] * largest.sign())[:, None]
        coordinates.append(both.masked_fill(~real[..., None], torch.nan))
        explained.append(singular[:, :2] ** 2 / (singular**2).sum(dim=1, keepdim=True))
    return PrincipalComponents(torch.stack(coordinates, dim=1), torch.stack(explained, dim=1))


def _checked_sets(
    hidden_states: Sequence[Tensor], vision: Tensor, tokens: Tensor, language: Tensor | None
) -> Modalities:
    sets = modalities(vision, tokens, language)
    for layer, hidden in enumerate(hidden_states):
        if hidden.ndim != 3 or hidden.shape[:2] != vision.shape:
            raise ValueError(
                f"hidden_states[{layer}] is {tuple(hidden.shape)}, but vision covers {tuple(vision.shape)}: pass "
                "(example, token, channel) and (example, token)"
            )
        total = hidden.sum(dim=2, dtype=torch.promote_types(hidden.dtype, torch.float32))
        broken = ~total.isfinite() & (sets.vision | sets.language).to(hidden.device)
        if broken.any():
            examples = broken.any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"hidden_states[{layer}] holds nan or infinity in examples {examples}")
    if sets.one_sided.any():
        warnings.warn(
            f"{int(sets.one_sided.sum())} of {len(vision)} examples lack a modality "
            f"(examples {sets.one_sided.nonzero().flatten().tolist()}): their NMI is nan",
            stacklevel=3,
        )
    return sets


def _centred(hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean over real tokens, so that products lose no digits; 0 elsewhere. Returns the mean too.

    In place on one copy, because copying would be a third of the work.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    padding = ~real[..., None]
    centred = hidden.detach().to(dtype, copy=True).masked_fill_(padding, 0)
    mean = centred.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)
    return centred.sub_(mean[:, None]).masked_fill_(padding, 0), mean


class _Centres(NamedTuple):
    """Two centres for each restart, given by inner products only."""

    towards: Tensor  # (example, token, restart, 2) inner product of token and centre
    square: Tensor  # (example, restart, 2) squared length


def _plus_plus(products: Tensor, real: Tensor, seed: int) -> _Centres:
    """Greedy k-means++ as in scikit-learn: of two candidates for the second centre, the one that leaves less inertia.

    All examples share the uniform draws, so that position in the batch and padding do not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(RESTARTS, 1 + _TRIALS, generator=generator, dtype=torch.float64).to(products)
    square = products.diagonal(dim1=1, dim2=2)  # example token
    count = real.sum(dim=1)
    order = (~real).long().argsort(dim=1, stable=True)  # real tokens first
    # The first centres are spread over the tokens: restarts that start alike would end alike.
    spread = (torch.arange(RESTARTS).to(draws) + draws[:, 0]) / RESTARTS
    nth = (spread * count[:, None]).long().clamp(max=real.shape[1] - 1)
    first = order.gather(1, nth)  # example restart

    def distances(picked: Tensor) -> Tensor:
        """Squared distances (example, picked, token), 0 at padding."""
        index = picked[..., None].expand(-1, -1, real.shape[1])
        away = square[:, None] + square.gather(1, picked)[..., None] - 2 * products.gather(1, index)
        return away.clamp(min=0).masked_fill(~real[:, None], 0)

    near = distances(first)
    cumulated = near.cumsum(dim=-1)
    wanted = draws[:, 1:] * cumulated[..., -1:]  # example restart trial
    candidates = torch.searchsorted(cumulated, wanted).clamp(max=real.shape[1] - 1)
    left = [torch.minimum(near, distances(candidate)).sum(dim=-1) for candidate in candidates.unbind(-1)]
    best = torch.stack(left, dim=-1).argmin(dim=-1, keepdim=True)
    picked = torch.cat([first[..., None], candidates.gather(2, best)], dim=-1)  # example restart 2
    index = picked.flatten(1)[:, None].expand(-1, real.shape[1], -1)
    towards = products.gather(2, index).unflatten(2, (RESTARTS, 2))
    return _Centres(towards, square.gather(1, picked.flatten(1)).unflatten(1, (RESTARTS, 2)))


class _Means(NamedTuple):
    """Two cluster means for each restart.

    Centred tokens add up to 0, so the sum of cluster 0 is minus that of cluster 1: inner products with one are enough.
    """

    towards: Tensor  # (example, token, restart) inner product of token and sum of cluster 1
    square: Tensor  # (example, restart) squared length of that sum
    share: Tensor  # (example, restart, 2) 1 / size of each cluster

    def as_centres(self) -> _Centres:
        signed = self.share * self.share.new_tensor([-1.0, 1.0])
        return _Centres(self.towards[..., None] * signed[:, None], self.square[..., None] * signed**2)


class _Unsettled(NamedTuple):
    """The examples with a restart still running, and their tokens."""

    example: Tensor  # (example,) number in the chunk
    products: Tensor  # (example, token, token)
    real: Tensor  # (example, token)
    square: Tensor  # (example, token)
    limit: Tensor  # (example, 1)


def _lloyd(products: Tensor, real: Tensor, starts: _Centres, scale: float) -> Clusters:
    """Lloyd's algorithm for all restarts of all examples at once, with scikit-learn's rules.

    A restart stops when its centres shift by less than `scale` times the mean squared length of a token.
    """
    square = products.diagonal(dim1=1, dim2=2)  # example token
    limit = (scale * square.sum(dim=1) / real.sum(dim=1).clamp(min=1))[:, None]
    away = starts.square[:, None] - 2 * starts.towards  # squared distance minus the token's squared length
    members = _without_empty((away[..., 1] < away[..., 0]) & real[..., None], real, square, lambda: starts)
    means = done = _means(products, real, members)
    running = _first_shift(starts, means, real, members) > limit  # example restart
    left = _Unsettled(torch.arange(len(real), device=real.device), products, real, square, limit)
    for _ in range(_ITERATIONS - 1):
        keep = running.any(dim=1)
        if not keep.any():
            break
        if 2 * int(keep.sum()) <= len(keep):  # otherwise the copy costs more than it saves
            done = _with_rows(done, left.example, means)
            left, means = _Unsettled(*(part[keep] for part in left)), _Means(*(part[keep] for part in means))
            members, running = members[keep], running[keep]
        assigned = _without_empty(_nearer(means, left.real), left.real, left.square, means.as_centres)
        moved = _means(left.products, left.real, assigned)
        changed = (assigned != members).any(dim=1)
        still = running & changed & (_shift(means, moved, assigned) > left.limit)
        # a restart that has stopped keeps its means while others run
        means = _Means(
            torch.where(running[:, None], moved.towards, means.towards),
            torch.where(running, moved.square, means.square),
            torch.where(running[..., None], moved.share, means.share),
        )
        members, running = assigned, still
    means = _with_rows(done, left.example, means)
    labels = _nearer(means, real)
    inertia = _distances(labels, real, square, means.as_centres()).sum(dim=1)  # example restart
    best = inertia.argmin(dim=1, keepdim=True)
    chosen = labels.gather(2, best[:, None].expand(-1, labels.shape[1], -1))[..., 0]
    return Clusters(chosen.long().masked_fill(~real, -1), inertia.gather(1, best)[:, 0])


def _with_rows(done: _Means, examples: Tensor, means: _Means) -> _Means:
    """`done` with the rows of `examples` replaced."""
    return _Means(*(old.index_copy(0, examples, new) for old, new in zip(done, means, strict=True)))


def _nearer(means: _Means, real: Tensor) -> Tensor:
    """(example, token, restart) bool: True where mean 1 is strictly nearer; both distances in one comparison."""
    threshold = means.square * (means.share[..., 1] - means.share[..., 0]) / 2
    return (means.towards > threshold[:, None]) & real[..., None]


def _without_empty(assigned: Tensor, real: Tensor, square: Tensor, centres: Callable[[], _Centres]) -> Tensor:
    """Members of cluster 1; an empty cluster takes the token farthest from its centre."""
    count = assigned.sum(dim=1)  # example restart
    empty = (count == 0) | (count == real.sum(dim=1, keepdim=True))
    if not empty.any():
        return assigned
    away = _distances(assigned, real, square, centres())
    farthest = away.argmax(dim=1, keepdim=True)
    swapped = assigned.scatter(1, farthest, ~assigned.gather(1, farthest))
    pointless = (away.amax(dim=1) <= 0) | (real.sum(dim=1, keepdim=True) < 2)
    return torch.where((empty & ~pointless)[:, None], swapped, assigned)


def _means(products: Tensor, real: Tensor, members: Tensor) -> _Means:
    one = members.to(products)
    ones = one.sum(dim=1)  # example restart
    sizes = torch.stack([real.sum(dim=1, keepdim=True) - ones, ones], dim=-1)
    towards = products @ one
    return _Means(towards, (one * towards).sum(dim=1), 1 / sizes.clamp(min=1))


def _first_shift(old: _Centres, new: _Means, real: Tensor, members: Tensor) -> Tensor:
    """(example, restart): squared distance from the starts to the means of `members`."""
    clusters = torch.stack([real[..., None] & ~members, members], dim=-1).to(old.towards)
    between = (clusters * old.towards).sum(dim=1) * new.share
    return (new.as_centres().square - 2 * between + old.square).sum(dim=-1)


def _shift(old: _Means, new: _Means, members: Tensor) -> Tensor:
    """As `_first_shift`, from means to means."""
    between = (members * old.towards).sum(dim=1)
    return (
        new.square * new.share.square().sum(dim=-1)
        - 2 * between * (old.share * new.share).sum(dim=-1)
        + old.square * old.share.square().sum(dim=-1)
    )


def _distances(labels: Tensor, real: Tensor, square: Tensor, centres: _Centres) -> Tensor:
    """(example, token, restart): squared distance to the token's centre, 0 at padding."""
    away = centres.square[:, None] - 2 * centres.towards
    own = torch.where(labels, away[..., 1], away[..., 0]) + square[..., None]
    return own.clamp(min=0) * real[..., None]


def _nmi(labels: Tensor, sets: Modalities) -> Tensor:
    """NMI of clusters and modalities, arithmetic mean of the entropies; (example,)."""
    modality = sets.indicators(torch.float64).to(labels.device)
    cluster = torch.stack([labels == 0, labels == 1], dim=-1).double()
    joint = torch.einsum("etm,etc->emc", modality, cluster)
    joint = joint / joint.sum(dim=(1, 2), keepdim=True)
    entropies = _entropy(joint.sum(dim=2)) + _entropy(joint.sum(dim=1))
    shared = (entropies - _entropy(joint.flatten(1))).clamp(min=0)
    return (2 * shared / entropies).masked_fill(sets.one_sided.to(labels.device), torch.nan)


def _entropy(share: Tensor) -> Tensor:
    return -torch.xlogy(share, share).sum(dim=-1)
