"""What a training step costs: pairs per second, where its time goes, model FLOPs utilisation, memory.

make bench-train        or        python -m benchmarks.train --help
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import plotly.graph_objects as go
import torch
import typer
from plotly.subplots import make_subplots
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.measure import (
    autocast,
    device_name,
    in_turns,
    peak_flops,
    peak_mib,
    ratio,
    report,
    start_peak,
    synchronise,
)
from vpworkbench.data.batches import Batch
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.visual import pack
from vpworkbench.settings import PretrainSettings, preset
from vpworkbench.train.engine import accumulate_gradients, bfloat16, build_optimiser
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare

PHASES = ("data wait", "forward", "backward", "optimiser")


def measure_training(
    names: Sequence[str] = ("tiny",),
    *,
    images: int = 4,
    repeats: int = 5,
    device: str = "cpu",
    workers: int = 1,
    vilt: bool = False,
) -> dict[str, Any]:
    """Measure pre-training steps of presets on generated scenes; bfloat16 on a GPU, float32 on a CPU.

    Parameters
    ----------
    images : int
        Images in a step, each with the preset's four texts; one micro-batch.
    repeats : int
        Steps that every figure is the median of.
    vilt : bool
        Time Hugging Face's ViLT-B/32 at 384 px beside each preset, on the same pairs: its two forwards, for MLM and
        for ITM, as published, and one of them.

    Returns
    -------
    dict
        For each preset `pairs_per_s`, `images_per_s`, `phases` (shares of a step's time), `mfu` of the step, the
        parser and the fusion, `peak_mib`, and `ratios`: pairs per second over encoding an image for each text
        (`grouped`), share of VLA in a step, pairs per second over ViLT's; and how long a step takes, compared with the
        plain one, if the tokens of a frozen visual side are read (`frozen`) and in bfloat16.
    """
    highest = peak_flops(device)
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "peak_flops": highest}
    result |= {"repeats": repeats, "images": images, "presets": {}}
    for name in tqdm(names, desc="measuring", unit="preset"):
        result["presets"][name] = _measured(name, images, repeats, device, workers, highest, vilt)
    return result


def _measured(
    name: str, images: int, repeats: int, device: str, workers: int, highest: float, vilt: bool
) -> dict[str, Any]:
    scenes = {"data.scenes.images": max(32, 2 * images), "data.scenes.val": 2, "data.scenes.test": 2}
    one_step = {"train.images": images, "train.accumulate": 1, "train.epochs": 0, "train.steps": 1}
    settings = preset(name).with_overrides(scenes | one_step | {"init_visual": "", "visual.frozen": False})
    prepared = prepare(settings)
    model, objective = prepared.model.to(device).train(), Pretraining(settings)
    batches = group_batches(prepared.splits["train"], model, settings.data, images=images, seed=0)
    batch = batches[0]
    pairs = len(batch.matched)

    start_peak(device)
    phases = _phases(model, objective, batches, settings, repeats, device, workers)
    peak = peak_mib(device)
    step_s = sum(phases.values())

    without = Pretraining(settings)
    without.weights = dict(objective.weights) | {"vla": 0.0}
    alone = _image_for_each_text(batch)
    with torch.no_grad():
        kept = replace(batch, images=pack(model.visual(batch.images.to(device))))
    routes = {
        "grouped": lambda: _step(model, objective, batch, device),
        "image for each text": lambda: _step(model, objective, alone, device),
        "without VLA": lambda: _step(model, without, batch, device),
    }
    cheaper = {"frozen": lambda: _step(model, objective, kept, device)}
    if device == "cpu":  # on a GPU every route is in bfloat16
        cheaper["bfloat16"] = lambda: _step(model, objective, batch, device, partial(bfloat16, device))
        cheaper["frozen, bfloat16"] = lambda: _step(model, objective, kept, device, partial(bfloat16, device))
    routes |= cheaper
    if vilt:
        peer = Vilt(model, batch).to(device)
        routes |= {"ViLT, two forwards": lambda: peer.step(2), "ViLT, one forward": lambda: peer.step(1)}
    for route in routes.values():
        route()
    seconds = in_turns(routes, repeats)

    ratios = {route: ratio(seconds, route, "grouped") for route in routes}
    return {
        "pairs": pairs,
        "pairs_per_s": pairs / step_s,
        "images_per_s": images / step_s,
        "phases": {name: value / step_s for name, value in phases.items()},
        "mfu": _utilisation(model, objective, batch, device, highest, repeats),
        "peak_mib": peak,
        "ratios": {"grouped": ratios["image for each text"], "vla_share": 1 - ratios["without VLA"]}
        | {route: ratios[route] for route in routes if route in cheaper or route.startswith("ViLT")},
    }


def _step(
    model: VisualParsingModel,
    objective: Pretraining,
    batch: Batch,
    device: str,
    precision: Callable[[], Any] | None = None,
) -> None:
    accumulate_gradients(model, objective, batch, 1, precision or partial(autocast, device))
    model.zero_grad(set_to_none=True)


def _image_for_each_text(batch: Batch) -> Batch:
    """The same pairs, every one with an image of its own to encode."""
    return replace(batch, images=batch.images[batch.image_index], image_index=torch.arange(len(batch.image_index)))


def _phases(
    model: VisualParsingModel,
    objective: Pretraining,
    batches: Any,
    settings: PretrainSettings,
    repeats: int,
    device: str,
    workers: int,
) -> dict[str, float]:
    """Median seconds of each phase of a step; the device is waited for between them."""
    optimiser = build_optimiser(model, settings.optim)
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(repeats + 2), num_workers=workers))
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    for step in range(repeats + 2):
        marks = [time.perf_counter()]
        batch = next(loader)
        marks.append(time.perf_counter())
        counts = objective.counts(batch)
        with autocast(device):
            sums = objective.losses(model, batch.to(device))
        loss = sum(objective.weights[name] * value / max(counts[name], 1) for name, value in sums.items())
        synchronise()
        marks.append(time.perf_counter())
        loss.backward()
        synchronise()
        marks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        synchronise()
        marks.append(time.perf_counter())
        if step >= 2:  # the first ones warm up
            for name, start, end in zip(PHASES, marks, marks[1:], strict=False):
                times[name].append(end - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _utilisation(
    model: VisualParsingModel, objective: Pretraining, batch: Batch, device: str, highest: float, repeats: int
) -> dict[str, float]:
    """Share of the device's peak that forward and backward reach: of the whole step, the parser, the fusion."""
    moved = batch.to(device)
    with autocast(device), torch.no_grad():
        visual = model.visual(moved.images)

    def parser() -> None:
        with autocast(device):
            model.visual(moved.images).features.sum().backward()

    def fusion() -> None:
        with autocast(device):
            inputs = {"image_index": moved.image_index}
            model.fuse(visual, moved.words, moved.word_tokens, **inputs).hidden[-1].sum().backward()

    routes = {"step": lambda: _step(model, objective, batch, device), "parser": parser, "fusion": fusion}
    found = {}
    for name, route in routes.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts products
            route()
        seconds = statistics.median(in_turns({name: route}, repeats)[name])
        found[name] = counter.get_total_flops() / seconds / highest
    model.zero_grad(set_to_none=True)
    return found


class Vilt(nn.Module):
    """Hugging Face's ViLT-B/32 with random weights, on the texts of a batch and images of 384 px."""

    def __init__(self, ours: VisualParsingModel, batch: Batch) -> None:
        super().__init__()
        from transformers import ViltConfig, ViltModel

        self.vilt = ViltModel(ViltConfig(vocab_size=len(ours.tokenizer)))
        self.words, self.itm = nn.Linear(768, len(ours.tokenizer)), nn.Linear(768, 2)
        sides = (384, 384)
        pixels = nn.functional.interpolate(batch.images.float() / 127.5 - 1, sides)[batch.image_index]
        self.register_buffer("pixels", pixels)
        self.register_buffer("ids", batch.words)
        self.register_buffer("real", batch.word_tokens.long())
        self.register_buffer("labels", batch.labels)
        self.register_buffer("matched", batch.matched.long())

    def step(self, forwards: int) -> None:
        """Forward and backward for MLM and, in a forward of its own where there are two, for ITM."""
        device = self.pixels.device.type
        with autocast(device):
            for forward in range(forwards):
                seen = self.vilt(input_ids=self.ids, attention_mask=self.real, pixel_values=self.pixels)
                losses: list[Tensor] = []
                if forward == 0:
                    logits = self.words(seen.last_hidden_state[:, : self.ids.shape[1]])
                    losses.append(nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten()))
                if forward == forwards - 1:
                    losses.append(nn.functional.cross_entropy(self.itm(seen.pooler_output).float(), self.matched))
                sum(losses).backward()
        self.zero_grad(set_to_none=True)


def step_figure(result: dict[str, Any]) -> go.Figure:
    """Shares of a step's time, and pairs per second, by preset."""
    names = list(result["presets"])
    figure = make_subplots(1, 2, subplot_titles=("Share of a step's time", "Pairs per second"), horizontal_spacing=0.12)
    for colour, phase in zip(PALETTE, PHASES, strict=False):
        shares = [part["phases"][phase] for part in result["presets"].values()]
        figure.add_bar(x=names, y=shares, name=phase, marker={"color": colour}, row=1, col=1)
    rates = [part["pairs_per_s"] for part in result["presets"].values()]
    figure.add_bar(x=names, y=rates, marker={"color": PALETTE[0]}, showlegend=False, row=1, col=2)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], col=1)
    speeds = ", ".join(f"{name} {rate:.3g}" for name, rate in zip(names, rates, strict=True))
    return finish(figure, title=f"What a training step costs ({result['device']})", alt=f"Pairs per second: {speeds}.")


def main(
    presets: Annotated[str, typer.Option(help="presets, comma-separated")] = "tiny",
    images: Annotated[int, typer.Option(help="images in a step", min=2)] = 4,
    repeats: Annotated[int, typer.Option(help="steps behind each median", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    workers: Annotated[int, typer.Option(help="processes that prepare batches", min=0)] = 1,
    vilt: Annotated[bool, typer.Option(help="time Hugging Face's ViLT-B/32 on the same pairs")] = False,
) -> None:
    """Pairs per second, shares of a step's time, model FLOPs utilisation, memory: JSON and a figure."""
    names = presets.split(",")
    result = measure_training(names, images=images, repeats=repeats, device=device, workers=workers, vilt=vilt)
    for name, part in result["presets"].items():
        phases = ", ".join(f"{phase} {share:.1%}" for phase, share in part["phases"].items())
        used = ", ".join(f"{piece} {share:.1%}" for piece, share in part["mfu"].items())
        ratios = ", ".join(f"{route} {value:.3g}" for route, value in part["ratios"].items())
        print(f"{name}: {part['pairs_per_s']:.3g} pairs/s, {part['images_per_s']:.3g} images/s; {phases}")
        print(f"  MFU: {used}; peak {part['peak_mib']:.0f} MiB; ratios: {ratios}")
    report("train", result, step_figure(result))


if __name__ == "__main__":
    typer.run(main)
