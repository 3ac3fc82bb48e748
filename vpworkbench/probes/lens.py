"""Logit lens: what would the model say if it ended after an earlier layer?

Every layer's state goes through the model's own last steps, as if the layers after it did nothing: the final norm and
the output embedding of a decoder, the heads of our models (nostalgebraist 2020, "interpreting GPT: the logit lens"). It
shows when an answer can be read by the head; an earlier layer may hold it in a form that the head cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import forwards_replaced, run_model, unchanged
from vpworkbench.probes.layers import LayerNames, Stack, run_single_stack


def lens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    readout: Callable[[Any], Tensor],
    *,
    tokens: Tensor | None = None,
    layers: LayerNames | None = None,
) -> Tensor:
    """A read-out of every layer's state; of the last one it is the model's own.

    One forward records the states. One more for each layer, in which no layer computes anything, decodes them.

    Parameters
    ----------
    model : nn.Module
        One of ours, also fine-tuned, or a model of transformers with its head, such as `...ForConditionalGeneration`.
    readout : callable
        From the model's outputs to a float tensor (example, ...), e.g. `lambda outputs: outputs.logits[:, -1]`, or one
        of `probes.readouts`. Logits of all tokens are made for one layer at a time; with `logits_to_keep` among
        `inputs` a decoder gives only some.
    tokens, layers
        Choose one of several stacks of layers, as in `hidden_states`: real positions, bool (example, token), or names.

    Returns
    -------
    Tensor, shape (example, layer + 1, ...)
        The first entry reads the input of the first layer.

    Raises
    ------
    ValueError
        If the model has no single stack of layers, as with two streams, or runs it more than once; if the read-out does
        not give one entry for each example.
    """
    stack = run_single_stack(model, inputs, tokens, layers)
    decoded = []
    for layer in range(len(stack.blocks) + 1):
        # Each pass starts from the same random state: ViLT shuffles its patches.
        with unchanged(model), torch.no_grad(), _ended_after(stack, layer):
            decoded.append(readout(run_model(model, inputs)))
    examples = len(stack.inputs[0])
    if not all(torch.is_tensor(part) and part.ndim and len(part) == examples for part in decoded):
        given = tuple(decoded[0].shape) if torch.is_tensor(decoded[0]) else type(decoded[0]).__name__
        raise ValueError(f"the read-out must give a tensor ({examples}, ...), an entry for each example, not {given}")
    return torch.stack(decoded, dim=1)


def words_by_layer(
    logits: Tensor, decode: Callable[[list[int]], str], *, top: int = 1
) -> list[list[list[tuple[str, float]]]]:
    """The table word by layer of one input: the most probable words with their probabilities.

    Parameters
    ----------
    logits : Tensor, shape (layer + 1, position, vocabulary)
        Of one example, from `lens`.
    decode : callable
        From token ids to text: the tokenizer's `decode`.

    Returns
    -------
    list over layer + 1 of list over position of list of (word, probability)
    """
    best = logits.float().softmax(dim=-1).topk(top)
    return [
        [
            [(decode([number]).strip(), share) for number, share in zip(*one, strict=True)]
            for one in zip(*layer, strict=True)
        ]
        for layer in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _ended_after(stack: Stack, layer: int) -> AbstractContextManager[None]:
    """In the block, the stack ends after its first `layer` layers: the later ones return their state as it is.

    The layers before that return what they returned when it was recorded. After the last layer nothing is changed.
    """
    blocks = list(stack.blocks) if layer < len(stack.blocks) else []
    return forwards_replaced(
        {
            block: partial(_recorded, stack.inputs[min(number + 1, layer)], stack.outputs[number])
            for number, block in enumerate(blocks)
        }
    )


def _recorded(state: Tensor, output: Any, *args: Any, **kwargs: Any) -> Any:
    return state if torch.is_tensor(output) else (state, *output[1:])
