"""Tokenizers of GGUF files, which llama.cpp defines."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import convert, load_tokenizer
from tests.support import gguf_files, tiny
from tests.support.gguf_vocabularies import (
    CONTROL,
    NORMAL,
    PIECES,
    TOKENS,
    TYPES,
    UNUSED,
    USER_DEFINED,
    byte_pairs,
    sentence_pieces,
    tokenizer_of,
    words_of,
    write,
)


@pytest.fixture
def read(tmp_path):
    """The tokenizer of a vocabulary."""
    return partial(tokenizer_of, tmp_path / "m.gguf")


# --- llama.cpp's own vocabularies


def test_vocabularies_of_llama_cpp(vocab):
    inputs = sorted(vocab.glob("*.gguf.inp"))
    assert inputs
    for file in inputs:
        texts = file.read_bytes().decode()
        texts = texts.split("\n__ggml_vocab_test__\n")
        lines = file.with_suffix(".out").read_text().split("\n")
        assert len(texts) == len(lines) > 40
        tokenizer = load_tokenizer(file.with_suffix(""))
        for text, line in zip(texts, lines, strict=True):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == [int(i) for i in line.split()], (file.name, text)
            assert tokenizer.decode(ids) == text, file.name


@pytest.mark.filterwarnings("ignore:.*missing tokenizer.ggml.pre")
def test_published_metadata(corpus, tmp_path):
    """Of whatever architecture, as far as the log tells the tokenizer's model."""
    files = sorted((corpus / "gguf_log").glob("*.json"))
    assert files
    for number, log in enumerate(map(gguf_files.read_log, files)):
        # One log has a line break written out after it.
        model = re.match(r"\w*", log.get("tokenizer.ggml.model", ("str", ""))[1])[0]
        single = {key: value for key, value in log.items() if not value[0].startswith("arr")}
        own = {key: single[key] for key in single if key.startswith("tokenizer.")}
        if not model:
            continue
        words = gguf_files.vocabulary(model, 3)
        count = len(words["tokenizer.ggml.tokens"][1])
        own |= {key: (own[key][0], count - 1) for key in own if key.endswith("_token_id")}
        own |= {"tokenizer.ggml.model": ("str", model)} | words
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(gguf_files.encode(own).content)
        tokenizer = load_tokenizer(file)
        for text in ("the  thin hen\n", "12 \u00e9\u4e2d\U0001f600"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text, files[number]
        adds = log.get("tokenizer.ggml.add_bos_token", ("bool", model == "llama"))[1]
        adds |= own.get("tokenizer.ggml.pre") == ("str", "llama-bpe")
        assert tokenizer.encode("in")[:-1][:1] == [count - 1] * adds, files[number]
        template = log.get("tokenizer.chat_template", (None, None))[1]
        assert tokenizer.chat_template == template


# --- byte pairs


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("ab", [8]),
        ("ab ab", [8, 9]),
        ("12", [5, 6]),  # the merge "1 2" never applies: digits stand alone
        ("ab<s>ab", [8, 0, 8]),  # the name of a special token is that token
        ("<tool>a", [2, 3]),
        ("", []),
    ],
)
def test_byte_pairs(tmp_path, text, ids):
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), metadata=tiny.TOKENIZER)
    tokenizer = load(file).tokenizer
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


# From llama.cpp's table of names: how "12 ab" is cut, whether a token that no merge makes is
# found, and whether texts begin with bos where the file does not say.
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm", ["1", "2", " ab"]),
        ("gpt-2", ["12", " ab"]),
        ("default", ["12", " ab"]),
        ("qwen2", ["1", "2", " ab"]),
        ("llama-bpe", ["<s>", "12", " ab"]),
        ("tekken", ["<s>", "1", "2", " ab"]),
        ("deepseek-coder", ["1", "2", " ab"]),
        ("deepseek-llm", ["12", " ab"]),
        ("deepseek-v3", ["12", " ab"]),
    ],
)
def test_names_of_pre_tokenizers(read, name, words):
    assert words_of(read(byte_pairs(pre=name)), "12 ab") == words


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        *((name, [8]) for name in ("llama-bpe", "glm4", "minicpm5", "tekken")),
        *((name, [3, 4]) for name in ("dbrx", "gpt-2", "qwen2", "smollm", "gpt-4o", "bloom")),
    ],
)
def test_tokens_that_no_merge_makes(read, name, ids):
    tokenizer = read(byte_pairs(pre=name, merges=["1 2"]))
    assert tokenizer.encode("ab", add_special_tokens=False) == ids


def test_the_first_of_two_equal_merges_counts(read):
    tables = byte_pairs(tokens="a b c ab bc".split(), token_type=[NORMAL] * 5)
    tokenizer = read(tables | {"merges": ["a b", "b c", "a b"]})
    assert words_of(tokenizer, "abc") == ["ab", "c"]


def test_no_pre_tokenizer_is_named(read):
    with pytest.warns(UserWarning, match="missing tokenizer.ggml.pre"):
        tokenizer = read(byte_pairs(pre=None))
    assert words_of(tokenizer, "12 ab") == ["12", " ab"]


def test_tokens_that_look_like_bytes(read):
    """DeepSeek's ü is a token of its own; as the character of a byte it would be no text."""
    others = [char for char in gguf_files.BYTES if char not in "üé"]
    tables = byte_pairs(
        tokens=[*others, "ü", "é", "Ġx"],
        token_type=[NORMAL] * 254 + [USER_DEFINED, CONTROL, USER_DEFINED],
        merges=[],
    )
    tokenizer = read(tables)
    for text in ("über", "café Ġx", "à 中"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("üéĠx") == [254, 255, 256]


def test_control_tokens_by_name(read):
    """llama.cpp knows what ends a turn, whatever its type is."""
    tokens = [*TOKENS, "<|im_end|>", "<other>"]
    tokenizer = read(byte_pairs(tokens=tokens, token_type=[*TYPES, NORMAL, NORMAL]))
    assert tokenizer.encode("a<|im_end|>") == [3, 12]
    assert tokenizer.encode("<other>b") == [4]  # it is spelled, and no other letter is a token
    assert "".join(tokenizer.stream([3, 12, 4, 2])) == "ab<tool>"


def test_no_types(read):
    tokenizer = read(byte_pairs(token_type=None))
    assert tokenizer.encode("ab<s>") == [8]  # again no other letter is a token
    assert tokenizer.encode("ab</s>") == [8, 1]


def test_empty_tokens(read):
    tokenizer = read(byte_pairs(tokens=["" if t == "<pad>" else t for t in TOKENS] + [""],
                                token_type=[*TYPES, UNUSED]))  # fmt: skip
    assert tokenizer.encode("ab") == [8]


def test_phi3_takes_white_space_after_special_tokens(read):
    tables = byte_pairs() | {"general.name": "Phi-3 mini"}
    assert read(tables).encode("<tool> a<s> a") == [2, 3, 0, 7, 3]
    assert read(byte_pairs()).encode("<tool> a") == [2, 7, 3]


# --- special tokens and chat templates


def test_special_tokens(read):
    ids = {"bos_token_id": 0, "eos_token_id": 1, "unknown_token_id": 12, "padding_token_id": 11}
    assert read(byte_pairs(**ids)).special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"
    }  # fmt: skip
    assert read(byte_pairs(bos_token_id=2**32 - 1, eos_token_id=None)).special_tokens == {}


def test_chat_templates(read):
    chat, key = [{"role": "user", "content": "hi"}], "tokenizer.chat_template"
    one = byte_pairs() | {key: "{{ bos_token }}{{ messages[0].content }}"}
    assert read(one).apply_chat_template(chat) == "<s>hi"
    assert read(byte_pairs()).chat_template is None
    several = one | {f"{key}.loud": "HI", "tokenizer.chat_templates": ["loud"]}
    tokenizer = read(several)
    assert tokenizer.apply_chat_template(chat) == "<s>hi"
    assert tokenizer.apply_chat_template(chat, chat_template="loud") == "HI"


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({"add_bos_token": True}, [0, 8]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 8, 1]),
        ({"add_bos_token": False, "pre": "llama-bpe"}, [8]),
        ({"pre": "llama-bpe", "bos_token_id": None}, [8]),
        ({"pre": "llama-bpe", "bos_token_id": 2**32 - 1}, [8]),
    ],
)
def test_ends(read, changes, ids):
    assert read(byte_pairs(**changes)).encode("ab") == ids


# --- files that are malformed, or of kinds that are not known

# llama.cpp writes "none" where there is no vocabulary (LLAMA_VOCAB_TYPE_NONE).
BAD = [
    (
        byte_pairs,
        {"model": "t5"},
        "model: expected 'llama' or 'gpt2', got 't5'; load the model from",
    ),
    (byte_pairs, {"model": None}, "missing tokenizer.ggml.model: this file has no tokenizer$"),
    (byte_pairs, {"model": "none"}, "ggml.model is 'none': this file has no tokenizer$"),
    (byte_pairs, {"model": 3}, "model: expected 'llama' or 'gpt2', got 3"),
    (
        byte_pairs,
        {"pre": "kimi-k2"},
        "pre: expected a known way .* got 'kimi-k2'; load the model from",
    ),
    (byte_pairs, {"pre": 7}, "pre: expected a known way .* got 7"),
    (byte_pairs, {"pre": ["qwen2"]}, "pre: expected a known way .* got an array of 1 strings"),
    (byte_pairs, {"tokens": None}, "missing tokenizer.ggml.tokens"),
    (byte_pairs, {"tokens": 5}, "tokens: expected an array of strings, got 5"),
    (byte_pairs, {"tokens": "ab"}, "tokens: expected an array of strings, got 'ab'"),
    (byte_pairs, {"tokens": [1, 2]}, "tokens: expected an array of strings"),
    (byte_pairs, {"tokens": [*TOKENS[:-1], "a"]}, "tokens: .* different tokens, got 'a' twice"),
    (byte_pairs, {"token_type": 5}, "token_type: expected an array of numbers"),
    (byte_pairs, {"token_type": [0.5] * 12}, "token_type: expected an array of numbers"),
    (byte_pairs, {"token_type": TOKENS}, "token_type: expected an array of numbers"),
    (byte_pairs, {"token_type": TYPES[:-1]}, "token_type: expected 12 numbers, .* got 11"),
    (byte_pairs, {"merges": None}, "missing tokenizer.ggml.merges"),
    (byte_pairs, {"merges": 3}, "merges: expected an array of strings, got 3"),
    (byte_pairs, {"merges": [1, 2]}, "merges: expected an array of strings"),
    (byte_pairs, {"merges": ["ab"]}, "merges: expected two tokens .* got 'ab'"),
    (byte_pairs, {"merges": ["b a"]}, "merges: expected two tokens .* got 'b a'"),
    (byte_pairs, {"merges": ["zz qq"]}, "merges: expected two tokens .* got 'zz qq'"),
    (byte_pairs, {"add_bos_token": 1}, "add_bos_token: expected true or false, got 1"),
    (byte_pairs, {"add_bos_token": True, "bos_token_id": None}, "bos_token_id: expected .*None"),
    (byte_pairs, {"add_eos_token": True, "eos_token_id": 12}, "eos_token_id: expected .* got 12"),
    (byte_pairs, {"unknown_token_id": "x"}, "unknown_token_id: expected a token's id, got 'x'"),
    (byte_pairs, {"tokenizer.chat_template": 3}, "template 'default': expected a text, got 3"),
    (sentence_pieces, {"scores": [0.0] * 3}, "scores: expected 261 numbers, .* got 3"),
    (sentence_pieces, {"scores": "x"}, "scores: expected an array of numbers"),
    (sentence_pieces, {"scores": [float("nan")] * 261}, "scores: expected numbers, got nan"),
    (sentence_pieces, {"add_space_prefix": "x"}, "add_space_prefix: expected true or false"),
]


@pytest.mark.parametrize(("tables", "changes", "message"), BAD)
def test_malformed(tmp_path, tables, changes, message):
    tables = tables() if tables is byte_pairs else tables(["a", "b"])
    kept = {key: value for key, value in (tables | changes).items() if value is not None}
    file = write(tmp_path / "m.gguf", **kept)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: .*{message}") as caught:
        load_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_wrong_names_the_file(tmp_path):
    file = write(tmp_path / "m.gguf", **byte_pairs(), **{"tokenizer.chat_template": "a\n{% b %}"})
    message = f"^{re.escape(str(file))}: chat_template: line 2: TemplateSyntaxError: "
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(file).apply_chat_template([{"role": "user", "content": "a"}])


# --- converted to files of Hugging Face


def converted(tmp_path, tables):
    metadata = {key if "." in key else f"tokenizer.ggml.{key}": v for key, v in tables.items()}
    vocab = len(tables["tokens"])
    config = tiny.replace(tiny.CONFIG, vocab_size=vocab)
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(config), config, metadata=metadata)
    return convert(file, tmp_path / "out")


def test_converted_byte_pairs(tmp_path):
    path = converted(tmp_path, byte_pairs(add_bos_token=True, padding_token_id=2**32 - 1))
    tokenizer = load(path).tokenizer
    assert tokenizer.encode("ab 12<tool>") == [0, 8, 7, 5, 6, 2]
    assert tokenizer.decode([0, 8, 7, 5, 6, 2]) == "<s>ab 12<tool>"
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert not {"pad_token", "chat_template"} & config.keys()
    assert config["model_max_length"] == 64


def test_converted_sentence_pieces(tmp_path):
    key = "tokenizer.chat_template"
    path = converted(tmp_path, sentence_pieces(PIECES) | {key: "yes", f"{key}.other": "no"})
    tokenizer = load(path).tokenizer
    assert tokenizer.encode("hello é") == [1, 268, 259, 198, 172]
    talk = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(talk) == "yes"
    assert tokenizer.apply_chat_template(talk, chat_template="other") == "no"


def test_equal_scores_are_not_converted(tmp_path):
    """tokenizer.json lists merges, of which the first applies first, not the leftmost."""
    tables = sentence_pieces(["a", "b", "c", "ab", "bc"], [0, -1, -2, -3, -3])
    with pytest.warns(UserWarning, match="no tokenizer is written: .*scores that are equal"):
        path = converted(tmp_path, tables)
    assert not list(path.glob("tokenizer*"))
