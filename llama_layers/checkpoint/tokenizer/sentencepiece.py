"""Vocabularies of SentencePiece's byte pairs, whose scores say which pair is merged first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from types import ModuleType
from typing import Any

import numpy as np

from llama_layers.checkpoint.gguf.metadata import Section
from llama_layers.checkpoint.tokenizer.vocabulary import Vocabulary, read_numbers

# Stands for a space.
_SPACE = "\u2581"


def build_sentencepiece(tokenizers: ModuleType, tables: Section, vocabulary: Vocabulary) -> Any:
    """Build the tokenizers.Tokenizer, but for special tokens.

    llama.cpp merges the neighbours whose token has the highest score, and the leftmost of those.
    """
    numbers = read_numbers(tables, "scores", len(vocabulary.tokens), np.number)
    scores = [0.0] * len(vocabulary.tokens) if numbers is None else numbers.tolist()
    if any(score != score for score in scores):
        raise tables.error("scores", "expected numbers, got nan")
    pairs = _pairs(vocabulary)
    ordered = _can_be_ordered(pairs, vocabulary.tokens, scores)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary.tokens,
            merges=_ordered(pairs, vocabulary.tokens, scores) if ordered else [],
            ignore_merges=not ordered,
            unk_token=vocabulary.special_tokens().get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if not ordered:
        merging = _Merging({token: scores[vocabulary.tokens[token]] for token in pairs})
        backend.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(merging)
    prefix = tables.flag("add_space_prefix", True)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE)] * prefix + [normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return backend


def _pairs(vocabulary: Vocabulary) -> dict[str, list[tuple[str, str]]]:
    """Find the pairs of parts that each token may be merged from.

    A part is a token, or a character, which merging begins with. Tokens that are found in the
    text before anything is merged have no parts.
    """
    found_first = {token for token in vocabulary.found_first() if _SPACE not in token}
    parts = vocabulary.tokens.keys() | {char for token in vocabulary.tokens for char in token}
    lengths = {len(part) for part in parts}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for token in vocabulary.tokens.keys() - found_first:
        ends = [i for i in lengths if len(token) - i in lengths]
        found = [(token[:i], token[i:]) for i in ends if token[:i] in parts and token[i:] in parts]
        if found:
            pairs[token] = found
    return pairs


def _can_be_ordered(
    pairs: Mapping[str, list[tuple[str, str]]], ids: Mapping[str, int], scores: list[float]
) -> bool:
    """Whether a list of merges, the first of which applies first, says the same as the scores.

    It cannot say that the leftmost of two pairs with equal scores is merged first; but where they
    make runs of one character, such as the spaces of Llama 2, preferring the longer run gives the
    same. Nor does it know parts that are not tokens.
    """
    ties = defaultdict(set)
    for token, found in pairs.items():
        if any(left not in ids or right not in ids for left, right in found):
            return False
        ties[scores[ids[token]]].add(token)
    return all(len(tied) == 1 or len(set("".join(tied))) == 1 for tied in ties.values())


def _ordered(
    pairs: Mapping[str, list[tuple[str, str]]], ids: Mapping[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    ordered = sorted(pairs, key=lambda token: (-scores[ids[token]], -len(token)))
    return [pair for token in ordered for pair in pairs[token]]


class _Merging:
    """A pre-tokenizer that merges by score, for vocabularies whose merges have no one order.

    Each piece that it cuts is then a token, or a character that is not one.
    """

    def __init__(self, scores: Mapping[str, float]) -> None:
        self._scores = scores

    def pre_tokenize(self, text: Any) -> None:
        """Cut a tokenizers.PreTokenizedString."""
        text.split(lambda _, part: _cut(part, list(self._lengths(str(part)))))

    def _lengths(self, text: str) -> Iterator[int]:
        """The lengths of the pieces of a text."""
        end_of = list(range(1, len(text) + 1))  # of the piece that begins here; 0 if none does
        before = list(range(-1, len(text) - 1))  # the piece before the one that begins here
        waiting: list[tuple[float, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(text):
                end = end_of[right]
                if (score := self._scores.get(text[left:end])) is not None:
                    heappush(waiting, (-score, left, end))

        for i in range(1, len(text)):
            consider(i - 1, i)
        while waiting:
            _, left, end = heappop(waiting)
            right = end_of[left]
            if not right or right >= end or end_of[right] != end:
                continue  # one of the two was merged with another since
            end_of[left], end_of[right] = end, 0
            if end < len(text):
                before[end] = left
            consider(before[left], left)
            consider(left, end)
        start = 0
        while start < len(text):
            yield end_of[start] - start
            start = end_of[start]


def _cut(text: Any, lengths: list[int]) -> list[Any]:
    """Cut a tokenizers.NormalizedString, by halves, since each cut copies what it cuts."""
    if len(lengths) < 2:
        return [text]
    half = len(lengths) // 2
    at = sum(lengths[:half])
    return _cut(text[:at], lengths[:half]) + _cut(text[at:], lengths[half:])
