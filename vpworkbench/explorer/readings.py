"""What one model makes of one image and one text, kept in the kernel: the explorer sends slices of it to the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpworkbench.data.records import Picture
from vpworkbench.probes import hidden_states, inter_modality_flow, modality_masks, modality_nmi, modality_pca
from vpworkbench.probes.layers import visit_attention_maps
from vpworkbench.probes.layouts import patches_recorded
from vpworkbench.subjects import Subject

HALF_ABOVE = 2**24  # numbers: larger attention is kept as float16, 16 million of them take 32 MiB
PRODUCTS_BYTES = 2**28  # of all spans of a reading, beyond which few of them are kept
LARGEST_MAP = 1_200  # rows and columns that a page draws; larger maps are pooled


@dataclass(eq=False)
class Reading:
    """One image and one text, read by one model.

    Attributes
    ----------
    image : uint8 array, (height, width, 3)
    words : list of str
        Tokens of the language places, in their order.
    language, vision : int64 array
        Places of the words and of the visual tokens that lie on the image, in the sequence.
    counted : bool array (2, token)
        The sets L and V of paper Eq. 6.
    boxes : float array, (vision, 4)
        x0 y0 x1 y1 as shares of the image.
    regions : bool
        Whether these lie anywhere, by the model: one region, or three in a row, look like a grid.
    attention : Tensor, (layer, head, token, token)
        Softmax weights, rows over the last axis sum to 1.
    flow, null : float array, (layer, layer)
        Inter-Modality Flow of every span and its value under uniform attention; nan where j < i.
    hidden : tuple of Tensor, (1, token, channel)
        Features at the input of the first layer and behind every layer.
    """

    subject: Subject
    picture: Picture
    text: str
    image: NDArray[np.uint8]
    words: list[str]
    language: NDArray[np.int64]
    vision: NDArray[np.int64]
    counted: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    regions: bool
    attention: Tensor
    flow: NDArray[np.float64]
    null: NDArray[np.float64]
    hidden: tuple[Tensor, ...]
    forward: dict[str, Any]
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
    def on_grid(self) -> bool:
        """Whether the visual tokens are the cells of a grid; regions are not, nor are tiles above a whole image."""
        columns, rows = (len(np.unique(self.boxes[:, side].round(3))) for side in (0, 1))
        return not self.regions and columns * rows == len(self.boxes)

    def weights(self, layer: int, head: int | None, *, rolled: bool = False) -> Tensor:
        """Attention of one layer, (query, key): of one head, or of their mean (None).

        Parameters
        ----------
        rolled : bool
            From the input to this layer with the residual, A^{1,j} (paper Eq. 4), the mean of the heads.
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
    def grid(self) -> NDArray[np.float32]:
        """By layer and head: mean share that words give to the image, that the image gives to words, and entropy.

        Returns
        -------
        array, (3, layer, head)
            The entropy in bits over the entropy of even attention: 0 one token, 1 all alike.
        """
        language, vision = (torch.from_numpy(part) for part in self.counted)
        real = language | vision  # regions are padded
        real[self.language] = True
        found = torch.empty(3, self.layers, self.heads)
        for layer, maps in enumerate(self.attention):
            one = maps.float()
            found[0, layer] = one[:, language][:, :, vision].sum(dim=2).mean(dim=1)
            found[1, layer] = one[:, vision][:, :, language].sum(dim=2).mean(dim=1)
            found[2, layer] = torch.special.entr(one[:, real]).sum(dim=2).mean(dim=1) / np.log(int(real.sum()))
        return found.numpy()

    def product(self, start: int, stop: int) -> Tensor:
        """A^{i,j} (paper Eq. 4), from the input of layer `start` to the output of layer `stop`; (token, token)."""
        rolled = self._products.setdefault(start, [])
        if len(self._products) > 2 and self.layers * self._mixed.nbytes > PRODUCTS_BYTES:  # the input's and the last
            self._products = {key: value for key, value in self._products.items() if key in (0, start)}
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
        """A^{i,j} with the words first and the visual tokens behind them, and where those begin.

        Returns
        -------
        array, (row, column)
            Shares that queries (rows) give to keys; sums over rows and columns that were pooled to fit a page are
            means over queries and sums over keys, so that rows keep their sum.
        list of int
            The first row, and column, of the visual tokens.
        """
        order = np.concatenate([np.flatnonzero(part) for part in self.counted])
        words = int(self.counted[0].sum())
        matrix = self.product(start, stop)[np.ix_(order, order)]
        factor = -(-len(order) // LARGEST_MAP)
        if factor == 1:
            return matrix.numpy(), [words]
        # each modality by itself: no cell may mix them
        cut = np.concatenate([np.arange(0, words, factor), np.arange(words, len(order), factor)])
        pooled = np.add.reduceat(np.add.reduceat(matrix.numpy(), cut, axis=0), cut, axis=1)
        pooled /= np.diff(np.append(cut, len(order)))[:, None]
        return pooled, [-(-words // factor)]

    @cached_property
    def nmi(self) -> NDArray[np.float64]:
        """Of two clusters and the two modalities, (layer + 1,): the input first (paper Fig. 5)."""
        return modality_nmi(self.hidden, *self._sets).numpy()[0]

    @cached_property
    def map(self) -> NDArray[np.float64]:
        """Tokens on two principal components, (layer + 1, token, 2); nan at tokens of neither modality."""
        return modality_pca(self.hidden, *self._sets).coordinates[0].double().cpu().numpy()

    @property
    def _sets(self) -> tuple[Tensor, Tensor]:
        language, vision = (torch.from_numpy(part)[None] for part in self.counted)
        return vision, vision | language


@torch.no_grad()
def read(model: Subject, picture: Picture, text: str) -> Reading:
    """Let a model read a picture with a text; every attention map of the pass is kept.

    Raises
    ------
    ValueError
        If the text is empty, or the model builds no visual token from the picture.
    """
    if not text.strip():
        raise ValueError("an empty sentence has no words to look at; type some")
    inputs = model.prepare([picture], [text])
    if not inputs.vision.any():
        raise ValueError(f"{model.name} makes no visual token of this input: there is nothing to look at")
    flow = inter_modality_flow(model.model, inputs.forward, inputs.vision, inputs.tokens, language=inputs.language)
    with patches_recorded(model.model) as shuffled:
        attention = _attention(model.model, inputs)
    masks = modality_masks(model.model, inputs.forward)
    placed, base = getattr(inputs, "boxes", None), model.base
    boxes = (shuffled.boxes(masks.vision.shape[1]) if shuffled.order else masks.boxes)[0].cpu()
    if placed is not None:  # a VisualBERT is not told where its regions lie
        boxes = placed[0]
    if base is not None and base.settings.visual.kind.pixels:
        image = inputs.forward["images"][0].permute(1, 2, 0).cpu().numpy()
    else:
        image = picture.image.pixels()
    real = inputs.tokens[0].cpu()
    vision, language = (part[0].cpu() & real for part in (inputs.vision, inputs.language))
    places = (vision & boxes.isfinite().all(dim=1)).nonzero()[:, 0].numpy()
    spoken = (real & ~vision).nonzero()[:, 0].numpy()
    return Reading(
        subject=model, picture=picture, text=text, image=image,
        words=_words(model, inputs, spoken), language=spoken, vision=places,
        counted=torch.stack([language, vision]).numpy(), boxes=boxes[places].float().numpy(),
        regions=not base.settings.visual.kind.on_grid if base is not None else placed is not None,
        attention=attention, flow=flow.flow[0].double().cpu().numpy(), null=flow.null[0].double().cpu().numpy(),
        hidden=tuple(part.detach() for part in hidden_states(model.model, inputs.forward, tokens=inputs.tokens)),
        forward=dict(inputs.forward),
    )  # fmt: skip


def _attention(model: nn.Module, inputs: Any) -> Tensor:
    """(layer, head, token, token) of the layers in which the modalities meet; of two streams put together."""
    maps: list[Tensor] = []

    def keep(attention: Tensor) -> None:
        maps.append(attention[0].float().cpu())

    visit_attention_maps(model, inputs.forward, tuple(inputs.vision.shape), keep)
    small = len(maps) * maps[0].numel() <= HALF_ABOVE
    return torch.stack([one if small else one.half() for one in maps])


def _words(model: Subject, inputs: Any, places: NDArray[np.int64]) -> list[str]:
    """The tokens at these places, as the tokenizer writes them; a number where they are not told."""
    forward = inputs.forward
    if model.base is not None:
        ids, tokenizer = forward["words"][0], model.base.tokenizer
    else:
        processor = getattr(model.prepare, "processor", None)
        ids, tokenizer = forward.get("input_ids"), getattr(processor, "tokenizer", processor)
        ids = ids[0] if ids is not None else torch.empty(0)
    if len(ids) == inputs.tokens.shape[1]:  # images stand among the words
        ids = ids[torch.from_numpy(places).to(ids.device)]
    elif (mask := forward.get("attention_mask")) is not None and mask.shape[-1] == len(ids):
        ids = ids[mask[0].bool()]
    if len(ids) != len(places) or tokenizer is None:
        return [f"token {place}" for place in places]
    words = map(str, tokenizer.convert_ids_to_tokens(ids.tolist()))
    return [word.replace("Ġ", "").replace("▁", "") or "·" for word in words]  # what stands for a space


def chosen_text(picture: Picture) -> str:
    """The sentence that a picture is first read with."""
    return picture.captions[0] if picture.captions else "a picture"


def same_boxes(readings: Sequence[Reading]) -> bool:
    """Whether all models cut the image alike, so that one pick fits all."""
    first = readings[0].boxes
    return all(one.boxes.shape == first.shape and np.allclose(one.boxes, first, atol=1e-4) for one in readings)
