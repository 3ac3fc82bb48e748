"""Intercepts every attention layer of a model while it runs, and leaves the model as it was.

Transformers' models dispatch each attention layer by `config._attn_implementation`. Registered here is one more
implementation, `ATTENTION`. It wraps the layer's queries, keys, values and mask in an `AttentionCall`, and a handler
computes the output. `call.output()` is what `sdpa` computes, on the same fused kernels and masks; a handler can also
read the call, or change it with `dataclasses.replace` first.

ViLT, VisualBERT, FLAVA and LXMERT compute attention in modules of their own, all in BERT's way. Their `forward` is
replaced while a probe runs, so that their layers go through the same handler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PretrainedConfig

ATTENTION = "vpworkbench_probe"
# For models set to eager attention: there a mask of None means full attention, in sdpa it may mean causal attention.
ATTENTION_AS_EAGER = f"{ATTENTION}_eager"

# Additive masks in use: -inf, the smallest number of the dtype, BERT's old -10,000 (-9,984 in bfloat16).
_MASKED_BELOW = -5000.0
# Size of the padded copies made at a time: a small share of a forward's memory on a CPU, one call on a GPU.
_PADDED_BYTES = {"cpu": 2**22, "cuda": 2**29}
# Options that sdpa silently leaves out of the softmax: the probe would describe another model.
_REFUSED_OPTIONS = {"softcap": "soft-capped scores", "s_aux": "attention sinks", "sinks": "attention sinks"}


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

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Numbers of examples, queries and keys."""
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]

    def output(self) -> Tensor:
        """The layer's output as the model expects it, (example, query, head, channel)."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        tensors = self.query, self.key, self.value, self.mask
        return sdpa_attention_forward(self.module, *tensors, scaling=self.scaling, is_causal=self.causal)[0]

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
            wide = replace(self, query=query, key=key, value=value, mask=mask).output()
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
        return scores.softmax(dim=-1)

    def uniform_attention(self, columns: Tensor) -> Tensor:
        """`columns`, (example, key, column), averaged over the keys that each query may attend to."""
        queries = self.lengths[1]
        if self.mask is None and not self.causal:
            return columns.mean(dim=1, keepdim=True).expand(-1, queries, -1)
        if self.mask is None:
            keys = torch.arange(1, columns.shape[1] + 1, device=columns.device)
            return columns.cumsum(dim=1) / keys[:, None]
        if _same_for_every_query(self.mask):
            allowed = _allowed(self.mask[:, :, 0]).to(columns)  # example head key
            share = allowed / allowed.sum(dim=-1, keepdim=True)
            return (share.mean(dim=1, keepdim=True) @ columns).expand(-1, queries, -1)
        # Equal scores give uniform weights, and the fused kernel needs no query x key memory.
        allowed = _allowed(self.mask)
        count = columns.shape[2]
        values = F.pad(columns, (0, -count % 8))[:, None].expand(-1, allowed.shape[1], -1, -1)
        zeros = values.new_zeros(*values.shape[:2], queries, values.shape[3])
        spread = F.scaled_dot_product_attention(zeros, torch.zeros_like(values), values, attn_mask=allowed)
        return spread.mean(dim=1)[..., :count]

    def mean_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some queries at a time, (some,), and their `weights` averaged over heads, (example, some, key)."""
        examples, queries, keys = self.lengths
        size = max(1, 2**24 // (examples * self.query.shape[1] * keys))  # at most 2^24 weights at a time
        for some in torch.arange(queries, device=self.query.device).split(size):
            yield some, self.weights(some.expand(examples, -1)).mean(dim=1)

    def allowed(self) -> Tensor:
        """The pairs that the mask allows, bool (example, head or 1, query, key)."""
        examples, queries, keys = self.lengths
        if self.mask is not None:
            return _allowed(self.mask).expand(examples, -1, queries, -1)
        pairs = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
        return (pairs.tril() if self.causal else pairs).expand(examples, 1, -1, -1)

    @property
    def reading(self) -> Reading:
        """Who may attend to whom, without the tensors of the call."""
        mask = self.mask
        if mask is not None and mask.shape[1] > 1:  # one for each head, perhaps with a bias that only this layer has
            mask = mask[:, :1] if mask.stride(1) == 0 else _allowed(mask).any(dim=1, keepdim=True)
        return Reading(mask, self.causal, self.lengths[2])

    def _mask_of(self, picked: Tensor) -> Tensor | None:
        if self.mask is None:
            key = torch.arange(self.key.shape[2], device=picked.device)
            return (key <= picked[..., None])[:, None] if self.causal else None
        if self.mask.shape[2] == 1:
            return self.mask
        example = torch.arange(len(picked), device=picked.device)[:, None]
        return self.mask.expand(len(picked), -1, -1, -1)[example, :, picked].transpose(1, 2)


class Reading(NamedTuple):
    """Which keys the queries of an attention layer may attend to."""

    mask: Tensor | None  # (example or 1, 1, query or 1, key), as that of a call
    causal: bool
    keys: int

    def keys_of(self, queries: Tensor) -> Tensor:
        """Keys that some of `queries` may attend to; bool (example, query) -> bool (example, key)."""
        if self.mask is None and self.causal:
            return queries.flip(1).cumsum(dim=1).flip(1) > 0  # all keys up to the last query
        if self.mask is None:
            return queries.any(dim=1, keepdim=True).expand(-1, self.keys)
        queries = queries.to(self.mask.device)
        if _same_for_every_query(self.mask):
            return _allowed(self.mask[:, 0, 0]) & queries.any(dim=1, keepdim=True)
        masks = self.mask.expand(len(queries), -1, -1, -1)
        return torch.stack([_allowed(mask[0, rows]).any(dim=0) for mask, rows in zip(masks, queries, strict=True)])


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
    _register()
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    configs = attention_configs(model)
    if not configs:
        raise ValueError(
            f"{type(model).__name__} holds no transformers config, so its attention layers cannot be intercepted; "
            "pass its attention maps to flow_from_attention instead"
        )
    with unchanged(model), torch.no_grad():
        for config in configs:
            eager = config.__dict__.get("_attn_implementation_internal") in (None, "eager", ATTENTION_AS_EAGER)
            config.__dict__["_attn_implementation_internal"] = ATTENTION_AS_EAGER if eager else ATTENTION
            if "use_cache" in config.__dict__:
                config.__dict__["use_cache"] = False  # a cache would keep all keys and values
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
    return model(**{**inputs, "use_cache": False} if inputs.get("use_cache") else inputs)


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every transformers config in `model` and its parts, nested ones too, once each."""
    from transformers import PretrainedConfig

    found: dict[int, PretrainedConfig] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(vars(value).values())
    return list(found.values())


def refuse_randomness(model: nn.Module) -> None:
    """Raise where dropout is active, or where a forward would update running statistics."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        rate = rate or getattr(module, "drop_prob", 0) or 0  # timm's stochastic depth
        if module.training and rate:
            raise ValueError(f"dropout is left on in {name} (rate {rate}): call model.eval() first")
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} would update its statistics: call model.eval() first")


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
    """The registered attention function; the signature is that of transformers."""
    probe = _PROBE.get()
    if probe is None:
        raise RuntimeError(f"attention {ATTENTION!r} only works within a probe; set it to 'sdpa'")
    name = probe.names.get(id(module), type(module).__name__)
    for option, meaning in _REFUSED_OPTIONS.items():
        if options.get(option) is not None:
            raise ValueError(
                f"{name} uses {meaning} ({option}), which fused sdpa attention leaves out; pass its eager attention "
                "maps to flow_from_attention instead"
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
    call = AttentionCall(module, name, query, key, value, attention_mask, scaling, causal)
    return probe.handler(probe.change(call) if probe.change else call), None


@cache
def _register() -> None:
    """Make both implementations known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attend_as_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _attend(module, *args, **{**kwargs, "is_causal": False})

    def mask_as_eager(*args: Any, **kwargs: Any) -> Tensor | None:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    AttentionInterface.register(ATTENTION_AS_EAGER, attend_as_eager)
    AttentionMaskInterface.register(ATTENTION_AS_EAGER, mask_as_eager)


def _own_attention(
    module: nn.Module,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor]:
    """BERT's attention: three projections, heads, an additive mask, never causal."""

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    query, key, value = heads(module.query(hidden_states)), heads(module.key(context)), heads(module.value(context))
    return (_attend(module, query, key, value, attention_mask, is_causal=False)[0].flatten(2),)


def _own_self_attention(
    module: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> tuple[Tensor]:
    return _own_attention(module, hidden_states, hidden_states, attention_mask)


# Attention modules of transformers outside its interface, by name, and what replaces their forward.
OWN_ATTENTION = {
    "ViltSelfAttention": _own_self_attention,
    "VisualBertSelfAttention": _own_self_attention,
    "FlavaSelfAttention": _own_self_attention,
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


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > _MASKED_BELOW


def _same_for_every_query(mask: Tensor) -> bool:
    return mask.shape[2] == 1 or mask.stride(2) == 0


def _padded(tensor: Tensor, width: int) -> Tensor:
    """`tensor` with channels of zeros added up to `width`."""
    return F.pad(tensor, (0, width - tensor.shape[-1]))
