"""What a probe costs: time and memory of a flow pass, against the plain forward and against stored attention maps.

make bench-probes        or        python -m benchmarks.probes --help
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import plotly.graph_objects as go
import torch
import typer
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertModel

from benchmarks.measure import (
    device_name,
    in_own_process,
    in_turns,
    medians,
    peak_mib,
    process_kib,
    ratio,
    report,
    start_peak,
)
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.probes import flow_from_attention, inter_modality_flow, modality_nmi

VISION_SHARE = 0.75  # of the tokens; the costs do not depend on it
PADDED_SHARE = 0.2  # of the second example's tokens in a padded batch
ROUTES = {"plain": "plain forward", "flow": "flow pass", "maps": "attention maps", "nnsight": "maps by nnsight"}
"""nnsight only if it is installed."""


def measure_probes(
    *,
    lengths: Sequence[int] = (300, 600, 1200, 2400),
    repeats: int = 5,
    layers: int = 12,
    device: str = "cpu",
    memory_gib: float = 4.0,
    longest: int = 9_600,
) -> dict[str, Any]:
    """Measure the probes on a BERT of base width with random weights: float32 on a CPU, bfloat16 on a GPU.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of an example; a batch holds two.
    memory_gib : float
        Memory that a route may allocate beyond the model before it counts as failed; lengths double up to `longest`.

    Returns
    -------
    dict
        `seconds` and `ratio` (to the plain forward) by length, padding and route; `peak_mib` beyond the model and
        `fails_at` by route; versions and sizes.
    """
    model = random_bert(layers, max(lengths), device)
    timed = [
        _timed(model, length, padded, repeats)
        for length in tqdm(lengths, desc="timing", unit="length")
        for padded in (False, True)
    ]
    result: dict[str, Any] = {
        "model": {"layers": layers, "width": 768, "heads": 12, "dtype": str(next(model.parameters()).dtype)},
        "device": device_name(device),
        "torch": torch.__version__,
        "repeats": repeats,
        "timed": timed,
    }
    del model
    result["peak_mib"] = [
        {"tokens": length, "route": route, "mib": in_own_process(_peak_of, route, length, layers, device)}
        for length in tqdm(lengths, desc="memory", unit="length")
        for route in _installed()
    ]
    if device == "cpu":
        result["memory_gib"] = memory_gib
        result["fails_at"] = {route: failing_length(route, layers, memory_gib, longest) for route in _installed()}
    return result


def measure_nmi(
    *,
    layers: int = 13,
    samples: int = 64,
    tokens: int = 200,
    channels: int = 768,
    repeats: int = 3,
    device: str = "cpu",
) -> dict[str, float]:
    """Seconds of `modality_nmi` and of a loop over scikit-learn's KMeans on the same features, in turns."""
    generator = torch.Generator().manual_seed(0)
    vision = (torch.arange(tokens) < tokens // 2).expand(samples, -1)
    real = torch.ones_like(vision)
    # Like hidden states: the modalities differ in a small offset, with noise in all channels.
    offset = torch.where(vision[..., None], 0.2, 0.0)
    hidden = [torch.randn(samples, tokens, channels, generator=generator) + offset for _ in range(layers)]
    on_device = [state.to(device) for state in hidden]

    def ours() -> None:
        modality_nmi(on_device, vision.to(device), real.to(device)).cpu()

    def loop() -> None:
        for state in hidden:
            for features, labels in zip(state.numpy(), vision.numpy(), strict=True):
                found = KMeans(2, n_init=10, random_state=0).fit_predict(features)
                normalized_mutual_info_score(labels, found)

    ours()
    seconds = in_turns({"ours": ours, "scikit_learn": loop}, repeats)
    return medians(seconds) | {"speedup": ratio(seconds, "scikit_learn", "ours")}


def random_bert(layers: int, longest: int, device: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, max_position_embeddings=longest, attn_implementation="sdpa", vocab_size=1000
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return BertModel(config, add_pooling_layer=False).eval().to(device, dtype)


def _batch(length: int, padded: bool, device: str, examples: int = 2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    words = torch.randint(5, 1000, (examples, length), generator=generator)
    tokens = torch.ones(examples, length, dtype=torch.bool)
    vision = torch.arange(length)[None].expand(examples, -1) < VISION_SHARE * length
    inputs = {"input_ids": words.to(device)}
    if padded:
        tokens[-1, : int(PADDED_SHARE * length)] = False
        inputs["attention_mask"] = tokens.long().to(device)
    return inputs, vision.to(device), tokens.to(device)


def routes_of(model: BertModel, length: int, padded: bool) -> dict[str, Callable[[], Any]]:
    """By name, the passes that are compared."""
    inputs, vision, tokens = _batch(length, padded, next(model.parameters()).device.type)

    def plain() -> None:
        with torch.no_grad():
            model(**inputs)

    def flow() -> None:
        inter_modality_flow(model, inputs, vision, tokens)

    def maps() -> None:
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                attentions = model(**inputs, output_attentions=True).attentions
        finally:
            model.set_attn_implementation("sdpa")
        _flow_of_maps(attentions, vision, tokens)

    def traced() -> None:
        from nnsight import NNsight

        model.set_attn_implementation("eager")
        try:
            wrapped = NNsight(model)
            with torch.no_grad(), wrapped.trace(**inputs):
                attentions = list().save()
                for layer in wrapped.encoder.layer:
                    attentions.append(layer.attention.self.output[1])
        finally:
            model.set_attn_implementation("sdpa")
        _flow_of_maps(attentions, vision, tokens)

    routes = {"plain": plain, "flow": flow, "maps": maps}
    return routes | {"nnsight": traced} if find_spec("nnsight") else routes


def _flow_of_maps(attentions: Sequence[Tensor], vision: Tensor, tokens: Tensor) -> None:
    for example, real in enumerate(tokens):
        kept = torch.stack([layer[example][:, real][:, :, real] for layer in attentions])
        flow_from_attention(kept, vision[example][real])


def _timed(model: BertModel, length: int, padded: bool, repeats: int) -> dict[str, Any]:
    routes = routes_of(model, length, padded)
    for route in routes.values():
        route()
    seconds = in_turns(routes, repeats)
    ratios = {name: ratio(seconds, name, "plain") for name in routes}
    return {"tokens": length, "padded": padded, "seconds": medians(seconds), "ratio": ratios}


def _installed() -> list[str]:
    return [route for route in ROUTES if route != "nnsight" or find_spec("nnsight")]


def _peak_of(route: str, length: int, layers: int, device: str) -> float:
    """MiB that one pass allocates at its peak, beyond the model and what a first short pass leaves."""
    model = random_bert(layers, length, device)
    routes_of(model, 32, True)[route]()
    run = routes_of(model, length, False)[route]
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else None
    start_peak(device)
    before = before if before is not None else process_kib("VmHWM") / 2**10
    run()
    return peak_mib(device) - before


def failing_length(route: str, layers: int, memory_gib: float, longest: int) -> int | None:
    """The first length, doubled from 300, for which a route needs more memory; None if it never does."""
    length = 300
    while length <= longest and in_own_process(_fits, route, length, layers, memory_gib):
        length *= 2
    return length if length <= longest else None


def _fits(route: str, length: int, layers: int, memory_gib: float) -> bool:
    model = random_bert(layers, length, "cpu")
    routes_of(model, 32, False)[route]()
    run = routes_of(model, length, False)[route]
    limit = int(process_kib("VmSize") * 2**10 + memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        run()
    except (RuntimeError, MemoryError):
        return False
    return True


def cost_figure(result: dict[str, Any]) -> go.Figure:
    """Time over the plain forward, and peak memory beyond the model, by tokens."""
    titles = ("Time over the plain forward", "Peak memory beyond the model, MiB")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    measured = [route for route in ROUTES if route in result["timed"][0]["ratio"]]
    for colour, route in zip(PALETTE, measured, strict=False):
        shared = {"name": ROUTES[route], "legendgroup": route, "mode": "lines+markers"}
        for padded in (False, True):
            points = [part for part in result["timed"] if part["padded"] == padded]
            x, y = [part["tokens"] for part in points], [part["ratio"][route] for part in points]
            line = {"color": colour, "dash": "dot" if padded else "solid"}
            figure.add_scatter(x=x, y=y, row=1, col=1, line=line, showlegend=not padded, **shared)
        points = [part for part in result["peak_mib"] if part["route"] == route]
        x, y = [part["tokens"] for part in points], [part["mib"] for part in points]
        figure.add_scatter(x=x, y=y, row=1, col=2, line={"color": colour}, showlegend=False, **shared)
    figure.update_xaxes(title_text="tokens of an example (dotted: padded)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", rangemode="normal", col=2)
    longest = max(result["timed"], key=lambda part: part["tokens"])
    alt = (
        f"At {longest['tokens']} tokens a flow pass takes {longest['ratio']['flow']:.2f} times the plain forward, "
        f"attention maps {longest['ratio']['maps']:.2f} times."
    )
    return finish(figure, title=f"What a probe costs ({result['device']})", alt=alt)


def main(
    tokens: Annotated[str, typer.Option(help="lengths of the sequences, comma-separated; at least 40")] = (
        "300,600,1200,2400"
    ),
    repeats: Annotated[int, typer.Option(help="turns of every route", min=1)] = 5,
    layers: Annotated[int, typer.Option(help="layers of the BERT", min=1)] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    memory_gib: Annotated[float, typer.Option(help="memory beyond the model at which a route counts as failed")] = 4.0,
    longest: Annotated[int, typer.Option(help="length at which the search for that failure ends")] = 9_600,
) -> None:
    """Flow and NMI against the plain forward, attention maps and scikit-learn: JSON and a figure."""
    try:
        lengths = [int(length) for length in tokens.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--tokens {tokens}: give whole numbers with commas, such as 300,600") from None
    if min(lengths) < 40:
        raise typer.BadParameter(f"--tokens {tokens}: give at least 40 each")
    result = measure_probes(
        lengths=lengths, repeats=repeats, layers=layers, device=device, memory_gib=memory_gib, longest=longest
    )
    result["nmi"] = measure_nmi(device=device)
    for part in result["timed"]:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in part["ratio"].items())
        print(f"{part['tokens']:6} tokens{' padded' if part['padded'] else '':8} time over plain: {ratios}")
    for part in result["peak_mib"]:
        print(f"{part['tokens']:6} tokens, {part['route']:6} peak {part['mib']:8.0f} MiB beyond the model")
    print(f"fails at {result.get('fails_at', 'not measured')}; NMI {result['nmi']['speedup']:.1f} times scikit-learn")
    report("probes", result, cost_figure(result))


if __name__ == "__main__":
    typer.run(main)
