"""SOHO's visual dictionary: a visual token becomes the nearest of so many codes, which follow what they stand for.

Huang et al., *Seeing Out of tHe bOx* (CVPR 2021), Sec. 3.2. Codes are no parameters: in every step, behind
the backward pass, each moves to the mean of the tokens that took it, by a moving average.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Group(Protocol):
    """The processes that share a training step; see `train.processes.Processes`."""

    index: int
    count: int

    def add(self, tensor: Tensor) -> None:
        """Add a tensor up over all processes, in place."""


DECAY = 0.99
IDLE_STEPS = 100
"""A code that no token took for so many steps is dead: it then moves to a token of the step, drawn at random."""


class Dictionary(nn.Module):
    """Codes, and how they follow.

    Parameters
    ----------
    codes, width : int
        Entries (SOHO has 2,048); channels of a token.

    Notes
    -----
    `update_codes` is called once per optimiser step, for all micro-batches and processes: neither changes the result.
    Codes start as N(0, 1), as in SOHO's code, so all but a few are dead at once; there they stay in SOHO, here
    they move to tokens after the first step.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("idle", torch.full((codes,), IDLE_STEPS - 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The codes in the place of the tokens, and which they are: (image, vision, c), int64 (image, vision).

        The gradient passes straight through to the features.
        """
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            wide = features.detach().to(self.codes)
            taken = (self.codes.square().sum(dim=1) - 2 * wide @ self.codes.T).argmin(dim=-1)
            chosen = self.codes[taken].to(features)
        if self.training and torch.is_grad_enabled():
            self._remember(wide, taken)
        return features + (chosen - features).detach(), taken

    @property
    def dead(self) -> Tensor:
        """How many codes no token took in the last `IDLE_STEPS` steps."""
        return (self.idle >= IDLE_STEPS).sum()

    @torch.no_grad()
    def update_codes(self, processes: Group) -> None:
        """Move the codes after an optimiser step, by the tokens of all processes."""
        if not self._seen:
            return
        tokens, taken = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        counts = torch.zeros(len(self.codes), dtype=self.codes.dtype, device=self.codes.device)
        sums = torch.zeros_like(self.codes)
        counts.index_add_(0, taken, torch.ones_like(taken, dtype=counts.dtype))
        sums.index_add_(0, taken, tokens)
        for tensor in (counts, sums):
            processes.add(tensor)
        means = sums / counts.clamp(min=1)[:, None]
        used = counts > 0
        self.codes.copy_(torch.where(used[:, None], DECAY * self.codes + (1 - DECAY) * means, self.codes))
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        self.steps += 1
        dead = (self.idle > 0) & (self.idle % IDLE_STEPS == 0)
        if dead.any():
            self.codes.copy_(torch.where(dead[:, None], self._drawn(tokens, processes), self.codes))

    def _drawn(self, tokens: Tensor, processes: Group) -> Tensor:
        """A token of the step for each code, drawn from those of all processes; the same in each."""
        each = torch.zeros(processes.count, dtype=torch.int64, device=tokens.device)
        each[processes.index] = len(tokens)
        processes.add(each)
        generator = torch.Generator().manual_seed(int(self.steps))
        rows = torch.randint(int(each.sum()), (len(self.codes),), generator=generator).to(tokens.device)
        rows -= each[: processes.index].sum()
        mine = (rows >= 0) & (rows < len(tokens))
        drawn = torch.where(mine[:, None], tokens[rows.clamp(0, len(tokens) - 1)], 0)
        processes.add(drawn)
        return drawn

    @torch.compiler.disable
    def _remember(self, features: Tensor, taken: Tensor) -> None:
        self._seen.append((features.flatten(0, -2), taken.flatten()))
