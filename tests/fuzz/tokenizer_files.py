"""Tokenizer files with something wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llama_layers.checkpoint import load_tokenizer
from tests.fuzz.mutations import mutated_json, one_of

TEXTS = ["ab <s>12 é", "ab 12 é", "", "  b\n", "<|im_end|>a"]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def _byte_level() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*alphabet, "ab"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def _byte_fallback() -> Any:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "a", "b", "▁"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _files(rng: np.random.Generator) -> dict[str, Any]:
    tokenizer = (_byte_level if rng.random() < 0.5 else _byte_fallback)()
    size = tokenizer.get_vocab_size()
    end = {"content": "</s>", "special": True, "normalized": False}
    added = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False}
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": end,
            "chat_template": TEMPLATE if rng.random() < 0.5 else named,
            "added_tokens_decoder": {str(size): added},
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": end, "unk_token": None},
        "added_tokens.json": {"<|im_end|>": size},
    }


def mutated(rng: np.random.Generator, directory: Path) -> Path:
    """A directory with some of the files a tokenizer has, one of them wrong."""
    files = _files(rng)
    wrong = one_of(rng, list(files))
    for name, content in files.items():
        if name in ("tokenizer.json", wrong) or rng.random() < 0.5:
            text = mutated_json(rng, content) if name == wrong else json.dumps(content).encode()
            (directory / name).write_bytes(text)
    return directory


def run(path: Path) -> bool:
    """Use what is there; whether all of it worked. An AssertionError if it was read wrongly."""
    try:
        tokenizer = load_tokenizer(path)
        found = [tokenizer.encode(text) for text in TEXTS]
        for ids in found:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(tokenizer.stream(iter(ids))) == decoded, (ids, decoded)
        tokenizer.apply_chat_template(TALK)
    except (ValueError, TypeError, OSError):
        return False
    plain = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    drawn = getattr(plain.model, "dropout", None)  # merges are left out at random
    for text, ids in zip(TEXTS, found, strict=True):
        if not drawn and "<" not in text:  # the files beside it may add special tokens
            assert ids == plain.encode(text).ids, text
    return True
