"""Images and texts in one space, each pooled by itself: their cosine, and the contrastive loss that shapes it.

A dual encoder is made of it; and retrieval by the fusion can start from it (align before fuse, Li et al. 2021).
"""

from __future__ import annotations

from math import log
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Module):
    """A linear layer for each side into one space, and the scale of the cosines there.

    Parameters
    ----------
    vision_width, text_width, width : int
        Channels of pooled images, of pooled texts, and of the common space.
    dropout : float
        Of the features, in training.
    """

    def __init__(self, vision_width: int, text_width: int, width: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(vision_width, width), nn.Linear(text_width, width)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.05)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines in [-1, 1], (image, text), of pooled features (image, c) and (text, d)."""
        seen = functional.normalize(self.image(self.dropout(images)).float(), dim=-1)
        said = functional.normalize(self.text(self.dropout(texts)).float(), dim=-1)
        return seen @ said.T

    @property
    def scale(self) -> Tensor:
        """1 / temperature, at most 100."""
        return self.log_scale.exp().clamp(max=100)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`."""
        save_weights(self, folder)


def mean_of_words(states: Tensor, word_tokens: Tensor) -> Tensor:
    """Mean over real places; states (text, word, d), word_tokens bool (text, word) -> (text, d)."""
    weights = word_tokens[..., None].to(states)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def symmetric_contrastive(cosine: Tensor, scale: Tensor, negative: Tensor) -> Tensor:
    """InfoNCE in both directions: cross entropy of the own text among all texts, and of the own image; summed.

    Parameters
    ----------
    cosine : Tensor, (pair, pair)
        Of image and text; a pair's own on the diagonal.
    scale : Tensor, ()
        1 / temperature.
    negative : bool Tensor, (pair, pair)
        Which texts may count against an image; the diagonal does not matter.
    """
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    logits = (scale * cosine).masked_fill(~(negative | own), -torch.inf)
    target = torch.arange(len(cosine), device=cosine.device)
    both = functional.cross_entropy(logits, target, reduction="sum")
    return (both + functional.cross_entropy(logits.T, target, reduction="sum")) / 2


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write `model.safetensors` of any module."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder) / "model.safetensors")
