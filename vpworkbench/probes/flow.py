"""Inter-Modality Flow of a model (paper Sec. 3.2, Eq. 2-6): how much attention crosses between the modalities.

A^{i,j} = A^j ... A^i (Eq. 4) is only ever summed over blocks. Summing its columns over L is the product with the
indicator 1_L, so one column for each start layer i is carried through the layers,

    u <- 0.5 (u + mean over heads of softmax(Q K^T / sqrt(d)) u),

as one more channel of the values of fused attention. One forward pass gives every span of layers, without any attention
map. `vpworkbench.probes.exactness` compares it with the formula as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall
from vpworkbench.probes.formula import Modalities, crossing, crossing_by_head, crossing_by_query
from vpworkbench.probes.layers import Block, LayerChoice, LayerNames, Readings, reaching
from vpworkbench.probes.layouts import modalities_of, patches_recorded
from vpworkbench.probes.picked import PickedColumns, PickedRows
from vpworkbench.probes.reading import Reading


@dataclass(frozen=True)
class InterModalityFlow:
    """Inter-Modality Flow of a batch; layers count from 0, the residual (Eq. 3) is included.

    Attributes
    ----------
    text_to_vision, vision_to_text : Tensor, shape (example, layer, layer)
        Share of attention from language queries to visual keys and the reverse, [b, i, j] from the input of layer i to
        the output of layer j; nan where j < i. They add up to `flow`.
    null : Tensor, shape (example, layer, layer)
        `flow` if every query spread its attention evenly over the keys that its mask allows.
    by_query : Tensor, shape (example, layer, layer, token)
        What each token's query adds to `flow`; 0 for tokens in neither modality.
    per_head_text_to_vision, per_head_vision_to_text : Tensor, shape (example, layer, head)
        The two directions of `per_head`.
    layers : tuple of str
        Names of the attention layers.
    uncounted : tuple of str
        Parts of the same stack that mix tokens in another way (linear attention, convolutions), or not at all: what
        they carry between the modalities is in no number here.
    readings : tuple of tuple of (Block, Reading)
        Who may attend to whom in each layer: its masks, for `live`.
    rows, columns : Tensor, shape (example, layer, head, picked, token), or None
        Softmax weights of the picked queries (which tokens they attend to) and of the picked keys (which tokens attend
        to them), without residual.
    rows_from_input, columns_from_input : Tensor, shape (example, layer, picked, token), or None
        The same rows and columns of A^{1,j} (Eq. 4).
    boxes : Tensor, shape (example, token, 4), or None
        For ViLT, which draws a new order of its patches in every forward: the boxes of this pass, as in
        `modality_masks`. Rows and columns follow them.
    """

    text_to_vision: Tensor
    vision_to_text: Tensor
    null: Tensor
    per_head_text_to_vision: Tensor
    per_head_vision_to_text: Tensor
    by_query: Tensor
    layers: tuple[str, ...]
    uncounted: tuple[str, ...]
    readings: tuple[Readings, ...]
    rows: Tensor | None
    columns: Tensor | None
    rows_from_input: Tensor | None
    columns_from_input: Tensor | None
    boxes: Tensor | None

    @cached_property
    def flow(self) -> Tensor:
        """F_inter^{i,j} (Eq. 5), (example, layer, layer); nan where j < i."""
        return self.text_to_vision + self.vision_to_text

    @property
    def per_head(self) -> Tensor:
        """Flow of each head within one layer, (example, layer, head): its inter over the heads' mean of inter + intra.

        The mean over heads is `within_layer`.
        """
        return self.per_head_text_to_vision + self.per_head_vision_to_text

    def __str__(self) -> str:
        flow, null = (float(part[:, 0, -1].mean()) for part in (self.flow, self.null))
        text = (
            f"Inter-Modality Flow through {len(self.layers)} layers: {flow:.1%}, with uniform attention {null:.1%}, "
            f"mean of {len(self.flow)} examples"
        )
        if self.uncounted:
            text += (
                f"; {len(self.uncounted)} parts without softmax attention are not counted: {', '.join(self.uncounted)}"
            )
        return text

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
        """Flow over null, (example, layer, layer): comparable across token counts; nan where the null is 0."""
        return self.flow / self.null.masked_fill(self.null == 0, torch.nan)

    def live(self, readout_tokens: Tensor) -> Tensor:
        """The part of `flow` that can reach a read-out; the rest of it is dead.

        What a query reads is live if its token's state after layer j can reach a read-out token through the later
        layers. The masks decide that, not the weights: a token is reached if a reached token may attend to it in the
        next layer. So in the last layer only what the read-out tokens themselves read is live.

        Parameters
        ----------
        readout_tokens : BoolTensor, shape (example, token)
            The tokens whose last state the read-out reads: [CLS] for ITM, the masked words for MLM, the last token for
            the next one of a decoder.

        Returns
        -------
        Tensor, shape (example, layer, layer)
            At most `flow`; nan where j < i.
        """
        shape = self.by_query.shape[0], self.by_query.shape[3]
        if readout_tokens.dtype != torch.bool or readout_tokens.shape != shape or not readout_tokens.any(dim=1).all():
            raise ValueError(
                f"readout_tokens must be bool {shape}, (example, token), with at least one token in every example; it "
                f"is {readout_tokens.dtype} {tuple(readout_tokens.shape)} with {int(readout_tokens.sum())} tokens"
            )
        reached = reaching(readout_tokens, self.readings).to(self.by_query)  # example stop token
        return torch.einsum("eijt,ejt->eij", self.by_query, reached)


def inter_modality_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    rows: Tensor | Sequence[int] | None = None,
    columns: Tensor | Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    layers: LayerNames | None = None,
) -> InterModalityFlow:
    """Share of attention that crosses the modalities, for every span of layers (paper Eq. 2-6).

    One forward pass without gradients on fused attention; no attention map is stored.

    Parameters
    ----------
    model : nn.Module
        Any module whose attention layers go through transformers' attention interface, and the families in
        `probes.attention` that do not. For a model of two streams (LXMERT, BridgeTower) the sequence is the words, then
        the image.
    inputs : mapping
        Keyword arguments of the model's forward.
    vision, tokens : BoolTensor, shape (example, token)
        Visual tokens and real (non-padding) positions of the sequence on which the attention runs.
    language : BoolTensor, shape (example, token), optional
        `tokens & ~vision` by default; positions in neither set count in neither sum.
    rows, columns : LongTensor, shape (example, picked) or (picked,), optional
        Tokens whose rows and columns of attention are wanted. Rows rolled out from the input cost about one eager pass
        more, in bounded memory; everything else is nearly free.
    starts : sequence of int, optional
        Layers at which spans start, by default all; spans of one layer are always included. `starts=[0]` gives
        `from_input` and `within_layer` for the least work.
    layers : str, list of str or callable, optional
        Names (or prefixes) of the attention layers in which the modalities meet, or a predicate on names; needed only
        where other layers have the same sequence length.
    """
    sets = modalities_of(model, inputs, vision, tokens, language)
    rows, columns = _positions(rows, sets, "rows"), _positions(columns, sets, "columns")
    with patches_recorded(model) as shuffled:
        recorder = recorded_pass(model, inputs, sets, layers, rows=rows, columns=columns, starts=starts)
    return recorder.result(shuffled.boxes(vision.shape[1]))


def recorded_pass(
    model: nn.Module, inputs: Mapping[str, Any], sets: Modalities, layers: LayerNames | None = None, **options: Any
) -> FlowRecorder:
    """One forward pass with a `FlowRecorder` at every attention layer; `options` are those of the recorder."""
    recorder = FlowRecorder(sets, LayerChoice(*sets.vision.shape, layers, model), **options)
    recorder.outputs = recorder.choice.run(model, inputs, recorder)
    recorder.uncounted = recorder.choice.uncounted(model)
    return recorder


def _positions(picked: Tensor | Sequence[int] | None, sets: Modalities, name: str) -> Tensor | None:
    """Positions of tokens as (example, picked)."""
    if picked is None:
        return None
    examples, tokens = sets.vision.shape
    picked = torch.as_tensor(picked, device=sets.vision.device)
    picked = picked.expand(examples, -1) if picked.ndim == 1 else picked
    whole = not picked.is_floating_point() and picked.dtype != torch.bool
    shaped = picked.ndim == 2 and len(picked) == examples and picked.numel() > 0
    if not (whole and shaped) or picked.min() < 0 or picked.max() >= tokens:
        raise ValueError(
            f"{name} must hold token positions from 0 to {tokens - 1}, (picked,) or ({examples}, picked), not "
            f"{picked.dtype} {tuple(picked.shape)}"
        )
    return picked.long()


# --------------------------------------------------------------------------------------------------- the recursion


class FlowRecorder:
    """Handles every attention of one pass and keeps sums, never a map."""

    outputs: Any = None  # of the model
    uncounted: tuple[str, ...] = ()

    def __init__(
        self,
        sets: Modalities,
        choice: LayerChoice,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.sets, self.choice, self.starts = sets, choice, starts
        self.rows = None if rows is None else PickedRows(rows, sets.vision.shape[1])
        self.columns = None if columns is None else PickedColumns(columns, sets.vision.shape[1])
        self.spans: list[list[int]] = []  # per layer: start of each column carried through it
        self.crossed: list[tuple[Tensor, Tensor]] = []  # per layer: (example, start) each
        self.by_query: list[Tensor] = []  # per layer: (example, start, token)
        self.null: list[Tensor] = []  # per layer: (example, start)
        self.heads: list[tuple[Tensor, Tensor]] = []  # per layer: (example, head) each
        self.readings: list[list[tuple[Block, Reading]]] = []  # per layer
        self._padded = not bool(sets.tokens.all())
        # Whether 1_V is carried beside 1_L; if every real token is in a set, the first chosen layer decides.
        self._two_sets = True if (sets.vision | sets.language != sets.tokens).any() else None
        self._checked_masks: list[Tensor | None] = []
        # Share of each token's attention that ends in L (and V), with the model's attention and with a uniform one.
        self._ends_in = self._ends_in_uniform = torch.empty(0)  # example token (start set)

    def __call__(self, call: AttentionCall) -> Tensor:
        block = self.choice.block(call)
        if block is None:
            return call.output()
        self._move_to(call.query.device)
        self._check_padding(call, block)
        if block.is_first:
            self._open_layer(call)
        self.readings[-1].append((block, call.reading))
        source = self._ends_in[:, block.keys]
        extra = [] if self.columns is None else [self.columns.carried(source, block)]
        # Rows of attention sum to one, unless a sink takes a share. So the mean can bypass the kernel: in half
        # precision only differences between tokens are rounded.
        mean = source.mean(dim=1, keepdim=True) * (call.sink is None)
        output, carried = call.output_and_columns(torch.cat([source - mean, *extra], dim=-1))
        per_head, extras = carried.tensor_split([mean.shape[-1]], dim=-1)
        self._add(call, block, per_head.to(mean) + mean[:, :, None])
        if self.columns is not None:
            self.columns.add(extras, block)
        if self.rows is not None:
            self.rows.add(call, block)
        if block.is_last:
            self._close_layer()
        return output

    def result(self, boxes: Tensor | None) -> InterModalityFlow:
        """What was recorded in the pass; refuses examples in which the modalities never meet, or attention is nan."""
        null, rows, columns = self._triangle(self.null), self.rows, self.columns
        apart = (null.nan_to_num().amax(dim=(1, 2)) == 0).nonzero().flatten().tolist()
        if apart:
            raise ValueError(
                f"in examples {apart} the mask never lets one modality attend to the other: nothing can flow between "
                "them"
            )
        for name, heads in zip(self.choice.names, self.heads, strict=True):
            broken = heads[0].isnan().any(dim=1).nonzero().flatten().tolist()
            if broken:
                raise ValueError(
                    f"attention is nan in {name} (examples {broken}): the model's hidden states are nan there, or a "
                    "real token can attend to nothing"
                )
        return InterModalityFlow(
            text_to_vision=self._triangle([to_vision for to_vision, _ in self.crossed]),
            vision_to_text=self._triangle([to_text for _, to_text in self.crossed]),
            null=null,
            per_head_text_to_vision=torch.stack([to_vision for to_vision, _ in self.heads], dim=1),
            per_head_vision_to_text=torch.stack([to_text for _, to_text in self.heads], dim=1),
            by_query=self._triangle(self.by_query),
            layers=tuple(self.choice.names),
            uncounted=self.uncounted,
            readings=tuple(map(tuple, self.readings)),
            rows=None if rows is None else torch.stack(rows.weights, dim=1),
            columns=None if columns is None else torch.stack(columns.weights, dim=1),
            rows_from_input=None if rows is None else rows.from_input(),
            columns_from_input=None if columns is None else torch.stack(columns.from_input, dim=1),
            boxes=boxes,
        )

    def _triangle(self, by_stop: list[Tensor]) -> Tensor:
        """(example, start, ...) for each last layer -> (example, layer, layer, ...)."""
        layers, first = len(by_stop), by_stop[0]
        square = first.new_full((len(first), layers, layers, *first.shape[2:]), torch.nan)
        for stop, (starts, values) in enumerate(zip(self.spans, by_stop, strict=True)):
            square[:, starts, stop] = values.to(square)
        return square

    def _move_to(self, device: torch.device) -> None:
        self.sets = Modalities(*(part.to(device) for part in self.sets))  # also between the devices of a split model
        self._ends_in, self._ends_in_uniform = self._ends_in.to(device), self._ends_in_uniform.to(device)

    def _check_padding(self, call: AttentionCall, block: Block) -> None:
        """1 - 1_L is 1_V only if no sink and no token in neither set, such as padding, is attended to."""
        if call.sink is not None and self._two_sets is not False:
            self._two_sets = True
        if self._two_sets or any(call.mask is mask for mask in self._checked_masks):
            return
        self._checked_masks.append(call.mask)
        attended = (call.reading.keys_of(self.sets.tokens[:, block.queries]) & ~self.sets.tokens[:, block.keys]).any()
        if not (block.is_first and block.is_last):
            attended = attended or self._padded  # the other attentions of the layer are not known yet
        if (attended or call.sink is not None) and self._two_sets is False:
            raise ValueError(
                f"{call.name} attends to padding or to a sink, and layers before it do not: pass the positions that "
                "the model treats as real as `tokens`"
            )
        self._two_sets = bool(attended)

    def _open_layer(self, call: AttentionCall) -> None:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        fresh = self.sets.indicators(dtype)[..., : 2 if self._two_sets else 1]  # example token set
        carried: list[int] = []
        if self.spans:
            kept = [i for i, start in enumerate(self.spans[-1]) if self.starts is None or start in self.starts]
            carried = [self.spans[-1][i] for i in kept]
            self._ends_in, self._ends_in_uniform = (
                torch.cat([self._by_span(columns)[:, :, kept].flatten(2), fresh], dim=-1)
                for columns in (self._ends_in, self._ends_in_uniform)
            )
        else:
            self._ends_in = self._ends_in_uniform = fresh
        self.spans.append([*carried, len(self.spans)])
        self.readings.append([])
        # The layer's result starts as its input; each attention of the layer replaces the rows of its queries.
        self._after, self._after_uniform = self._ends_in.clone(), self._ends_in_uniform.clone()
        heads = call.query.shape[1]
        self._within = fresh[:, :, None].expand(-1, -1, heads, -1).clone()  # example token head set

    def _add(self, call: AttentionCall, block: Block, per_head: Tensor) -> None:
        """per_head : Tensor, shape (example, query, head, start * set): attention times `_ends_in`."""
        rows = block.queries
        newest = self._by_span(per_head)[..., -1, :]
        self._within[:, rows] = (self._within[:, rows] + newest) / 2
        after = (self._after[:, rows] + per_head.mean(dim=2)) / 2
        uniform = (self._after_uniform[:, rows] + call.uniform_attention(self._ends_in_uniform[:, block.keys])) / 2
        self._after[:, rows] = self._without_empty_rows(after, rows)
        self._after_uniform[:, rows] = self._without_empty_rows(uniform, rows)

    def _close_layer(self) -> None:
        self._ends_in, self._ends_in_uniform = self._after, self._after_uniform
        self.heads.append(crossing_by_head(self._within, self.sets))
        self.crossed.append(crossing(self._by_span(self._ends_in), self.sets))
        self.by_query.append(crossing_by_query(self._by_span(self._ends_in), self.sets).transpose(1, 2))
        self.null.append(sum(crossing(self._by_span(self._ends_in_uniform), self.sets)))

    def _by_span(self, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, 2 if self._two_sets else 1))

    def _without_empty_rows(self, columns: Tensor, rows: slice) -> Tensor:
        """A padding query may have no key; some kernels return nan, and 0 * nan would spread it."""
        return columns.masked_fill(~self.sets.tokens[:, rows, None] & columns.isnan(), 0.0) if self._padded else columns
