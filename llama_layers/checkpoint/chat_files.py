"""Where a Hugging Face directory keeps its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_layers.errors import CheckpointError
from llama_layers.files.json_files import read_json_if_there

MORE_TEMPLATES = "additional_chat_templates"


class ChatTemplates(NamedTuple):
    """A chat template, several by name, or None; and the file that each text comes from."""

    templates: str | Mapping[str, str] | None
    files: Mapping[str, Path]


def read_chat_templates(directory: Path) -> ChatTemplates:
    """Read the chat template, or several by name.

    They are files of their own in newer checkpoints. Only where there is no such file, they are
    in tokenizer_config.json, or else in chat_template.json, where processors of images once had
    theirs.
    """
    own = directory / "chat_template.jinja"
    files = {"default": own} if own.is_file() else {}
    files |= {file.stem: file for file in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        templates = {name: _text(file) for name, file in files.items()}
        alone = list(templates) == ["default"]
        return ChatTemplates(
            templates["default"] if alone else templates,
            {text: files[name] for name, text in templates.items()},
        )
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = directory / name
        content = read_json_if_there(file, CheckpointError)
        if (template := content.get("chat_template")) not in (None, [], {}):
            return in_one_file(file, _checked(file, template))
    return ChatTemplates(None, {})


def in_one_file(file: Path, templates: str | Mapping[str, str] | None) -> ChatTemplates:
    """Templates that all come from one file."""
    texts = [templates] if isinstance(templates, str) else (templates or {}).values()
    return ChatTemplates(templates, dict.fromkeys(texts, file))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: expected UTF-8: {error}") from None


def _checked(file: Path, template: Any) -> str | dict[str, str]:
    if isinstance(template, str):
        return template
    pairs: list[tuple[Any, Any]] = []
    if isinstance(template, list):  # of objects with a name and a template
        pairs = [(e.get("name"), e.get("template")) for e in template if isinstance(e, dict)]
    elif isinstance(template, dict):
        pairs = list(template.items())
    texts = all(isinstance(text, str) for pair in pairs for text in pair)
    if not pairs or not texts or len(dict(pairs)) != len(template):
        raise CheckpointError(
            f"{file}: chat_template: expected a text, or several with different names, "
            f"got {template!r}"
        )
    return dict(pairs)
