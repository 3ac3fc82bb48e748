"""Intercepts every attention layer of a model while it runs, and leaves the model as it was.

Transformers' models ask its `AttentionInterface` for the function of each attention layer. While a probe runs in this
thread, they get one that wraps the layer's queries, keys, values and mask in an `AttentionCall`, and a handler computes
the output. `call.output()` is what `sdpa` computes, on the same fused kernels; a handler can also read the call, or
change it with `dataclasses.replace` first. The model's settings keep their names, so models that treat `eager` or
`sdpa` in a way of their own (masks of sparse attention) still do.

ViLT, VisualBERT, FLAVA and LXMERT compute attention in modules of their own, all in BERT's way. Their `forward` is
replaced while a probe runs, so that their layers go through the same handler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpworkbench.errors import first_line
from vpworkbench.probes.model_parts import attention_configs, refuse_randomness
from vpworkbench.probes.reading import Reading, allowed_by, same_for_every_query

_STORING = ("use_cache", "output_attentions", "_output_attentions")
# Size of the padded copies made at a time: a small share of a forward's memory on a CPU, one call on a GPU.
_PADDED_BYTES = {"cpu": 2**22, "cuda": 2**29}
# Float tensors that a layer may pass on for other kernels, and that do not change what it computes. Any other one could
# be a part of the scores, and the probe would describe another model.
_HARMLESS_OPTIONS = re.compile(r"position_embeddings|pixel_values\w*|input_features|inputs_embeds")


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer of one forward pass."""

    module: nn.Module
    name: str  # of the layer in the model
    query: Tensor  # example head query channel
    key: Tensor  # example key_head key channel; grouped-query models have fewer key heads than heads
    value: Tensor  # as the key, but with channels of its own
    mask: Tensor | None  # (example or 1, head or 1, query or 1, key); bool, True where a query may attend, or additive
    scaling: float  # factor of the scores
    causal: bool  # True where the mask is None and the kernel applies the causal mask itself
    sink: Tensor | None = None  # (example or 1, head, query or 1): score of one more key, whose value is zero

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Numbers of examples, queries and keys."""
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]

    def output(self) -> Tensor:
        """The layer's output as the model expects it, (example, query, head, channel)."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self.sink is not None:
            return self._with_sink_as_key().output()[:, -self.lengths[1] :, :, : self.value.shape[-1]]
        tensors = self.query, self.key, self.value, self.mask
        return sdpa_attention_forward(self.module, *tensors, scaling=self.scaling, is_causal=self.causal)[0]

    def _with_sink_as_key(self) -> AttentionCall:
        """The same call with the sink as a first key, scored in a channel of its own.

        Where the kernel applies the causal mask itself, a query is put in front too: every other one still sees the
        keys before it, and the sink.
        """
        extra = (self.sink.to(self.query) / self.scaling)[..., None].expand(*self.query.shape[:3], 1)
        query = torch.cat([self.query, extra], dim=-1)
        key = F.pad(_padded(self.key, query.shape[-1]), (0, 0, 1, 0))
        key[:, :, 0, -1] = 1
        width = max(query.shape[-1], self.value.shape[-1])
        query, key = _padded(query, width), _padded(key, width)
        value = F.pad(_padded(self.value, width), (0, 0, 1, 0))
        mask = self.mask
        if self.causal:
            query = F.pad(query, (0, 0, 1, 0))
        elif mask is not None:
            mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        return replace(self, query=query, key=key, value=value, mask=mask, sink=None)

    def without(self, blocked: Tensor) -> AttentionCall:
        """This layer without some pairs, bool (example, query, key): blocked keys get no weight.

        The other weights of the query sum to 1. The weights of a query that loses all its keys mean nothing.
        """
        mask = self.allowed() & ~blocked[:, None]
        if self.mask is not None and self.mask.dtype != torch.bool:  # it may hold a bias besides
            # not -inf: a row of it alone would be nan
            mask = self.mask.masked_fill(blocked[:, None], torch.finfo(self.mask.dtype).min)
        return replace(self, mask=mask, causal=False)

    def output_without(self, blocked: Tensor) -> Tensor:
        """The output of `without`; a query that loses all its keys reads nothing: its output is zero."""
        allowed = self.allowed()
        emptied = allowed.any(dim=-1) & ~(allowed & ~blocked[:, None]).any(dim=-1)  # example head query
        return self.without(blocked).output().masked_fill(emptied.transpose(1, 2)[..., None], 0.0)

    def output_and_columns(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output, and `softmax(Q K^T) columns` for every head, on the fused kernel.

        The columns travel as extra channels of the values. Fused kernels want one width for queries, keys and values,
        so all three are padded with zeros, which changes no score; a multiple of 8 keeps them aligned. A few heads are
        computed at a time, because the padded copies could otherwise dominate the memory of the forward.

        `columns` is (example, key, column); the results are (example, query, head, channel) and (example, query, head,
        column).
        """
        (examples, heads, queries, _), key_heads = self.query.shape, self.key.shape[1]
        channels, count = self.value.shape[-1], columns.shape[-1]
        width = -(-max(self.query.shape[-1], channels + count) // 8) * 8
        group = heads // key_heads
        size = examples * width * self.query.element_size() * max(group * queries, self.key.shape[2])
        at_once = max(1, _PADDED_BYTES.get(self.query.device.type, 2**22) // size)  # key heads
        output = self.query.new_empty(examples, queries, heads, channels)
        carried = self.query.new_empty(examples, queries, heads, count)
        for start in range(0, key_heads, at_once):
            of_keys = slice(start, start + at_once)
            of_queries = slice(start * group, (start + at_once) * group)
            query = _padded(self.query[:, of_queries], width)
            key, value = _padded(self.key[:, of_keys], width), _padded(self.value[:, of_keys], width)
            value[..., channels : channels + count] = columns.to(value.dtype)[:, None]
            mask = self.mask[:, of_queries] if self.mask is not None and self.mask.shape[1] > 1 else self.mask
            sink = None if self.sink is None else self.sink[:, of_queries]
            wide = replace(self, query=query, key=key, value=value, mask=mask, sink=sink).output()
            output[:, :, of_queries] = wide[..., :channels]
            carried[:, :, of_queries] = wide[..., channels : channels + count]
        return output, carried

    def weights(self, picked: Tensor | None = None) -> Tensor:
        """Softmax weights, (example, head, picked, key), in float32 or better, of the queries at (example, picked).

        By default those of all queries, which needs memory query x key.
        """
        examples, queries, _ = self.lengths
        if picked is None:
            picked = torch.arange(queries, device=self.query.device).expand(examples, -1)
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        example = torch.arange(examples, device=self.query.device)[:, None]
        query = self.query[example, :, picked].transpose(1, 2).to(dtype)
        key = self.key.repeat_interleave(query.shape[1] // self.key.shape[1], dim=1).to(dtype)
        scores = query @ key.transpose(2, 3) * self.scaling
        mask = self._mask_of(picked)
        if mask is not None and mask.dtype == torch.bool:
            # not -inf: a padding query may attend to nothing, and its row would be nan
            scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
        elif mask is not None:
            scores = scores + mask
        if self.sink is not None:  # its weight is no key's
            sink = self.sink.expand(examples, -1, queries)[example, :, picked].transpose(1, 2)
            extra = sink.to(dtype)[..., None]
            return torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
        return scores.softmax(dim=-1)

    def uniform_attention(self, columns: Tensor) -> Tensor:
        """`columns`, (example, key, column), averaged over the keys that each query may attend to."""
        queries = self.lengths[1]
        if self.mask is None and not self.causal:
            return columns.mean(dim=1, keepdim=True).expand(-1, queries, -1)
        if self.mask is None:
            keys = torch.arange(1, columns.shape[1] + 1, device=columns.device)
            return columns.cumsum(dim=1) / keys[:, None]
        if same_for_every_query(self.mask):
            allowed = allowed_by(self.mask[:, :, 0]).to(columns)  # example head key
            share = allowed / allowed.sum(dim=-1, keepdim=True)
            return (share.mean(dim=1, keepdim=True) @ columns).expand(-1, queries, -1)
        # Equal scores give uniform weights, and the fused kernel needs no query x key memory.
        allowed = allowed_by(self.mask)
        count = columns.shape[2]
        values = F.pad(columns, (0, -count % 8))[:, None].expand(-1, allowed.shape[1], -1, -1)
        zeros = values.new_zeros(*values.shape[:2], queries, values.shape[3])
        spread = F.scaled_dot_product_attention(zeros, torch.zeros_like(values), values, attn_mask=allowed)
        return spread.mean(dim=1)[..., :count]

    def mean_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some queries at a time, (some,), and their `weights` averaged over heads, (example, some, key)."""
        examples, queries, keys = self.lengths
        size = max(1, 2**22 // (examples * self.query.shape[1] * keys))  # at most 2^22 weights at a time
        for some in torch.arange(queries, device=self.query.device).split(size):
            yield some, self.weights(some.expand(examples, -1)).mean(dim=1)

    def allowed(self) -> Tensor:
        """The pairs that the mask allows, bool (example, head or 1, query, key)."""
        examples, queries, keys = self.lengths
        if self.mask is not None:
            return allowed_by(self.mask).expand(examples, -1, queries, -1)
        pairs = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
        return (pairs.tril() if self.causal else pairs).expand(examples, 1, -1, -1)

    @property
    def reading(self) -> Reading:
        """Who may attend to whom, without the tensors of the call."""
        mask = self.mask
        if mask is not None and mask.shape[1] > 1:  # one for each head, perhaps with a bias that only this layer has
            mask = mask[:, :1] if mask.stride(1) == 0 else allowed_by(mask).any(dim=1, keepdim=True)
        return Reading(mask, self.causal, self.lengths[2])

    def _mask_of(self, picked: Tensor) -> Tensor | None:
        if self.mask is None:
            key = torch.arange(self.key.shape[2], device=picked.device)
            return (key <= picked[..., None])[:, None] if self.causal else None
        if self.mask.shape[2] == 1:
            return self.mask
        example = torch.arange(len(picked), device=picked.device)[:, None]
        return self.mask.expand(len(picked), -1, -1, -1)[example, :, picked].transpose(1, 2)


Handler = Callable[[AttentionCall], Tensor]
"""Computes the output of an attention layer, (example, query, head, channel); most return `call.output()`."""

Change = Callable[[AttentionCall], AttentionCall]
"""What another attention layer would be in this one's place."""


@contextmanager
def intercept_attention(model: nn.Module, handler: Handler, change: Change | None = None) -> Iterator[None]:
    """In the block, `handler` computes every attention layer of `model`, without gradients.

    With `change`, the handler receives the changed layers, and so do the handlers of further blocks inside this one:
    probes see the changed model. Afterwards, also after an exception, the model's settings, its hooks and the random
    state are as before.
    """
    refuse_randomness(model)
    _redirect_interface()
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    configs = attention_configs(model)
    if not configs:
        raise ValueError(
            f"{type(model).__name__} holds no transformers config, so its attention layers cannot be intercepted; "
            "pass its attention maps to flow_from_attention instead"
        )
    with unchanged(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for config in configs:
            if config.__dict__.get("_attn_implementation_internal") not in (None, "eager", "sdpa"):
                config.__dict__["_attn_implementation_internal"] = "sdpa"  # other kernels have masks of their own
            # a cache would keep all keys and values, and maps are what a probe does without
            config.__dict__.update({name: False for name in _STORING if config.__dict__.get(name)})
        outer = _PROBE.get()
        token = _PROBE.set(_Probe(handler, names, change or (outer.change if outer else None)))
        try:
            with _own_attention_replaced(model):
                yield
        finally:
            _PROBE.reset(token)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore settings, hooks and random state of `model` when the block ends."""
    modules = list(model.modules())
    configs = [(config, dict(config.__dict__)) for config in attention_configs(model)]
    kinds = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    hooks = [(held, set(held)) for module in modules for held in map(vars(module).get, kinds)]
    installed = "_output_capturing_hooks_installed"  # transformers adds hooks for good, and marks the module so
    unmarked = [module for module in modules if installed not in module.__dict__]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for config, settings in configs:
            config.__dict__.clear()
            config.__dict__.update(settings)
        for held, before in hooks:
            for hook in set(held) - before:
                del held[hook]
        for module in unmarked:
            module.__dict__.pop(installed, None)


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """`model(**inputs)` without a cache; refuses inputs that a probe cannot serve."""
    if inputs.get("past_key_values") is not None:
        raise ValueError("past_key_values: a probe needs the whole sequence in one pass; leave it out")
    if inputs.get("output_attentions"):
        raise ValueError("output_attentions would store every attention map; leave it out")
    try:
        return model(**{**inputs, "use_cache": False} if inputs.get("use_cache") else inputs)
    except RuntimeError as error:
        if "device" not in str(error):
            raise
        raise ValueError(f"{first_line(error)} Move the inputs to the model: inputs.to(model.device)") from error


# ------------------------------------------------------------------------- from transformers' call to the handler


class _Probe(NamedTuple):
    """The probe that runs in this thread."""

    handler: Handler
    names: dict[int, str]  # of the model's modules, by id
    change: Change | None


_PROBE: ContextVar[_Probe | None] = ContextVar("probe", default=None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that layers get while a probe runs; the signature is that of transformers."""
    probe = _PROBE.get()
    name = probe.names.get(id(module), type(module).__name__)
    sinks = [options.pop(option, None) for option in ("s_aux", "sinks")]
    tensors = {key for key, held in options.items() if torch.is_tensor(held) and held.is_floating_point()}
    unknown = sorted(key for key in tensors if not _HARMLESS_OPTIONS.fullmatch(key))
    if options.get("softcap") is not None or unknown:
        what = f"passes {', '.join(unknown)} to its attention" if unknown else "caps its scores (softcap)"
        raise ValueError(
            f"{name} {what}, which fused attention leaves out; pass its eager attention maps to flow_from_attention "
            "instead"
        )
    if dropout:
        raise ValueError(f"dropout is left on in {name} (rate {dropout}): call model.eval() first")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        from transformers.integrations.sdpa_attention import create_position_bias_mask

        attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
        causal = False
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sink = next((found for found in sinks if found is not None), None)
    if sink is not None:  # one for each head, perhaps for each query too, with an axis of keys
        sink = sink.reshape(1, -1, 1) if sink.numel() == query.shape[1] else sink.flatten(3).squeeze(-1)
    call = AttentionCall(module, name, query, key, value, attention_mask, scaling, causal, sink)
    return probe.handler(probe.change(call) if probe.change else call), None


def _attend_as_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """In eager attention a mask of None means full attention, in sdpa it may mean causal attention."""
    return _attend(module, *args, **{**kwargs, "is_causal": False})


@cache
def _redirect_interface() -> None:
    """From now on, layers that run within a probe get its attention function, and all others what they asked for."""
    from transformers import AttentionInterface

    of_transformers = AttentionInterface.get_interface

    def get_interface(self: Any, attn_implementation: str | None, default: Callable) -> Callable:
        if _PROBE.get() is None:
            return of_transformers(self, attn_implementation, default)
        return _attend if attn_implementation == "sdpa" else _attend_as_eager

    AttentionInterface.get_interface = get_interface


def _own_attention(
    module: nn.Module,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """BERT's attention: three projections, heads, an additive mask, never causal."""

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    query, key, value = heads(module.query(hidden_states)), heads(module.key(context)), heads(module.value(context))
    return _attend(module, query, key, value, attention_mask, is_causal=False)[0].flatten(2), None


def _own_self_attention(
    module: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    return _own_attention(module, hidden_states, hidden_states, attention_mask)


# Attention modules of transformers outside its interface, by name, and what replaces their forward.
OWN_ATTENTION = {
    "ViltSelfAttention": _own_self_attention,
    "VisualBertSelfAttention": _own_self_attention,
    "FlavaSelfAttention": _own_self_attention,
    "GitSelfAttention": _own_self_attention,
    "LxmertAttention": _own_attention,
}


def _own_attention_replaced(model: nn.Module) -> AbstractContextManager[None]:
    """In the block, attention modules outside the interface call the handler."""
    return forwards_replaced(
        {
            module: partial(OWN_ATTENTION[type(module).__name__], module)
            for module in model.modules()
            if type(module).__name__ in OWN_ATTENTION and type(module).__module__.startswith("transformers.")
        }
    )


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """In the block, these modules run other forwards."""
    before = {module: vars(module).get("forward") for module in forwards}  # an instance's own, e.g. of a split model
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward  # the class's is in force again
            if forward is not None:
                module.forward = forward


def _padded(tensor: Tensor, width: int) -> Tensor:
    """`tensor` with channels of zeros added up to `width`."""
    return F.pad(tensor, (0, width - tensor.shape[-1]))
