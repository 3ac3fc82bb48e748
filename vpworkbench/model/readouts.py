"""Answers of the heads: does a text match its image, and which word is hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from vpworkbench.model.model import Inputs, VisualParsingModel


@torch.no_grad()
def match_probability(model: VisualParsingModel, inputs: Inputs) -> Tensor:
    """ITM: probability that each text is true of its image; (text,) on the CPU."""
    return torch.softmax(model.itm(model(**inputs.forward).cls), dim=-1)[:, 1].cpu()


@torch.no_grad()
def fill_mask(model: VisualParsingModel, inputs: Inputs) -> list[tuple[str, float]]:
    """MLM: the five most probable words for the first [MASK] of the first text, with their probabilities."""
    masked = (inputs.forward["words"][0] == model.tokenizer.mask_token_id).nonzero()
    if not len(masked):
        raise ValueError("the text has no [MASK]; replace a word by [MASK]")
    logits = model.word_logits(model(**inputs.forward).text[0, masked[0, 0]])
    best = torch.softmax(logits, dim=-1).topk(5)
    words = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    return list(zip(words, best.values.tolist(), strict=True))
