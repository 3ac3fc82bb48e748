"""Answers of the heads: does a text match its image, which word is hidden, and what is seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.model.visual import VisualTokens


@torch.no_grad()
def match_probability(model: VisualParsingModel, inputs: Inputs) -> Tensor:
    """ITM: probability that each text is true of its image; (text,) on the CPU."""
    return torch.softmax(model.itm(model(**inputs.forward).cls).float(), dim=-1)[:, 1].cpu()


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


class Caption(NamedTuple):
    """A text, and the mean log probability of its words and of its end."""

    text: str
    score: float


@torch.no_grad()
def write_captions(model: VisualParsingModel, images: Tensor, *, beams: int = 1) -> list[Caption]:
    """A caption of each image, greedy or by beam search; `images` as `VisualParsingModel.encode` takes them.

    The model was pre-trained with `loss.seq2seq` and `data.mask_end` (Unified VLP). The next word is what it predicts
    for a [MASK] after the words so far, under `seq2seq_mask`; [SEP] ends a caption, and so does the longest text of the
    model. The finished beam with the best score is returned. A ValueError for two streams: they have no `seq2seq_mask`.
    """
    if model.settings.fusion.kind == "two-stream":
        raise ValueError("a model of two streams cannot write captions: train one stream with loss.seq2seq")
    if beams < 1:
        raise ValueError(f"beams={beams}: give at least 1, which is greedy")
    visual = model.eval().encode(images)
    return [_search(model, visual, image, beams) for image in range(len(images))]


def _search(model: VisualParsingModel, visual: VisualTokens, image: int, beams: int) -> Caption:
    tokenizer, device = model.tokenizer, model.device
    end, never = tokenizer.sep_token_id, [one for one in tokenizer.all_special_ids if one != tokenizer.sep_token_id]
    open_ones, finished = [(0.0, [tokenizer.cls_token_id])], []
    for length in range(1, model.settings.text_tokens):
        words = torch.tensor([ids + [tokenizer.mask_token_id] for _, ids in open_ones], device=device)
        every = words.new_ones(len(words), dtype=torch.bool)
        index = torch.full((len(words),), image, device=device)
        tokens = torch.ones_like(words, dtype=torch.bool)
        joint = model.fuse(visual, words, tokens, image_index=index, causal=every)
        logits = model.word_logits(joint.text[:, -1]).float()
        logits[:, never] = -torch.inf
        totals = logits.log_softmax(dim=-1) + logits.new_tensor([total for total, _ in open_ones])[:, None]
        best = totals.flatten().topk(min(2 * beams, totals.numel()))
        places = (divmod(place, totals.shape[1]) for place in best.indices.tolist())
        texts = [open_ones[row][1] + [word] for row, word in places]
        grown = list(zip(best.values.tolist(), texts, strict=True))
        finished += [(value / length, ids) for value, ids in grown[:beams] if ids[-1] == end]
        open_ones = [one for one in grown if one[1][-1] != end][:beams]
        if len(finished) >= beams:
            break
    score, ids = max(finished or [(value / length, ids) for value, ids in open_ones])
    return Caption(tokenizer.decode(ids, skip_special_tokens=True), score)
