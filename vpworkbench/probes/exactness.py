"""Is a probed pass the plain one, and its flow that of the printed formula?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import run_model, unchanged
from vpworkbench.probes.flow import inter_modality_flow, recorded_pass
from vpworkbench.probes.formula import Modalities, crossing_share
from vpworkbench.probes.layers import LayerNames, visit_attention_maps
from vpworkbench.probes.layouts import modalities_of


class Check(NamedTuple):
    """The result of `check`; both differences are the largest absolute ones."""

    outputs: float  # probed forward against plain forward, over all floating point outputs
    flow: float  # against the printed formula in float64
    layers: int
    tokens: int
    examples: int  # on which the formula was computed

    def __str__(self) -> str:
        return (
            f"outputs differ by at most {self.outputs:.1e} from the plain forward, the flow by at most {self.flow:.1e} "
            f"from the printed formula ({self.layers} layers, {self.tokens} tokens, {self.examples} examples)"
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
    tolerance: float | None = None,
) -> Check:
    """Compare a probed pass with the plain forward, and its flow with Eq. 2-6 as printed; prints the result.

    Outputs are compared at real tokens: what a model computes at padding may depend on its kernel.

    The formula multiplies explicit attention maps in float64 and needs memory layer x token^2. It is computed on the
    first `examples` examples where every tensor of `inputs` has one entry for each example, and on all otherwise.
    The other parameters are those of `inter_modality_flow`.

    Parameters
    ----------
    tolerance : float, optional
        Largest difference: of the flow, and of an output over its largest value (over 1 if that is smaller). 1e-3 by
        default, 0.05 for a model in half precision.

    Raises
    ------
    ValueError
        If a difference is larger: the probe does not describe this model.
    """
    if examples < 1:
        raise ValueError(f"examples={examples}: compare at least one")
    sets = modalities_of(model, inputs, vision, tokens, language)
    with unchanged(model), torch.no_grad():
        plain = _floating(run_model(model, inputs))
    recorder = recorded_pass(model, inputs, sets, layers)
    # Only attention maps of an eager model are missing from the probed outputs.
    pairs = [_real(sets.tokens, plain[path], tensor) for path, tensor in _floating(recorder.outputs).items()]
    outputs = max((_difference(*pair) for pair in pairs), default=0.0)
    relative = max((_difference(*pair) / max(1.0, _largest(pair[0])) for pair in pairs), default=0.0)

    count, short = len(vision), inputs
    if all(len(value) == count for value in inputs.values() if torch.is_tensor(value)):
        count = min(examples, count)
        short = {name: value[:count] if torch.is_tensor(value) else value for name, value in inputs.items()}
    sets = Modalities(*(part[:count] for part in sets))
    fused = inter_modality_flow(model, short, sets.vision, sets.tokens, language=sets.language, layers=layers)
    difference = _difference(fused.flow.nan_to_num(), _printed_flow(model, short, sets, layers))
    result = Check(outputs, difference, len(fused.layers), vision.shape[1], count)
    print(result)
    if tolerance is None:
        tolerance = 1e-3 if recorder.heads[0][0].dtype == next(model.parameters()).dtype else 0.05
    if not (relative <= tolerance and difference <= tolerance):
        raise ValueError(
            f"{result}: more than {tolerance:g} of their size. The probe does not describe {type(model).__name__}: one "
            "of its attention layers adds something of its own, or its forward does not repeat itself"
        )
    return result


def _printed_flow(
    model: nn.Module, inputs: Mapping[str, Any], sets: Modalities, layers: LayerNames | None = None
) -> Tensor:
    """Eq. 2-6 from explicit maps, with the products formed; (example, layer, layer), 0 for j < i."""
    factors: list[Tensor] = []  # A of each layer, example query key

    def keep(attention: Tensor) -> None:
        identity = torch.eye(attention.shape[-1], dtype=torch.float64, device=attention.device)
        factors.append(identity / 2 + attention.mean(dim=1).double() / 2)  # Eq. 3

    visit_attention_maps(model, inputs, tuple(sets.vision.shape), keep, layers=layers)
    flow = torch.zeros(len(sets.vision), len(factors), len(factors), dtype=torch.float64)
    for start, product in enumerate(factors):
        for stop in range(start, len(factors)):
            if stop > start:
                product = factors[stop] @ product  # Eq. 4
            for example, one in enumerate(zip(product, sets.vision, sets.language, strict=True)):
                flow[example, start, stop] = crossing_share(*one)
    return flow


def _floating(outputs: Any, path: str = "") -> dict[str, Tensor]:
    """All floating point tensors in a model's output, by their path in it."""
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


def _real(tokens: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs at real tokens, if they have the sequence's tokens; as they are otherwise."""
    if one.ndim > 2 and one.shape[:2] == tokens.shape:
        return tuple(part[tokens.to(part.device)] for part in (one, other))
    return one, other


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().nan_to_num().max()) if tensor.numel() else 0.0


def _difference(one: Tensor, other: Tensor) -> float:
    one, other = one.double().cpu(), other.double().cpu()
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().masked_fill(same, 0).max()) if one.numel() else 0.0
