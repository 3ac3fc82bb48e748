"""Read-outs: one number for each example from a model's outputs, for probes that change a pass and read the effect.

A read-out is any function from the outputs of the model's forward to a tensor (example,). Those here are larger where
the model does better at one thing that it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ReadOut = Callable[[Any], Tensor]
"""From the outputs of a model's forward to one number for each example, (example,)."""

NOT_SCORED = -100
"""Label of a token that does not count, as in transformers."""


def read(readout: ReadOut, outputs: Any, examples: int) -> Tensor:
    """The numbers of a read-out, float64 (example,) on the CPU; a ValueError unless there is a finite one for each."""
    values = readout(outputs)
    if not torch.is_tensor(values) or values.shape != (examples,):
        found = f"a tensor {tuple(values.shape)}" if torch.is_tensor(values) else type(values).__name__
        raise ValueError(
            f"the read-out gives {found}; it must give one number for each example, a tensor ({examples},)"
        )
    values = values.detach().cpu().double()
    broken = (~values.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the read-out is nan or infinite in examples {broken}; it must be finite")
    return values


def match_log_odds(model: nn.Module) -> ReadOut:
    """ITM of our model: log odds that the text is true of the image; 0 is undecided."""

    def log_odds(joint: Any) -> Tensor:
        unmatched, matched = model.itm(joint.cls).unbind(dim=-1)
        return matched - unmatched

    return log_odds


def masked_word(model: nn.Module, forward: Mapping[str, Tensor], words: Sequence[str]) -> ReadOut:
    """MLM of our model: log probability of `words[i]` at the first [MASK] of text i.

    `forward` are the keyword arguments of the model's forward. A ValueError for a text without [MASK], and for a word
    that is not one token of the vocabulary.
    """
    is_mask = forward["words"].cpu() == model.tokenizer.mask_token_id
    without = (~is_mask.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"texts {without} have no [MASK]; replace the word by [MASK]")
    rows, places = torch.arange(len(is_mask)), is_mask.int().argmax(dim=1)
    ids = _numbers(words, model.tokenizer.get_vocab(), "words of the vocabulary", len(is_mask))
    return lambda joint: _log_softmax(model.word_logits(joint.text[rows, places]))[rows, ids]


def task_answer(task_model: nn.Module, answers: Sequence[str]) -> ReadOut:
    """Log probability that a fine-tuned model gives `answers[i]` to text i, e.g. the right answers of VQA.

    It reads the outputs of the pre-trained model inside, `task_model.base`: that is the model to probe. A ValueError
    for an answer that the model does not know, and for a task with two images.
    """
    if task_model.task.images != 1:
        raise ValueError(f"{task_model.task.name} answers from two passes of the model, and a read-out sees only one")
    labels = {label: number for number, label in enumerate(task_model.labels)}
    ids = _numbers(answers, labels, "answers of this model", len(answers))

    def log_probability(joint: Any) -> Tensor:
        logits = task_model.read([joint]).cpu().double()
        return task_model.task.probabilities(logits)[torch.arange(len(ids)), ids].log()

    return log_probability


def next_tokens(labels: Tensor) -> ReadOut:
    """Log probability of given tokens of a decoder, teacher forced; summed over the tokens of an example.

    Parameters
    ----------
    labels : LongTensor, shape (example, token)
        `input_ids` where a token counts, e.g. at the answer, and -100 elsewhere. The token before each predicts it.
    """
    scored = labels[:, 1:].cpu() != NOT_SCORED
    without = (~scored.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"examples {without} have no token to score: their labels are all {NOT_SCORED}")
    rows, places = scored.nonzero().unbind(dim=1)
    ids = labels[:, 1:].cpu()[scored]

    def log_probability(outputs: Any) -> Tensor:
        if outputs.logits.shape[:2] != labels.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)}, but the model gives logits of {tuple(outputs.logits.shape[:2])} "
                "tokens: both must cover the same sequence"
            )
        each = _log_softmax(outputs.logits[rows, places])[torch.arange(len(ids)), ids]
        return each.new_zeros(len(labels)).index_add(0, rows, each)

    return log_probability


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.cpu().double().log_softmax(dim=-1)


def _numbers(names: Sequence[str], numbers: Mapping[str, int], what: str, examples: int) -> Tensor:
    """The number of each name, int64 (example,)."""
    if len(names) != examples:
        raise ValueError(f"{len(names)} {what} for {examples} examples: give one for each")
    unknown = sorted(set(names) - set(numbers))
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))}: not among the {what}")
    return torch.tensor([numbers[name] for name in names])
