"""Inter-Modality Flow (paper Sec. 3.2, Eq. 2-6): how much attention crosses between the modalities.

`flow_from_attention` is the definition, for attention maps at hand. `inter_modality_flow` gives the
same numbers for a model, in one forward pass on fused attention, without any attention map.

Why that works: A^{i,j} = A^j ... A^i is only ever summed over blocks. Summing its columns over L is
the product with the indicator 1_L, so one column per start layer i is carried through the layers,
u <- 0.5 (u + mean over heads of softmax(Q K^T / sqrt(d)) u), as one more value of fused attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, nn

from vpworkbench.probes.capture import (
    AttentionCall,
    LayerChoice,
    LayerNames,
    attention_handled,
    run_model,
    untouched,
)
from vpworkbench.probes.modality import Modalities, both_modalities


def flow_from_attention(attention: Tensor, vision: Tensor, *, language: Tensor | None = None) -> Tensor:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    Parameters
    ----------
    attention : Tensor, shape (layer, head, query, key)
        Softmax weights of one example without padding: rows sum to 1.
    vision : BoolTensor, shape (token,)
        True at visual tokens.
    language : BoolTensor, shape (token,), optional
        Every other token where not given; tokens in neither set count in neither sum.

    Returns
    -------
    Tensor, shape (layer, layer)
        `flow[i, j]` in [0, 1], from the input of layer i to the output of layer j; nan where j < i.

    Raises
    ------
    ValueError
        If one modality has no token: the share would be 0 whatever the model does.
    """
    if attention.ndim != 4 or attention.shape[2:] != (len(vision), len(vision)):
        raise ValueError(
            f"attention must be (layer, head, query, key) over the {len(vision)} tokens of "
            f"`vision`, not {tuple(attention.shape)}"
        )
    given = None if language is None else language[None]
    sets = both_modalities(vision[None], torch.ones_like(vision)[None], given)
    weights = attention.mean(dim=1)  # layer query key
    flow = weights.new_full((len(weights), len(weights)), torch.nan)
    for start in range(len(weights)):
        reach = _indicators(sets, weights.dtype)[0]  # token set
        for stop in range(start, len(weights)):
            reach = (reach + weights[stop] @ reach) / 2  # the residual keeps half, Eq. 3
            flow[start, stop] = sum(_crossing(reach[None], sets))
    return flow


@dataclass(frozen=True)
class InterModalityFlow:
    """Inter-Modality Flow of a batch; layers count from 0, the residual (Eq. 3) is included.

    Attributes
    ----------
    text_to_vision, vision_to_text : Tensor, shape (example, layer, layer)
        Share of attention from language queries to visual keys and the reverse, [b, i, j] from the
        input of layer i to the output of layer j; nan where j < i. They add up to `flow`.
    null : Tensor, shape (example, layer, layer)
        `flow` if every query spread its attention evenly over the keys its mask allows.
    per_head : Tensor, shape (example, layer, head)
        Within one layer, each head's inter over the heads' mean of inter + intra, so that the mean
        over heads is `within_layer`.
    layers : tuple of str
        Names of the attention layers that counted.
    per_token : Tensor, shape (example, layer, layer, token), or None
        Share of each query's attention that crosses; nan at tokens in neither set.
    rows, columns : Tensor, shape (example, layer, head, picked, token), or None
        Softmax weights of the picked queries (where does this token look) and of the picked keys
        (who looks at this token), without residual.
    rows_from_input, columns_from_input : Tensor, shape (example, layer, picked, token), or None
        The same rows and columns of A^{1,j} (Eq. 4).
    """

    text_to_vision: Tensor
    vision_to_text: Tensor
    null: Tensor
    per_head: Tensor
    layers: tuple[str, ...]
    per_token: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    rows_from_input: Tensor | None = None
    columns_from_input: Tensor | None = None

    @cached_property
    def flow(self) -> Tensor:
        """F_inter^{i,j} (Eq. 5), (example, layer, layer); nan where j < i."""
        return self.text_to_vision + self.vision_to_text

    @property
    def from_input(self) -> Tensor:
        """F_inter^{1,j}, (example, layer): Fig. 3."""
        return self.flow[:, 0]

    @property
    def within_layer(self) -> Tensor:
        """F_inter^{i,i}, (example, layer): Fig. 4."""
        return self.flow.diagonal(dim1=1, dim2=2)

    @property
    def excess(self) -> Tensor:
        """Flow over null, (example, layer, layer): comparable across token counts; nan at 0."""
        return self.flow / self.null.masked_fill(self.null == 0, torch.nan)


def inter_modality_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    rows: Tensor | Sequence[int] | None = None,
    columns: Tensor | Sequence[int] | None = None,
    per_token: bool = False,
    starts: Sequence[int] | None = None,
    layers: LayerNames | None = None,
) -> InterModalityFlow:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    One forward pass without gradients on fused attention; no attention map is stored. `check`
    compares the pass with the plain forward and with the printed formula.

    Parameters
    ----------
    model : nn.Module
        Any module whose attention layers go through transformers' attention interface.
    inputs : mapping
        Keyword arguments of `model`'s forward.
    vision, tokens : BoolTensor, shape (example, token)
        Visual tokens and real (non-padding) positions of the sequence on which the attention runs.
    language : BoolTensor, shape (example, token), optional
        `tokens & ~vision` where not given; positions in neither set count in neither sum.
    rows, columns : LongTensor, shape (example, picked) or (picked,), optional
        Tokens whose rows and columns of attention are wanted. Rows rolled out from the input cost
        about one eager pass more, in bounded memory; everything else is nearly free.
    per_token : bool
        Also return each token's own flow.
    starts : sequence of int, optional
        Layers at which spans start, all of them where not given; spans of one layer are always
        there. `starts=[0]` gives `from_input` and `within_layer` for the least work.
    layers : str, list of str or callable, optional
        Names (or prefixes) of the attention layers in which the modalities meet, or a predicate on
        names; needed only where layers elsewhere happen to have the same sequence length.

    Raises
    ------
    ValueError
        If the model's sequence is not that of `vision`, a modality is missing or never met by the
        other, dropout is on, or an attention layer cannot be probed on fused kernels.
    """
    sets = both_modalities(vision, tokens, language)
    recorder = _Recorder(sets, rows, columns, per_token, starts, layers)
    with attention_handled(model, recorder):
        run_model(model, inputs)
    recorder.choice.close(model, inputs)
    return recorder.result()


class Check(NamedTuple):
    """What `check` found; both differences are the largest absolute ones."""

    outputs: float  # probed forward against plain forward, over all floating point outputs
    flow: float  # against the printed formula in float64
    layers: int
    tokens: int
    examples: int  # of the shortened input on which the formula was worked out

    def __str__(self) -> str:
        return (
            f"outputs differ by at most {self.outputs:.1e} from the plain forward, the flow by at "
            f"most {self.flow:.1e} from the printed formula ({self.layers} layers, {self.tokens} "
            f"tokens, {self.examples} examples)"
        )


def check(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    layers: LayerNames | None = None,
    examples: int = 1,
) -> Check:
    """Compare a probed pass with the plain forward and with Eq. 2-6 as printed; prints the result.

    The formula multiplies explicit attention maps in float64 and needs memory layer x token^2, so
    it sees the first `examples` examples alone, where every tensor of `inputs` has one entry for
    each example, and all of them otherwise. Parameters are those of `inter_modality_flow`.
    """
    with untouched(model), torch.no_grad():
        plain = _floating(run_model(model, inputs))
    sets = both_modalities(vision, tokens, language)
    recorder = _Recorder(sets, None, None, False, None, layers)
    with attention_handled(model, recorder):
        probed = _floating(run_model(model, inputs))
    recorder.choice.close(model, inputs)
    outputs = max((_difference(*pair) for pair in zip(plain, probed, strict=True)), default=0.0)

    tensors = [value for value in inputs.values() if torch.is_tensor(value)]
    count = examples if all(len(value) == len(vision) for value in tensors) else len(vision)
    short = {key: value[:count] if torch.is_tensor(value) else value for key, value in inputs.items()}
    sets = Modalities(*(part[:count] for part in sets))
    fused = inter_modality_flow(model, short, sets.vision, sets.tokens, language=sets.language,
                                layers=layers)  # fmt: skip
    printed = _printed_formula(model, short, sets, layers)
    difference = _difference(fused.flow.nan_to_num(), printed)
    result = Check(outputs, difference, len(fused.layers), vision.shape[1], len(sets.vision))
    print(result)
    return result


def max_flow(attention: Tensor, *, queries: Sequence[int] | None = None) -> Tensor:
    """Attention flow of Abnar and Zuidema (2020): maximum flow from outputs to inputs, one example.

    The paper calls the roll-out (Eq. 4) a flow; this is the flow that the name comes from. Nodes
    are tokens at every depth, capacities the entries of 0.5 (I + W), and each entry of the result
    is one maximum-flow problem: seconds for tens of tokens, so pick `queries` beyond that.

    Parameters
    ----------
    attention : Tensor, shape (layer, head, query, key)
        Softmax weights of one example: rows sum to 1.
    queries : sequence of int, optional
        Output tokens to start from; all of them where not given.

    Returns
    -------
    Tensor, shape (query, key)
        float64, exact to 1e-6; nan in the rows of queries not picked. See `crossing_share`.
    """
    weights = attention.detach().double().mean(dim=1).cpu()  # layer query key
    layers, tokens, _ = weights.shape
    mixed = (weights + torch.eye(tokens)) / 2
    unit = 2**24  # scipy's capacities are whole numbers below 2^31
    depth, query, key = np.indices(mixed.shape)
    # node (depth, token): layer l leads from depth l + 1 to depth l
    edges = ((depth + 1) * tokens + query).ravel(), (depth * tokens + key).ravel()
    capacity = (mixed * unit).round().numpy().astype(np.int32).ravel()
    nodes = (layers + 1) * tokens
    graph = coo_array((capacity, edges), shape=(nodes, nodes)).tocsr()
    flow = torch.full((tokens, tokens), torch.nan, dtype=torch.float64)
    for start in range(tokens) if queries is None else queries:
        for stop in range(tokens):
            flow[start, stop] = maximum_flow(graph, layers * tokens + start, stop).flow_value / unit
    return flow


def crossing_share(matrix: Tensor, vision: Tensor, *, language: Tensor | None = None) -> Tensor:
    """Eq. 5-6 for any matrix (query, key) of one example; rows that are nan do not count."""
    language = ~vision if language is None else language
    matrix = matrix.nan_to_num()
    same = vision[:, None] & vision | language[:, None] & language
    cross = vision[:, None] & language | language[:, None] & vision
    return matrix[cross].sum() / matrix[cross | same].sum()


class _Recorder:
    """The recursion: handles every attention layer of one pass and keeps sums, never a map."""

    def __init__(
        self,
        sets: Modalities,
        rows: Tensor | Sequence[int] | None,
        columns: Tensor | Sequence[int] | None,
        per_token: bool,
        starts: Sequence[int] | None,
        layers: LayerNames | None,
    ) -> None:
        self.sets = sets
        self.choice = LayerChoice(*sets.vision.shape, layers)
        self.rows = _Rows(picked) if (picked := _picked(rows, sets, "rows")) is not None else None
        picked = _picked(columns, sets, "columns")
        self.columns = _Columns(picked, sets.vision.shape[1]) if picked is not None else None
        self.per_token = per_token
        self.starts = starts
        self.padded = not bool(sets.tokens.all())
        self.scratch: dict[str, Tensor] = {}
        self.two_sets: bool | None = None  # 1_V beside 1_L; known at the first layer that counts
        self.spans: list[list[int]] = []  # per layer: start of each column carried through it
        self.crossed: list[tuple[Tensor, Tensor]] = []  # per layer: (example, start) each
        self.null: list[Tensor] = []  # per layer: (example, start)
        self.heads: list[Tensor] = []  # per layer: (example, head)
        self.token_flows: list[Tensor] = []  # per layer: (example, token, start)
        self._masks: list[Tensor | None] = []  # those whose padding was looked at

    def __call__(self, call: AttentionCall) -> Tensor:
        if not self.choice.counts(call):
            return call.output()
        self._move_to(call.query)
        self._look_at_padding(call)
        self._start_columns(len(self.choice.names) - 1, call.query.dtype)
        extra = [] if self.columns is None else [self.columns.carried(self.reach)]
        # Rows of attention sum to one, so the mean can go around the kernel: in half precision
        # only what differs between tokens is rounded.
        mean = self.reach.mean(dim=1, keepdim=True)
        output, carried = call.carry(torch.cat([self.reach - mean, *extra], dim=-1), self.scratch)
        per_head, extras = carried.tensor_split([mean.shape[-1]], dim=-1)
        self._record(call, per_head.to(mean) + mean[:, :, None])
        if self.columns is not None:
            self.columns.record(extras)
        if self.rows is not None:
            self.rows.record(call)
        self._drop_column()
        return output

    def result(self) -> InterModalityFlow:
        """Arrange what the pass left; raise where it is undefined."""
        text_to_vision = self._triangle([there for there, _ in self.crossed])
        null = self._triangle(self.null)
        self._raise_if_undefined(null)
        return InterModalityFlow(
            text_to_vision=text_to_vision,
            vision_to_text=self._triangle([back for _, back in self.crossed]),
            null=null,
            per_head=torch.stack(self.heads, dim=1),
            layers=tuple(self.choice.names),
            per_token=self._triangle(self.token_flows) if self.per_token else None,
            rows=None if self.rows is None else torch.stack(self.rows.weights, dim=1),
            columns=None if self.columns is None else torch.stack(self.columns.weights, dim=1),
            rows_from_input=None if self.rows is None else self.rows.from_input(),
            columns_from_input=(None if self.columns is None else torch.stack(self.columns.from_input, dim=1)),
        )

    def _move_to(self, query: Tensor) -> None:
        if self.sets.vision.device != query.device:  # also between the devices of a split model
            self.sets = Modalities(*(part.to(query.device) for part in self.sets))
        if self.spans:
            self.reach, self.even = self.reach.to(query.device), self.even.to(query.device)

    def _look_at_padding(self, call: AttentionCall) -> None:
        """1 - 1_L is 1_V only where nobody looks at a token in neither set; padding may be one."""
        padding = ~self.sets.tokens
        if any(call.mask is mask for mask in self._masks) or self.two_sets:
            return
        self._masks.append(call.mask)
        seen = not self.sets.complete or call.can_attend(self.sets.tokens, padding)
        if seen and self.two_sets is False:
            raise ValueError(
                f"{call.name} attends to padding, which the layers before it mask: give `tokens` "
                "the positions that the model treats as real"
            )
        self.two_sets = seen

    def _start_columns(self, layer: int, dtype: torch.dtype) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        fresh = _indicators(self.sets, dtype)[..., : 2 if self.two_sets else 1]  # example token set
        first = not self.spans
        carried = [] if first else [self.spans[-1][i] for i in self._kept]
        self.spans.append([*carried, layer])
        self.reach = fresh if first else torch.cat([self.reach, fresh], dim=-1)
        self.even = fresh if first else torch.cat([self.even, fresh], dim=-1)

    def _drop_column(self) -> None:
        """A column that starts here has served `within_layer`; carry it on only if asked for."""
        starts = self.spans[-1]
        self._kept = [i for i, s in enumerate(starts) if self.starts is None or s in self.starts]
        if len(self._kept) < len(starts):
            self.reach = self._by_span(self.reach)[:, :, self._kept].flatten(2)
            self.even = self._by_span(self.even)[:, :, self._kept].flatten(2)

    def _record(self, call: AttentionCall, per_head: Tensor) -> None:
        """per_head : Tensor, shape (example, token, head, start * set): attention times `reach`."""
        newest = self._by_span(self.reach)[:, :, -1]  # example token set
        within = (newest[:, :, None] + self._by_span(per_head)[..., -1, :]) / 2
        self.heads.append(_crossing_by_head(_both(within), self.sets))
        self.reach = self._without_empty_rows((self.reach + per_head.mean(dim=2)) / 2)
        self.even = self._without_empty_rows((self.even + call.uniform(self.even)) / 2)
        reach = _both(self._by_span(self.reach))
        self.crossed.append(_crossing(reach, self.sets))
        self.null.append(sum(_crossing(_both(self._by_span(self.even)), self.sets)))
        if self.per_token:
            self.token_flows.append(_crossing_by_token(reach, self.sets))

    def _by_span(self, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, 2 if self.two_sets else 1))

    def _without_empty_rows(self, columns: Tensor) -> Tensor:
        """A padding query may see no key; some kernels answer nan, and 0 * nan would spread it."""
        if not self.padded:
            return columns
        return columns.masked_fill(~self.sets.tokens[..., None] & columns.isnan(), 0.0)

    def _triangle(self, by_stop: list[Tensor]) -> Tensor:
        """(example, [token,] start) for each last layer -> (example, layer, layer[, token])."""
        layers, first = len(by_stop), by_stop[0]
        square = first.new_full((len(first), layers, layers, *first.shape[1:-1]), torch.nan)
        for stop, (starts, values) in enumerate(zip(self.spans, by_stop, strict=True)):
            square[:, starts, stop] = values.movedim(-1, 1).to(square)
        return square

    def _raise_if_undefined(self, null: Tensor) -> None:
        apart = null.nan_to_num().amax(dim=(1, 2)) == 0
        if apart.any():
            raise ValueError(
                f"in examples {apart.nonzero().flatten().tolist()} the mask never lets one "
                "modality attend to the other: nothing can flow between them"
            )
        for layer, heads in enumerate(self.heads):
            if heads.isnan().any():
                broken = heads.isnan().any(dim=1).nonzero().flatten().tolist()
                raise ValueError(
                    f"attention is nan in {self.choice.names[layer]} (examples {broken}): the "
                    "model's hidden states are nan there, or a real token can attend to nothing"
                )


class _Columns:
    """Picked columns of attention: one-hot values, fresh at each layer and rolled out."""

    def __init__(self, picked: Tensor, tokens: int) -> None:
        self.onehot = torch.nn.functional.one_hot(picked, tokens).transpose(1, 2)
        self.rolled: Tensor | None = None  # example token picked
        self.weights: list[Tensor] = []
        self.from_input: list[Tensor] = []

    def carried(self, like: Tensor) -> Tensor:
        """(example, token, 2 * picked): fresh ones, then rolled ones."""
        self.onehot = self.onehot.to(like)
        self.rolled = self.onehot if self.rolled is None else self.rolled.to(like)
        return torch.cat([self.onehot, self.rolled], dim=-1)

    def record(self, carried: Tensor) -> None:
        """carried : Tensor, shape (example, token, head, 2 * picked)."""
        fresh, rolled = carried.to(self.rolled).chunk(2, dim=-1)
        self.weights.append(fresh.permute(0, 2, 3, 1))
        self.rolled = (self.rolled + rolled.mean(dim=2)) / 2
        self.from_input.append(self.rolled.transpose(1, 2))


class _Rows:
    """Picked rows of attention, from queries and keys; kept for the roll-out, linear in tokens."""

    def __init__(self, picked: Tensor) -> None:
        self.picked = picked
        self.calls: list[AttentionCall] = []
        self.weights: list[Tensor] = []

    def record(self, call: AttentionCall) -> None:
        self.picked = self.picked.to(call.query.device)
        self.calls.append(call)
        self.weights.append(call.weights(self.picked))

    def from_input(self) -> Tensor:
        """Rows of A^{1,j}, from the last factor to the first; (example, layer, picked, token)."""
        examples, picked = self.picked.shape
        tokens = self.calls[0].lengths[1]
        onehot = torch.nn.functional.one_hot(self.picked, tokens).to(self.weights[0])
        rolled = onehot.new_empty(examples, 0, tokens)  # example (stop picked) token
        for call in reversed(self.calls):
            rolled = torch.cat([onehot.to(call.query.device), rolled.to(call.query.device)], dim=1)
            rolled = (rolled + _rows_times_attention(rolled, call)) / 2
        return rolled.unflatten(1, (len(self.calls), picked))


def _rows_times_attention(rows: Tensor, call: AttentionCall, entries: int = 2**24) -> Tensor:
    """rows (example, row, query) times attention, its mean over heads; by blocks of queries."""
    examples, queries, keys = call.lengths
    size = max(1, entries // (examples * call.query.shape[1] * keys))
    product = torch.zeros_like(rows)
    for block in torch.arange(queries, device=rows.device).split(size):
        weights = call.weights(block.expand(examples, -1)).mean(dim=1)  # example block key
        product += rows[:, :, block] @ weights.to(rows)
    return product


def _indicators(sets: Modalities, dtype: torch.dtype) -> Tensor:
    """1_L and 1_V: (example, token, set)."""
    return torch.stack([sets.language, sets.vision], dim=-1).to(dtype)


def _both(reach: Tensor) -> Tensor:
    """Add the share that ends on vision where only the share that ends on language is carried."""
    return reach if reach.shape[-1] == 2 else torch.cat([reach, 1 - reach], dim=-1)


def _crossing(reach: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """Eq. 5-6: text to vision and vision to text, each over inter + intra.

    Parameters
    ----------
    reach : Tensor, shape (example, token, ..., set)
        Share of each query's attention that ends on language (0) and on vision (1).

    Returns
    -------
    tuple of two Tensor, shape (example, ...)
    """
    from_language, from_vision = _sums(reach, sets)
    total = (from_language + from_vision).sum(dim=-1)
    return from_language[..., 1] / total, from_vision[..., 0] / total


def _crossing_by_head(reach: Tensor, sets: Modalities) -> Tensor:
    """Flow of each head, (example, head), from `reach` (example, token, head, set).

    Inter over the heads' mean of inter + intra: where some attention ends in neither set the heads
    weigh differently, and only so is their mean the flow of the layer.
    """
    from_language, from_vision = _sums(reach, sets)
    total = (from_language + from_vision).sum(dim=-1).mean(dim=1, keepdim=True)
    return (from_language[..., 1] + from_vision[..., 0]) / total


def _sums(reach: Tensor, sets: Modalities) -> tuple[Tensor, Tensor]:
    """`reach` (example, token, ..., set) summed over the queries in L and over those in V."""
    return tuple(torch.einsum("et,et...->e...", queries.to(reach), reach) for queries in (sets.language, sets.vision))


def _crossing_by_token(reach: Tensor, sets: Modalities) -> Tensor:
    """Share of each token's own attention that crosses, (example, token, ...); else nan."""
    to_language, to_vision = (reach / reach.sum(dim=-1, keepdim=True)).unbind(dim=-1)
    flow = torch.where(sets.vision[..., None], to_language, to_vision)
    return flow.masked_fill(~(sets.vision | sets.language)[..., None], torch.nan)


def _picked(picked: Tensor | Sequence[int] | None, sets: Modalities, name: str) -> Tensor | None:
    if picked is None:
        return None
    examples, tokens = sets.vision.shape
    picked = torch.as_tensor(picked, device=sets.vision.device)
    picked = picked.expand(examples, -1) if picked.ndim == 1 else picked
    if picked.is_floating_point() or picked.ndim != 2 or len(picked) != examples:
        raise ValueError(
            f"{name} must hold token positions, (picked,) or ({examples}, picked), not "
            f"{picked.dtype} {tuple(picked.shape)}"
        )
    if picked.numel() == 0 or picked.min() < 0 or picked.max() >= tokens:
        raise ValueError(f"{name} must hold positions from 0 to {tokens - 1}")
    return picked.long()


def _printed_formula(
    model: nn.Module, inputs: Mapping[str, Any], sets: Modalities, layers: LayerNames | None
) -> Tensor:
    """Eq. 2-6 from explicit maps, the product formed; (example, layer, layer), 0 for j < i."""
    choice = LayerChoice(*sets.vision.shape, layers)
    products: list[Tensor] = []  # A^{i,j} for each start i, example query key
    shares: list[Tensor] = []

    def multiply(call: AttentionCall) -> Tensor:
        if not choice.counts(call):
            return call.output()
        identity = torch.eye(sets.vision.shape[1], dtype=torch.float64, device=call.query.device)
        mixed = (identity + call.weights().mean(dim=1)) / 2
        products[:] = [mixed @ product for product in products] + [mixed]
        share = [
            [
                crossing_share(*one, language=language)
                for *one, language in zip(product, sets.vision, sets.language, strict=True)
            ]
            for product in products
        ]
        shares.append(torch.tensor(share, dtype=torch.float64).T)  # example start
        return call.output()

    with attention_handled(model, multiply):
        run_model(model, inputs)
    count = len(shares)
    padded = [torch.nn.functional.pad(share, (0, count - share.shape[-1])) for share in shares]
    return torch.stack(padded, dim=-1)


def _floating(outputs: Any) -> list[Tensor]:
    """All floating point tensors in a model's output, in order."""
    if torch.is_tensor(outputs):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif hasattr(outputs, "__dataclass_fields__"):
        outputs = vars(outputs).values()
    elif not isinstance(outputs, list | tuple):
        return []
    return [tensor for part in outputs for tensor in _floating(part)]


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
