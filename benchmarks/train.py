"""What a training step costs: pairs a second, where its time goes, model FLOPs utilisation, memory.

Ratios are of steps that take turns in one process, so that a machine's other work falls on all alike.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from vpworkbench.bench import _in_turns, _status, _synchronise
from vpworkbench.data.batches import Batch
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.settings import PretrainSettings, preset
from vpworkbench.train.engine import accumulate_gradients, build_optimiser
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, by the maker; of another device the best rate of a large product, measured."""
PHASES = ("data wait", "forward", "backward", "optimiser")


def train_bench(
    names: Sequence[str] = ("tiny",),
    *,
    images: int = 4,
    repeats: int = 5,
    device: str = "cpu",
    workers: int = 1,
    vilt: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
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
        parser and the fusion, `peak_mib`, and `ratios`: pairs a second over encoding an image for each text
        (`grouped`), share of VLA in a step, pairs a second over ViLT's.
    """
    peak = peak_flops(device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "repeats": repeats, "images": images, "peak_flops": peak, "presets": {},
    }  # fmt: skip
    for number, name in enumerate(names):
        result["presets"][name] = _measured(name, images, repeats, device, workers, peak, vilt)
        if progress:
            progress("measuring", number + 1, len(names))
    return result


def peak_flops(device: str) -> float:
    """FLOPs a second that the device can do at most, as MFU has it."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if known := [flops for part, flops in PEAK_FLOPS.items() if part in name]:
            return known[0]
    side = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    one, other = torch.randn(2, side, side, device=device).to(dtype)
    times = _in_turns({"product": lambda: one @ other}, 5)["product"]
    return 2 * side**3 / min(times)


def _measured(
    name: str, images: int, repeats: int, device: str, workers: int, peak: float, vilt: bool
) -> dict[str, Any]:
    few = {"data.scenes.images": max(32, 2 * images), "data.scenes.val": 2, "data.scenes.test": 2,
           "train.images": images, "train.accumulate": 1, "train.epochs": 0, "train.steps": 1}  # fmt: skip
    settings = preset(name).with_overrides(few | {"init_visual": ""})
    prepared = prepare(settings)
    model, objective = prepared.model.to(device).train(), Pretraining(settings)
    batches = group_batches(prepared.splits["train"], model, settings.data, images=images, seed=0)
    batch = batches[0]
    pairs = len(batch.matched)

    _forget_peak(device)
    phases = _phases(model, objective, batches, settings, repeats, device, workers)
    peak_mib = _peak_mib(device)
    step_s = sum(phases.values())

    without = Pretraining(settings)
    without.weights = dict(objective.weights) | {"vla": 0.0}
    alone = _image_for_each_text(batch)
    routes = {
        "grouped": lambda: _step(model, objective, batch, device),
        "image for each text": lambda: _step(model, objective, alone, device),
        "without VLA": lambda: _step(model, without, batch, device),
    }
    if vilt:
        peer = Vilt(model, batch).to(device)
        routes |= {"ViLT, two forwards": lambda: peer.step(2), "ViLT, one forward": lambda: peer.step(1)}
    for route in routes.values():
        route()
    seconds = _in_turns(routes, repeats)

    def over(other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["grouped"], seconds[other], strict=True))

    ratios = {"grouped": over("image for each text"), "vla_share": 1 - over("without VLA")}
    ratios |= {name: over(name) for name in routes if name.startswith("ViLT")}
    return {
        "pairs": pairs, "pairs_per_s": pairs / step_s, "images_per_s": images / step_s,
        "phases": {name: value / step_s for name, value in phases.items()},
        "mfu": _utilisation(model, objective, batch, device, peak, repeats), "peak_mib": peak_mib, "ratios": ratios,
    }  # fmt: skip


def _autocast(device: str) -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def _step(model: VisualParsingModel, objective: Pretraining, batch: Batch, device: str) -> None:
    accumulate_gradients(model, objective, batch, 1, lambda: _autocast(device))
    model.zero_grad(set_to_none=True)


def _image_for_each_text(batch: Batch) -> Batch:
    """The same pairs, every one with an image of its own to encode."""
    return replace(batch, images=batch.images[batch.image_index], image_index=torch.arange(len(batch.image_index)))


def _phases(
    model: VisualParsingModel, objective: Pretraining, batches: Any, settings: PretrainSettings, repeats: int,
    device: str, workers: int,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each phase of a step; the device is waited for between them."""
    optimiser = build_optimiser(model, settings.optim)
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(repeats + 2), num_workers=workers))
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    for step in range(repeats + 2):
        marks = [time.perf_counter()]
        batch = next(loader)
        marks.append(time.perf_counter())
        counts = objective.counts(batch)
        with _autocast(device):
            sums = objective.losses(model, batch.to(device))
        loss = sum(objective.weights[name] * value / max(counts[name], 1) for name, value in sums.items())
        _synchronise()
        marks.append(time.perf_counter())
        loss.backward()
        _synchronise()
        marks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        _synchronise()
        marks.append(time.perf_counter())
        if step >= 2:  # the first ones warm up
            for name, start, end in zip(PHASES, marks, marks[1:], strict=False):
                times[name].append(end - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _utilisation(
    model: VisualParsingModel, objective: Pretraining, batch: Batch, device: str, peak: float, repeats: int
) -> dict[str, float]:
    """Share of the device's peak that forward and backward reach: of the whole step, the parser, the fusion."""
    moved = batch.to(device)
    with _autocast(device), torch.no_grad():
        visual = model.visual(moved.images)

    def parser() -> None:
        with _autocast(device):
            model.visual(moved.images).features.sum().backward()

    def fusion() -> None:
        with _autocast(device):
            inputs = {"image_index": moved.image_index}
            model.fuse(visual, moved.words, moved.word_tokens, **inputs).hidden[-1].sum().backward()

    routes = {"step": lambda: _step(model, objective, batch, device), "parser": parser, "fusion": fusion}
    found = {}
    for name, route in routes.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts products
            route()
        seconds = statistics.median(_in_turns({name: route}, repeats)[name])
        found[name] = counter.get_total_flops() / seconds / peak
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
        for name, value in {"pixels": pixels, "ids": batch.words, "real": batch.word_tokens.long(),
                            "labels": batch.labels, "matched": batch.matched.long()}.items():  # fmt: skip
            self.register_buffer(name, value)

    def step(self, forwards: int) -> None:
        """Forward and backward for MLM and, in a forward of its own where there are two, for ITM."""
        device = self.pixels.device.type
        with _autocast(device):
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


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM") / 2**10


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """`train.json`, and `train.html` with the figure, in `folder`; the figure's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    page = folder / "train.html"
    step_figure(result).write_html(page, include_plotlyjs="directory")
    return page


def step_figure(result: dict[str, Any]) -> go.Figure:
    """Where the time of a step goes, and pairs a second, by preset."""
    names = list(result["presets"])
    figure = make_subplots(1, 2, subplot_titles=("Share of a step's time", "Pairs a second"), horizontal_spacing=0.12)
    for colour, phase in zip(PALETTE, PHASES, strict=False):
        shares = [part["phases"][phase] for part in result["presets"].values()]
        figure.add_bar(x=names, y=shares, name=phase, marker={"color": colour}, row=1, col=1)
    rates = [part["pairs_per_s"] for part in result["presets"].values()]
    figure.add_bar(x=names, y=rates, marker={"color": PALETTE[0]}, showlegend=False, row=1, col=2)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], col=1)
    told = ", ".join(f"{name} {rate:.3g}" for name, rate in zip(names, rates, strict=True))
    return finish(figure, title=f"What a training step costs ({result['device']})", alt=f"Pairs a second: {told}.")
