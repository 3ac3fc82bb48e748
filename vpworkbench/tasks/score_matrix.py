"""Every image scored with every caption: the matrix from which retrieval is read.

Visual tokens are computed once and kept, captions of one length share a batch, and pairs pass the fusion in large
batches. A stopped matrix continues where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vpworkbench.data.inputs import Progress, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.model.words import Words
from vpworkbench.system import write_atomically
from vpworkbench.tasks.task import TaskModel

IMAGES_AT_ONCE = 32
FEWEST_TEXTS, MOST_TEXTS = 16, 64  # captions of one length in a batch

TextBatch = tuple[Tensor, Tensor, Tensor]
"""Columns of the matrix, int64 (text,); token ids, int64 (text, word); real tokens, bool (text, word)."""


@torch.no_grad()
def score_matrix(
    model: TaskModel,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    *,
    pairs: int = 512,
    bf16: bool = False,
    file: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Match score of every image with every caption, float32 (image, caption): logit of match minus logit of no match.

    Parameters
    ----------
    pairs : int
        Pairs in one pass of the fusion, approximately.
    bf16 : bool
        bfloat16 autocast, on a GPU only: scores then agree to two or three digits.
    file : Path or None
        `.npy` that keeps finished rows (nan elsewhere), so that a stopped call can continue. The `.json` beside it
        identifies the weights, images and captions.

    Raises
    ------
    ValueError
        If the file holds the scores of other weights, images or captions, or for bf16 on a CPU.
    """
    device = model.base.device
    if bf16 and device.type != "cuda":
        raise ValueError("bf16 scores need a GPU; leave it off on a CPU")
    model.eval()
    scores = _open_scores(file, model, pictures, captions)
    missing = [row for row in range(len(pictures)) if np.isnan(scores[row]).any()]
    batches = [tuple(part.to(device) for part in batch) for batch in _batches_by_length(model.base.words, captions)]
    starts = tqdm(range(0, len(missing), IMAGES_AT_ONCE), desc="scoring", unit=f"{IMAGES_AT_ONCE} images")
    with torch.autocast("cuda", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
        for start in starts:
            rows = missing[start : start + IMAGES_AT_ONCE]
            scores[rows] = _score_rows(model, [pictures[row] for row in rows], batches, pairs).cpu().numpy()
            if isinstance(scores, np.memmap):
                scores.flush()
            if progress:
                progress("scoring images", len(pictures) - len(missing) + start + len(rows), len(pictures))
    return np.array(scores)


def _score_rows(model: TaskModel, pictures: Sequence[Picture], batches: Sequence[TextBatch], pairs: int) -> Tensor:
    """Rows of the matrix for some images, which are encoded once; float32 (image, caption)."""
    pixels = visual_input(model.base.settings.visual).stack(pictures).to(model.base.device)
    visual = model.base.visual(pixels)
    vision, vision_tokens = model.base.fusion.embed_vision(visual), visual.not_padding()
    captions = sum(len(columns) for columns, _, _ in batches)
    scores = vision.new_empty(len(pictures), captions, dtype=torch.float32)
    for columns, words, word_tokens in batches:
        for some in torch.arange(len(pictures), device=pixels.device).split(max(1, pairs // len(words))):
            texts = [part.repeat(len(some), 1) for part in (words, word_tokens)]
            images = [part[some].repeat_interleave(len(words), dim=0) for part in (vision, vision_tokens)]
            logits = model.head(model.base.fusion.cls_output(*texts, *images)).float()
            scores[some[:, None], columns] = (logits[:, 1] - logits[:, 0]).view(len(some), len(words))
    return scores


def _batches_by_length(words: Words, captions: Sequence[str]) -> Iterator[TextBatch]:
    """Captions of one length together. Rare lengths share a batch, padded."""
    lengths = [len(words.ids(caption)) for caption in captions]
    order = sorted(range(len(captions)), key=lengths.__getitem__)
    batch: list[int] = []
    for place, following in zip(order, [*order[1:], None], strict=True):
        batch.append(place)
        last_of_length = following is None or lengths[following] > lengths[place]
        if following is None or len(batch) == MOST_TEXTS or (last_of_length and len(batch) >= FEWEST_TEXTS):
            yield torch.tensor(batch), *words.tensors([captions[place] for place in batch])
            batch = []


def _open_scores(
    file: Path | None, model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str]
) -> np.ndarray:
    """The scores that the file holds, else nan everywhere."""
    shape = len(pictures), len(captions)
    if file is None:
        return np.full(shape, np.nan, dtype=np.float32)
    identity_file, identity = file.with_suffix(".json"), _identity(model, pictures, captions)
    if file.exists() and identity_file.exists():
        if json.loads(identity_file.read_text()) != identity:
            raise ValueError(f"{file}: scores of other weights, images or captions; delete it, or take another file")
        return np.load(file, mmap_mode="r+")
    scores = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    scores[:] = np.nan
    write_atomically(identity_file, json.dumps(identity) + "\n")
    return scores


def _identity(model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str]) -> str:
    """A hash of all that the scores depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(json.dumps([[picture.image.name for picture in pictures], list(captions)]).encode())
    return digest.hexdigest()
