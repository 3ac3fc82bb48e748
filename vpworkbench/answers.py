"""Where each word of a decoder's answer looked, and how much of its probability comes from the image.

The answer is generated, or given. One teacher-forced pass over prompt and answer then gives every number: a token is
predicted by the position before it, so the attention of a word is the row of that position, as in a step of `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.data.images import read_image
from vpworkbench.huggingface import device_of, prompt_inputs
from vpworkbench.probes.attention import run_model, unchanged
from vpworkbench.probes.flow import InterModalityFlow, recorded_pass
from vpworkbench.probes.knock_out import Span, knock_out
from vpworkbench.probes.layers import LayerNames
from vpworkbench.probes.layouts import ModalityMasks, modalities_of, modality_masks
from vpworkbench.probes.model_parts import config_of, decoder_of


@dataclass(frozen=True)
class Answer:
    """An answer, word by word; a word is a token of the tokenizer.

    Attributes
    ----------
    words : tuple of str
    prompt : tuple of str
        The tokens of prompt and answer, for `most_attended`.
    log_probs : Tensor, shape (word,)
        Natural logarithm of each word's probability, given the words before it.
    blocked : Tensor, shape (span, word)
        The same with every token blocked from the image in the layers of the span; the first span is all layers.
    spans : tuple of (int, int)
        First and last blocked layer, counted from 0.
    prior : Tensor, shape (word,), or None
        The same without an image in the prompt; None if the model needs one.
    attention : Tensor, shape (word, layer, head, token)
        Softmax weights of the position that predicts the word.
    rolled : Tensor, shape (word, layer, token)
        The same row of A^{1,j} (paper Eq. 4).
    null : Tensor, shape (word, layer)
        `image_share` if attention were uniform over the tokens that the mask allows.
    masks : ModalityMasks
        Of prompt and answer; one example.
    layers, uncounted : tuple of str
        As in `InterModalityFlow`. Parts that are not counted are not blocked either.
    """

    words: tuple[str, ...]
    prompt: tuple[str, ...]
    log_probs: Tensor
    blocked: Tensor
    spans: tuple[Span, ...]
    prior: Tensor | None
    attention: Tensor
    rolled: Tensor
    null: Tensor
    masks: ModalityMasks
    layers: tuple[str, ...]
    uncounted: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.words).strip()

    @property
    def image_share(self) -> Tensor:
        """Share of each word's attention on the image, (word, layer); beside it stands `null`."""
        return self.attention[..., self.masks.vision[0]].sum(dim=-1).mean(dim=-1)

    @property
    def from_image(self) -> Tensor:
        """What each word's log probability loses without attention to the image in any layer, (word,)."""
        return self.log_probs - self.blocked[0]

    def map(self, word: int, *, layer: int | None = None, head: int | None = None, rolled: bool = False) -> Tensor:
        """Attention of a word on the visual tokens, (vision,): of a layer and a head, or their means.

        `rolled` takes the row of A^{1,j} instead; without `layer`, up to the last one.
        """
        if rolled:
            weights = self.rolled[word, -1 if layer is None else layer]
        else:
            weights = self.attention[word] if layer is None else self.attention[word, layer : layer + 1]
            weights = weights.mean(dim=1) if head is None else weights[:, head]
            weights = weights.mean(dim=0)
        return weights[self.masks.vision[0]]

    @property
    def boxes(self) -> Tensor:
        """Places of the visual tokens on their image, (vision, 4); nan where they have none (`masks.note` says why)."""
        return self.masks.boxes[0, self.masks.vision[0]]

    def most_attended(self, word: int, count: int = 5) -> list[tuple[str, float]]:
        """The tokens of the text that a word attends to most, with their shares; mean over layers and heads."""
        weights = self.attention[word].mean(dim=(0, 1)).masked_fill(~self.masks.language[0], -1)
        share, place = weights.topk(min(count, int(self.masks.language.sum())))
        return [(self.prompt[at], value) for at, value in zip(place.tolist(), share.tolist(), strict=True)]


@torch.no_grad()
def probe_answer(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    *,
    answer: str | None = None,
    max_new_tokens: int = 24,
    spans: Sequence[Span] = (),
    layers: LayerNames | None = None,
) -> Answer:
    """Probe the answer of an image-text decoder to a question.

    Parameters
    ----------
    image
        A path, a PIL image or an array, or a list of them: several images of one question.
    answer : str, optional
        By default the model's own, generated greedily.
    spans : sequence of (first, last)
        Layers in which the image is blocked, besides all of them.
    layers
        As in `inter_modality_flow`.

    Raises
    ------
    ValueError
        If the answer is empty or too long, the inputs mark no image tokens, or `inter_modality_flow` refuses the model.
    TypeError
        If the processor has no tokenizer, or question and answer are no texts.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        kind = type(processor).__name__
        raise TypeError(f"{kind} has no tokenizer: give the model's processor, AutoProcessor.from_pretrained(...)")
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise TypeError("question and answer must each be one text")
    _refuse_encoder_decoder(model)
    images = [read_image(one) for one in (image if isinstance(image, list | tuple) else [image])]
    inputs = prompt_inputs(processor, images, question, device_of(model))
    if not modality_masks(model, inputs).vision.any():
        raise ValueError("the prompt holds no image tokens: give an image, and the model's own processor")
    if answer is None and not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} generates no text: give `answer`, or a decoder")
    if answer is None:
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
        length = inputs["input_ids"].shape[1]
        whole = made[:length].equal(inputs["input_ids"][0])  # some models give back only what is new
        ids = [number for number in made[length if whole else 0 :].tolist() if number not in tokenizer.all_special_ids]
    else:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the answer is empty: give `answer`, or let the model generate more tokens")
    try:
        without = prompt_inputs(processor, [], question, device_of(model))
        with unchanged(model):
            prior = word_log_probs(run_model(model, teacher_forced(model, without, ids)), ids)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # a processor that insists on an image
        prior = None
    return read_answer(model, inputs, ids, tokenizer, prior=prior, spans=spans, layers=layers)


def read_answer(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ids: Sequence[int],
    tokenizer: Any,
    *,
    prior: Tensor | None = None,
    spans: Sequence[Span] = (),
    layers: LayerNames | None = None,
) -> Answer:
    """As `probe_answer`, from the inputs of one prompt, also padded on the left, and the ids of the answer."""
    _refuse_encoder_decoder(model)
    forced = teacher_forced(model, inputs, ids)
    longest = getattr(config_of(model).get_text_config(), "max_position_embeddings", None)
    if longest and forced["input_ids"].shape[1] > longest:
        raise ValueError(
            f"prompt and answer are {forced['input_ids'].shape[1]} tokens, and {type(model).__name__} takes {longest}: "
            "give a shorter text or a smaller image"
        )
    masks = modality_masks(model, forced)
    layers = decoder_of(model) if layers is None else layers
    sets = modalities_of(model, forced, masks.vision, masks.tokens, masks.language)
    places = torch.arange(-len(ids) - 1, -1) + masks.vision.shape[1]
    recorder = recorded_pass(model, forced, sets, layers, rows=places.to(masks.vision.device)[None], starts=[0])
    log_probs, recorder.outputs = word_log_probs(recorder.outputs, ids), None
    flow = recorder.result(None)
    del recorder  # it holds queries and keys of every layer
    every = ((0, len(flow.layers) - 1), *spans)
    read: list[Tensor] = []

    def keep(outputs: Any) -> Tensor:
        read.append(word_log_probs(outputs, ids))
        return read[-1].sum()[None]

    pairs = (masks.tokens & ~masks.vision)[:, :, None] & masks.vision[:, None]
    knock_out(
        model, forced, masks.vision, masks.tokens, keep, language=masks.language, way=pairs, spans=every, layers=layers
    )
    return Answer(
        words=_words(tokenizer, ids),
        prompt=tuple(tokenizer.decode([number]) for number in forced["input_ids"][0].tolist()),
        log_probs=log_probs,
        blocked=torch.stack(read[1:]),  # the first is the plain pass
        spans=every,
        prior=prior,
        attention=flow.rows[0].permute(2, 0, 1, 3).cpu(),
        rolled=flow.rows_from_input[0].transpose(0, 1).cpu(),
        null=_uniform_share(flow, masks, places),
        masks=ModalityMasks(*(part.cpu() if torch.is_tensor(part) else part for part in masks)),
        layers=flow.layers,
        uncounted=flow.uncounted,
    )


def _words(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; a letter of several tokens belongs to the last of them."""
    texts = [tokenizer.decode(list(ids[:end])) for end in range(len(ids) + 1)]  # a token alone may lose its space
    for end in range(1, len(ids)):
        texts[end] = texts[end - 1] if texts[end].endswith("\ufffd") else texts[end]
    return tuple(after[len(before) :] for before, after in pairwise(texts))


def teacher_forced(model: nn.Module, inputs: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """The inputs of a prompt with an answer after it; what is given for each token continues as in `generate`.

    Where the model can, it makes logits of the answer only: those of a long prompt take more memory than its states.
    """
    from transformers import GenerationMixin
    from transformers.utils import ModelOutput

    shape = inputs["input_ids"].shape
    if shape[0] != 1:
        raise ValueError(f"inputs hold {shape[0]} prompts: an answer is probed for one at a time")
    each = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.shape == shape}
    longer = {name: torch.cat([value, value[:, -1:].expand(-1, len(ids))], dim=1) for name, value in each.items()}
    generator = next((part for part in model.modules() if isinstance(part, GenerationMixin)), None)
    if generator is not None:  # some models continue with another number
        own = generator._update_model_kwargs_for_generation(ModelOutput(), each, num_new_tokens=len(ids))
        longer |= {name: own[name] for name in longer if own[name].shape == longer[name].shape}
    longer["input_ids"][:, shape[1] :] = torch.tensor(ids)
    keeps_few = generator is not None and "logits_to_keep" in signature(generator.forward).parameters
    few = {"logits_to_keep": len(ids) + 1} if keeps_few else {}
    return {**inputs, **longer, **few}


def _refuse_encoder_decoder(model: nn.Module) -> None:
    if getattr(config_of(model), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} reads the image in an encoder and answers in a decoder: an answer is probed only "
            "where one stack of layers reads both. inter_modality_flow probes the encoder"
        )


def word_log_probs(outputs: Any, ids: Sequence[int]) -> Tensor:
    """Log probability of each word of an answer at the end of the sequence, float64 (word,).

    A ValueError if the outputs do not predict the next word at every place.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[1] <= len(ids) or logits.shape[2] <= max(ids):
        found = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
        raise ValueError(f"the model gives {found}: give a decoder, where each token predicts the next one")
    logits = logits[0, -len(ids) - 1 : -1].cpu().double()
    return logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]


def _uniform_share(flow: InterModalityFlow, masks: ModalityMasks, places: Tensor) -> Tensor:
    """Share of visual tokens among those that each place may attend to, (word, layer)."""
    queries = torch.nn.functional.one_hot(places, masks.tokens.shape[1]).bool().to(masks.tokens.device)
    shares = []
    for readings in flow.readings:
        _, reading = readings[0]
        keys = [reading.keys_of(query[None]) for query in queries]  # (1, token) for each word
        shares.append(torch.stack([(one & masks.vision.to(one.device)).sum() / one.sum() for one in keys]).cpu())
    return torch.stack(shares, dim=1)
