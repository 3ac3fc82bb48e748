"""Probes over many examples: one pass for each batch, then everything by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vpworkbench.probes.flow import inter_modality_flow
from vpworkbench.probes.hidden import hidden_states
from vpworkbench.probes.nmi import modality_nmi


class ProbeInputs(Protocol):
    """A batch: keyword arguments of the model's forward, and V, the real places and L; bool (example, token)."""

    forward: Mapping[str, Any]
    vision: Tensor
    tokens: Tensor
    language: Tensor


class Probed(NamedTuple):
    """Probes of a set of examples, as float arrays.

    Attributes
    ----------
    flow, null : array, (example, layer, layer)
        F_inter^{i,j} (paper Eq. 5) and its value under uniform attention; nan where j < i.
    text_to_vision, vision_to_text : array, (example, layer, layer)
        The two directions, adding up to `flow`.
    nmi : array, (example, layer + 1)
        Fig. 5; the first column is the embedding.
    """

    flow: np.ndarray
    null: np.ndarray
    text_to_vision: np.ndarray
    vision_to_text: np.ndarray
    nmi: np.ndarray

    @property
    def from_input(self) -> np.ndarray:
        """F^{1,j} (Fig. 3), (example, layer)."""
        return self.flow[:, 0]

    @property
    def within_layer(self) -> np.ndarray:
        """F^{i,i} (Fig. 4), (example, layer)."""
        return np.diagonal(self.flow, axis1=1, axis2=2)

    def summary(self) -> dict[str, float]:
        """Means over the examples: F^{1,L} with its null, and NMI at the last layer."""
        last = {"flow_from_input": self.from_input, "null_from_input": self.null_from_input, "nmi": self.nmi}
        return {f"{name}_last_layer": float(np.nanmean(values[:, -1])) for name, values in last.items()}

    @property
    def null_from_input(self) -> np.ndarray:
        return self.null[:, 0]

    @property
    def null_within_layer(self) -> np.ndarray:
        return np.diagonal(self.null, axis1=1, axis2=2)


@torch.no_grad()
def probe_dataset(
    model: nn.Module,
    batches: Iterable[ProbeInputs],
    *,
    total: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Probed:
    """Inter-Modality Flow and NMI of every example.

    Parameters
    ----------
    total : int
        Number of batches, for the progress bar.
    """
    parts: list[tuple[Tensor, ...]] = []
    for number, inputs in enumerate(batches):
        flow = inter_modality_flow(model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language)
        hidden = hidden_states(model, inputs.forward, tokens=inputs.tokens)
        nmi = modality_nmi(hidden, inputs.vision, inputs.tokens, language=inputs.language, seed=seed)
        parts.append((flow.flow, flow.null, flow.text_to_vision, flow.vision_to_text, nmi))
        if progress:
            progress("probing", number + 1, total)
    return Probed(*(torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)))
