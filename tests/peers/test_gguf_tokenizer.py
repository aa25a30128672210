"""Tokenizers of GGUF files against other engines of regular expressions, and transformers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import regex
import tokenizers
import transformers

from llama_layers.checkpoint import convert, load_tokenizer
from llama_layers.checkpoint.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.support import gguf_files, tiny
from tests.support.texts import random_texts

pytestmark = pytest.mark.peer

# llama.cpp's expressions (src/llama-vocab.cpp), by one name of each.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
LEAD = r"[^\r\n\p{L}\p{N}]?"
SYMBOLS, SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LLAMA_CPP = {
    "llama-bpe": [rf"{ENDS}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"],
    "minicpm5": [r"\p{N}{1,3}", rf"{ENDS}|{WORD}|\p{{N}}+|{SYMBOLS}|{SPACES}"],
    "qwen2": [rf"{ENDS}|{WORD}|\p{{N}}|{SYMBOLS}|{SPACES}"],
    "seed-coder": [rf"{ENDS}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"],
    "qwen35": [
        rf"{ENDS}|{LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
    ],
    "tekken": [
        rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}|{SLASHES}|{SPACES}"
    ],
    "gpt-4o": [
        rf"{LEAD}{UPPER}*{LOWER}+{ENDS}?|{LEAD}{UPPER}+{LOWER}*{ENDS}?|\p{{N}}{{1,3}}"
        rf"|{SLASHES}|{SPACES}"
    ],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "superbpe": [r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))"],
    # Written out as ranges, which leave out the mathematical letters of the texts below.
    "deepseek-llm": [
        "[\r\n]", r"\s?(?:(?!\U0001d400)[\p{Lu}\p{Ll}\p{Lt}])+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+",
    ],
    "deepseek-coder": [
        "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|" + SPACES,
    ],
    "bloom": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"],
    "viking": [" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"],
}  # fmt: skip


def cut(texts, pattern):
    """What a pattern matches, and what lies between."""
    pieces = []
    for text in texts:
        ends = {0, len(text)} | {i for found in pattern.finditer(text) for i in found.span()}
        pieces += [text[start:end] for start, end in pairwise(sorted(ends))]
    return pieces


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_how_text_is_cut(name):
    steps = tokenizers.pre_tokenizers
    ours = steps.Sequence(
        [steps.Split(tokenizers.Regex(p), "isolated") for p in PRE_TOKENIZERS[name].patterns]
    )
    patterns = [regex.compile(pattern) for pattern in LLAMA_CPP[name]]
    for text in random_texts(1000):
        pieces = [text]
        for pattern in patterns:
            pieces = cut(pieces, pattern)
        assert [piece for piece, _ in ours.pre_tokenize_str(text)] == pieces, (name, text)


@pytest.mark.parametrize("ends", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_converted_files_in_transformers(tmp_path, model, ends):
    tables = {key: value for key, (_, value) in gguf_files.vocabulary(model, 3).items()}
    count = len(tables["tokenizer.ggml.tokens"])
    metadata = tables | {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": count - 3,
        "tokenizer.ggml.eos_token_id": count - 2,
        "tokenizer.ggml.add_bos_token": ends[0],
        "tokenizer.ggml.add_eos_token": ends[1],
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }
    config = tiny.replace(tiny.CONFIG, vocab_size=count)
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(config), config, metadata=metadata)
    ours = load_tokenizer(file)
    theirs = transformers.AutoTokenizer.from_pretrained(convert(file, tmp_path / "out"))
    assert (theirs.bos_token, theirs.eos_token) == ("<|special_0|>", "<|special_1|>")
    texts = ["the  thin <|special_2|> hen", "", " ", "<|special_0|>in", *random_texts(300)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        plain = ours.encode(text, add_special_tokens=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == plain, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    chat = [{"role": "user", "content": "in"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat)
