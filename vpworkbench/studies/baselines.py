"""What a score is worth: beside the most frequent label, half of the input, the drawn structure, no pre-training."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vpworkbench.data import nlvr1
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Example, Picture
from vpworkbench.metrics import most_given
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.runs import read_json, runs_root
from vpworkbench.settings import FinetuneSettings
from vpworkbench.stats import Interval, student_interval
from vpworkbench.tasks.retrieval import RetrievalResult, chance, retrieval_result
from vpworkbench.tasks.task import METRICS, TaskResult, score
from vpworkbench.train.dual import dual_scores
from vpworkbench.train.finetune import PreparedTask, pair_batches

Progress = Callable[[str, int, int], None]
WORDS = r"(?u)\b\w+\b"
SETTLED = {"tol": 1e-2, "max_iter": 500}  # of regressions: the last digits cost half a minute and generalise no better
NUMBERS = {word: number for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"), 1)}
NUMBERS |= {str(number): number for number in range(1, 8)}


def baselines(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    *,
    most: int = 4_000,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, TaskResult] | dict[str, RetrievalResult]]:
    """The most frequent label, the text alone, the image alone, the text times pooled features; of NLVR v1 MaxEnt too.

    Of retrieval chance, and two dual encoders (`dual`). Each is trained once, for all splits.

    Parameters
    ----------
    most : int
        Training examples that each of them sees, at most.
    folder : Path or None
        Keeps the dual encoders.

    Returns
    -------
    dict
        Of each split but training, by name what each scores; empty where the answers of the split are withheld.
    """
    held_out = [split for split in prepared.splits if split != "train"]
    splits = {split: prepared.splits[split] if prepared.is_answered(split) else [] for split in held_out}
    with tempfile.TemporaryDirectory() as scratch:
        if settings.task == "retrieval":
            place = folder or Path(scratch)
            return {split: _duals(prepared, settings, pictures, place, progress) if pictures else {}
                    for split, pictures in splits.items()}  # fmt: skip
    asked = [example for examples in splits.values() for example in examples]
    told = _told(prepared, settings, asked, most, progress) if asked else {}
    found: dict[str, dict[str, TaskResult]] = {split: {} for split in splits}
    for name, labels in told.items():
        given = iter(labels)  # by place: two splits may share ids
        for split, examples in splits.items():
            predicted = {example.id: str(next(given)) for example in examples}
            if examples:
                found[split][name] = TaskResult(settings.task, score(settings.task, examples, predicted), predicted)
    return found


def _duals(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    pictures: Sequence[Picture],
    folder: Path,
    progress: Progress | None,
) -> dict[str, RetrievalResult]:
    found = dual_scores(pair_batches(prepared, settings), pictures, settings, folder=folder, progress=progress)
    return {"chance": chance(pictures)} | {name: retrieval_result(one, pictures) for name, one in found.items()}


def _told(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    examples: Sequence[Example],
    most: int,
    progress: Progress | None,
) -> dict[str, Sequence[str]]:
    """By baseline the label that it gives to each example."""
    rng = np.random.default_rng(settings.seed)
    training = prepared.splits["train"]
    frequent = Counter(map(_label, training)).most_common(1)[0][0]
    training = [training[number] for number in rng.permutation(len(training))[:most]]
    labels = [_label(example) for example in training]
    text = make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=WORDS), LogisticRegression(**SETTLED))
    text.fit([example.text for example in training], labels)
    features = image_features(
        prepared.model.base, [example.images for example in [*training, *examples]], progress=progress
    )
    image = make_pipeline(StandardScaler(), LogisticRegression(**SETTLED))
    image.fit(features[: len(training)], labels)
    told = {
        "most frequent": [frequent] * len(examples),
        "text only": list(text.predict([example.text for example in examples])),
        "image only": list(image.predict(features[len(training) :])),
        "text x pooled features": text_times_features(
            [example.text for example in training], features[: len(training)], labels,
            [example.text for example in examples], features[len(training) :], seed=settings.seed,
        ),
    }  # fmt: skip
    if all(example.boxes for example in [*training, *examples]):
        told["MaxEnt on structure"] = list(maxent_on_structure(training, labels, examples))
    return told


def _label(example: Example) -> str:
    """The label, or what most people answered."""
    return example.label if example.label is not None else most_given(example.answers)


class ProductFusion(nn.Module):
    """Text and image, a vector each, multiplied: BUTD (Anderson et al. 2018), or MUTAN with an identity for its core.

    BUTD reads words by a GRU and pools regions by attention; here words are counted and tokens are pooled evenly.
    """

    def __init__(self, words: int, features: int, labels: int, width: int = 256) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Linear(words, width), nn.Tanh())
        self.image = nn.Sequential(nn.Linear(features, width), nn.Tanh())
        self.out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, labels))

    def forward(self, words: Tensor, features: Tensor) -> Tensor:
        """Logits (example, label) of counted words (example, word) and pooled features (example, feature)."""
        return self.out(self.text(words) * self.image(features))


def text_times_features(
    texts: Sequence[str],
    features: np.ndarray,
    labels: Sequence[str],
    new_texts: Sequence[str],
    new_features: np.ndarray,
    *,
    epochs: int = 30,
    seed: int = 0,
) -> list[str]:
    """Labels that a `ProductFusion` gives to the new ones, trained on the others.

    Parameters
    ----------
    features, new_features : array, (example, feature)
        Of `image_features`.
    """
    scaler = StandardScaler()
    counter = CountVectorizer(ngram_range=(1, 2), token_pattern=WORDS, max_features=5_000, dtype=np.float32)
    known, target = np.unique(labels, return_inverse=True)
    words = torch.from_numpy(counter.fit_transform(texts).toarray())
    seen = torch.from_numpy(scaler.fit_transform(features)).float()
    with torch.random.fork_rng(devices=[]):  # a baseline must not change what is trained behind it
        torch.manual_seed(seed)
        model = ProductFusion(words.shape[1], seen.shape[1], len(known))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(epochs):
            for rows in torch.randperm(len(words)).split(64):
                loss = nn.functional.cross_entropy(model(words[rows], seen[rows]), torch.from_numpy(target)[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    with torch.no_grad():
        given = torch.from_numpy(counter.transform(new_texts).toarray())
        logits = model.eval()(given, torch.from_numpy(scaler.transform(new_features)).float())
    return [str(label) for label in known[logits.argmax(dim=1).numpy()]]


def maxent_on_structure(training: Sequence[Example], labels: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """Maximum entropy on the statement's words crossed with facts of `boxes`: the label of each of `examples`.

    The strength of its prior is chosen by five folds of the training statements.
    """
    once = {(example.text, example.boxes): (example, label) for example, label in zip(training, labels, strict=True)}
    hasher = FeatureHasher(2**18, input_type="string", alternate_sign=False)
    priors = {"C": [0.001, 0.003, 0.01, 0.03, 0.1]}
    classifier = GridSearchCV(LogisticRegression(max_iter=300), priors, cv=KFold(5, shuffle=True, random_state=0))
    classifier.fit(hasher.transform(_crossed(example) for example, _ in once.values()), [y for _, y in once.values()])
    return classifier.predict(hasher.transform(map(_crossed, examples)))


def _crossed(example: Example) -> list[str]:
    """Each word with each fact about the kinds of item that the statement names."""
    words = re.findall(WORDS, example.text.lower())
    facts = list(_facts(words, example.boxes))
    return [f"{word}|{fact}" for word, fact in product(sorted({*words, ""}), facts)]


def _facts(words: Sequence[str], boxes: Sequence[nlvr1.Box]) -> Iterator[str]:
    """How the numbers of items of the named kinds compare with the numbers named."""
    numbers = [NUMBERS[word] for word in words if word in NUMBERS]
    for colour, shape in product(("", *nlvr1.COLOURS.values()), ("", *nlvr1.SHAPES)):
        if (colour and colour not in words) or (shape and not any(word.startswith(shape) for word in words)):
            continue
        counts = [sum(colour in ("", item.colour) and shape in ("", item.shape) for item in box) for box in boxes]
        kind = f"{'colour ' * bool(colour)}{'shape ' * bool(shape)}"
        found = {"all": sum(counts), "most": max(counts), "least": min(counts), "boxes": sum(map(bool, counts))}
        for name, count in found.items():
            yield from (f"{kind}{name} {np.sign(count - number):+d}" for number in numbers)
            if not numbers:
                yield f"{kind}{name} {count}"
        for number in numbers:
            yield f"{kind}a box of exactly so many: {number in counts}"


@torch.no_grad()
def image_features(
    model: VisualParsingModel,
    images: Sequence[tuple[ImageFile, ...]],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Mean and largest visual features of each example's images, side by side; (example, feature)."""
    files = list(dict.fromkeys(image for group in images for image in group))
    pooled: dict[ImageFile, np.ndarray] = {}
    for start in range(0, len(files), 64):
        part = files[start : start + 64]
        pixels = visual_input(model.settings.visual).stack(part).to(model.device)
        visual = model.eval().visual(pixels)
        both = torch.cat([visual.mean(), visual.largest()], dim=1).cpu().numpy()
        pooled |= dict(zip(part, both, strict=True))
        if progress:
            progress("reading images", min(start + 64, len(files)), len(files))
    return np.stack([np.concatenate([pooled[image] for image in group]) for group in images])


def runs_by_start(settings: FinetuneSettings) -> pd.DataFrame:
    """Finished runs of `04_finetune` that differ from these settings in nothing but `seed` and `pretrained`.

    What leaves a run's result as it is, how often it is saved and logged and who prepares its batches, may differ too.

    Returns
    -------
    DataFrame
        `pretrained`, `seed`, `score` (of the validation split), one row a run, equal runs once.
    """
    wanted, rows = _of_any_seed(settings.model_dump(mode="json")), {}
    for folder in sorted((runs_root() / "04_finetune").glob("*")):
        if not (folder / "summary.json").exists():
            continue
        there = read_json(folder / "config.json")["settings"]
        if _of_any_seed(there) == wanted:
            rows[there["pretrained"], there["seed"]] = read_json(folder / "summary.json")[METRICS[settings.task]]
    return pd.DataFrame(
        [(*key, value) for key, value in sorted(rows.items(), reverse=True)], columns=["pretrained", "seed", "score"]
    )


def _of_any_seed(settings: dict[str, Any]) -> dict[str, Any]:
    train = {name: value for name, value in settings["train"].items() if name not in ("checkpoint_every", "log_every")}
    return settings | {"seed": 0, "pretrained": True, "workers": 0, "train": train}


def start_intervals(runs: pd.DataFrame) -> dict[str, Interval]:
    """Mean score over seeds, pre-trained and from scratch, with 95% t intervals; and of their difference, by seed.

    Parameters
    ----------
    runs
        Of `runs_by_start`. Bounds are nan where there are fewer than two seeds.
    """
    by_seed = runs.pivot(index="seed", columns="pretrained", values="score")
    names = {True: "pre-trained", False: "from scratch"}
    found = {names[start]: student_interval(by_seed[start].dropna()) for start in (True, False) if start in by_seed}
    if len(found) == 2:
        found["difference"] = student_interval((by_seed[True] - by_seed[False]).dropna())
    return found
