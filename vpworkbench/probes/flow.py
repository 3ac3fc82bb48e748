"""Inter-Modality Flow of a model (paper Sec. 3.2, Eq. 2-6): how much attention crosses between the modalities.

`inter_modality_flow` takes one forward pass on fused attention, without any attention map: see `recorder`. `check`
holds it to the formula as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall, attention_handled, run_model, untouched
from vpworkbench.probes.formula import crossing_share
from vpworkbench.probes.layers import LayerChoice, LayerNames, streams_of
from vpworkbench.probes.layouts import ShuffledPatches, patches_recorded
from vpworkbench.probes.modality import Modalities, both_modalities
from vpworkbench.probes.recorder import Recorder


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
    boxes : Tensor, shape (example, token, 4), or None
        As of `modality_masks`, for a model that draws a new order of its patches in every forward (ViLT): rows and
        columns refer to the order of this pass, which these boxes tell.
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
    boxes: Tensor | None = None

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
        Any module whose attention layers go through transformers' attention interface, and the families with an
        attention of their own that `own_attention` knows. Where a model has two streams (LXMERT, BridgeTower) the
        sequence is the words, then the image.
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
    recorder = Recorder(
        sets,
        _choice(model, sets, layers),
        rows=_picked(rows, sets, "rows"),
        columns=_picked(columns, sets, "columns"),
        per_token=per_token,
        starts=starts,
    )
    with attention_handled(model, recorder), patches_recorded(model) as shuffled:
        run_model(model, inputs)
    recorder.choice.close(model, inputs)
    recorder.raise_if_undefined()
    return _result(recorder, shuffled)


def _result(recorder: Recorder, shuffled: ShuffledPatches) -> InterModalityFlow:
    triangle, rows, columns = recorder.triangle, recorder.rows, recorder.columns
    tokens = recorder.sets.tokens
    return InterModalityFlow(
        text_to_vision=triangle([there for there, _ in recorder.crossed]),
        vision_to_text=triangle([back for _, back in recorder.crossed]),
        null=triangle(recorder.null),
        per_head=torch.stack(recorder.heads, dim=1),
        layers=tuple(recorder.choice.names),
        per_token=None if recorder.token_flows is None else triangle(recorder.token_flows),
        rows=None if rows is None else torch.stack(rows.weights, dim=1),
        columns=None if columns is None else torch.stack(columns.weights, dim=1),
        rows_from_input=None if rows is None else rows.from_input(),
        columns_from_input=None if columns is None else torch.stack(columns.from_input, dim=1),
        boxes=shuffled.boxes(tokens.shape[1]) if shuffled.order else None,
    )


def _choice(model: nn.Module, sets: Modalities, layers: LayerNames | None) -> LayerChoice:
    return LayerChoice(*sets.vision.shape, layers, streams_of(model))


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
    recorder = Recorder(sets, _choice(model, sets, layers))
    with attention_handled(model, recorder):
        probed = _floating(run_model(model, inputs))
    recorder.choice.close(model, inputs)
    # Attention maps that an eager model hands out are all that a probed one leaves away.
    outputs = max((_difference(plain[at], tensor) for at, tensor in probed.items()), default=0.0)

    tensors = [value for value in inputs.values() if torch.is_tensor(value)]
    short, count = inputs, len(vision)
    if all(len(value) == len(vision) for value in tensors):
        count = min(examples, count)
        short = {key: value[:count] if torch.is_tensor(value) else value for key, value in inputs.items()}
    sets = Modalities(*(part[:count] for part in sets))
    fused = inter_modality_flow(model, short, sets.vision, sets.tokens, language=sets.language,
                                layers=layers)  # fmt: skip
    printed = _printed_formula(model, short, sets, layers)
    difference = _difference(fused.flow.nan_to_num(), printed)
    result = Check(outputs, difference, len(fused.layers), vision.shape[1], len(sets.vision))
    print(result)
    return result


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
    choice = _choice(model, sets, layers)
    tokens = sets.vision.shape[1]
    products: list[Tensor] = []  # A^{i,j} for each start i, example query key
    shares: list[Tensor] = []
    layer = torch.empty(0)

    def multiply(call: AttentionCall) -> Tensor:
        nonlocal layer
        place = choice.place(call)
        if place is None:
            return call.output()
        identity = torch.eye(tokens, dtype=torch.float64, device=call.query.device)
        if place.opens:
            layer = identity.expand(len(sets.vision), -1, -1).clone()
        layer[:, place.queries] /= 2  # Eq. 3
        layer[:, place.queries, place.keys] += call.weights().mean(dim=1).double() / 2
        if place.closes:
            products[:] = [layer @ product for product in products] + [layer]
            share = [
                [crossing_share(*one) for one in zip(product, sets.vision, sets.language, strict=True)]
                for product in products
            ]
            shares.append(torch.tensor(share, dtype=torch.float64).T)  # example start
        return call.output()

    with attention_handled(model, multiply):
        run_model(model, inputs)
    count = len(shares)
    padded = [torch.nn.functional.pad(share, (0, count - share.shape[-1])) for share in shares]
    return torch.stack(padded, dim=-1)


def _floating(outputs: Any, path: str = "") -> dict[str, Tensor]:
    """All floating point tensors in a model's output, by where they stand in it."""
    if torch.is_tensor(outputs):
        return {path: outputs} if outputs.is_floating_point() else {}
    if hasattr(outputs, "__dataclass_fields__") and not isinstance(outputs, Mapping):
        outputs = vars(outputs)
    if isinstance(outputs, Mapping):
        parts = outputs.items()
    elif isinstance(outputs, list | tuple):
        parts = enumerate(outputs)
    else:
        return {}
    return {at: tensor for name, part in parts for at, tensor in _floating(part, f"{path}.{name}").items()}


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
