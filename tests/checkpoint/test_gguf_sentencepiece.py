"""Tokenizers of GGUF files with SentencePiece vocabularies, which merge by score."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.checkpoint import load_tokenizer
from tests.support.gguf_vocabularies import (
    BYTE,
    BYTES,
    PIECES,
    USER_DEFINED,
    sentence_pieces,
    tokenizer_of,
    words_of,
    write,
)


@pytest.fixture
def read(tmp_path):
    """The tokenizer of a vocabulary."""
    return partial(tokenizer_of, tmp_path / "m.gguf")


def merged(text, ids, scores):
    """What llama.cpp does, as slowly as it can be done."""
    pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [a + b for a, b in pairwise(pieces)]
        found = [(scores[ids[pair]], -i) for i, pair in enumerate(pairs) if pair in ids]
        if not found:
            break
        i = -max(found)[1]
        pieces[i : i + 2] = [pairs[i]]
    spelled = [[p] if p in ids else [BYTES[b] for b in p.encode()] for p in pieces]
    return [ids[token] for tokens in spelled for token in tokens]


WORDS = st.text("▁abé", min_size=1, max_size=5) | st.text("▁", min_size=2, max_size=9)
LETTERS = list("▁abé")


@st.composite
def scored(draw):
    """Words with scores: all different, some equal, or equal for the runs of spaces alone."""
    letters = draw(st.sampled_from([LETTERS, LETTERS, []]))
    words = draw(st.lists(WORDS, min_size=1, max_size=20, unique=True))
    words = list(dict.fromkeys([*letters, *words]))
    scores = list(draw(st.permutations(range(-len(words), 0))))
    kind = draw(st.sampled_from(["different", "equal", "runs"]))
    if kind == "equal":
        scores = draw(st.lists(st.integers(-3, 0), min_size=len(words), max_size=len(words)))
    if kind == "runs":
        scores = [-1000 if set(w) == {"▁"} else s for w, s in zip(words, scores, strict=True)]
    return words, scores


@given(scored(), st.lists(st.text(" abé", max_size=30), min_size=1, max_size=10))
def test_the_highest_score_is_merged_first_and_of_two_the_leftmost(tmp_path_factory, found, texts):
    words, scores = found
    tables = sentence_pieces(words, scores)
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("spm") / "m.gguf", **tables))
    ids = {token: i for i, token in enumerate(tables["tokens"])}
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded == merged(text, ids, tables["scores"])
        if "▁" in words:  # or else spaces are spelled in bytes, which are not read as spaces
            assert tokenizer.decode(encoded) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", ["<s>", "▁hello"]),
        ("hello hello", ["<s>", "▁hello", "▁hello"]),
        ("", ["<s>"]),
        (" ", ["<s>", "▁", "▁"]),
        ("</s>hello", ["<s>", "</s>", "▁hello"]),  # each part gets a space before it
        ("ll<s> ll", ["<s>", "▁", "ll", "<s>", "▁", "▁", "ll"]),
        ("<unk>hell", ["<s>", "<unk>", "▁hell"]),
        ("<tool>ll", ["<s>", "<tool>", "▁", "ll"]),
        ("é", ["<s>", "▁", "<0xC3>", "<0xA9>"]),
        ("▁he", ["<s>", "▁", "▁he"]),
        ("<0x41>", ["<s>", "▁", *(f"<0x{ord(c):02X}>" for c in "<0x41>")]),
    ],
)
def test_sentence_pieces(read, text, words):
    tables = sentence_pieces([*PIECES, "<tool>"])
    tables["token_type"][-1] = USER_DEFINED
    ids = {token: i for i, token in enumerate(tables["tokens"])}
    tokenizer = read(tables)
    assert tokenizer.encode(text) == [ids[word] for word in words]
    tokenizer = read(tables | {"add_space_prefix": False, "add_bos_token": False})
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_runs_of_spaces(read):
    """Llama 2 has them with one score for all: from the left, each as long as it can be."""
    tokenizer = read(sentence_pieces(["▁", "▁▁", "▁▁▁"], [0, -9, -9]))
    assert tokenizer.encode(4 * " ", add_special_tokens=False) == [261, 260]


def test_user_defined_tokens_with_spaces(read):
    """The mark of a space is not in the text that they are sought in, but in what is merged."""
    tables = sentence_pieces(PIECES)
    tables["token_type"][tables["tokens"].index("▁he")] = USER_DEFINED
    assert words_of(read(tables), "hello he") == ["<s>", "hello", "he"]
    assert read(tables).encode("hello he")[-1] == tables["tokens"].index("▁he")


def test_ends_of_sentence_pieces(read):
    words = [*PIECES, "<end>"]
    assert read(sentence_pieces(words, add_bos_token=False)).encode("") == []
    assert read(sentence_pieces(words, add_eos_token=True)).encode("") == [1, 2]
    ends = {"bos_token_id": 259, "eos_token_id": 269, "add_eos_token": True}
    assert read(sentence_pieces(words, **ends)).encode("") == [259, 269]
    assert read(sentence_pieces(words)).special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"
    }  # fmt: skip


def test_an_unknown_character(read):
    tables = sentence_pieces(PIECES)
    kept = [i for i, kind in enumerate(tables["token_type"]) if kind != BYTE]
    few = {name: [tables[name][i] for i in kept] for name in ("tokens", "token_type", "scores")}
    assert read(tables | few).encode("héèh", add_special_tokens=False) == [3, 4, 0, 4]


def test_no_scores(read):
    """All are 0 then, so that the leftmost pair is merged first."""
    tables = sentence_pieces(["a", "b", "c", "bc", "ab"])
    del tables["scores"]
    assert words_of(read(tables), "abc", add_special_tokens=False)[-2:] == ["ab", "c"]
    assert read(tables | {"add_space_prefix": False}).encode("") == [1]
