"""Inputs for patching, from minimal pairs: two runs of a model, and the groups of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vpworkbench.data.minimal_pairs import PicturePair
from vpworkbench.model.model import Inputs
from vpworkbench.probes import hidden_states, modality_masks, objects_of_boxes
from vpworkbench.subjects import Subject


class PatchInputs(NamedTuple):
    """Arguments of `patch`: what the forward of either run takes, and the groups of tokens."""

    clean: dict[str, Any]
    corrupt: dict[str, Any]
    groups: dict[str, Tensor]  # bool (example, token); together all real tokens


@torch.no_grad()
def patch_inputs(
    subject: Subject, pairs: Sequence[PicturePair], *, corrupt: Literal["image", "text"] = "image"
) -> PatchInputs:
    """The first picture of each pair with its caption, and the same with the picture, or the caption, of the second.

    The groups are the image tokens on the thing that differs, as it is in either picture; other image tokens; the word
    that differs; other words; and [CLS], where the model has one. A ValueError if the tokens of the two runs do not
    correspond, because the tokenizer splits the two words into different numbers of tokens.
    """
    firsts, seconds = zip(*(pair.pictures for pair in pairs), strict=True)
    texts, other_texts = (list(side) for side in zip(*(pair.texts for pair in pairs), strict=True))
    clean = subject.prepare(firsts, texts)
    changed = {"image": subject.prepare(seconds, texts), "text": subject.prepare(firsts, other_texts)}
    for what, other in changed.items():
        if other.tokens.shape != clean.tokens.shape or (what == "text" and not torch.equal(other.tokens, clean.tokens)):
            raise ValueError(f"{subject.name} makes different numbers of tokens of the two {what}s of a pair")
    word = clean.language & _differ(subject, clean, changed["text"])
    thing = _on_things(subject, clean, pairs, 0) | _on_things(subject, changed["image"], pairs, 1)
    vision = clean.vision & clean.tokens
    cls = torch.zeros_like(vision)
    processor = subject.base or getattr(subject.prepare, "processor", None)
    if getattr(getattr(processor, "tokenizer", processor), "cls_token", None):
        cls[torch.arange(len(cls)), clean.language.int().argmax(dim=1)] = True  # the first of the words
    groups = {
        "object that differs": vision & thing,
        "other image tokens": vision & ~thing,
        "word that differs": word,
        "other words": clean.tokens & ~clean.vision & ~word & ~cls,
        "[CLS]": cls,
    }
    found = {name: group for name, group in groups.items() if group.any()}
    return PatchInputs(clean.forward, changed[corrupt].forward, found)


def _differ(subject: Subject, one: Inputs, other: Inputs) -> Tensor:
    """Where the sequences of two inputs differ before the first layer, bool (example, token)."""
    if subject.base is not None:  # its first state may come after layers on words only
        ids = one.forward["words"] != other.forward["words"]
        return torch.nn.functional.pad(ids, (0, one.tokens.shape[1] - ids.shape[1]))
    states = (hidden_states(subject.model, inputs.forward, tokens=inputs.tokens)[0] for inputs in (one, other))
    return torch.ne(*states).any(dim=-1)


def _on_things(subject: Subject, inputs: Inputs, pairs: Sequence[PicturePair], side: int) -> Tensor:
    """Tokens on the thing that differs, bool (example, token)."""
    boxes = modality_masks(subject.model, inputs.forward).boxes if inputs.boxes is None else inputs.boxes
    found = torch.zeros_like(inputs.vision)
    for row, placed, pair in zip(found, boxes.cpu(), pairs, strict=True):
        at = placed.isfinite().all(dim=1)
        object_map = torch.from_numpy(pair.pictures[side].object_map())
        row[at.to(row.device)] = (objects_of_boxes(object_map, placed[at]) == pair.thing + 1).to(row.device)
    return found
