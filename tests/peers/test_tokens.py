"""Tokens and templates from the files beside tokenizer.json: what transformers makes of them."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken

from llama_layers.checkpoint import load_tokenizer

pytestmark = pytest.mark.peer

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")
SHOW = " ".join(f"{{{{ {name}_token if {name}_token is defined else '-' }}}}" for name in NAMES)
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
OBJECT = PLAIN | {"content": "<s>", "__type": "AddedToken"}
DECODER = {
    "5": PLAIN | {"content": "<s>", "special": True, "rstrip": True},
    "6": PLAIN | {"content": "<l>", "special": False, "lstrip": True},
    "7": PLAIN | {"content": "ab", "special": False, "single_word": True},
    "8": PLAIN | {"content": "<e>", "special": True},
}
NAMED = [{"name": "default", "template": SHOW}, {"name": "tool_use", "template": "T"}]

FILES = {
    "no other file": {},
    "strings": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "<e>", "pad_token": None}},
    "objects": {"tokenizer_config": {"bos_token": OBJECT, "mask_token": "a"}},
    "a map": {"special_tokens_map": {"bos_token": PLAIN | {"content": "<s>"}, "eos_token": "<e>"}},
    "both": {
        "tokenizer_config": {"bos_token": "<s>", "unk_token": "<u>"},
        "special_tokens_map": {"bos_token": "<e>", "sep_token": "<e>"},
    },
    "a map that does not count": {
        "tokenizer_config": {"bos_token": "<s>", "added_tokens_decoder": DECODER},
        "special_tokens_map": {"bos_token": "<e>", "sep_token": "<e>"},
    },
    "added tokens": {
        "added_tokens": {"<e>": 6, "<l>": 7, "a": 0},
        "special_tokens_map": {"eos_token": "<e>"},
    },
    "added tokens and others": {
        "added_tokens": {"<l>": 6},
        "tokenizer_config": {"pad_token": "<e>", "bos_token": "ab", "image_token": "<i>"},
    },
    "flags": {"tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": DECODER}},
    "more special tokens": {
        "tokenizer_config": {"additional_special_tokens": ["<l>", "<e>"], "bos_token": "<s>"}
    },
    "more special tokens with names": {
        "tokenizer_config": {"extra_special_tokens": {"image_token": "<i>"}, "bos_token": "<s>"}
    },
    "named templates": {"tokenizer_config": {"chat_template": NAMED, "bos_token": "<s>"}},
}


@pytest.mark.parametrize("files", FILES)
def test_the_same_files(tmp_path, files):
    vocabulary = {letter: i for i, letter in enumerate("abcde")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in FILES[files].items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if files != "named templates":
        (tmp_path / "chat_template.jinja").write_text(SHOW)
    ours = load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "a"}]
    if files != "no other file":  # where ours reads tokenizer.json for them
        assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk, tokenize=False)
    for text in ("<s>  a", "a  <l>a", "ab abc", "a<e>b", "<i><u><e><l>", "e d ab", "<s> ab<s>"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
