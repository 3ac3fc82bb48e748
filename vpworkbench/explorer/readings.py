"""Attention, flow and hidden states of one image and one text in one model; the page receives slices of them."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpworkbench.data.records import Picture
from vpworkbench.huggingface import as_read
from vpworkbench.probes import (
    attention_blocked,
    flow_from_attention,
    hidden_states,
    inter_modality_flow,
    modality_masks,
    modality_nmi,
    modality_pca,
)
from vpworkbench.probes.alignment import exact_plan
from vpworkbench.probes.layers import visit_attention_maps
from vpworkbench.subjects import Subject

HALF_ABOVE = 2**24  # numbers: larger attention is kept as float16; 16 million numbers take 32 MiB
LARGEST_MAP = 1_200  # rows and columns that a page draws; larger maps are pooled


BLOCKED = {
    "text_to_vision": "words cannot read the image",
    "vision_to_text": "the image cannot read the words",
    "both": "words and image cannot read each other",
}
"""What the ways of `knock_out` block."""


class Block(NamedTuple):
    """A way of `knock_out` that is blocked in some layers, the first and the last one counted from 0."""

    way: str
    first: int
    last: int

    def __str__(self) -> str:
        layers = f"layers {self.first + 1} to {self.last + 1}" if self.first < self.last else f"layer {self.last + 1}"
        return f"{BLOCKED[self.way]} in {layers}"


@dataclass(eq=False)
class Reading:
    """One image and one text, read by one model, perhaps with some attention blocked.

    Attributes
    ----------
    image : uint8 array, (height, width, 3)
    words : list of str
        Tokens at the places `language`.
    language, vision : int64 array
        Places in the sequence: of the words, and of the visual tokens that lie on the image.
    modalities : bool array, (2, token)
        The sets L and V of paper Eq. 6.
    boxes : float array, (vision, 4)
        x0 y0 x1 y1 as shares of the image.
    regions : bool
        True if the model uses free boxes (a few boxes can look like a grid).
    attention : Tensor, (layer, head, token, token)
        Softmax weights; rows over the last axis sum to 1.
    flow, null : float array, (layer, layer)
        Inter-Modality Flow of every span, and its value under uniform attention with nothing blocked; nan where j < i.
    hidden : tuple of Tensor, (1, token, channel)
        Features at the input of the first layer and at the output of every layer.
    inputs : as from `Subject.prepare`
    block : Block or None
        Attention, flow and features are those of the model with this block.
    """

    subject: Subject
    picture: Picture
    text: str
    image: NDArray[np.uint8]
    words: list[str]
    language: NDArray[np.int64]
    vision: NDArray[np.int64]
    modalities: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    regions: bool
    attention: Tensor
    flow: NDArray[np.float64]
    null: NDArray[np.float64]
    hidden: tuple[Tensor, ...]
    inputs: Any
    block: Block | None
    _products: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.attention.shape[0]

    @property
    def heads(self) -> int:
        return self.attention.shape[1]

    @property
    def tokens(self) -> int:
        return self.attention.shape[2]

    @property
    def note(self) -> str:
        """What is blocked, as the end of a title; empty if nothing is."""
        return f", while {self.block}" if self.block else ""

    @property
    def curves(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Flow and its null by layer: from the input (paper Fig. 3), and within each layer (Fig. 4)."""
        return [(self.flow[0], self.null[0]), (self.flow.diagonal(), self.null.diagonal())]

    def blocks(self, start: int, stop: int) -> list[bool]:
        """Whether words cannot read the image, and the image not the words, in any layer of `start` to `stop`."""
        way, first, last = self.block or ("", 0, 0)
        return [way in (one, "both") and first <= start and stop <= last for one in list(BLOCKED)[:2]]

    def blocking(self) -> AbstractContextManager[None]:
        """In this context the model runs with the block, on the inputs of this reading only."""
        return _blocking(self.subject, self.inputs, self.block)

    def same_boxes(self, other: Reading) -> bool:
        """True if the visual tokens of both are at the same places, so that one pick fits both."""
        return self.boxes.shape == other.boxes.shape and np.allclose(self.boxes, other.boxes, atol=1e-4)

    @property
    def on_grid(self) -> bool:
        """True if the visual tokens are the cells of a grid; False for regions and for tiles that overlap."""
        columns, rows = (len(np.unique(self.boxes[:, side].round(3))) for side in (0, 1))
        return not self.regions and columns * rows == len(self.boxes)

    def weights(self, layer: int, head: int | None, *, rolled: bool = False) -> Tensor:
        """Attention of one layer, (query, key): of one head, or the mean of all heads (None).

        With `rolled`: from the input to this layer with the residual, A^{1,j} (paper Eq. 4), mean of the heads.
        """
        if rolled:
            return self.product(0, layer)
        if head is None:
            return 2 * self._mixed[layer] - torch.eye(self.tokens)
        return self.attention[layer, head].float()

    def looks(self, layer: int, head: int | None = None, *, rolled: bool = False) -> NDArray[np.float32]:
        """Where each word looks on the image, (word, vision)."""
        return self.weights(layer, head, rolled=rolled)[np.ix_(self.language, self.vision)].numpy()

    def reads(self, layer: int, head: int | None = None, *, rolled: bool = False) -> NDArray[np.float32]:
        """Which words each visual token reads, (vision, word)."""
        return self.weights(layer, head, rolled=rolled)[np.ix_(self.vision, self.language)].numpy()

    @cached_property
    def transport(self) -> NDArray[np.float32]:
        """Exact plan of optimal transport after the last layer, (word, vision): rows of words sum to 1.

        Special tokens such as [CLS] have no mass: their rows are zero.
        """
        plan = np.zeros((len(self.language), len(self.vision)), dtype=np.float32)
        words = [number for number, word in enumerate(self.words) if not re.fullmatch(r"\[[A-Z]+\]|<.*>", word)]
        if words and len(self.vision):
            states = self.hidden[-1][0].cpu()
            plan[words] = len(words) * exact_plan(states[self.language[words]], states[self.vision]).numpy()
        return plan

    @cached_property
    def grid(self) -> NDArray[np.float32]:
        """(3, layer, head): mean share from words to the image, from the image to words, and entropy.

        The entropy is divided by that of uniform attention: 0 is one token, 1 is all tokens equally.
        """
        language, vision = (torch.from_numpy(part) for part in self.modalities)
        real = language | vision  # without the padding of regions
        real[self.language] = True
        found = torch.empty(3, self.layers, self.heads)
        for layer, maps in enumerate(self.attention):
            one = maps.float()
            found[0, layer] = one[:, language][:, :, vision].sum(dim=2).mean(dim=1)
            found[1, layer] = one[:, vision][:, :, language].sum(dim=2).mean(dim=1)
            shares = one[:, real].clamp(min=0)  # below 0 where a layer attends to one modality only (BridgeTower)
            shares = shares / shares.sum(dim=2, keepdim=True)
            found[2, layer] = torch.special.entr(shares).sum(dim=2).mean(dim=1) / np.log(int(real.sum()))
        return found.numpy()

    def product(self, start: int, stop: int) -> Tensor:
        """A^{i,j} (paper Eq. 4), from the input of layer `start` to the output of layer `stop`; (token, token)."""
        self._products = {key: self._products.get(key, []) for key in (0, start)}  # keep few: they are large
        rolled = self._products[start]
        while start + len(rolled) <= stop:
            mixed = self._mixed[start + len(rolled)]
            rolled.append(mixed @ rolled[-1] if rolled else mixed)
        return rolled[stop - start]

    @cached_property
    def _mixed(self) -> Tensor:
        """0.5 (I + W) of every layer, W the mean of its heads (paper Eq. 3); (layer, token, token)."""
        identity = torch.eye(self.tokens)
        return torch.stack([(maps.mean(dim=0, dtype=torch.float32) + identity) / 2 for maps in self.attention])

    def span(self, start: int, stop: int) -> tuple[NDArray[np.float32], list[int]]:
        """A^{i,j} with the words first and then the visual tokens, and the row where the visual tokens begin.

        Rows are queries and sum to 1. If the map is too large for a page, it is pooled: mean over queries, sum over
        keys.
        """
        order = np.concatenate([np.flatnonzero(part) for part in self.modalities])
        words = int(self.modalities[0].sum())
        matrix = self.product(start, stop)[np.ix_(order, order)]
        factor = -(-len(order) // LARGEST_MAP)
        if factor == 1:
            return matrix.numpy(), [words]
        # each modality separately: no cell may mix them
        cut = np.concatenate([np.arange(0, words, factor), np.arange(words, len(order), factor)])
        pooled = np.add.reduceat(np.add.reduceat(matrix.numpy(), cut, axis=0), cut, axis=1)
        pooled /= np.diff(np.append(cut, len(order)))[:, None]
        return pooled, [-(-words // factor)]

    @cached_property
    def nmi(self) -> NDArray[np.float64]:
        """NMI between two clusters and the two modalities, (layer + 1,), the input first (paper Fig. 5)."""
        return modality_nmi(self.hidden, *self._sets).cpu().numpy()[0]

    @cached_property
    def components(self) -> NDArray[np.float64]:
        """Tokens on two principal components, (layer + 1, token, 2); nan at tokens of neither modality."""
        return modality_pca(self.hidden, *self._sets).coordinates[0].double().cpu().numpy()

    @property
    def _sets(self) -> tuple[Tensor, Tensor]:
        language, vision = (torch.from_numpy(part)[None] for part in self.modalities)
        return vision, vision | language


@torch.no_grad()
def read(model: Subject, picture: Picture, text: str, block: Block | None = None) -> Reading:
    """Run a model on a picture with a text, perhaps with some attention blocked, and keep every attention map.

    Raises a ValueError if the text is empty, if the model builds no visual token from the picture, and where
    `attention_blocked` refuses the block.
    """
    if not text.strip():
        raise ValueError("an empty sentence has no words to look at; type some")
    inputs = model.prepare([picture], [text])
    if not inputs.vision.any():
        raise ValueError(f"{model.name} makes no visual token of this input: there is nothing to look at")
    flow = inter_modality_flow(model.model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language)
    maps: list[Tensor] = []
    with _blocking(model, inputs, block):
        visit_attention_maps(
            model.model, inputs.forward, inputs.vision.shape, lambda attention: maps.append(attention[0].float().cpu())
        )
        hidden = hidden_states(model.model, inputs.forward, tokens=inputs.tokens)
    is_large = len(maps) * maps[0].numel() > HALF_ABOVE
    given = getattr(inputs, "boxes", None)  # some models, such as VisualBERT, do not know where their regions lie
    boxes = flow.boxes if given is None else given  # ViLT draws the same order of its patches in every pass here
    if boxes is None:
        boxes = modality_masks(model.model, inputs.forward).boxes
    boxes, real = boxes[0].cpu(), inputs.tokens[0].cpu()
    vision, language = (part[0].cpu() & real for part in (inputs.vision, inputs.language))
    on_image = (vision & boxes.isfinite().all(dim=1)).nonzero()[:, 0].numpy()
    in_text = (real & ~vision).nonzero()[:, 0].numpy()
    flows = flow.flow[0]
    if block:  # which may leave nothing that flows, and `inter_modality_flow` refuses that
        means = torch.stack([one.mean(dim=0, keepdim=True) for one in maps])
        flows = flow_from_attention(means, vision, language=language)
    visual = None if model.base is None else model.base.settings.visual
    if visual is not None and visual.kind.pixels:
        image = inputs.forward["images"][0].permute(1, 2, 0).cpu().numpy()  # the pixels that the model reads
    else:
        image = as_read(getattr(model.prepare, "processor", None), picture.image.pixels())
    return Reading(
        subject=model,
        picture=picture,
        text=text,
        image=image,
        words=_words(model, inputs, in_text),
        language=in_text,
        vision=on_image,
        modalities=torch.stack([language, vision]).numpy(),
        boxes=boxes[on_image].float().numpy(),
        regions=given is not None if visual is None else not visual.kind.on_grid,
        attention=torch.stack([one.half() if is_large else one for one in maps]),
        flow=flows.double().cpu().numpy(),
        null=flow.null[0].double().cpu().numpy(),
        hidden=tuple(part.detach() for part in hidden),
        inputs=inputs,
        block=block,
    )


def _blocking(model: Subject, inputs: Any, block: Block | None) -> AbstractContextManager[None]:
    if block is None:
        return nullcontext()
    sets = {"vision": inputs.vision, "tokens": inputs.tokens, "language": inputs.language}
    return attention_blocked(model.model, inputs.forward, **sets, way=block.way, span=block[1:])


def _words(model: Subject, inputs: Any, places: NDArray[np.int64]) -> list[str]:
    """The tokens at these places as the tokenizer writes them; numbered if the tokenizer is unknown."""
    forward = inputs.forward
    if model.base is not None:
        ids, tokenizer = forward["words"][0], model.base.tokenizer
    else:
        processor = getattr(model.prepare, "processor", None)
        ids, tokenizer = forward.get("input_ids"), getattr(processor, "tokenizer", processor)
        ids = ids[0] if ids is not None else torch.empty(0)
    if len(ids) == inputs.tokens.shape[1]:  # image tokens have places among the words
        ids = ids[torch.from_numpy(places).to(ids.device)]
    elif (mask := forward.get("attention_mask")) is not None and mask.shape[-1] == len(ids):
        ids = ids[mask[0].bool()]
    if len(ids) != len(places) or tokenizer is None:
        return [f"token {place}" for place in places]
    words = map(str, tokenizer.convert_ids_to_tokens(ids.tolist()))
    return [word.replace("Ġ", "").replace("▁", "") or "·" for word in words]  # some tokenizers mark a space so


def check_index(name: str, index: int | None, count: int) -> None:
    """Refuse an index that does not exist; None is not given."""
    if index is not None and not 0 <= index < count:
        raise ValueError(f"{name} {index} does not exist; there are {count}, counted from 0")
