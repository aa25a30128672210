"""The tables of a GGUF file's tokenizer: its tokens, their types and scores, and special ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama_layers.checkpoint.gguf.metadata import GGUFStrings, Section

# GGUF's token types. The others are for bytes, which their text tells, and for unused tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# Types of tokens that are found in a text by their spelling, before anything else.
FOUND_FIRST = (UNKNOWN, CONTROL, USER_DEFINED)

# llama.cpp knows tokens by their spelling too. A text ends at these: they end a message or a file,
# or separate the files of a repository.
_MESSAGE_ENDS = """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|>
    <｜end▁of▁sentence｜>
    """.split()  # noqa: RUF001
_FILE_ENDS = """
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO>
    <reponame> <|file_sep|>
    """.split()
END_TOKENS = (*_MESSAGE_ENDS, *_FILE_ENDS)
# If a vocabulary has both tokens of a line, <|end|> ends a part of a message, and the text goes on.
_PARTS_OF_MESSAGES = (
    {"<|return|>", "<|call|>"},
    {"<|return|>", "<|calls|>"},
    {"<|flush|>", "<|call|>"},
    {"<|flush|>", "<|calls|>"},
)
# llama.cpp takes these for control tokens, whatever their type: some converters left them normal,
# which would spell them out.
_CONTROL_TOKENS = frozenset(END_TOKENS) | frozenset(
    """
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
    """.split()  # noqa: RUF001
)

# transformers' names of special tokens, and the middle of GGUF's keys (the spelling is GGUF's).
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
# llama.cpp's defaults for a SentencePiece vocabulary.
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}


@dataclass(frozen=True)
class Vocabulary:
    """The tables of a tokenizer."""

    tokens: dict[str, int]
    """Ids by token, in order."""
    kinds: list[int]
    """The type of each token."""
    special_ids: dict[str, int]
    """Ids by transformers' name of a special token, such as "bos_token"."""

    def found_first(self) -> dict[str, int]:
        """The types, by token, of tokens that are found by their spelling before anything else."""
        kinds = zip(self.tokens, self.kinds, strict=True)
        return {token: kind for token, kind in kinds if kind in FOUND_FIRST}

    def special_tokens(self) -> dict[str, str]:
        """Special tokens by transformers' name for them."""
        tokens = list(self.tokens)
        return {name: tokens[i] for name, i in self.special_ids.items()}


def ends_by_spelling(tokens: GGUFStrings) -> list[int]:
    """Find the ids of the tokens at which a text ends by their spelling, in order."""
    found = tokens.positions(END_TOKENS)
    if any(parts <= found.keys() for parts in _PARTS_OF_MESSAGES):
        found.pop("<|end|>", None)
    return sorted(found.values())


def read_vocabulary(tables: Section) -> Vocabulary:
    """Read and check the tables of a file's tokenizer."""
    # Each token needs a name of its own, and this is llama.cpp's.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tables.strings("tokens"))]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise tables.error("tokens", f"expected different tokens, got {twice!r} twice")
    numbers = read_numbers(tables, "token_type", len(tokens), np.integer)
    kinds = [NORMAL] * len(tokens) if numbers is None else numbers.tolist()
    for token in _CONTROL_TOKENS & ids.keys():
        kinds[ids[token]] = CONTROL
    return Vocabulary(ids, kinds, _special_ids(tables, len(tokens)))


def read_numbers(tables: Section, name: str, count: int, kind: type) -> np.ndarray | None:
    """Read a table of numbers, one for each token; None if the file has none."""
    table = tables.numbers(name, kind)
    if table is not None and len(table) < count:
        raise tables.error(name, f"expected {count} numbers, one for each token, got {len(table)}")
    return None if table is None else table[:count]


def _special_ids(tables: Section, count: int) -> dict[str, int]:
    """Ids by name; one that the tokenizer does not have, such as -1 as a uint32, means none."""
    defaults = _SENTENCEPIECE_IDS if tables.get("model") == "llama" else {}
    ids = {
        name: tables.integer(f"{middle}_token_id", defaults.get(name, -1), "a token's id")
        for name, middle in _SPECIAL.items()
    }
    return {name: i for name, i in ids.items() if 0 <= i < count}
