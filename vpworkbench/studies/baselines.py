"""What a score is worth: simple models beside it, and the same model from scratch."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from vpworkbench.data.records import Example
from vpworkbench.model.attentive import EveImage, Mac
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.runs import read_json, runs_root, saved_settings
from vpworkbench.settings import FinetuneSettings
from vpworkbench.stats import Interval, student_interval
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.classification import each_image_once
from vpworkbench.tasks.retrieval import Retrieval, RetrievalResult, chance, reranked, retrieval_result
from vpworkbench.tasks.task import Progress, TaskResult, right_answer, texts_of
from vpworkbench.train.dual import DUAL, dual_scores
from vpworkbench.train.finetune import PreparedTask

WORD = r"(?u)\b\w+\b"
REGRESSION = {"tol": 1e-2, "max_iter": 500}  # a smaller tolerance costs half a minute and generalises no better
NUMBERS = {word: number for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"), 1)}
NUMBERS |= {str(number): number for number in range(1, 8)}
ATTENTIVE: dict[str, dict[str, Callable[[FinetuneSettings], Callable[..., nn.Module]]]] = {
    "nlvr2": {"MAC": lambda settings: partial(Mac, steps=settings.mac_steps)},
    "nlvr1": {"MAC": lambda settings: partial(Mac, steps=settings.mac_steps)},
    "snli-ve": {"EVE-Image": lambda settings: EveImage},
}
"""Task -> networks that attend to visual tokens, trained from scratch on the tokens of the checkpoint."""


def baselines(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    *,
    most: int = 4_000,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, TaskResult] | dict[str, RetrievalResult]]:
    """Results of simple models by split (all but training) and name; empty if the answers of the split are withheld.

    The first is the fine-tuned model with another image: what it answers without seeing. The others are trained once,
    on at most `most` examples: the most frequent label, text only, image only, and text times pooled features; for NLVR
    v1 MaxEnt on the drawn structure too, and those of `ATTENTIVE`. For retrieval: chance, two dual encoders and SCAN,
    which `folder` keeps.
    """
    splits = {split: records for split, records in prepared.splits.items() if split != "train"}
    scored = {split: records for split, records in splits.items() if prepared.is_answered(split)}
    found: dict[str, dict[str, Any]] = {split: {} for split in splits}
    task = prepared.model.task
    if isinstance(task, Retrieval):
        batches = task.batches(prepared.splits["train"], prepared.model, settings)
        with tempfile.TemporaryDirectory() as scratch:
            for split, pictures in scored.items():
                scores = dual_scores(batches, pictures, settings, folder=folder or Path(scratch), progress=progress)
                results = {name: retrieval_result(one, pictures) for name, one in scores.items()}
                found[split] = {"chance": chance(pictures)} | results
        return found
    examples = [example for part in scored.values() for example in part]
    predictions = _classify(prepared, settings, examples, most, progress) if examples else {}
    for split, part in scored.items():
        if len({example.images for example in part}) > 1:
            found[split]["another image"] = task.evaluate(prepared.model, with_other_images(part), settings)
    for name, labels in predictions.items():
        remaining = iter(labels)  # by place: two splits may share ids
        for split, part in scored.items():
            predicted = {example.id: str(next(remaining)) for example in part}
            found[split][name] = TaskResult(task, task.scores(part, predicted), predicted)
    return found


def with_reranked(
    others: Mapping[str, Mapping[str, TaskResult | RetrievalResult]],
    fine_tuned: Mapping[str, TaskResult | RetrievalResult],
) -> dict[str, dict[str, TaskResult | RetrievalResult]]:
    """`others` as from `baselines`, and for retrieval each dual encoder whose candidates the fine-tuned model re-ranks.

    `fine_tuned` holds the results of that model, of `val` and `test`.
    """
    found = {split: dict(results) for split, results in others.items()}
    for name in DUAL if isinstance(fine_tuned["val"], RetrievalResult) else ():
        for split, result in reranked({split: others[split][name] for split in others}, fine_tuned).items():
            found[split][f"{name} + fine-tuned"] = result
    return found


def with_other_images(examples: Sequence[Example]) -> list[Example]:
    """Each example with the images of another one; those of one image all get the same other image."""
    groups = list(dict.fromkeys(example.images for example in examples))
    other = dict(zip(groups, groups[1:] + groups[:1], strict=True))
    return [replace(example, images=other[example.images]) for example in examples]


def _classify(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    examples: Sequence[Example],
    most: int,
    progress: Progress | None,
) -> dict[str, Sequence[str]]:
    """For each baseline, the label that it gives to each example."""
    rng = np.random.default_rng(settings.seed)
    training = prepared.splits["train"]
    frequent = Counter(map(right_answer, training)).most_common(1)[0][0]
    training = [training[number] for number in rng.permutation(len(training))[:most]]
    labels, texts, new_texts = list(map(right_answer, training)), texts_of(training), texts_of(examples)
    text = make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=WORD), LogisticRegression(**REGRESSION))
    text.fit(texts, labels)
    images = [example.images for example in [*training, *examples]]
    pooled = image_features(prepared.model.base, images, progress=progress)
    features, new_features = np.split(pooled, [len(training)])
    image = make_pipeline(StandardScaler(), LogisticRegression(**REGRESSION)).fit(features, labels)
    fused = text_times_features(texts, features, labels, new_texts, new_features, seed=settings.seed)
    predictions = {
        "most frequent": [frequent] * len(examples),
        "text only": list(text.predict(new_texts)),
        "image only": list(image.predict(new_features)),
        "text x pooled features": fused,
    }
    if all(example.boxes for example in [*training, *examples]):
        predictions["MaxEnt on structure"] = list(maxent_on_structure(training, labels, examples))
    for name, network in ATTENTIVE.get(prepared.model.task.name, {}).items():
        given = prepared.model.base, training, labels, examples
        predictions[name] = attentive_labels(network(settings), *given, seed=settings.seed)
    return predictions


class ProductFusion(nn.Module):
    """A text vector times an image vector: BUTD (Anderson et al. 2018), or MUTAN with the identity as its core.

    BUTD reads words with a GRU and pools regions by attention; here words are counted and tokens are averaged.
    """

    def __init__(self, words: int, features: int, labels: int) -> None:
        super().__init__()
        width = 256
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
    seed: int,
) -> list[str]:
    """Labels for new examples by a `ProductFusion` trained on the others; features as from `image_features`."""
    scaler = StandardScaler()
    counter = CountVectorizer(ngram_range=(1, 2), token_pattern=WORD, max_features=5_000, dtype=np.float32)
    known, target = np.unique(labels, return_inverse=True)
    words = torch.from_numpy(counter.fit_transform(texts).toarray())
    vision = torch.from_numpy(scaler.fit_transform(features)).float()
    build = partial(ProductFusion, words.shape[1], vision.shape[1], len(known))
    model = _trained(build, (words, vision), torch.from_numpy(target), seed=seed, epochs=30)
    with torch.no_grad():
        given = torch.from_numpy(counter.transform(new_texts).toarray())
        logits = model(given, torch.from_numpy(scaler.transform(new_features)).float())
    return [str(label) for label in known[logits.argmax(dim=1).numpy()]]


def _trained(
    build: Callable[[], nn.Module], inputs: Sequence[Tensor], target: Tensor, *, seed: int, epochs: int
) -> nn.Module:
    """A classifier of `inputs`, each (example, ...), trained on the CPU and in evaluation mode; target (example,)."""
    with torch.random.fork_rng(devices=[]):  # a baseline must not change what is trained after it
        torch.default_generator.manual_seed(seed)
        model = build()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(epochs):
            for rows in torch.randperm(len(target)).split(64):
                given = (part[rows].float() if part.is_floating_point() else part[rows] for part in inputs)
                loss = nn.functional.cross_entropy(model(*given), target[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model.eval()


@torch.no_grad()
def _token_inputs(base: VisualParsingModel, examples: Sequence[Example]) -> tuple[Tensor, ...]:
    """Inputs of `ATTENTIVE`: float16 visual tokens (example, side, vision, c), word ids, and which of both are real."""
    vision, inputs = [], visual_input(base.settings.visual)
    for start in range(0, len(examples), 64):
        images, index = each_image_once([example.images for example in examples[start : start + 64]], inputs)
        visual = base.eval().visual(images.to(base.device))
        vision.append([part[index.to(base.device)].cpu() for part in (visual.features.half(), visual.not_padding())])
    return *map(torch.cat, zip(*vision, strict=True)), *base.words.tensors(texts_of(examples))


def attentive_labels(
    network: Callable[..., nn.Module],
    base: VisualParsingModel,
    training: Sequence[Example],
    labels: Sequence[str],
    examples: Sequence[Example],
    *,
    seed: int,
    epochs: int = 10,
) -> list[str]:
    """The label of each of `examples` by a network of `ATTENTIVE`, trained on the others."""
    known, target = np.unique(labels, return_inverse=True)
    build = partial(network, base.visual.width, len(base.words.tokenizer), len(known))
    model = _trained(build, _token_inputs(base, training), torch.from_numpy(target), seed=seed, epochs=epochs)
    found: list[str] = []
    for start in range(0, len(examples), 64):
        vision, *others = _token_inputs(base, examples[start : start + 64])
        with torch.no_grad():
            found += map(str, known[model(vision.float(), *others).argmax(dim=1).numpy()])
    return found


def maxent_on_structure(training: Sequence[Example], labels: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """The label of each of `examples`, by maximum entropy on the statement's words crossed with facts about `boxes`.

    The strength of the prior is chosen by five-fold cross-validation on the training statements.
    """
    unique = {(example.text, example.boxes): (example, label) for example, label in zip(training, labels, strict=True)}
    hasher = FeatureHasher(2**18, input_type="string", alternate_sign=False)
    priors = {"C": [0.001, 0.003, 0.01, 0.03, 0.1]}
    classifier = GridSearchCV(LogisticRegression(max_iter=300), priors, cv=KFold(5, shuffle=True, random_state=0))
    facts = hasher.transform(_crossed(example) for example, _ in unique.values())
    classifier.fit(facts, [label for _, label in unique.values()])
    return classifier.predict(hasher.transform(map(_crossed, examples)))


def _crossed(example: Example) -> list[str]:
    """Each word of the statement with each fact about the kinds of item that it names."""
    words = re.findall(WORD, example.text.lower())
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
    model: VisualParsingModel, images: Sequence[tuple[ImageFile, ...]], *, progress: Progress | None = None
) -> np.ndarray:
    """Mean and maximum over visual tokens, concatenated over the images of each example; (example, feature)."""
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
    """Finished runs of `04_finetune` whose settings differ from these only in `seed` and `pretrained`.

    Settings that do not change a run's result (checkpoint and log intervals, workers) are ignored. One row for each
    run, equal runs once: `pretrained`, `seed` and `score` (on validation, or on test if validation trained;
    nan where the answers are withheld).
    """
    wanted, rows, metric = _without_seed(settings.model_dump(mode="json")), {}, TASKS[settings.task].metric
    for folder in sorted((runs_root() / "04_finetune").glob("*")):
        if not (folder / "summary.json").exists():
            continue
        run = saved_settings(folder)
        if _without_seed(run) == wanted:
            summary = read_json(folder / "summary.json")
            rows[run["pretrained"], run["seed"]] = (summary["test"] if settings.train_on_val else summary).get(metric)
    table = [(*key, value) for key, value in sorted(rows.items(), reverse=True)]
    return pd.DataFrame(table, columns=["pretrained", "seed", "score"]).astype({"score": float})


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    train = {name: value for name, value in settings["train"].items() if name not in ("checkpoint_every", "log_every")}
    return settings | {"seed": 0, "pretrained": True, "workers": 0, "mac_steps": 0, "train": train}


def start_intervals(runs: pd.DataFrame) -> dict[str, Interval]:
    """Mean score over seeds, pre-trained and from scratch, and their difference by seed; 95% intervals (Student's t).

    `runs` is the result of `runs_by_start`; those without a score are left out. Bounds are nan if there are fewer than
    two seeds.
    """
    by_seed = runs.dropna(subset="score").pivot(index="seed", columns="pretrained", values="score")
    names = {True: "pre-trained", False: "from scratch"}
    found = {names[start]: student_interval(by_seed[start].dropna()) for start in (True, False) if start in by_seed}
    if len(found) == 2:
        found["difference"] = student_interval((by_seed[True] - by_seed[False]).dropna())
    return found
