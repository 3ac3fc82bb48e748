"""What a score matrix costs: pairs a second of `retrieval.score_matrix` against a plain loop over pairs.

Routes take turns in one process, so that a machine's other work falls on all alike; ratios are within a turn.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from PIL import Image
from torch import Tensor

from vpworkbench.bench import _in_turns, _synchronise
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.settings import ModelSettings, preset
from vpworkbench.tasks.retrieval import score_matrix
from vpworkbench.tasks.task import LABELS, TaskModel

ROUTES = {
    "naive": "the whole model on every pair",
    "images once": "visual tokens kept, captions padded",
    "ours": "score_matrix",
}
NAIVE_BATCH = 16
FLICKR30K_TEST = (1_000, 5_000)  # images, captions
VOCABULARY = 1_000


def retrieval_bench(
    *,
    name: str = "ablation-224",
    images: int = 4,
    captions: int = 100,
    naive_pairs: int = 32,
    repeats: int = 5,
    device: str = "cpu",
    partial: tuple[str, int, int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a preset's model with random weights, on noise and on captions of the lengths of Flickr 8k's.

    The naive route is the loop that one writes first: image and caption of every pair go through the whole model, in
    batches of 16, captions padded to the longest length that the model takes. float32; on a GPU bfloat16.

    Parameters
    ----------
    images, captions : int
        Of the matrix that `score_matrix` computes in a turn, its images encoded anew each time. A real set has more
        captions to an image, so the encoding weighs less there.
    naive_pairs : int
        Of the same matrix, that the plain loop computes in a turn.
    partial : (preset, images, captions) or None
        A real part of a large matrix by `score_matrix` alone; the time of Flickr30k's test set, 1,000 x 5,000, is
        extrapolated from it.

    Returns
    -------
    dict
        `pairs_per_s` and `ratio` (to naive) by route, `largest_difference` of the scores; `partial`; sizes.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = _model(name, device)
        pictures, texts = _noise(Path(folder), model, images), _captions(model, captions)
        routes, pairs, found = _routes(model, pictures, texts, naive_pairs)
        for number, route in enumerate(routes.values()):
            route()
            if progress:
                progress("warming up", number + 1, len(routes))
        seconds = _in_turns(routes, repeats)
    rates = {route: [pairs[route] / one for one in times] for route, times in seconds.items()}
    result: dict[str, Any] = {
        "preset": name, "device": _device(device), "torch": torch.__version__, "dtype": _dtype(device),
        "images": images, "captions": captions, "naive_pairs": pairs["naive"], "repeats": repeats,
        "pairs_per_s": {route: statistics.median(times) for route, times in rates.items()},
        "ratio": {
            route: statistics.median(one / base for one, base in zip(times, rates["naive"], strict=True))
            for route, times in rates.items()
        },
        "largest_difference": float(np.abs(found["ours"].flat[: pairs["naive"]] - found["naive"]).max()),
    }  # fmt: skip
    if partial:
        result["partial"] = partial_run(*partial, device=device)
    return result


def partial_run(name: str, images: int, captions: int, *, device: str, pairs: int = 4096) -> dict[str, Any]:
    """Score some images of a large set with all its captions; what Flickr30k's test set would take at that rate."""
    with tempfile.TemporaryDirectory() as folder:
        model = _model(name, device)
        pictures, texts = _noise(Path(folder), model, images), _captions(model, captions)
        options = {"pairs": pairs, "bf16": device == "cuda"}
        score_matrix(model, pictures[:1], texts[: 2 * pairs], **options)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _synchronise()
        began = time.perf_counter()
        score_matrix(model, pictures, texts, **options)
        _synchronise()
        seconds = time.perf_counter() - began
    rate, (all_images, all_captions) = images * captions / seconds, FLICKR30K_TEST
    measured = {"preset": name, "images": images, "captions": captions, "pairs_at_once": pairs, "seconds": seconds}
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured | {"pairs_per_s": rate, "extrapolated_minutes": all_images * all_captions / rate / 60}


def _routes(
    model: TaskModel, pictures: Sequence[Picture], texts: Sequence[str], naive_pairs: int
) -> tuple[dict[str, Callable[[], None]], dict[str, int], dict[str, np.ndarray]]:
    """What is timed, the pairs in a turn of each, and where each leaves its scores."""
    device, longest = model.device, model.base.settings.text_tokens
    pixels = Pixels(model.base.settings.visual.image_px).stack(pictures).to(device)  # decoded before the clock starts
    words = torch.from_numpy(_padded(model, texts, longest)).to(device)
    tokens = words != model.base.tokenizer.pad_token_id
    places = [divmod(number, len(texts)) for number in range(min(naive_pairs, len(pictures) * len(texts)))]
    found: dict[str, np.ndarray] = {}

    def loop(forward: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        scores = []
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            for start in range(0, len(places), NAIVE_BATCH):
                image, text = torch.tensor(places[start : start + NAIVE_BATCH], device=device).unbind(1)
                logits = model.head(forward(image, text)).float()
                scores.append((logits[:, 1] - logits[:, 0]).cpu())
        return torch.cat(scores).numpy()

    def naive() -> None:
        found["naive"] = loop(lambda image, text: model.base(pixels[image], words[text], tokens[text]).cls)

    def images_once() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            visual = model.base.visual(pixels[: places[-1][0] + 1])
        found["images once"] = loop(
            lambda image, text: model.base.fuse(visual, words[text], tokens[text], image_index=image).cls
        )

    def ours() -> None:
        found["ours"] = score_matrix(model, pictures, texts, bf16=device.type == "cuda")

    pairs = {"naive": len(places), "images once": len(places), "ours": len(pictures) * len(texts)}
    return {"naive": naive, "images once": images_once, "ours": ours}, pairs, found


def _padded(model: TaskModel, texts: Sequence[str], longest: int) -> np.ndarray:
    words = model.words.pad(texts)
    room = ((0, 0), (0, longest - words.shape[1]))
    return np.pad(words, room, constant_values=model.base.tokenizer.pad_token_id)


def _model(name: str, device: str) -> TaskModel:
    settings = preset(name)
    torch.manual_seed(0)
    tokenizer = build_tokenizer([f"w{number}" for number in range(VOCABULARY)] * 2)
    shape = ModelSettings(visual=settings.visual, fusion=settings.fusion, text_tokens=settings.data.text_tokens)
    return TaskModel(VisualParsingModel(shape, tokenizer), "retrieval", LABELS["retrieval"]).to(device).eval()


def _captions(model: TaskModel, count: int) -> list[str]:
    """Words at random; lengths with [CLS] and [SEP] as in Flickr 8k: 5 to 39 tokens, 14.5 on average."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(2.47, 0.333, count)), 3, model.base.settings.text_tokens - 2)
    return [" ".join(f"w{word}" for word in rng.integers(0, VOCABULARY, int(length))) for length in lengths]


def _noise(folder: Path, model: TaskModel, count: int) -> list[Picture]:
    rng, side = np.random.default_rng(0), model.base.settings.visual.image_px
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [Picture(str(number), ImageFile(folder, f"{number}.png"), "test", ()) for number in range(count)]


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _dtype(device: str) -> str:
    return "bfloat16 autocast" if device == "cuda" else "float32"


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """`retrieval.json`, and `retrieval.html` with the figure, in `folder`; the figure's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "retrieval.json").write_text(json.dumps(result, indent=2) + "\n")
    page = folder / "retrieval.html"
    rate_figure(result).write_html(page, include_plotlyjs="directory")
    return page


def rate_figure(result: dict[str, Any]) -> go.Figure:
    """Pairs a second by route, each with how many times as fast as the plain loop it is."""
    rates, ratios = result["pairs_per_s"], result["ratio"]
    figure = go.Figure()
    figure.add_bar(
        x=[f"{route}<br>{ROUTES[route]}" for route in rates], y=list(rates.values()), width=0.5,
        text=[f"{rates[route]:.3g}/s, {ratios[route]:.1f} x" for route in rates], marker={"color": PALETTE[0]},
    )  # fmt: skip
    figure.update_yaxes(title_text="pairs a second", rangemode="tozero")
    told = ", ".join(f"{route} {rates[route]:.3g} ({ratios[route]:.1f} times naive)" for route in rates)
    return finish(figure, title=f"Scoring pairs, {result['preset']} ({result['device']})", alt=f"Pairs/s: {told}.")
