"""Activation patching: states of some tokens, copied from a clean run into a corrupt one, and what that restores.

Two inputs differ in one thing, and so does the read-out. If a group of tokens carries the difference at a layer, then
copying their clean states into the corrupt run at that layer brings the clean read-out back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall, intercept_attention, run_model
from vpworkbench.probes.layers import LayerNames, run_single_stack
from vpworkbench.probes.readouts import ReadOut, read
from vpworkbench.stats import Interval, bootstrap_interval


@dataclass(frozen=True)
class Patched:
    """Read-outs of a clean run, of a corrupt one, and of the corrupt one with some clean states; float64 on the CPU.

    Attributes
    ----------
    groups : tuple of str
        Names of the groups of tokens.
    clean, corrupt : Tensor, shape (example,)
    patched : Tensor, shape (example, layer, group)
        The read-out with the states of the group replaced at the input of the layer.
    """

    groups: tuple[str, ...]
    clean: Tensor
    corrupt: Tensor
    patched: Tensor

    @property
    def restored(self) -> Tensor:
        """Share of the read-out restored, (patched - corrupt) / (clean - corrupt); (example, layer, group).

        0 is nothing, 1 is all of it; less than 0 and more than 1 are possible. nan where both runs read the same.
        """
        lost = (self.clean - self.corrupt)[:, None, None]
        return (self.patched - self.corrupt[:, None, None]) / lost.masked_fill(lost == 0, torch.nan)

    @property
    def without_difference(self) -> int:
        """Examples whose clean and corrupt runs read the same: there is nothing to restore."""
        return int((self.clean == self.corrupt).sum())

    def interval(self, seed: int = 0) -> Interval:
        """Mean of `restored` with its bootstrap 95% interval over examples; (layer, group).

        An example counts as much as its read-out differs between the two runs. The share of a small difference can be
        any number, and would decide a plain mean.
        """
        weights = (self.clean - self.corrupt).abs()
        return bootstrap_interval(self.restored.numpy(), seed, weights=weights.numpy())


@torch.no_grad()
def patch(
    model: nn.Module,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    readout: ReadOut,
    groups: Mapping[str, Tensor],
    *,
    layers: LayerNames | None = None,
) -> Patched:
    """Copy the states of each group at the input of each layer from the clean run into the corrupt one.

    One forward for each layer and group, and three more; all compute attention as `sdpa` does. A group of all tokens
    restores the read-out exactly. What a model adds to its later layers (Qwen3-VL) stays that of the corrupt input.

    Parameters
    ----------
    clean, corrupt : mapping
        Keyword arguments of the model's forward, for the same examples and with the same places of tokens.
    readout : callable
        From the model's outputs to one number for each example; `probes.readouts` has some.
    groups : mapping of BoolTensor, shape (example, token)
        Name -> places in the joint sequence; without any, nothing is restored. See `each_token`.
    layers
        Names or prefixes of modules, where several stacks of layers run on sequences of this length.

    Raises
    ------
    ValueError
        If the model has two streams of states, the groups do not fit its sequence, the two runs have sequences of
        different shapes, or the read-out is not one number for each example.
    """
    if not groups:
        raise ValueError("patch needs a group of tokens; give `groups`, name -> bool (example, token)")
    tokens = next(iter(groups.values()))
    for name, places in groups.items():
        if places.dtype != torch.bool or places.ndim != 2 or places.shape != tokens.shape:
            shape = f"{places.dtype} {tuple(places.shape)}"
            raise ValueError(f"group {name!r} is {shape}; all must be bool (example, token) of one shape")
    stack = run_single_stack(model, clean, tokens, layers)

    def run(inputs: Mapping[str, Any], layer: int = 0, places: Tensor | None = None) -> Tensor:
        with intercept_attention(model, AttentionCall.output):  # the same kernels in all passes; removes the hook too
            if places is not None:
                hook = _copying(stack.inputs[layer], places)
                stack.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
            outputs = run_model(model, inputs)
        return read(readout, outputs, len(tokens))

    before = run(clean), run(corrupt)
    patched = [
        torch.stack([run(corrupt, layer, places) for places in groups.values()], dim=1)
        for layer in range(len(stack.blocks))
    ]
    return Patched(tuple(groups), *before, torch.stack(patched, dim=1))


def each_token(tokens: Tensor) -> dict[str, Tensor]:
    """Groups of one place each, for a map layers x tokens; named by their number. `tokens` is bool (example, token)."""
    places = tokens.any(dim=0).nonzero()[:, 0].tolist()
    alone = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return {str(place): alone[place].expand_as(tokens) for place in places}


def _copying(clean: Tensor, places: Tensor) -> Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict]]:
    """A forward pre-hook that puts `clean` states at `places` of a block's input."""

    def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        state = args[0] if args else kwargs["hidden_states"]
        if state.shape != clean.shape:
            shapes = f"{tuple(clean.shape)} in the clean run and {tuple(state.shape)} in the corrupt one"
            raise ValueError(f"the states are {shapes}: give both inputs as many examples and tokens")
        mixed = torch.where(places.to(state.device)[..., None], clean, state)
        return ((mixed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": mixed})

    return hook
