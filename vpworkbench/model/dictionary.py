"""SOHO's visual dictionary (Huang et al., *Seeing Out of tHe bOx*, CVPR 2021, Sec. 3.2)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

DECAY = 0.99
IDLE_STEPS = 100
"""A code that replaced no token for this many steps is dead: it moves to a random token of the step."""


class ProcessGroup(Protocol):
    """Processes that share a training step, such as `train.processes.Processes`; `add` sums a tensor in place."""

    index: int
    count: int

    def add(self, tensor: Tensor) -> None: ...


class Dictionary(nn.Module):
    """Each token is replaced by the nearest of `codes` codes (SOHO: 2,048), which move to the mean of their tokens.

    Codes are not parameters but moving averages. `update_codes` is called once per optimiser step, for all its
    micro-batches and processes, so that neither changes the result. With SOHO's N(0, 1) start most codes are never
    used. SOHO leaves them; here they move to tokens after the first step.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("idle", torch.full((codes,), IDLE_STEPS - 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._assigned: list[tuple[Tensor, Tensor]] = []  # tokens and their codes since the last update

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(image, vision, channel) -> the nearest code of each token, of the same shape, and its index, int64.

        The gradient passes straight through to the features.
        """
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            tokens = features.detach().to(self.codes)
            nearest = (self.codes.square().sum(dim=1) - 2 * tokens @ self.codes.T).argmin(dim=-1)
            replaced = self.codes[nearest].to(features)
        if self.training and torch.is_grad_enabled():
            self._remember(tokens, nearest)
        return features + (replaced - features).detach(), nearest

    @property
    def dead(self) -> Tensor:
        """Number of codes that replaced no token in the last `IDLE_STEPS` steps."""
        return (self.idle >= IDLE_STEPS).sum()

    @torch.no_grad()
    def update_codes(self, processes: ProcessGroup) -> None:
        """Move the codes after an optimiser step, by the tokens of all processes."""
        if not self._assigned:
            return
        tokens, nearest = (torch.cat(parts) for parts in zip(*self._assigned, strict=True))
        self._assigned.clear()
        counts = nearest.bincount(minlength=len(self.codes)).to(self.codes)
        sums = torch.zeros_like(self.codes).index_add_(0, nearest, tokens)
        for tensor in (counts, sums):
            processes.add(tensor)
        means = sums / counts.clamp(min=1)[:, None]
        used = counts > 0
        self.codes.copy_(torch.where(used[:, None], DECAY * self.codes + (1 - DECAY) * means, self.codes))
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        self.steps += 1
        dead = (self.idle > 0) & (self.idle % IDLE_STEPS == 0)
        if dead.any():
            self.codes.copy_(torch.where(dead[:, None], self._random_tokens(tokens, processes), self.codes))

    def _random_tokens(self, tokens: Tensor, processes: ProcessGroup) -> Tensor:
        """For each code a random token of the step, from any process; every process gets the same, (code, channel)."""
        counts = torch.zeros(processes.count, dtype=torch.int64, device=tokens.device)
        counts[processes.index] = len(tokens)
        processes.add(counts)
        generator = torch.Generator().manual_seed(int(self.steps))
        rows = torch.randint(int(counts.sum()), (len(self.codes),), generator=generator).to(tokens.device)
        rows -= counts[: processes.index].sum()  # counted from the first token of this process
        mine = (rows >= 0) & (rows < len(tokens))
        chosen = torch.where(mine[:, None], tokens[rows.clamp(0, len(tokens) - 1)], 0)
        processes.add(chosen)
        return chosen

    @torch.compiler.disable
    def _remember(self, tokens: Tensor, nearest: Tensor) -> None:
        self._assigned.append((tokens.flatten(0, -2), nearest.flatten()))
