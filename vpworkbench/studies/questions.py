"""What a model is asked about pictures, for the effects of blocking attention: matches, and hidden words.

`match` is the log odds of the right ITM decision. Each text is asked twice, of its own picture and of one that denies
it: a model that does not see the pictures is right in half of the cases. `word` is the log probability of one colour or
shape word: masked in our models, the next word of a decoder. `answer` is the log probability of the right answer of a
fine-tuned model to a question of its own task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Example as TaskExample
from vpworkbench.data.records import Picture
from vpworkbench.model.model import Inputs
from vpworkbench.probes.readouts import NOT_SCORED, ReadOut, masked_word, match_log_odds, next_tokens, task_answer
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.subjects import Subject
from vpworkbench.tasks.task import right_answer

READ_OUTS = {
    "match": "log odds of the right decision",
    "word": "log probability of the right word",
    "answer": "log probability of the right answer",
}
PER_TEXT = {"match": 2, "word": 1, "answer": 1}  # examples in a row that share a text


class Example(NamedTuple):
    """One text that is asked of one picture."""

    picture: Picture | ImageFile
    other: Picture | ImageFile  # for the control
    text: str
    word: str = ""  # that is hidden, or predicted
    is_true: bool = True
    answer: str = ""  # that is right, of a fine-tuned model's task


class Question(NamedTuple):
    """Some examples as a model takes them."""

    inputs: Inputs
    readout: ReadOut
    places: Tensor  # tokens that the head reads, bool (example, token)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `knock_out` besides the model."""
        sets = {"vision": self.inputs.vision, "tokens": self.inputs.tokens, "language": self.inputs.language}
        return {"inputs": self.inputs.forward, "readout": self.readout, **sets}


def known(subject: Subject) -> tuple[str, ...]:
    """The read-outs of a model. Encoders of transformers are opened without heads, and have none.

    A fine-tuned model keeps the heads of its pre-training; the read-out before blocking says whether they still work.
    """
    if subject.base is None:
        return ("word",) if subject.answers else ()
    return ("match", "word", "answer") if subject.has_questions else ("match", "word")


def batches(subject: Subject, pictures: Sequence[Picture], what: str) -> list[list[Example]]:
    """`examples` in batches that the model takes."""
    asked = examples(subject, pictures, what)
    return [asked[start : start + subject.batch] for start in range(0, len(asked), subject.batch)]


def examples(subject: Subject, pictures: Sequence[Picture], what: str) -> list[Example]:
    """What is asked of each picture with its first caption; none of a picture that no other picture denies.

    For `answer`, as many questions of the validation split of the model's own task, each about another picture.
    """
    if what == "answer":
        return _of_its_task(subject, len(pictures))
    chosen, found = [picture for picture in pictures if picture.captions], []
    for number, picture in enumerate(chosen):
        text, following = picture.captions[0], chosen[number + 1 :] + chosen[:number]
        other = next((one for one in following if one.denies(text)), None)
        if other is None:
            continue
        if what == "match":
            found += [Example(picture, other, text), Example(other, picture, text, is_true=False)]
        elif word := _hidden(subject, text, number):
            found.append(Example(picture, other, text, word))
    return found


def _of_its_task(subject: Subject, count: int) -> list[Example]:
    """Questions with an answer that the model knows. Pictures take turns with their first, second, ... question."""
    splits, _ = subject.task_model.task.load(subject.task_settings)
    by_picture: dict[ImageFile, list[TaskExample]] = {}
    for one in splits["val"]:
        if right_answer(one) in subject.task_model.labels:
            by_picture.setdefault(one.images[0], []).append(one)
    chosen = [own[number % len(own)] for number, own in enumerate(by_picture.values())][:count]
    pictures = [one.images[0] for one in chosen]
    others = pictures[1:] + pictures[:1]
    return [
        Example(picture, other, one.text, answer=right_answer(one))
        for picture, other, one in zip(pictures, others, chosen, strict=True)
    ]


def ask(subject: Subject, some: Sequence[Example]) -> Question:
    """Examples of one kind as inputs and a read-out."""
    pictures, texts, words = [one.picture for one in some], [one.text for one in some], [one.word for one in some]
    if not words[0]:
        inputs = subject.prepare(pictures, texts)
        first = torch.arange(inputs.tokens.shape[1]) == inputs.language.int().argmax(dim=1).cpu()[:, None]
        if not some[0].answer:
            return Question(inputs, _right_decision(subject, some), first.to(inputs.tokens.device))
        readout = task_answer(subject.task_model, [one.answer for one in some])
        reads_all = subject.task_model.pool == "words"
        return Question(inputs, readout, inputs.language if reads_all else first.to(inputs.tokens.device))
    if subject.base is None:
        return _next_word(subject, pictures, texts, words)
    hidden = [_replaced(text, word, "[MASK]") for text, word in zip(texts, words, strict=True)]
    inputs = subject.prepare(pictures, hidden)
    places = torch.zeros_like(inputs.tokens)
    ids = inputs.forward["words"]
    places[:, : ids.shape[1]] = ids == subject.base.tokenizer.mask_token_id
    return Question(inputs, masked_word(subject.base, inputs.forward, words), places)


def _right_decision(subject: Subject, some: Sequence[Example]) -> ReadOut:
    """Log odds of the right ITM decision."""
    log_odds, sign = match_log_odds(subject.base), torch.tensor([1.0 if one.is_true else -1.0 for one in some])
    return lambda joint: log_odds(joint).cpu() * sign


def _next_word(subject: Subject, pictures: list[Picture], texts: list[str], words: list[str]) -> Question:
    """The word's tokens, teacher forced: those that change if another word replaces it."""
    inputs = subject.prepare(pictures, texts)
    changed = [_replaced(text, word, "xylophone") for text, word in zip(texts, words, strict=True)]
    others = subject.prepare(pictures, changed)
    labels = torch.full_like(inputs.forward["input_ids"], NOT_SCORED)
    for row, (tokens, other_tokens) in enumerate(zip(inputs.tokens, others.tokens, strict=True)):
        ids = inputs.forward["input_ids"][row, tokens].tolist()
        other = others.forward["input_ids"][row, other_tokens].tolist()
        start, stop = _alike(ids, other), len(ids) - _alike(ids[::-1], other[::-1])
        at = tokens.nonzero()[start : max(stop, start + 1), 0]
        labels[row, at] = inputs.forward["input_ids"][row, at]
    return Question(inputs, next_tokens(labels), (labels != NOT_SCORED).roll(-1, dims=1))


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next((place for place, (a, b) in enumerate(zip_longest(one, other)) if a != b), len(one))


def _hidden(subject: Subject, text: str, number: int) -> str:
    """A colour or shape word of the text, else its last word; empty if our model has no token for one."""
    words = [word.strip(".,") for word in text.lower().split()]
    if subject.base is not None:
        tokens = subject.base.tokenizer.convert_ids_to_tokens(subject.base.words.ids(text))  # cut where it is too long
        words = [word for word in words if word in tokens]
    attributes = [word for word in words if word in ATTRIBUTE_WORDS] or words[-1:]
    return attributes[number % len(attributes)] if attributes else ""


def _replaced(text: str, word: str, by: str) -> str:
    """The text with the first occurrence of a word replaced."""
    return re.sub(rf"\b{re.escape(word)}\b", by, text, count=1, flags=re.IGNORECASE)
