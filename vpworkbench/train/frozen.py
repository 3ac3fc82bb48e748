"""Tokens of a frozen visual side (`visual.frozen`), computed once for a set instead of at every step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import ImageCache, Pixels, VisualInput
from vpworkbench.model.visual import pack
from vpworkbench.model.weights import digest
from vpworkbench.runs import Run
from vpworkbench.train.checkpoints import is_trained


def token_inputs(
    visual: nn.Module, images: Sequence[ImageFile], run: Run, device: torch.device, *, flip: bool
) -> VisualInput:
    """Packed tokens of image files by a visual side, with `flip` of mirrored ones too, kept in the run's folder.

    Other weights or images make another cache. A run that is trained already reads nothing more, so for it nothing is
    computed.
    """
    pixels = Pixels(visual.settings.image_px)
    if is_trained(run.folder):
        return pixels
    visual = visual.to(device).eval()

    @torch.no_grad()
    def encode(files: Sequence[ImageFile], mirrored: np.ndarray) -> Tensor:
        return pack(visual(pixels.stack(files, mirrored).to(device))).cpu()

    key = digest(visual, visual.settings.model_dump_json())
    options = {"both_ways": flip, "what": "encoding images", "progress": run.progress}
    return ImageCache(run.folder, images, encode, key, **options)


def forget_tokens(run: Run) -> None:
    """Delete the tokens of a run that is trained; its processes may all do so at once."""
    for path in run.folder.glob("images-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
