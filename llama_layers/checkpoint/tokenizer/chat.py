"""Chat templates: read from files, and applied to a conversation."""

from __future__ import annotations

import datetime
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llama_layers.errors import CheckpointError
from llama_layers.files.json_files import read_json_if_there

MORE_TEMPLATES = "additional_chat_templates"

# Names of the text that a model thinks before it answers; the first that is there counts.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Options that transformers' method keeps from templates, since they change what it returns.
_OPTIONS_ELSEWHERE = """
continue_final_message tokenize sanitize_control_tokens padding truncation max_length return_tensors
return_dict return_assistant_tokens_mask tokenizer_kwargs
""".split()


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


def chosen_template(
    templates: str | Mapping[str, str] | None, name: str | None, *, tools: bool
) -> str:
    """The template of a name, or the one that a conversation with or without tools asks for."""
    if templates is None:
        raise CheckpointError(
            "chat_template: this checkpoint has none; it is not a chat model, and continues "
            "a text given without one"
        )
    named = {"default": templates} if isinstance(templates, str) else templates
    if name is None:
        name = "tool_use" if tools and "tool_use" in named else "default"
        if name not in named:
            raise CheckpointError(
                f"chat_template: this checkpoint has several and no default; "
                f"name one of {', '.join(sorted(named))}"
            )
    elif name not in named:
        one_of = "one of " if len(named) > 1 else ""
        raise ValueError(
            f"chat_template: expected {one_of}{', '.join(sorted(named))}, got {name!r}"
        )
    return named[name]


def render_chat(
    template: str,
    file: Path | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
) -> str:
    """A conversation rendered by a template, which sees what transformers gives it.

    It runs in a sandbox, with plain copies of what the caller passed. Errors name the file that
    the template comes from, if it comes from one.
    """
    from llama_layers.checkpoint.tokenizer.sandbox import Sandbox  # jinja2 takes time to load

    for name, given in (("messages", messages), ("tools", tools), ("documents", documents)):
        _check_mappings(name, given)
    if not messages:
        raise ValueError("messages: expected one or more, got none")
    if asked := [name for name in _OPTIONS_ELSEWHERE if variables.get(name)]:
        raise TypeError(f"{asked[0]}: transformers' option is not supported, and not a variable")
    sandbox = Sandbox()
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        seen = _plain({**special_tokens, **variables, "tools": tools, "documents": documents})
        seen["messages"] = [_message(message) for message in messages]
        return sandbox.text(template, seen)
    except Exception as error:  # a template is a program, and can raise anything
        place = "chat_template: " if file is None else f"{file}: chat_template: "
        raise CheckpointError(f"{place}{_said(error)}") from None


def _said(error: Exception) -> str:
    """Say what went wrong in a template, and in which line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    line = getattr(error, "lineno", lines[-1] if lines else None)  # of TemplateSyntaxError
    said = getattr(error, "message", None) or error  # jinja2's own, without the source
    return f"{'' if line is None else f'line {line}: '}{type(error).__name__}: {said}"


def _check_mappings(name: str, values: object) -> None:
    """Raise TypeError unless values are a sequence of mappings: not one text or one message."""
    if values is None and name != "messages":
        return
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{name}: expected a sequence of mappings, got {type(values).__name__}")
    for value in values:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: expected mappings, got {type(value).__name__}")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without nulls, and with its thoughts under two names."""
    plain: dict[str, Any] = _plain(
        {key: value for key, value in message.items() if value is not None}
    )
    thought = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if thought is None:
        return plain
    return {"thinking": thought, **plain, "reasoning_content": thought}


def _plain(value: object) -> Any:
    """A copy made of JSON's types, so that a template reaches no method of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy
        return _plain(value.item())
    return f"<{type(value).__name__}>"  # an image, say: templates only look whether it is there


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: str | int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes of HTML that jinja2's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(reason: str) -> NoReturn:
    """Raise ValueError: templates call this for a conversation that they cannot render."""
    raise ValueError(reason)
