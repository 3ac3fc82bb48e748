"""Three attentive baselines from their papers: SCAN (retrieval), MAC (NLVR), EVE-Image (visual entailment).

Each reads words from scratch and visual tokens of any family. Padding is True-masked: `*_tokens` are real positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

EPS = 1e-8


def read_words(rnn: nn.RNNBase, embedded: Tensor, word_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a recurrent network, (text, word, d), and its final state in each direction, (direction, text, d).

    `embedded` is (text, word, channel); padding comes after the real words, and the network does not see it.
    """
    lengths = word_tokens.sum(dim=1).cpu()
    packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(packed)
    state = state[0] if isinstance(state, tuple) else state  # an LSTM has a cell state too
    return pad_packed_sequence(outputs, batch_first=True, total_length=embedded.shape[1])[0], state


def stacked_attention(
    queries: Tensor, contexts: Tensor, query_tokens: Tensor, context_tokens: Tensor, *, sharpness: float
) -> Tensor:
    """SCAN's similarity (a, b) of all pairs of a query set and a context set (Lee et al. 2018, Eq. 1 to 5, AVG).

    Both are unit vectors, (a, query, d) and (b, context, d): words and regions (text to image) or regions and words
    (image to text). Each query attends to the context by its cosines: negative ones count 0, and those of a context
    token are divided by their norm over the queries. The similarity is the mean cosine of the queries and what they
    attended to. `sharpness` is the factor of the softmax (lambda 1): 9 from text to image, 4 from image to text.
    """
    cosine = torch.einsum("aqd,bcd->abqc", queries, contexts).clamp(min=0)
    cosine = cosine * query_tokens[:, None, :, None]
    scores = sharpness * cosine / cosine.square().sum(dim=2, keepdim=True).clamp(min=EPS).sqrt()
    weights = scores.masked_fill(~context_tokens[None, :, None], -torch.inf).softmax(dim=-1)
    attended = functional.normalize(torch.einsum("abqc,bcd->abqd", weights, contexts), dim=-1)
    found = torch.einsum("aqd,abqd->abq", queries, attended)
    return (found * query_tokens[:, None]).sum(dim=-1) / query_tokens.sum(dim=1)[:, None]


class Scan(nn.Module):
    """Stacked cross attention in both directions; the score is their mean (in the paper two models are averaged)."""

    def __init__(self, vision_width: int, vocabulary: int, width: int = 256) -> None:
        super().__init__()
        self.image, self.embed = nn.Linear(vision_width, width), nn.Embedding(vocabulary, width)
        self.read = nn.GRU(width, width, batch_first=True, bidirectional=True)

    def forward(self, vision: Tensor, vision_tokens: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Similarities (image, text), of visual tokens (image, vision, c) and word ids (text, word)."""
        regions = functional.normalize(self.image(vision), dim=-1)
        both, _ = read_words(self.read, self.embed(words), word_tokens)
        language = functional.normalize(both.unflatten(-1, (2, -1)).mean(dim=2), dim=-1)  # of both directions
        to_image = stacked_attention(language, regions, word_tokens, vision_tokens, sharpness=9.0)
        to_text = stacked_attention(regions, language, vision_tokens, word_tokens, sharpness=4.0)
        return (to_image.T + to_text) / 2


def attend(scores: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Softmax over the real keys, and the sum of their values; (text, key, 1), (text, key, d), (text, key)."""
    return (scores.masked_fill(~real[..., None], -torch.inf).softmax(dim=1) * values).sum(dim=1)


class Mac(nn.Module):
    """Cells of control, read and write (Hudson and Manning 2018, Sec. 3.2), without its optional gates.

    The knowledge base is the visual tokens of all images of a text; each image adds a learned vector to its own.
    """

    def __init__(self, vision_width: int, vocabulary: int, labels: int, *, steps: int = 4, width: int = 128) -> None:
        super().__init__()
        self.embed, self.sides = nn.Embedding(vocabulary, width), nn.Embedding(2, width)
        self.read = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.image = nn.Sequential(nn.Linear(vision_width, width), nn.ELU(), nn.Linear(width, width), nn.ELU())
        self.first = nn.Parameter(torch.zeros(2, width))  # control, memory
        self.question = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.control, self.control_weight = nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.memory, self.knowledge = nn.Linear(width, width), nn.Linear(width, width)
        self.related, self.read_weight = nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.write = nn.Linear(2 * width, width)
        self.out = nn.Sequential(nn.Linear(2 * width, width), nn.ELU(), nn.Linear(width, labels))

    def forward(self, vision: Tensor, vision_tokens: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Logits (text, label), of visual tokens (text, side, vision, c) and word ids (text, word)."""
        contextual, state = read_words(self.read, self.embed(words), word_tokens)
        question = torch.cat([*state], dim=-1)
        sides = self.sides(torch.arange(vision.shape[1], device=vision.device))
        base, real = (self.image(vision) + sides[:, None]).flatten(1, 2), vision_tokens.flatten(1, 2)
        known = self.knowledge(base)
        control, memory = (part.expand(len(words), -1) for part in self.first)
        for of_step in self.question:
            asked = self.control(torch.cat([control, of_step(question)], dim=-1))
            control = attend(self.control_weight(asked[:, None] * contextual), contextual, word_tokens)
            interaction = self.memory(memory)[:, None] * known
            related = self.related(torch.cat([interaction, base], dim=-1))
            retrieved = attend(self.read_weight(control[:, None] * related), base, real)
            memory = self.write(torch.cat([retrieved, memory], dim=-1))
        return self.out(torch.cat([question, memory], dim=-1))


class SelfAttention(nn.Module):
    """Each token attends to the real tokens of its modality (one head), and keeps itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """(example, token, d), (example, token) -> (example, token, d)."""
        given = self.query(states), self.key(states), states
        return states + functional.scaled_dot_product_attention(*given, attn_mask=real[:, None])


class EveImage(nn.Module):
    """Attention within the words and within the image, then from the text to the image (Xie et al. 2019, EVE-Image)."""

    def __init__(self, vision_width: int, vocabulary: int, labels: int, *, width: int = 128) -> None:
        super().__init__()
        self.embed, self.image = nn.Embedding(vocabulary, width), nn.Linear(vision_width, width)
        self.within_text, self.within_image = SelfAttention(width), SelfAttention(width)
        self.read = nn.GRU(width, width, batch_first=True)
        self.text_query, self.image_key = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, labels))

    def forward(self, vision: Tensor, vision_tokens: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Logits (text, label), of visual tokens (text, side, vision, c) and word ids (text, word)."""
        _, state = read_words(self.read, self.within_text(self.embed(words), word_tokens), word_tokens)
        text, real = state[0], vision_tokens.flatten(1, 2)
        regions = self.within_image(self.image(vision).relu().flatten(1, 2), real)
        given = self.text_query(text)[:, None], self.image_key(regions), regions
        grounded = functional.scaled_dot_product_attention(*given, attn_mask=real[:, None])[:, 0]
        return self.out(torch.cat([text, grounded], dim=-1))
