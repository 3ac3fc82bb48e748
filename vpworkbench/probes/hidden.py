"""Features of every layer, for NMI and PCA: the model's own `hidden_states`, or read off its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vpworkbench.probes.attention import AttentionCall, attention_handled, refuse_randomness, run_model, untouched
from vpworkbench.probes.layers import LayerNames, is_named, streams_of


def hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], *, tokens: Tensor | None = None, layers: LayerNames | None = None
) -> tuple[Tensor, ...]:
    """Features at the input of the first layer and at the output of every layer.

    A transformers model answers by its own `output_hidden_states`. From any other module with a
    transformers encoder inside (ours) they are read off the blocks of that encoder.

    Parameters
    ----------
    tokens : BoolTensor, shape (example, token), optional
    layers : str, list of str or callable, optional
        Either tells the stack of layers apart where a model has several, see `LayerChoice`.

    Returns
    -------
    tuple over layer + 1 of Tensor, shape (example, token, channel)
    """
    if isinstance(model, PreTrainedModel) and layers is None:
        refuse_randomness(model)
        with untouched(model), torch.no_grad():
            asked = {"output_hidden_states": True, "return_dict": True}
            outputs = run_model(model, {**inputs, **asked})
        if streams_of(model):
            return _of_streams(model, outputs)
        if outputs.get("hidden_states"):
            return tuple(outputs["hidden_states"])
    return _hidden_states_of_blocks(model, inputs, tokens, layers)


def _of_streams(model: nn.Module, outputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Words and image of the layers that meet, joined: LXMERT lists its streams apart, BridgeTower in pairs."""
    if outputs.get("language_hidden_states") and outputs.get("vision_hidden_states"):
        met = model.config.x_layers
        pairs = zip(
            outputs["language_hidden_states"][-met - 1 :], outputs["vision_hidden_states"][-met - 1 :], strict=True
        )
    else:
        pairs = outputs["hidden_states"][2]
    return tuple(torch.cat(pair, dim=1) for pair in pairs)


def _hidden_states_of_blocks(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor | None, layers: LayerNames | None
) -> tuple[Tensor, ...]:
    attended: list[str] = []
    states: dict[str, list[Tensor]] = {}  # name of a list of blocks -> input of its first, outputs

    def remember(call: AttentionCall) -> Tensor:
        wanted = tokens is None or call.lengths[:2] == tuple(tokens.shape)
        if wanted and (layers is None or is_named(call.name, layers)):
            attended.append(call.name)
        return call.output()

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stack = states.setdefault(name, [])
            if not stack:
                stack.append(args[0] if args else kwargs["hidden_states"])
            stack.append(output if torch.is_tensor(output) else output[0])

        return read

    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    with attention_handled(model, remember):
        for name, blocks in lists.items():
            for block in blocks:
                block.register_forward_hook(hook(name), with_kwargs=True)
        run_model(model, inputs)
    owners = {max((name for name in states if layer.startswith(name + ".")), key=len, default="") for layer in attended}
    if len(owners) != 1 or not owners <= set(states):
        raise ValueError(
            f"{type(model).__name__} has {len(owners)} stacks of layers that match "
            f"({', '.join(sorted(owners))}); choose one by `tokens` or `layers`"
        )
    return tuple(states[owners.pop()])
