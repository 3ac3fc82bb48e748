"""Is a probed pass the plain one, and its flow that of the printed formula?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import run_model, unchanged
from vpworkbench.probes.flow import inter_modality_flow, recorded_pass
from vpworkbench.probes.formula import Modalities, both_modalities, crossing_share
from vpworkbench.probes.layers import LayerNames, visit_attention_maps


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
) -> Check:
    """Compare a probed pass with the plain forward, and its flow with Eq. 2-6 as printed; prints the result.

    The formula multiplies explicit attention maps in float64 and needs memory layer x token^2. It is computed on the
    first `examples` examples where every tensor of `inputs` has one entry for each example, and on all otherwise.
    The other parameters are those of `inter_modality_flow`.
    """
    sets = both_modalities(vision, tokens, language)
    with unchanged(model), torch.no_grad():
        plain = _floating(run_model(model, inputs))
    probed = _floating(recorded_pass(model, inputs, sets, layers).outputs)
    # Only attention maps of an eager model are missing from the probed outputs.
    outputs = max((_difference(plain[path], tensor) for path, tensor in probed.items()), default=0.0)

    count, short = len(vision), inputs
    if all(len(value) == count for value in inputs.values() if torch.is_tensor(value)):
        count = min(examples, count)
        short = {name: value[:count] if torch.is_tensor(value) else value for name, value in inputs.items()}
    sets = Modalities(*(part[:count] for part in sets))
    fused = inter_modality_flow(model, short, sets.vision, sets.tokens, language=sets.language, layers=layers)
    difference = _difference(fused.flow.nan_to_num(), _printed_flow(model, short, sets, layers))
    result = Check(outputs, difference, len(fused.layers), vision.shape[1], count)
    print(result)
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


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double().cpu() - other.double().cpu()).abs().max()) if one.numel() else 0.0
