"""Models whose attention does not go through transformers' interface: the same computation, read from outside.

ViLT, VisualBERT, FLAVA and LXMERT form their scores in the open, all in BERT's way: three projections, heads, an
additive mask. While a probe runs, their layers hand the projections over as an `AttentionCall` and go on with fused
attention, so a pass costs no more than with any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

# Classes of transformers, by name: importing all their modules would take seconds.
SELF_ATTENTION = ("ViltSelfAttention", "VisualBertSelfAttention", "FlavaSelfAttention")
CROSS_ATTENTION = ("LxmertAttention",)

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(module, query, key, value, mask) -> (example, query, head, channel)."""


@contextmanager
def own_attention_handled(model: nn.Module, attend: Attend) -> Iterator[None]:
    """In the block `attend` answers the attention layers of the classes above; afterwards they are as before."""
    changed = []
    try:
        for module in model.modules():
            kind = type(module).__name__
            if kind in SELF_ATTENTION + CROSS_ATTENTION and type(module).__module__.startswith("transformers."):
                module.forward = partial(_self_attention if kind in SELF_ATTENTION else _attention, module, attend)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward  # the instance's; that of its class is in force again


def _self_attention(
    module: nn.Module,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor]:
    return _attention(module, attend, hidden_states, hidden_states, attention_mask)


def _attention(
    module: nn.Module,
    attend: Attend,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor]:
    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    query, key, value = heads(module.query(hidden_states)), heads(module.key(context)), heads(module.value(context))
    return (attend(module, query, key, value, attention_mask).flatten(2),)
