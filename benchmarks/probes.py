"""What a probe costs: time and memory of a flow pass against the plain forward and against attention maps.

Every figure is a ratio of passes that take turns in one process, so that a machine's other work falls on all alike.
Memory is measured in a process of its own for each route and length.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from transformers import BertConfig, BertModel

from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.probes import flow_from_attention, inter_modality_flow, modality_nmi

VISION_SHARE = 0.75  # of the tokens; the costs do not depend on it
PADDED_SHARE = 0.2  # of the second example's tokens, where a batch is padded
ROUTES = {"plain": "plain forward", "flow": "flow pass", "maps": "attention maps", "nnsight": "maps by nnsight"}
"""nnsight only where it is installed. TransformerLens reads models that it builds anew, so there is none like ours."""


def probe_bench(
    *,
    lengths: Sequence[int] = (300, 600, 1200, 2400),
    repeats: int = 5,
    layers: int = 12,
    device: str = "cpu",
    memory_gib: float = 4.0,
    longest: int = 9_600,
    nmi: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the probes on a BERT of base width with random weights, float32 on a CPU and bfloat16 on a GPU.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of an example; a batch holds two.
    repeats : int
        Turns that every route takes; medians are reported.
    memory_gib : float
        What a route may allocate beside the model before it counts as dead; lengths are doubled up to `longest`.

    Returns
    -------
    dict
        `seconds` and `ratio` (to plain) by length, padding and route; `peak_mib` beside the model and `dies_at` by
        route; `nmi_speedup`; versions and sizes.
    """
    model = _bert(layers, max(lengths), device)
    passes = [(length, padded) for length in lengths for padded in (False, True)]
    timed = []
    for number, (length, padded) in enumerate(passes):
        timed.append(_timed(model, length, padded, repeats))
        if progress:
            progress("timing", number + 1, len(passes))
    result: dict[str, Any] = {
        "model": {"layers": layers, "width": 768, "heads": 12, "dtype": str(next(model.parameters()).dtype)},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "repeats": repeats, "timed": timed,
    }  # fmt: skip
    del model
    result["peak_mib"] = _peaks(lengths, layers, device, progress)
    if device == "cpu":
        result["memory_gib"] = memory_gib
        result["dies_at"] = _deaths(layers, memory_gib, longest, progress)
    if nmi:
        result["nmi"] = nmi_bench(device=device)
    return result


def nmi_bench(
    *,
    layers: int = 13,
    samples: int = 64,
    tokens: int = 200,
    channels: int = 768,
    repeats: int = 3,
    device: str = "cpu",
) -> dict[str, float]:
    """Seconds of `modality_nmi` and of the loop over scikit-learn's KMeans on the same features, in turns."""
    generator = torch.Generator().manual_seed(0)
    vision = (torch.arange(tokens) < tokens // 2).expand(samples, -1)
    real = torch.ones_like(vision)
    # Neighbouring modalities, as hidden states have them: apart in a few channels, noise in the rest.
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
    seconds = _in_turns({"ours": ours, "scikit_learn": loop}, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["scikit_learn"], seconds["ours"], strict=True)]
    return medians | {"speedup": statistics.median(ratios)}


def _bert(layers: int, longest: int, device: str) -> BertModel:
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


def _routes(model: BertModel, length: int, padded: bool) -> dict[str, Callable[[], Any]]:
    device = str(next(model.parameters()).device.type)
    inputs, vision, tokens = _batch(length, padded, device)

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
    routes = _routes(model, length, padded)
    for route in routes.values():
        route()
    seconds = _in_turns(routes, repeats)
    ratios = {
        name: statistics.median(one / base for one, base in zip(times, seconds["plain"], strict=True))
        for name, times in seconds.items()
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"tokens": length, "padded": padded, "seconds": medians, "ratio": ratios}


def _installed() -> list[str]:
    return [route for route in ROUTES if route != "nnsight" or find_spec("nnsight")]


def _in_turns(routes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each route, every turn in the other direction than the one before."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(repeats):
        for name in list(routes)[:: 1 if turn % 2 == 0 else -1]:
            _synchronise()
            began = time.perf_counter()
            routes[name]()
            _synchronise()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------- memory


def _peaks(
    lengths: Sequence[int], layers: int, device: str, progress: Callable[[str, int, int], None] | None
) -> list[dict[str, Any]]:
    found, tasks = [], [(length, route) for length in lengths for route in _installed()]
    for number, (length, route) in enumerate(tasks):
        peak = _apart(_peak_of, route, length, layers, device)
        found.append({"tokens": length, "route": route, "mib": peak})
        if progress:
            progress("measuring memory", number + 1, len(tasks))
    return found


def _deaths(
    layers: int, memory_gib: float, longest: int, progress: Callable[[str, int, int], None] | None
) -> dict[str, int | None]:
    """The first length, doubled from 300, at which a route wants more than it may; None: it lived through all."""
    deaths: dict[str, int | None] = {}
    for number, route in enumerate(_installed()):
        length = 300
        while length <= longest and _apart(_survives, route, length, layers, memory_gib):
            length *= 2
        deaths[route] = length if length <= longest else None
        if progress:
            progress("looking for the end", number + 1, len(_installed()))
    return deaths


def _apart(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a fresh process: what one route has allocated must not serve the next.

    glibc keeps freed blocks of up to 32 MiB, and which depends on the order in which sizes come: at 1,200 tokens that
    made 20% of the peak, either way. With a fixed threshold memory goes back when it is freed.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, task, arguments))
    with _environment(MALLOC_MMAP_THRESHOLD_="131072"):
        process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None  # killed
    finally:
        process.join()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """For processes that start in the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _answer(send: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(task(*arguments))


def _peak_of(route: str, length: int, layers: int, device: str) -> float:
    """MiB that one pass allocates at its peak, beside the model and what a first short pass leaves."""
    model = _bert(layers, length, device)
    _routes(model, 32, True)[route]()
    run = _routes(model, length, False)[route]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmHWM")
    run()
    return (_status("VmHWM") - before) / 2**10


def _survives(route: str, length: int, layers: int, memory_gib: float) -> bool:
    model = _bert(layers, length, "cpu")
    _routes(model, 32, False)[route]()
    run = _routes(model, length, False)[route]
    limit = int(_status("VmSize") * 2**10 + memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        run()
    except (RuntimeError, MemoryError):
        return False
    return True


def _status(name: str) -> int:
    """A size of this process in KiB; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """`probes.json`, and `probes.html` with the figure, in `folder`; the figure's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probes.json").write_text(json.dumps(result, indent=2) + "\n")
    page = folder / "probes.html"
    cost_figure(result).write_html(page, include_plotlyjs="directory")
    return page


def cost_figure(result: dict[str, Any]) -> go.Figure:
    """Seconds over the plain forward, and peak memory beside the model, by tokens."""
    titles = ("Time over the plain forward", "Peak memory beside the model, MiB")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    measured = [route for route in ROUTES if route in result["timed"][0]["ratio"]]
    for colour, route in zip(PALETTE, measured, strict=False):
        shared = {"name": ROUTES[route], "legendgroup": route, "mode": "lines+markers"}
        for padded in (False, True):
            points = [part for part in result["timed"] if part["padded"] == padded]
            figure.add_scatter(
                x=[part["tokens"] for part in points], y=[part["ratio"][route] for part in points], row=1, col=1,
                line={"color": colour, "dash": "dot" if padded else "solid"}, showlegend=not padded, **shared,
            )  # fmt: skip
        points = [part for part in result["peak_mib"] if part["route"] == route]
        figure.add_scatter(
            x=[part["tokens"] for part in points], y=[part["mib"] for part in points], row=1, col=2,
            line={"color": colour}, showlegend=False, **shared,
        )  # fmt: skip
    figure.update_xaxes(title_text="tokens of an example (dotted: padded)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", rangemode="normal", col=2)
    longest = max(result["timed"], key=lambda part: part["tokens"])
    alt = (
        f"At {longest['tokens']} tokens a flow pass takes {longest['ratio']['flow']:.2f} times the plain forward, "
        f"attention maps {longest['ratio']['maps']:.2f} times."
    )
    return finish(figure, title=f"What a probe costs ({result['device']})", alt=alt)
