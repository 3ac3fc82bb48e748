"""Reads attention and hidden states while a model runs, and leaves the model as it was.

Transformers' models dispatch every attention layer by `config._attn_implementation`. Registered
here is one more implementation, `ATTENTION`, which hands each layer's queries, keys, values and
mask to a handler and otherwise computes what `sdpa` computes, on the same fused kernels and masks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "vpworkbench_probe"
LayerNames = str | Sequence[str] | Callable[[str], bool]

# Additive masks in the field: -inf, the dtype's minimum, BERT's old -10,000 (-9,984 in bfloat16).
_HIDDEN_BELOW = -5000.0
# What sdpa would silently leave out of the softmax; a probe on top would report another model.
_REFUSED = {"softcap": "soft-capped scores", "s_aux": "attention sinks", "sinks": "attention sinks"}


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer of one forward pass.

    Attributes
    ----------
    query : Tensor, shape (example, head, query, channel)
    key, value : Tensor, shape (example, key head, key, channel)
        Grouped-query models have fewer key heads than heads; they come unrepeated.
    mask : Tensor or None, shape (example or 1, head or 1, query or 1, key)
        bool, True where a query may look; or additive.
    causal : bool
        True where the mask is None because the kernel applies the causal one itself.
    """

    module: nn.Module
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Examples, queries and keys."""
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]

    def output(self) -> Tensor:
        """What the model expects: (example, query, head, channel)."""
        return self._fused(self.query, self.key, self.value)

    def carry(self, columns: Tensor, scratch: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The layer's output, and `softmax(Q K^T) columns` for every head, from one fused call.

        The columns ride as extra values. The fused kernels want one width for queries, keys and
        values, so all three are padded with zeros, which changes no score; 8 keeps them aligned.

        Parameters
        ----------
        columns : Tensor, shape (example, key, column)
        scratch : dict, optional
            Keeps the padded copies from layer to layer: fresh memory costs more than the copy.

        Returns
        -------
        Tensor, shape (example, query, head, channel)
        Tensor, shape (example, query, head, column)
        """
        channels, count = self.value.shape[-1], columns.shape[-1]
        width = -(-max(self.query.shape[-1], channels + count) // 8) * 8
        scratch = {} if scratch is None else scratch
        query = _widened(self.query, width, "query", scratch)
        key = _widened(self.key, width, "key", scratch)
        value = _widened(self.value, width, "value", scratch)
        value[..., channels : channels + count] = columns.to(value.dtype)[:, None]
        output = self._fused(query, key, value)
        carried = output[..., channels : channels + count]
        return output[..., :channels].contiguous(), carried

    def weights(self, picked: Tensor | None = None) -> Tensor:
        """Softmax weights of the picked queries, in float32 or better.

        Parameters
        ----------
        picked : LongTensor, shape (example, picked), optional
            Positions of queries; all of them where not given, which needs memory query x key.

        Returns
        -------
        Tensor, shape (example, head, picked, key)
        """
        examples, queries, _ = self.lengths
        if picked is None:
            picked = torch.arange(queries, device=self.query.device).expand(examples, -1)
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        example = torch.arange(examples, device=self.query.device)[:, None]
        query = self.query[example, :, picked].transpose(1, 2).to(dtype)
        key = self.key.repeat_interleave(query.shape[1] // self.key.shape[1], dim=1).to(dtype)
        scores = query @ key.transpose(2, 3) * self.scaling
        mask = self._mask_rows(picked)
        if mask is not None and mask.dtype == torch.bool:
            # not -inf: a padding query may see nothing, and its row would be nan
            scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1)

    def uniform(self, columns: Tensor) -> Tensor:
        """`columns` under attention that spreads evenly over the keys each query may see.

        Parameters and result have the shape (example, token, column).
        """
        if self.mask is None and not self.causal:
            return columns.mean(dim=1, keepdim=True).expand_as(columns)
        if self.mask is None:
            seen = torch.arange(1, columns.shape[1] + 1, device=columns.device)
            return columns.cumsum(dim=1) / seen[:, None]
        if self._same_for_every_query:
            allowed = _allowed(self.mask[:, :, 0]).to(columns)  # example head key
            share = allowed / allowed.sum(dim=-1, keepdim=True)
            return (share.mean(dim=1, keepdim=True) @ columns).expand_as(columns)
        return self._uniform_by_zero_queries(columns)

    def can_attend(self, queries: Tensor, keys: Tensor) -> bool:
        """Whether any of `queries` may look at any of `keys`; both (example, token) bool."""
        if not keys.any():
            return False
        if self.mask is None:
            before = keys.cumsum(dim=1) > 0 if self.causal else keys.any(dim=1, keepdim=True)
            return bool((before & queries).any())
        if self._same_for_every_query:
            seen = (_allowed(self.mask[:, :, 0]) & keys[:, None]).flatten(1).any(dim=1)
            return bool((seen & queries.any(dim=1)).any())
        masks = self.mask.expand(len(queries), -1, -1, -1)
        return any(
            bool(_allowed(mask[:, :, key])[:, query].any())
            for mask, query, key in zip(masks, queries, keys, strict=True)
        )

    @property
    def _same_for_every_query(self) -> bool:
        return self.mask is not None and (self.mask.shape[2] == 1 or self.mask.stride(2) == 0)

    def _uniform_by_zero_queries(self, columns: Tensor) -> Tensor:
        """Equal scores are uniform weights, and the fused kernel needs no query x key memory."""
        allowed = _allowed(self.mask)
        examples, tokens, count = columns.shape
        values = F.pad(columns, (0, -count % 8))[:, None].expand(-1, allowed.shape[1], -1, -1)
        spread = F.scaled_dot_product_attention(
            torch.zeros_like(values), torch.zeros_like(values), values, attn_mask=allowed
        )
        return spread.mean(dim=1)[..., :count]

    def _mask_rows(self, picked: Tensor) -> Tensor | None:
        if self.mask is None:
            key = torch.arange(self.key.shape[2], device=picked.device)
            return (key <= picked[..., None])[:, None] if self.causal else None
        if self.mask.shape[2] == 1:
            return self.mask
        example = torch.arange(len(picked), device=picked.device)[:, None]
        return self.mask.expand(len(picked), -1, -1, -1)[example, :, picked].transpose(1, 2)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention_forward(
            self.module, query, key, value, self.mask, scaling=self.scaling, is_causal=self.causal
        )[0]


Handler = Callable[[AttentionCall], Tensor]


@dataclass
class LayerChoice:
    """Which attention layers of a pass count: those in which the probed sequence attends to itself.

    Parameters
    ----------
    examples, tokens : int
        Size of the probed batch; other layers (a vision tower, cross attention) run plainly.
    layers : str, list of str or callable, optional
        Names of modules (a prefix such as "language_model" will do) or a predicate on names, where
        the length alone does not tell the layers apart.
    """

    examples: int
    tokens: int
    layers: LayerNames | None = None
    names: list[str] = field(default_factory=list)
    _others: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)

    def counts(self, call: AttentionCall) -> bool:
        """Whether this layer counts; remembers the answer for `close`."""
        named = self.layers is None or _is_named(call.name, self.layers)
        if named and call.lengths == (self.examples, self.tokens, self.tokens):
            self.names.append(call.name)
            return True
        if named:
            self._others.append((call.name, call.lengths))
        return False

    def close(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """After the pass: raise where the layers that counted are not one stack of layers."""
        stacks = list(dict.fromkeys(_stack(name) for name in self.names))
        if not stacks:
            raise ValueError(self._nothing_counted(model, inputs))
        if len(stacks) > 1 and self.layers is None:
            raise ValueError(
                f"{len(stacks)} stacks of attention layers run on {self.tokens} tokens: "
                f"{', '.join(stacks)}; name those in which the modalities meet, e.g. "
                f"layers={stacks[-1].split('.*')[0]!r}"
            )
        changed = [(name, size) for name, size in self._others if _stack(name) in stacks]
        if changed:
            name, (examples, queries, keys) = changed[0]
            raise ValueError(
                f"{name} attends from {queries} to {keys} tokens in {examples} examples, but "
                f"`vision` has {self.tokens} tokens in {self.examples}: a flow needs "
                "one sequence throughout"
            )

    def _nothing_counted(self, model: nn.Module, inputs: Mapping[str, Any]) -> str:
        kind = type(model).__name__
        if not self._others:
            chosen = "" if self.layers is None else f" chosen by layers={self.layers!r}"
            return (
                f"no attention layer of {kind}{chosen} went through transformers' attention "
                "interface; pass its attention maps to flow_from_attention instead"
            )
        sizes = {(_stack(name), size) for name, size in self._others}
        seen = "; ".join(
            f"{stack}: {queries} queries x {keys} keys in {examples} examples"
            for stack, (examples, queries, keys) in sorted(sizes)
        )
        shapes = {name: value.shape for name, value in inputs.items() if torch.is_tensor(value)}
        given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        return (
            f"`vision` has {self.tokens} tokens in {self.examples} examples, but {kind} built "
            f"sequences of other lengths from the inputs ({given}): {seen}. What the model's "
            "forward adds to its inputs (image tokens, a class token) belongs in `vision` and "
            "`tokens` too"
        )


@contextmanager
def attention_handled(model: nn.Module, handler: Handler) -> Iterator[None]:
    """In the block `handler` answers every attention layer of `model`, without gradients.

    Afterwards, also after an exception, the model's attention setting, cache setting, hooks and
    training mode and the random state are as before.
    """
    refuse_randomness(model)
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    configs = attention_configs(model)
    if not configs:
        raise ValueError(
            f"{type(model).__name__} holds no transformers config, so its attention cannot be read "
            "in the pass; pass its attention maps to flow_from_attention instead"
        )
    with untouched(model), torch.no_grad():
        for config in configs:
            config.__dict__["_attn_implementation_internal"] = ATTENTION
            if "use_cache" in config.__dict__:
                config.__dict__["use_cache"] = False  # a cache would keep all keys and values
        token = _HANDLER.set((handler, names))
        try:
            yield
        finally:
            _HANDLER.reset(token)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore settings, hooks, training mode and random state of `model` when the block ends."""
    configs = [(config, dict(config.__dict__)) for config in attention_configs(model)]
    modules = [
        (module, module.training, set(module._forward_hooks), set(module._forward_pre_hooks))
        for module in model.modules()
    ]
    captured = "_output_capturing_hooks_installed"  # where transformers adds hooks for good
    unmarked = [module for module, *_ in modules if captured not in module.__dict__]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for config, settings in configs:
            config.__dict__.clear()
            config.__dict__.update(settings)
        for module, training, hooks, pre_hooks in modules:
            module.training = training
            for hook in set(module._forward_hooks) - hooks:
                module._forward_hooks.pop(hook)
                module._forward_hooks_with_kwargs.pop(hook, None)
            for hook in set(module._forward_pre_hooks) - pre_hooks:
                module._forward_pre_hooks.pop(hook)
                module._forward_pre_hooks_with_kwargs.pop(hook, None)
        for module in unmarked:
            module.__dict__.pop(captured, None)


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every transformers config in `model` or its parts, nested ones too, once each."""
    found: dict[int, PretrainedConfig] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(vars(value).values())
    return list(found.values())


def refuse_randomness(model: nn.Module) -> None:
    """Raise where dropout or a running statistic is on: it would read noise, or leave some."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        rate = rate or getattr(module, "drop_prob", 0) or 0  # timm's stochastic depth
        if module.training and rate:
            raise ValueError(f"dropout is left on in {name} (rate {rate}): call model.eval() first")
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} would update its statistics: call model.eval() first")


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """`model(**inputs)` with what a probe cannot serve refused by name, and the cache off."""
    if inputs.get("past_key_values") is not None:
        raise ValueError("past_key_values: a probe needs the sequence in one pass; leave it out")
    if inputs.get("output_attentions"):
        raise ValueError("output_attentions stores what a probe does without; leave it out")
    cache = {"use_cache": False} if inputs.get("use_cache") else {}
    return model(**{**inputs, **cache})


def hidden_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    tokens: Tensor | None = None,
    layers: LayerNames | None = None,
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
        if outputs.get("hidden_states"):
            return tuple(outputs["hidden_states"])
    return _hidden_states_of_blocks(model, inputs, tokens, layers)


def _hidden_states_of_blocks(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor | None, layers: LayerNames | None
) -> tuple[Tensor, ...]:
    attended: list[str] = []
    states: dict[str, list[Tensor]] = {}  # name of a list of blocks -> input of its first, outputs

    def remember(call: AttentionCall) -> Tensor:
        wanted = tokens is None or call.lengths[:2] == tuple(tokens.shape)
        if wanted and (layers is None or _is_named(call.name, layers)):
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


# The running pass of this thread: its handler and the names of the model's modules by id.
_HANDLER: ContextVar[tuple[Handler, dict[int, str]] | None] = ContextVar("handler", default=None)


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
    """The registered attention function: the signature that transformers calls."""
    handling = _HANDLER.get()
    if handling is None:
        raise RuntimeError(f"attention {ATTENTION!r} only works within a probe; set it to 'sdpa'")
    handler, names = handling
    name = names.get(id(module), type(module).__name__)
    for option, what in _REFUSED.items():
        if options.get(option) is not None:
            raise ValueError(
                f"{name} uses {what} ({option}), which fused sdpa attention leaves out; pass its "
                "eager attention maps to flow_from_attention instead"
            )
    if dropout:
        raise ValueError(f"dropout is left on in {name} (rate {dropout}): call model.eval() first")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask, causal, query, key)
        causal = False
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(module, name, query, key, value, attention_mask, scaling, causal)
    return handler(call), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    from transformers.integrations.sdpa_attention import create_position_bias_mask  # since 5.x

    return create_position_bias_mask(bias, mask, causal, query, key)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > _HIDDEN_BELOW


def _widened(tensor: Tensor, width: int, name: str, scratch: dict[str, Tensor]) -> Tensor:
    """`tensor` with zeros behind its channels, in the memory of the layer before where it fits."""
    shape = (*tensor.shape[:-1], width)
    name = f"{name} of {tensor.shape[-1]}"  # layers may differ in width, and zeros must stay zeros
    buffer = scratch.get(name)
    same = buffer is not None and (buffer.dtype, buffer.device) == (tensor.dtype, tensor.device)
    if not same or buffer.shape != shape:
        buffer = scratch[name] = tensor.new_zeros(shape)
    buffer[..., : tensor.shape[-1]] = tensor
    return buffer


def _stack(name: str) -> str:
    """Name of a module without its layer's number: equal for all layers of one stack."""
    return re.sub(r"\d+", "*", name)


def _is_named(name: str, layers: LayerNames) -> bool:
    if callable(layers):
        return bool(layers(name))
    prefixes = [layers] if isinstance(layers, str) else layers
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
