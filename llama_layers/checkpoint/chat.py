"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llama_layers.errors import CheckpointError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """A conversation rendered by a template, which comes with the weights and is not trusted.

    It runs in jinja2's sandbox for immutable data, with the names that templates on Hugging Face
    count on.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except Exception as error:  # a template is a program, and can raise anything
        raise CheckpointError(f"chat_template: {type(error).__name__}: {error}") from None


def _refuse(reason: str) -> NoReturn:
    """What a template calls for a conversation that it does not know how to render."""
    raise ValueError(reason)
