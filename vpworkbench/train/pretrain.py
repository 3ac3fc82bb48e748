"""Pre-training (paper Sec. 3.3 and 4.1): a run's data and model, and its training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import BertTokenizerFast

from vpworkbench.data.files import Skipped, skipping_missing, write_skipped
from vpworkbench.data.inputs import pixel_cache, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.scene_cache import cache_root
from vpworkbench.data.splits import check_sizes, load_splits
from vpworkbench.guides import mask_guide
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import KeyReport, start_text, start_visual
from vpworkbench.model.words import build_tokenizer, build_vocabulary, wordpiece_tokenizer
from vpworkbench.runs import Run
from vpworkbench.settings import ModelSettings, PretrainSettings
from vpworkbench.train.checkpoints import is_trained
from vpworkbench.train.engine import fit, pick_device
from vpworkbench.train.evaluate import held_out_probe
from vpworkbench.train.frozen import forget_tokens, token_inputs
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.processes import launch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """The data and the model of a run, ready for training."""

    splits: dict[str, list[Picture]]
    model: VisualParsingModel
    reports: list[KeyReport]
    skipped: list[Skipped]  # records without a readable image


def prepare(settings: PretrainSettings) -> PreparedRun:
    """Read the data, build the tokenizer and the model; whatever is wrong with the settings or files shows here."""
    build_visual(settings.visual)  # an unknown backbone is reported before scenes are drawn
    inputs = visual_input(settings.visual)  # and so is a missing folder
    with skipping_missing(settings.data.missing, settings.data.missing_most) as skipped:
        splits = load_splits(settings.data)
    check_sizes(splits, ", ".join(settings.data.sets))
    inputs.check([picture.image for part in splits.values() for picture in part])
    mask_guide(settings, splits["train"])  # and so is a source of masks that cannot rank
    texts = [text for picture in splits["train"] for text in picture.captions + picture.foils]
    tokenizer = build_tokenizer(texts, settings.init_text)
    model, reports = build_model(settings, tokenizer)
    model.words.check(texts, source=", ".join(settings.data.sets))
    return PreparedRun(splits, model, reports, skipped)


def pretrain(run: Run, prepared: PreparedRun, settings: PretrainSettings) -> int:
    """Train to the end, from the run's last checkpoint if there is one; returns the optimiser steps of the whole run.

    With several `train.processes` it starts them, waits, and loads the weights that they trained.
    """
    train, training, model = settings.train, prepared.splits["train"], prepared.model
    write_skipped(prepared.skipped, run.folder)
    launch(train.processes, run.folder)
    images, inputs = [picture.image for picture in training], visual_input(settings.visual)
    held_out, device = prepared.splits["val"], pick_device(train.device)
    if settings.visual.frozen:
        inputs = token_inputs(model.visual, images, run, device, flip=settings.data.flip)
    elif settings.data.cache:
        inputs = pixel_cache(cache_root(), images, settings.visual.image_px, progress=run.progress)
    kept = None if is_trained(run.folder) else run  # a finished run needs no scores
    guide = mask_guide(settings, training, kept, device=device)
    sizes = {"images": train.images, "seed": settings.seed, "inputs": inputs, "guide": guide}
    batches = group_batches(training, model, settings.data, **sizes)
    held_out_guide = mask_guide(settings, held_out, device=device)
    probe = partial(held_out_probe, pictures=held_out, settings=settings, guide=held_out_guide)
    options = {"optim": settings.optim, "train": train, "seed": settings.seed, "workers": settings.data.workers}
    steps = fit(model, Pretraining(settings, probe), batches, run, **options, what="pre-training")
    forget_tokens(run)
    return steps


def with_words_of(model: VisualParsingModel, texts: Iterable[str]) -> VisualParsingModel:
    """The model, its vocabulary extended by the words of `texts`, such as the questions of a task.

    Their embeddings are drawn at random; all other weights are kept.
    """
    known = model.tokenizer.get_vocab()
    added = [entry for entry in build_vocabulary(texts) if entry not in known]
    if not added:
        return model
    vocabulary = known | {entry: len(known) + number for number, entry in enumerate(added)}
    grown = VisualParsingModel(model.settings, wordpiece_tokenizer(vocabulary))
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        else:
            state[name][: len(known)] = tensor  # the word embedding and the bias over words
    grown.load_state_dict(state)
    return grown.to(model.device).eval()


def build_model(settings: PretrainSettings, tokenizer: BertTokenizerFast) -> tuple[VisualParsingModel, list[KeyReport]]:
    """The seeded model of a run, started from `init_visual` and `init_text`; a report for each file of weights."""
    if not (settings.init_visual or settings.visual.frozen) and settings.optim.lr_visual < 5e-5:
        log.warning(
            "the visual side starts from scratch with optim.lr_visual %g and will hardly learn: set init_visual (the "
            "paper starts from ImageNet), or a rate of about 2e-4",
            settings.optim.lr_visual,
        )
    torch.manual_seed(settings.seed)
    shape = ModelSettings(visual=settings.visual, fusion=settings.fusion, text_tokens=settings.data.text_tokens)
    model = VisualParsingModel(shape, tokenizer)
    reports = (
        start_visual(model.visual, settings.init_visual, preset=settings.preset),
        start_text(model.fusion, settings.init_text),
    )
    return model, [report for report in reports if report]
