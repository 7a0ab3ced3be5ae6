"""Byte-pair tokens, trained on the text that the language model learns from, and sequences of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = 0  # id of the token that ends a file or an answer, and fills up a sequence
ANSWER = 1  # id of the token between a prompt and its answer
IGNORED = -100  # the label of a token that counts in no loss: torch's and transformers' convention

Pair = tuple[Sequence[int], Sequence[int]]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer: any text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>", "<answer>"],  # END and ANSWER
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> Tensor:
    """int64 [N, length]: the texts one after another, each ended by END, in pieces; what is left at the end is not used."""
    stream = [token for text in texts for token in (*tokenizer.encode(text).ids, END)]
    return torch.tensor(stream[: len(stream) // length * length], dtype=torch.int64).view(-1, length)


def pairs(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> list[Pair]:
    """The tokens of (prompt, answer) texts: a prompt ends with ANSWER, an answer with END."""
    return [([*tokenizer.encode(prompt).ids, ANSWER], [*tokenizer.encode(answer).ids, END]) for prompt, answer in texts]


def pack(pairs: Iterable[Pair], length: int) -> tuple[Tensor, Tensor]:
    """Sequences of whole pairs, in the order given, filled up with END: (tokens, labels), int64 [N, length] each.

    A label is the token itself inside an answer, its END included, and IGNORED elsewhere. Pairs longer than a sequence are left out.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for prompt, answer in pairs:
        size = len(prompt) + len(answer)
        if size > length:
            continue
        if not rows or len(rows[-1][0]) + size > length:
            rows.append(([], []))
        tokens, labels = rows[-1]
        tokens += [*prompt, *answer]
        labels += [*[IGNORED] * len(prompt), *answer]
    for tokens, labels in rows:
        missing = length - len(tokens)
        tokens += [END] * missing
        labels += [IGNORED] * missing
    made = torch.tensor(rows, dtype=torch.int64).view(-1, 2, length)
    return made[:, 0], made[:, 1]
