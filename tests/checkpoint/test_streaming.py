"""Streamed text is the text of all ids, whatever the ids and whatever the decoder."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llama_layers.checkpoint import Tokenizer

WORDS = ["▁Hello", "▁world", "▁", "▁▁", "é", "\ufffd", "a", "##b", "c</w>"]
SPECIAL = ["<s>", "</s>"]


def with_special_tokens(backend):
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend)


def byte_fallback(dropped=1):
    """As Llama 2 and Mistral have it: a token for each byte, and words."""
    texts = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {text: i for i, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", dropped, 0),
        ]
    )
    return with_special_tokens(backend)


def byte_level():
    """As Llama 3 and Qwen have it: tokens of one byte and of several."""
    alphabet = dict(zip(range(256), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    texts = [*alphabet.values(), *(a + b for a in alphabet.values() for b in "Ãĺą")]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, []))
    backend.decoder = decoders.ByteLevel()
    return with_special_tokens(backend)


def of_words(decoder):
    backend = tokenizers.Tokenizer(models.WordLevel({text: i for i, text in enumerate(WORDS)}))
    backend.decoder = decoder
    return with_special_tokens(backend)


TOKENIZERS = {
    "byte fallback": byte_fallback(),
    "byte level": byte_level(),
    "several spaces dropped": byte_fallback(dropped=3),
    "metaspace": of_words(decoders.Metaspace()),
    "word pieces": of_words(decoders.WordPiece()),
    "word ends": of_words(decoders.BPEDecoder()),
    "no decoder": of_words(None),
}
BYTES = {
    "byte fallback": TOKENIZERS["byte fallback"]._backend.token_to_id,
    "byte level": TOKENIZERS["byte level"]._backend.token_to_id,
}


def byte_ids(name, data):
    """The ids of single bytes."""
    if name == "byte fallback":
        return [BYTES[name](f"<0x{byte:02X}>") for byte in data]
    table = byte_level_letters()
    return [BYTES[name](table[byte]) for byte in data]


def byte_level_letters():
    """GPT-2's letter for each byte: the printable ones stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in own)
    return {b: chr(b) for b in own} | {b: chr(256 + n) for n, b in enumerate(others)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_pieces_are_the_text(name, data):
    tokenizer = TOKENIZERS[name]
    size = tokenizer._backend.get_vocab_size()
    ids = st.integers(0, size + 3)  # and some that it does not have
    if size > 256:  # words and special tokens among the bytes
        ids = st.one_of(ids, st.integers(256, size - 1))
    ids = data.draw(st.lists(ids, max_size=24))
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte fallback", "byte level"])
@given(text=st.text(max_size=12), cut=st.integers(0, 3))
def test_text_by_its_bytes(name, text, cut):
    data = text.encode()
    data = data[: max(0, len(data) - cut)]
    expected = data.decode(errors="replace")
    if name == "byte fallback":  # all of a run of bytes or none; and a first space is dropped
        valid = data.decode(errors="ignore").encode() == data
        expected = (expected if valid else "\ufffd" * len(data)).removeprefix(" ")
    assert "".join(TOKENIZERS[name].stream(byte_ids(name, data))) == expected


def test_characters_come_when_they_are_whole():
    ids = byte_ids("byte level", "aé🙂".encode())
    read = []

    def given_out():
        for i in ids:
            read.append(i)
            yield i

    pieces = TOKENIZERS["byte level"].stream(given_out())
    seen = [(next(pieces), len(read)) for _ in range(3)]
    assert seen == [("a", 1), ("é", 3), ("🙂", 7)]
    words = TOKENIZERS["byte fallback"]
    hello, world = (words._backend.token_to_id(word) for word in ("▁Hello", "▁world"))
    assert list(words.stream([hello, world])) == ["Hello", " world"]


@pytest.mark.parametrize(
    ("ids", "text"),
    [  # ids are bytes and words; the text is that of the tokenizers package for all of them
        ([0x0A, 0xF0, 0x9F, "▁Hello", "▁world"], "\ufffd\ufffd\ufffd Hello world"),
        ([0xC3, 0xA9, 0x80, "▁Hello"], "\ufffd\ufffd\ufffd Hello"),
        (["▁Hello", 0xF0, 0x9F, 0x98], "Hello\ufffd\ufffd\ufffd"),
        (["▁Hello", 0xC3, "<s>", 0xA9], "Helloé"),
        (["<s>", "▁world", "</s>", "▁Hello"], "world Hello"),
        (["▁", "▁world", "▁", "▁", "▁Hello"], " world   Hello"),
    ],
)
def test_byte_fallback(ids, text):
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer._backend.token_to_id(i) if isinstance(i, str) else i for i in ids]
    assert "".join(tokenizer.stream(ids)) == text


def test_only_what_is_new_is_decoded():
    """The work of a piece does not grow with the text before it."""
    decoded = []

    class Counting(Tokenizer):
        def decode(self, ids, /, **options):
            decoded.append(len(ids))
            return super().decode(ids, **options)

    tokenizer = Counting(byte_level()._backend)
    assert "".join(tokenizer.stream([70] * 1000)) == tokenizer.decode([70] * 1000)
    assert max(decoded[:-1]) <= 4
