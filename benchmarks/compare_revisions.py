"""Run two versions of the package on the same small work, and compare all results to the last digit.

    python benchmarks/compare_revisions.py OLD_TREE NEW_TREE [--data FOLDER] [--only losses,probes]

A tree is a checkout of the repository. Each tree runs in its own process, on one CPU thread, and writes its results to
a JSON file; then every result is compared. The exit code is 1 if a result differs or is missing, or if a part failed.
`--record TREE FILE.json` only writes that file. It may stand for OLD_TREE later, so that OLD_TREE need not run again.

Modules may move between the trees: a name is looked up wherever the tree defines it. After a rename, extend `RENAMES`;
after a change of arguments, adapt the one call below.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGE = "vpworkbench"
RENAMES: dict[str, str] = {}
"""Old name -> new name of a function, class or constant. Write `folder.name` where several modules define the name."""
RENAMED_SETTINGS: dict[str, str] = {}
"""Old key -> new key of a setting, both dotted, such as `data.workers`."""
INTENDED: dict[str, str] = {}
"""Pattern of results that differ on purpose -> the reason: `{"settings/*/workers": "part of train now"}`."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
SCENES = {"images": 64, "val": 64, "test": 16}
LONGEST, LONGEST_TEXT = 40, 400  # a mapping with more entries, and a longer JSON text, is written as a hash
SHOWN = 12  # differences printed for each part

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
        settings = found("SceneSettings")(**dict(zip(SCENES, counts, strict=True)), difficulty=difficulty, seed=5)
        folder = found("write_scenes")(place.scratch / difficulty, settings, processes=1, progress=False)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            yield f"{difficulty}/{file.relative_to(folder)}", file.read_bytes()


def readers(place: Place) -> Results:
    """Records, splits, texts, ground truth and pixels, as read from generated scenes and from the real sets."""
    sets: dict[str, Mapping[str, Any]] = {"scenes": splits()}
    for task in ("vqa", "nlvr2", "snli-ve"):
        sets[f"scenes, {task}"] = found("load_examples")(finetune_settings(task)).splits
    yield "object maps", [picture.object_map() for picture in splits()["val"]]
    if place.data:
        for name in ("coco_mini", "flickr1k", "nlvr1"):
            sets[name] = found("load_splits")(found("DataSettings")(sets=str(place.data / name)))
        for name, task in (("daquar", "vqa"), ("nlvr1", "nlvr1")):
            sets[f"{name}, {task}"] = found("load_examples")(
                finetune_settings(task, data=str(place.data / name))
            ).splits
    for name, parts in sets.items():
        for split, records in parts.items():
            yield f"{name}/{split}", [record_row(record) for record in records]
            yield f"{name}/{split}, first", [record_row(record) for record in records[:2]]
            images = [image for record in records[:8] for image in getattr(record, "images", None) or (record.image,)]
            yield f"{name}/{split}, pixels", [image.pixels(96) for image in images]
            if records and hasattr(records[0], "denies"):
                pairs = itertools.product(records[:12], [text for one in records[:40] for text in one.captions[:2]])
                yield f"{name}/{split}, truth", [(one.denies(text), one.affirms(text)) for one, text in pairs]
        texts = [text for one in parts["train"] for text in (getattr(one, "captions", None) or (one.text,))]
        yield f"{name}/vocabulary", found("build_vocabulary")(texts)


def model(place: Place) -> Results:
    """The shipped model: its weights, and what it says of 16 held-out pictures."""
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
    yield "match probability", found("match_probability")(shipped, pictures[0], texts)
    yield "fill mask", found("fill_mask")(shipped, pictures[0], "there is a [MASK] ball")
    yield "taken apart", found("take_apart")(shipped, pictures[0], settings)


def held_out(place: Place) -> Results:
    """The held-out evaluation of the shipped model: match decisions and hidden words, with intervals."""
    shipped, settings = load_shipped()
    scored = found("scored_words")(settings.data)
    for name, words in (("colours and shapes", scored), ("any word", None)):
        figures = found("evaluate")(shipped, splits()["val"], settings.data, scored=words, images=64)
        yield name, figures.summary()


def probes(place: Place) -> Results:
    """Inter-Modality Flow, NMI, hidden states and the mask probe, of the shipped model and of two transformers."""
    shipped, settings = load_shipped()
    pictures = splits()["val"]
    for special_tokens in ("language", "exclude"):
        inputs = prepared(pictures[:16], special_tokens=special_tokens)
        sets = {"vision": inputs.vision, "tokens": inputs.tokens, "language": inputs.language}
        options = {"rows": [0, 2], "columns": [1, 20], "per_token": True}
        yield f"flow, {special_tokens}", flow_of(shipped, inputs.forward, sets, **options)
        hidden = found("hidden_states")(shipped, inputs.forward, tokens=inputs.tokens)
        yield f"hidden states, {special_tokens}", hidden
        yield f"NMI, {special_tokens}", found("modality_nmi")(hidden, **sets)
        yield f"principal components, {special_tokens}", tuple(found("modality_pca")(hidden, **sets))
        yield f"gradient-weighted flow, {special_tokens}", found("gradient_weighted_flow")(
            shipped, inputs.forward, inputs.vision, inputs.tokens, lambda joint: shipped.itm(joint.cls)[:, 1].sum(),
            language=inputs.language,
        )  # fmt: skip
    yield "table", found("probe")(shipped, pictures, images=32).means()
    yield "mask shares", found("mask_shares")(shipped, pictures, settings)
    yield "mask errors", found("mask_errors")(shipped, pictures, settings)
    maps, vision = seeded(3, 2, 10, 10).softmax(dim=-1), torch.arange(10) >= 6
    yield "printed formula", found("flow_from_attention")(maps, vision)
    yield "maximum flow", found("max_flow")(maps, queries=[0, 8])
    for name, (foreign, inputs, sets) in {"BERT": random_bert(), "ViLT": random_vilt()}.items():
        yield f"flow, {name}", flow_of(foreign, inputs, sets)
        yield f"NMI, {name}", found("modality_nmi")(found("hidden_states")(foreign, inputs), **sets)


def losses(place: Place) -> Results:
    """Every mask and every objective on seeded random tensors, and the gradients."""
    noise, parsing, codes = seeded(4, 9), seeded(4, 9, 9, seed=1).softmax(dim=-1), (seeded(4, 9, seed=2) * 4).long()
    words = torch.arange(7) < torch.tensor([7, 5, 3, 6])[:, None]
    seen = torch.arange(9) < torch.tensor([9, 9, 4, 6])[:, None]
    for select, real in itertools.product(("row", "column", "symmetric"), (None, seen)):
        name = f"mask, {select}, {'all tokens' if real is None else 'some tokens'}"
        yield name, found("visual_mask")(noise, 4, parsing=parsing, select=select, seen=real)
    yield "mask, random", found("visual_mask")(noise, 4)
    yield "mask, code", (masked := found("code_mask")(noise, codes))
    yield "mask, pixels", found("hide_pixels")((seeded(4, 3, 24, 24) * 255).byte(), masked)
    text, vision = seeded(4, 7, 16, seed=3) - 0.5, seeded(4, 9, 16, seed=4) - 0.5
    cost = found("cosine_cost")(text, vision)
    yield "transport plan", found("transport_plan")(cost, words, seen)
    labels, matched = torch.tensor([3, 0, 5, 1]), torch.tensor([True, False, True, False])
    mlm, itm, distance, mfr, mvm, mean_of = found(
        "masked_language_modeling", "image_text_matching", "transport_distance", "masked_feature_regression",
        "masked_visual_modeling", "token_alignment",
    )  # fmt: skip
    objectives: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
        "MLM": (lambda logits: mlm(logits, labels), seeded(4, 6)),
        "ITM": (lambda logits: itm(logits, matched), seeded(4, 2)),
        "transport distance": (lambda states: distance(states, vision, words, seen).sum(), text),
        "VLA": (lambda states: mean_of(distance(states, vision, words, seen), matched), text),
        "MFR, mean": (lambda states: mfr(states, vision[0]), seeded(9, 16)),
        "MFR, sum": (lambda states: mfr(states, vision[0], reduction="sum"), seeded(9, 16)),
        "MVM": (lambda logits: mvm(logits, codes, masked), seeded(4, 9, 4)),
    }
    for name, (objective, given) in objectives.items():
        value = sum_of(objective(given.requires_grad_()))
        yield name, (value, *torch.autograd.grad(value, given))


def training(place: Place) -> Results:
    """Six steps of pre-training for each visual family: the lines of metrics, and the final weights."""
    pixels = {"mask.where": "pixels", "train.accumulate": 2, "train.probe_every": 2}
    runs = {
        "swin": pretrain_settings(),
        "swin, masks in pixels": pretrain_settings(**pixels),
        "swin, MiniLM, ungrouped": pretrain_settings(init_text="minilm", **{"data.grouped": False}),
        "grid": pretrain_settings(visual="grid"),
        "grid, dictionary": pretrain_settings(visual="grid", **{"visual.dictionary": 64}),
        "patch": pretrain_settings(visual="patch", **{"visual.position": "learned", "visual.sampled": 20}),
        "regions": pretrain_settings(visual="regions", regions=region_files(place)),
    }
    for name, settings in runs.items():
        ready, run = found("prepare")(settings), new_run("01_pretrain", settings)
        found("pretrain")(run, ready, settings)
        yield from trained(name, run, ready.model)


def tasks(place: Place) -> Results:
    """Three steps of fine-tuning for each task, scores and predictions; the metrics on fixed inputs; the baselines."""
    yield from metrics()
    runs = {
        "vqa": finetune_settings("vqa"),
        "nlvr2": finetune_settings("nlvr2"),
        "nlvr2, pair-attention": finetune_settings("nlvr2", pairing="pair-attention"),
        "snli-ve, from scratch": finetune_settings("snli-ve", pretrained=False),
        "retrieval": finetune_settings("retrieval", **{"retrieval.search_images": 16}),
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
        if "," not in name:
            for split, by_name in found("baselines")(ready, settings, most=64).items():
                summaries = {key: one.summary(ready.splits[split]) for key, one in by_name.items()}
                yield f"{name}/baselines, {split}", summaries


def metrics() -> Results:
    """The official metrics."""
    given = ["Two", "2", "a two", "three", "2", "2.", "two dogs", "it's 2", "1,000", "two"]
    normalised, score, targets, most, right, consistent, recall = found(
        "normalised_answer", "vqa_score", "answer_targets", "most_given", "metrics.accuracy", "consistency", "recall_at"
    )
    yield "normalised answers", [normalised(answer) for answer in given]
    yield "VQA score", [score(answer, given) for answer in given]
    yield "VQA targets", (targets(given), most(given))
    yield "accuracy", right(["a", "b", "c"], ["a", "c", "c"])
    truth = {f"dev-{group}-{pair}-{k}": str(k == pair) for group in range(3) for pair in (0, 1) for k in (0, 1)}
    yield "consistency", consistent(truth | {"dev-1-0-1": "True"}, truth)
    yield "recall", recall(seeded(8, 20).numpy().round(1), seeded(8, 20, seed=1).numpy() > 0.7)
    yield "interval", tuple(found("bootstrap_interval")(seeded(20, 3).numpy(), 1))


def visual_init(place: Place) -> Results:
    """Three steps of training a visual side on scene labels; its accuracy; the region features."""
    for family in ("swin", "grid", "patch"):
        changes = {f"scenes.{name}": count for name, count in SCENES.items()} | {
            "train.steps": 3, "train.epochs": 0, "train.images": 16, "train.log_every": 1, "workers": 0,
        }  # fmt: skip
        settings = found("visual_init_settings")(visual=family, overrides=renamed(changes, found("VisualInitSettings")))
        run = new_run("00_visual_init", settings)
        network, accuracies = found("train_visual")(run, settings)
        yield from trained(family, run, network)
        yield f"{family}/accuracy", accuracies
    files = sorted(Path(region_files(place)).rglob("*.npz"))
    yield "regions", [dict(np.load(file)) for file in files[::8]]


def settings(place: Place) -> Results:
    """All values of every preset, and of the parameters of each notebook, key by key."""
    pretrain, finetune, start = found("pretrain_settings", "finetune_settings", "visual_init_settings")
    built = {f"preset {name}": preset for name, preset in found("PRESETS").items()}
    built |= {
        f"task preset {name}, {task}, {part}": values
        for name, tasks in found("TASK_PRESETS").items() for task, parts in tasks.items()
        for part, values in parts.items()
    }  # fmt: skip
    built |= {
        "pretrain": pretrain(),
        "pretrain paper": pretrain(preset="paper-384", epochs=2, seed=3),
        "pretrain grid": pretrain(visual="grid", visual_tokens=64, masking="random"),
        "pretrain dictionary": pretrain(visual="grid", overrides={"visual.dictionary": 2048}),
        "pretrain patch": pretrain(preset="ablation-224", visual="patch", steps=0),
        "pretrain regions": pretrain(visual="regions", visual_tokens=50),
        "pretrain MiniLM": pretrain(preset="small", init_text="minilm", steps=5_000, checkpoint_every=100),
        "visual init": start(),
        "visual init grid": start(preset="small", visual="grid", images=0, epochs=0, visual_tokens=100),
        **{f"finetune {task}": finetune(task=task) for task in ("vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval")},
        "finetune paper": finetune(task="snli-ve", preset="paper", steps=0, pretrained=False, seed=2),
        "probe": found("probe_settings")(data=["flickr", "coco"], special_tokens="exclude", images=10),
        "compare": found("compare_settings")(models=["", "other"]),
        "explore": found("explore_settings")(picture=3, sentence="a ball"),
        "runs": found("runs_settings")(where="seed == 0"),
        "families": found("family_runs_settings")(length=50),
    }
    old_names = {new: old for old, new in RENAMED_SETTINGS.items()}
    for name, one in built.items():
        for key, value in leaves(one.model_dump(mode="json")):
            yield f"{name}/{old_names.get(key, key)}", value


def figures(place: Place) -> Results:
    """Figures of fixed numbers: what is drawn and what is written, apart."""
    image = (seeded(48, 48, 3) * 255).byte().numpy()
    flow, maps = seeded(12, 3, seed=1).numpy(), seeded(16, 16, seed=2).softmax(dim=-1).numpy()
    interval = found("Interval")
    shares = {name: interval(mean, mean - 0.1, mean + 0.05, 50) for name, mean in (("one", 0.6), ("two", 0.3))}
    held_out = found("HeldOut")(*(interval(mean, mean - 0.05, mean + 0.05, 50) for mean in (0.9, 0.5, 0.6, 0.2, 3.0)))
    lines = {"step": np.arange(1, 61) * 20, "mlm": seeded(60, seed=3).numpy(), "itm": seeded(60, seed=4).numpy()}
    table = importlib.import_module("pandas").DataFrame(lines)
    drawn = {
        "flow_curves": ({"a": flow, "b": flow / 2}, {"a": flow, "b": flow / 3}),
        "flow_triangle": (np.triu(seeded(4, 4).numpy()),),
        "flow_directions": (flow, flow / 2),
        "nmi": (flow,),
        "modality_map": (seeded(9, 2).numpy(), np.arange(9) > 4, np.arange(9) < 8),
        "word_attention": (["a", "red", "ball"], seeded(3).numpy()),
        "score_against_flow": ({name: (one, one) for name, one in shares.items()},),
        "pictures": ([image, image], ["one", "two"]),
        "tokens": (image, 4),
        "parsing": (image, maps, [0, 9], 4),
        "masks": (image, {"a": maps[0] > maps[0].mean(), "b": maps[1] > maps[1].mean()}),
        "attention_on_image": (image, maps[0], 4),
        "losses": (table,),
        "run_curves": ({"a": table, "b": table * 2}, "mlm"),
        "held_out": (held_out,),
        "accuracy_bars": (shares,),
        "recall_bars": ({"ours": {"TR R@1": shares["one"], "IR R@1": shares["two"]}},),
    }
    options: dict[str, dict[str, Any]] = {
        "modality_map": {"layer": 1},
        "masks": {"pick": 3, "grid": 4},
        "score_against_flow": {"nulls": {"one": 0.2}, "seeds": {"two": [(0.2, 0.3)]}, "over": "seeds", "score": "VQA"},
    }
    for name, arguments in drawn.items():
        plotly = found(f"figures.{name}")(*arguments, **options.get(name, {})).to_json()
        atoms = list(leaves(json.loads(plotly)))
        words = [isinstance(value, str) and not key.endswith((".bdata", ".source")) for key, value in atoms]
        yield f"{name}, numbers", [atom for atom, is_word in zip(atoms, words, strict=True) if not is_word]
        yield f"{name}, words", [atom for atom, is_word in zip(atoms, words, strict=True) if is_word]


PARTS: dict[str, Callable[[Place], Results]] = {
    part.__name__: part
    for part in (scenes, readers, model, held_out, probes, losses, training, tasks, visual_init, settings, figures)
}


# ------------------------------------------------------------------------- calls that a new version may answer anew


def load_shipped() -> Any:
    """The model that ships with the tree, and the settings that made it."""
    return found("load_run")()


def prepared(pictures: list[Any], **options: Any) -> Any:
    """Pictures with their first captions, as inputs of the shipped model."""
    return load_shipped()[0].prepare(pictures, [picture.captions[0] for picture in pictures], **options)


def flow_of(network: Any, inputs: Any, sets: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Every number that the flow probe gives."""
    flow = found("probes.inter_modality_flow")(network, inputs, **sets, **options)
    names = (
        "flow", "null", "excess", "text_to_vision", "vision_to_text", "per_head", "per_token", "rows", "columns",
        "rows_from_input", "columns_from_input", "boxes", "layers",
    )  # fmt: skip
    return {name: getattr(flow, name) for name in names}


def sum_of(loss: Any) -> Tensor:
    """The sum of a loss, also where a loss is a sum and its count."""
    return getattr(loss, "total", loss)


def pretrain_settings(*, init_text: str = "", visual: str = "swin", regions: str = "", **changes: Any) -> Any:
    """Six steps on few scenes."""
    few = {f"data.scenes.{name}": count for name, count in SCENES.items()}
    few |= {"data.workers": 0, "train.log_every": 2} | changes
    overrides = renamed(few, found("PretrainSettings"))
    return found("pretrain_settings")(visual=visual, init_text=init_text, regions=regions, steps=6, overrides=overrides)


def finetune_settings(task: str, *, data: str = "scenes", pretrained: bool = True, **changes: Any) -> Any:
    """Three steps on few scenes."""
    few = {f"scenes.{name}": count for name, count in SCENES.items()}
    few |= {"workers": 0, "train.log_every": 1, "train.images": 8} | changes
    overrides = renamed(few, found("FinetuneSettings"))
    return found("finetune_settings")(task=task, data=data, pretrained=pretrained, steps=3, overrides=overrides)


def new_run(notebook: str, settings: Any) -> Any:
    """A run folder of these settings."""
    return found("open_run")(notebook, settings)


def trained(name: str, run: Any, network: Any) -> Results:
    """The metrics of a run, times aside, and its final weights."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for key in dict.fromkeys(key for line in lines for key in line if not key.endswith("_s")):
        yield f"{name}/metrics, {key}", [line.get(key) for line in lines]
    yield f"{name}/weights", network.state_dict()


def record_row(record: Any) -> list[Any]:
    """What a record of any data set says, in plain values."""
    images = getattr(record, "images", None) or (record.image,)
    texts = ("id", "split", "captions", "foils", "text", "label", "answers", "answer", "kind", "boxes", "origins")
    return [[image.name for image in images], *(getattr(record, name, None) for name in texts)]


def random_bert() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A small BERT with random weights, whose last tokens count as visual; its inputs, and the sets V and L."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    mask = (torch.arange(12) < torch.tensor([[12], [10]])).long()
    inputs = {"input_ids": (seeded(2, 12) * 90).long(), "attention_mask": mask}
    vision = (torch.arange(12) >= 5) & mask.bool()
    return BertModel(BertConfig(vocab_size=90, **shape)).eval(), inputs, {"vision": vision, "tokens": mask.bool()}


def random_vilt() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A small ViLT with random weights; its inputs, and the sets V and L as `modality_masks` finds them."""
    from transformers import ViltConfig, ViltModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViltConfig(vocab_size=90, **shape, image_size=24, patch_size=8, max_image_length=-1)
    inputs = {
        "input_ids": (seeded(2, 7) * 90).long(), "attention_mask": torch.ones(2, 7).long(),
        "pixel_values": seeded(2, 3, 24, 24), "pixel_mask": torch.ones(2, 24, 24).long(),
    }  # fmt: skip
    network = ViltModel(config).eval()
    masks = found("probes.modality_masks")(network, inputs)
    return network, inputs, {"vision": masks.vision, "tokens": masks.tokens}


@functools.cache
def splits() -> dict[str, list[Any]]:
    """A few generated scenes, read as a captioned set."""
    return found("load_splits")(pretrain_settings().data)


@functools.cache
def region_files(place: Place) -> str:
    """Region features of the same scenes, by a network trained for three steps."""
    few, length = found("SceneSettings")(**SCENES), found("TrainSettings")(steps=3, images=16)
    settings = found("RegionSettings")(scenes=few, train=length, workers=0)
    found("make_regions")(place.scratch / "regions", settings, progress=False)
    return str(place.scratch / "regions")


# ------------------------------------------------------------------------------------ names, numbers, and a record


def found(*names: str) -> Any:
    """What has this name in the tree, wherever it is defined; of several names a list."""
    objects = []
    for name in names:
        known = next((one for one in (RENAMES.get(name, name), name) if modules_of(one)), name)
        if len(modules := modules_of(known)) != 1:
            raise LookupError(f"{name}: defined in {modules or 'no module'}; extend RENAMES in {Path(__file__).name}")
        objects.append(getattr(importlib.import_module(modules[0]), known.rpartition(".")[2]))
    return objects[0] if len(objects) == 1 else objects


def modules_of(name: str) -> list[str]:
    """The modules that define `name`; of `folder.name` those under that folder or file alone."""
    *folders, name = name.split(".")
    return [module for module in defined_names().get(name, []) if set(folders) <= set(module.split("."))]


@functools.cache
def defined_names() -> dict[str, list[str]]:
    """Each top-level name of the tree in the current folder, with the modules that define it.

    The front door and the command line are left out: they repeat the names of others.
    """
    places: dict[str, list[str]] = {}
    for file in sorted(Path(PACKAGE).rglob("*.py")):
        if file in (Path(PACKAGE, "__init__.py"), Path(PACKAGE, "cli.py")):
            continue
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for name in {getattr(target, "name", getattr(target, "id", None)) for target in targets} - {None}:
                places.setdefault(name, []).append(module)
    return places


def renamed(changes: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Changes of settings, under the keys that this tree has."""
    known = set(setting_keys(kind))
    return {new if (new := RENAMED_SETTINGS.get(key)) in known else key: value for key, value in changes.items()}


def setting_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a class of settings."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from setting_keys(field.annotation, f"{prefix}{name}.")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Plain values by dotted path, out of nested dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from leaves(part, f"{prefix}.{key}" if prefix else str(key))
    if not parts:
        yield prefix, value


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers, float32."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def plain(value: Any) -> Any:
    """A value as JSON: arrays as type, shape, mean and a hash of their bytes; tuples of any class as lists."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim and value.dtype != object:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
        return f"{value.dtype} {value.shape} mean {float(np.nanmean(value)) if value.size else 0!r} sha {digest}"
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return f"{len(value)} bytes sha {hashlib.sha256(value).hexdigest()[:16]}"
    if hasattr(value, "to_dict"):  # a table of pandas
        value = value.to_dict("list")
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__}: no plain value; record its parts")


def entries_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is written of a result: each value of a short mapping apart, what is long as a hash."""
    if isinstance(value, Mapping) and len(value) <= LONGEST:
        for key, part in value.items():
            yield from entries_of(f"{name}/{key}", part)
        return
    value = plain(value)
    text = json.dumps(value)
    if len(text) > LONGEST_TEXT:
        value = f"{len(value)} entries sha {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    yield name, value


def record(tree: Path, file: Path, data: Path | None, names: list[str]) -> None:
    """Run parts in this process, whose current folder and PYTHONPATH are the tree, and write what they found."""
    package = importlib.import_module(PACKAGE)
    if not Path(package.__file__).resolve().is_relative_to(tree):
        raise ImportError(f"{PACKAGE} was imported from {package.__file__}, not from {tree}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        os.environ |= {"VPW_RUNS": f"{scratch}/runs", "VPW_CACHE": f"{scratch}/cache"}
        for name in names:
            started, entries, error = time.perf_counter(), {}, ""
            try:
                for key, value in PARTS[name](Place(Path(scratch), data)):
                    entries |= dict(entries_of(key, value))
            except Exception:
                error = traceback.format_exc()
            parts[name] = {"entries": entries, "error": error, "seconds": time.perf_counter() - started}
    file.write_text(json.dumps(parts, indent=1))


def recorded(tree: Path, data: Path | None, names: list[str]) -> dict[str, Any]:
    """The parts of a tree, run in a process of its own; or of a record that was made before."""
    if tree.is_file():
        return json.loads(tree.read_text())
    if not (tree / PACKAGE).is_dir():
        raise SystemExit(f"{tree}: no checkout (no folder {PACKAGE}) and no record")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "record.json")
        command = [sys.executable, __file__, "--record", str(tree), str(file), "--only", ",".join(names)]
        command += ["--data", str(data)] if data else []
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)
        return json.loads(file.read_text())


# ------------------------------------------------------------------------------------------------- the comparison


def report(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> bool:
    """Print each part and what differs in it; whether all is equal, but for what is intended."""
    nothing, good = {"entries": {}, "error": "", "seconds": 0.0}, True
    for name in names:
        sides = [side.get(name, nothing) for side in (old, new)]
        before, after = (side["entries"] for side in sides)
        states = {key: state_of(f"{name}/{key}", before, after, key) for key in before | after}
        counts = Counter(states.values())
        failed = any(side["error"] for side in sides) or not states
        good &= not (failed or counts["differs"] or counts["missing"])
        told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "nothing compared"
        seconds = " / ".join(f"{side['seconds']:.0f}" for side in sides)
        print(f"{name:12} {'FAILED, ' * failed}{told}  ({seconds} s)")
        for tree, side in zip(("old", "new"), sides, strict=True):
            if side["error"]:
                print(f"    {tree} tree failed: " + side["error"].strip().replace("\n", "\n    "))
        told_apart = [(key, state) for key, state in states.items() if state != "equal"]
        for key, state in told_apart[:SHOWN]:
            print(f"    {state:8} {key}: {before.get(key)!r:.100} -> {after.get(key)!r:.100}")
        if len(told_apart) > SHOWN:
            print(f"    and {len(told_apart) - SHOWN} more")
    return good


STATES = ("equal", "differs", "missing", "added", "intended")


def state_of(name: str, before: dict[str, Any], after: dict[str, Any], key: str) -> str:
    """How a result of both trees compares: one of STATES. One that only the new tree has fails nothing."""
    if key in before and key in after and json.dumps(before[key]) == json.dumps(after[key]):
        return "equal"
    if any(fnmatch(name, pattern) for pattern in INTENDED):
        return "intended"
    return "added" if key not in before else "missing" if key not in after else "differs"


def main() -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout, or a record made before")
    parser.add_argument("new", type=Path, help="a checkout; with --record the file to write")
    parser.add_argument("--record", action="store_true", help="run the first tree alone and write its results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas: %(default)s")
    parser.add_argument("--data", type=Path, help="folder of coco_mini, flickr1k, nlvr1 and daquar; else left out")
    given = parser.parse_args()
    names, data = given.only.split(","), given.data and given.data.resolve()
    if unknown := set(names) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    old, new = given.old.resolve(), given.new.resolve()
    if given.record and Path.cwd() == old:
        record(old, new, data, names)
        return 0
    if given.record:
        new.write_text(json.dumps(recorded(old, data, names), indent=1))
        return 0
    good = report(recorded(old, data, names), recorded(new, data, names), names)
    print("all equal" if good else "NOT equal")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
