"""Which word goes with which patch: the exact plan of optimal transport between them, after the last layer.

ViLT's paper draws this alignment. The training loss takes a plan by proximal steps (`losses.transport_plan`); this one
is POT's exact solution.
"""

from __future__ import annotations

import ot
import torch
from torch import Tensor

from vpworkbench.losses import cosine_cost


def exact_plan(words: Tensor, vision: Tensor) -> Tensor:
    """The plan that moves the words' mass to the visual tokens at the least cost, 1 - cosine.

    Parameters
    ----------
    words, vision : Tensor, (word, channel), (vision, channel)
        Features of one pair, without [CLS], [SEP] and padding. Each set has uniform mass 1.

    Returns
    -------
    Tensor, (word, vision), float64
        It sums to 1; a row sums to 1 / words.

    Raises
    ------
    ValueError
        If there are no words, or no visual tokens.
    """
    if not (len(words) and len(vision)):
        raise ValueError(f"a plan needs words and visual tokens; there are {len(words)} and {len(vision)}")
    cost = cosine_cost(words[None].double(), vision[None].double())[0].cpu()
    return torch.from_numpy(ot.emd(*map(ot.unif, cost.shape), cost.numpy()))
