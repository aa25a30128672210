"""How a mistake of the zoo is put into a port."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.zoo.models import Setting
from tests.zoo.port import Port

PLAIN = Setting()


@dataclass(frozen=True)
class Mistake:
    """A mistake, and where it shows first."""

    name: str
    plant: Callable[[Port], None]
    first: str
    """The first site that is wrong in a full trace."""
    setting: Setting
    unseen: str
    """Why logits do not change; empty if they do."""
    dump: Callable[[dict[str, Any]], None] | None = None
    """What it does to the arrays as they are written, if it is a mistake of writing."""

    @property
    def text(self) -> str:
        """What was planted, and where that was reported."""
        return TEXTS[self.name]


MISTAKES: dict[str, Mistake] = {}
TEXTS: dict[str, str] = {
    name: text
    for line in Path(__file__).with_name("LIST.md").read_text().splitlines()
    if (found := re.match(r"- `(\w+)`: (.+)", line))
    for name, text in [found.groups()]
}


# Mistakes at the start of the list of which results were read whatever their names are.
_READ_FROM_START = 41


def seen(name: str) -> bool:
    """Whether a mistake, or what check says of it, was read before names were added.

    Half of the list was, by a checksum of the name; of the other half, the first results of the
    page, and one that an issue discusses.
    """
    half = zlib.crc32(name.encode()) % 2 == 0
    return half or name == "exponential_fast" or list(MISTAKES).index(name) < _READ_FROM_START


def site(short: str) -> str:
    """The name of a site: "0.q_proj" is that of the first layer's queries, "0" its output."""
    layer, _, part = short.partition(".")
    if not layer.isdigit():
        return short if short == "lm_head" else f"model.{short}"
    if not part:
        return f"model.layers.{layer}"
    attention = "q_proj k_proj v_proj q_rope k_rope attention o_proj".split()
    mlp = "gate_proj up_proj act down_proj".split()
    room = "self_attn." if part in attention else "mlp." if part in mlp else ""
    return f"model.layers.{layer}.{room}{part}"


def edit(first: str, setting: Setting = PLAIN, unseen: str = "") -> Callable[..., Any]:
    """A mistake that changes a port's numbers: its weights, its config, its order of layers."""

    def record(body: Callable[[Port], None]) -> Callable[[Port], None]:
        name = body.__name__
        MISTAKES[name] = Mistake(name, body, site(first), setting, unseen)
        return body

    return record


def step(method: str, first: str, setting: Setting = PLAIN, unseen: str = "") -> Callable[..., Any]:
    """A mistake in a step: the body is called with the port, the right step, and its arguments."""

    def record(body: Callable[..., Any]) -> Callable[..., Any]:
        name = body.__name__
        MISTAKES[name] = Mistake(name, partial(put, method, body), site(first), setting, unseen)
        return body

    return record


def dumped(first: str, setting: Setting, unseen: str) -> Callable[..., Any]:
    """A mistake in how arrays are written."""

    def record(body: Callable[..., Any]) -> Callable[..., Any]:
        name = body.__name__
        MISTAKES[name] = Mistake(name, lambda port: None, site(first), setting, unseen, body)
        return body

    return record


def put(method: str, body: Callable[..., Any], port: Port) -> None:
    """Replace a step of a port."""
    setattr(port, method, partial(body, port, getattr(port, method)))
