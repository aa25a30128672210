"""Published chat templates and special tokens: the same prompt as from transformers, or refused.

Run with ``pytest --corpus DIR``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers

from llama_layers import CheckpointError
from llama_layers.checkpoint import Tokenizer, load_tokenizer

pytestmark = pytest.mark.peer

USER = {"role": "user", "content": "What is 2 + 2? <é & ü>"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "4."}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "One of them."}},
            "required": ["a"],
        },
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "4"},
]
THINKING = [USER, ANSWER | {"reasoning": "2 and 2 make 4."}, USER]

CONVERSATIONS = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([USER, ANSWER, USER], {}),
    "ended": ([SYSTEM, USER, ANSWER, USER, ANSWER], {"add_generation_prompt": False}),
    "tools": ([USER], {"tools": [ADD]}),
    "called": (CALLING, {"tools": [ADD]}),
    "thought": (THINKING, {}),
    "variable": ([USER], {"enable_thinking": False}),
}

# What a template may name; `is defined` tells an absent token from an empty one.
NAMES = """
bos eos pad unk sep cls mask image boi eoi audio audio_bos audio_eos video vision_bos vision_eos
""".split()
TOKENS_SHOWN = "".join(f"[{{{{ {n}_token is defined }}}} {{{{ {n}_token }}}}]" for n in NAMES)


def templates(corpus: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """The published templates, with the special tokens of those that come with some."""
    found = {file.name: (file.read_text("utf-8"), {}) for file in (corpus / "jinja").iterdir()}
    for file in (corpus / "tokenizer_config").iterdir():
        content = json.loads(file.read_text("utf-8"))
        named = {k: v for k, v in content.items() if k.endswith("_token") and isinstance(v, str)}
        template = content["chat_template"]
        for entry in template if isinstance(template, list) else [{"template": template}]:
            found[f"{file.name} {entry.get('name')}"] = (entry["template"], named)
    return found


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_template_gives_the_same_prompt(corpus, conversation):
    messages, options = CONVERSATIONS[conversation]
    wrong, rendered = [], 0
    for name, (template, tokens) in sorted(templates(corpus).items()):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, **tokens
        )
        ours = Tokenizer(backend, chat_template=template, special_tokens=tokens)
        try:
            expected = theirs.apply_chat_template(
                messages, tokenize=False, **{"add_generation_prompt": True, **options}
            )
            rendered += 1
        except Exception:  # as templates raise
            expected = None
        try:
            prompt = ours.apply_chat_template(messages, **options)
        except CheckpointError:
            prompt = None
        if prompt != expected:
            wrong.append(name)
    assert not wrong
    assert rendered > 20


def byte_level(tokens: dict[int, str]) -> dict[str, object]:
    """The content of a tokenizer.json of single bytes, and of tokens at their ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    free = (i for i in range(10**6) if i not in tokens)
    vocabulary = {text: next(free) for text in sorted(tokenizer.pre_tokenizer.alphabet())}
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = vocabulary | {text: i for i, text in tokens.items()}
    return content


@pytest.mark.parametrize("kind", ["tokenizer_config", "special_tokens_map"])
def test_special_tokens_are_the_same(corpus, tmp_path, kind):
    files = sorted((corpus / kind).iterdir())
    assert len(files) > 20
    for file in files:
        content = json.loads(file.read_text("utf-8"))
        content.pop("chat_template", None)
        tokens = {int(i): t["content"] for i, t in content.get("added_tokens_decoder", {}).items()}
        directory = tmp_path / file.stem
        directory.mkdir()
        (directory / f"{kind}.json").write_text(json.dumps(content), "utf-8")
        (directory / "tokenizer.json").write_text(json.dumps(byte_level(tokens)), "utf-8")
        (directory / "chat_template.jinja").write_text(TOKENS_SHOWN)
        try:
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        except TypeError:  # special tokens as objects in a list, which older versions wrote
            continue
        ours = load_tokenizer(directory)
        expected = theirs.apply_chat_template([USER], tokenize=False)
        assert ours.apply_chat_template([USER]) == expected, file.name
        for text in [*tokens.values(), *theirs.all_special_tokens]:
            line = f"a {text} b{text}c"
            assert ours.encode(line) == theirs.encode(line), (file.name, text)
