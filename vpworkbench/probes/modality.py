"""Which token belongs to which modality: the sets V and L of the paper, checked for all probes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Modalities(NamedTuple):
    """The sets V and L of a batch; all (example, token) bool, padding in neither."""

    vision: Tensor
    language: Tensor
    tokens: Tensor

    @property
    def complete(self) -> bool:
        """Whether every token belongs to one of the two sets."""
        return bool((self.vision | self.language == self.tokens).all())

    @property
    def one_sided(self) -> Tensor:
        """(example,) bool: True where V or L is empty."""
        return ~(self.vision.any(dim=1) & self.language.any(dim=1))


def modalities(vision: Tensor, tokens: Tensor, language: Tensor | None = None) -> Modalities:
    """The sets V and L; language defaults to every token that is not visual.

    Parameters
    ----------
    vision, tokens, language : BoolTensor, shape (example, token)
        `vision` and `language` may cover padding, which is in neither set; they must not overlap.

    Raises
    ------
    ValueError
        If shapes or types differ or the sets overlap.
    """
    given = {"vision": vision, "tokens": tokens, "language": language}
    for name, value in given.items():
        if value is None:
            continue
        if value.dtype != torch.bool or value.ndim != 2:
            raise ValueError(f"{name} must be bool of shape (example, token), not {value.dtype} {tuple(value.shape)}")
        if value.shape != vision.shape:
            raise ValueError(
                f"vision is {tuple(vision.shape)} but {name} is {tuple(value.shape)}: both cover "
                "the sequence on which the attention runs, (example, token)"
            )
    tokens, vision = tokens.to(vision.device), vision & tokens.to(vision.device)
    language = ~vision if language is None else language.to(vision.device)
    if (vision & language).any():
        raise ValueError("vision and language overlap: a token belongs to one modality at most")
    return Modalities(vision, language & tokens, tokens)


def both_modalities(vision: Tensor, tokens: Tensor, language: Tensor | None = None) -> Modalities:
    """As `modalities`, and raise where an example lacks one: its flow would be 0 in any model."""
    sets = modalities(vision, tokens, language)
    problems = {
        "are all padding": ~sets.tokens.any(dim=1),
        "have no visual token": ~sets.vision.any(dim=1),
        "have no language token": ~sets.language.any(dim=1),
    }
    for problem, where in problems.items():
        if where.any():
            raise ValueError(
                f"examples {where.nonzero().flatten().tolist()} {problem}; check `vision`, "
                "`tokens` and `language`, or leave these examples out"
            )
    return sets
