"""What a score matrix costs: pairs per second of `score_matrix` against a plain loop over pairs.

make bench-retrieval        or        python -m benchmarks.retrieval --help
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import plotly.graph_objects as go
import torch
import typer
from PIL import Image
from torch import Tensor

from benchmarks.measure import device_name, in_turns, medians, peak_mib, report, start_peak, synchronise
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.figures.style import PALETTE, finish
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import build_tokenizer
from vpworkbench.settings import ModelSettings, preset
from vpworkbench.tasks.retrieval import RETRIEVAL, score_matrix
from vpworkbench.tasks.task import TaskModel

ROUTES = {
    "naive": "the whole model on every pair",
    "images once": "visual tokens kept, captions padded",
    "ours": "score_matrix",
}
NAIVE_BATCH = 16
FLICKR30K_TEST = (1_000, 5_000)  # images, captions
VOCABULARY = 1_000


def measure_retrieval(
    *,
    name: str = "ablation-224",
    images: int = 4,
    captions: int = 100,
    naive_pairs: int = 32,
    repeats: int = 5,
    device: str = "cpu",
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

    Returns
    -------
    dict
        `pairs_per_s` and `ratio` (to naive) by route, `largest_difference` of the scores; sizes.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = _model(name, device)
        pictures, texts = _noise(Path(folder), model, images), _captions(model, captions)
        routes, pairs, found = _routes(model, pictures, texts, naive_pairs)
        for route in routes.values():
            route()
        seconds = in_turns(routes, repeats)
    rates = {route: [pairs[route] / one for one in times] for route, times in seconds.items()}
    result: dict[str, Any] = {
        "preset": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "images": images,
        "captions": captions,
        "naive_pairs": pairs["naive"],
        "repeats": repeats,
        "pairs_per_s": medians(rates),
        "ratio": {
            route: statistics.median(one / base for one, base in zip(times, rates["naive"], strict=True))
            for route, times in rates.items()
        },
        "largest_difference": float(np.abs(found["ours"].flat[: pairs["naive"]] - found["naive"]).max()),
    }
    return result


def score_part(name: str, images: int, captions: int, *, device: str, pairs: int = 4096) -> dict[str, Any]:
    """Score some images of a large set with all its captions; what Flickr30k's test set would take at that rate."""
    with tempfile.TemporaryDirectory() as folder:
        model = _model(name, device)
        pictures, texts = _noise(Path(folder), model, images), _captions(model, captions)
        options = {"pairs": pairs, "bf16": device == "cuda"}
        score_matrix(model, pictures[:1], texts[: 2 * pairs], **options)
        start_peak(device)
        synchronise()
        began = time.perf_counter()
        score_matrix(model, pictures, texts, **options)
        synchronise()
        seconds = time.perf_counter() - began
    rate, (all_images, all_captions) = images * captions / seconds, FLICKR30K_TEST
    measured = {"preset": name, "images": images, "captions": captions, "pairs_at_once": pairs, "seconds": seconds}
    return measured | {
        "peak_mib": peak_mib(device),
        "pairs_per_s": rate,
        "extrapolated_minutes": all_images * all_captions / rate / 60,
    }


def _routes(
    model: TaskModel, pictures: Sequence[Picture], texts: Sequence[str], naive_pairs: int
) -> tuple[dict[str, Callable[[], None]], dict[str, int], dict[str, np.ndarray]]:
    """What is timed, the pairs in a turn of each, and where each leaves its scores."""
    device, longest = model.base.device, model.base.settings.text_tokens
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
    words = model.base.words.pad(texts)
    room = ((0, 0), (0, longest - words.shape[1]))
    return np.pad(words, room, constant_values=model.base.tokenizer.pad_token_id)


def _model(name: str, device: str) -> TaskModel:
    settings = preset(name)
    torch.manual_seed(0)
    tokenizer = build_tokenizer([f"w{number}" for number in range(VOCABULARY)] * 2)
    shape = ModelSettings(visual=settings.visual, fusion=settings.fusion, text_tokens=settings.data.text_tokens)
    return TaskModel(VisualParsingModel(shape, tokenizer), RETRIEVAL, ("unmatched", "matched")).to(device).eval()


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


def rate_figure(result: dict[str, Any]) -> go.Figure:
    """Pairs per second by route, and how many times the plain loop's."""
    rates, ratios = result["pairs_per_s"], result["ratio"]
    figure = go.Figure()
    names = [f"{route}<br>{ROUTES[route]}" for route in rates]
    labels = [f"{rates[route]:.3g}/s, {ratios[route]:.1f} x" for route in rates]
    figure.add_bar(x=names, y=list(rates.values()), text=labels, width=0.5, marker={"color": PALETTE[0]})
    figure.update_yaxes(title_text="pairs per second", rangemode="tozero")
    speeds = ", ".join(f"{route} {rates[route]:.3g} ({ratios[route]:.1f} times naive)" for route in rates)
    return finish(figure, title=f"Scoring pairs, {result['preset']} ({result['device']})", alt=f"Pairs/s: {speeds}.")


def main(
    preset: Annotated[str, typer.Option(help="preset whose sizes are measured")] = "ablation-224",
    images: Annotated[int, typer.Option(help="images of the matrix of one turn", min=1)] = 4,
    captions: Annotated[int, typer.Option(help="captions of that matrix", min=1)] = 100,
    repeats: Annotated[int, typer.Option(help="turns of every route", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Scoring all pairs against the plain loop over pairs: JSON and a figure."""
    result = measure_retrieval(name=preset, images=images, captions=captions, repeats=repeats, device=device)
    for route, rate in result["pairs_per_s"].items():
        print(f"{route:12} {rate:10.3g} pairs/s, {result['ratio'][route]:.2f} times naive")
    print(f"largest difference of scores {result['largest_difference']:.1e}")
    report("retrieval", result, rate_figure(result))


if __name__ == "__main__":
    typer.run(main)
