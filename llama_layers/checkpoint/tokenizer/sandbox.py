"""A sandbox for chat templates, which come with the weights and are not trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Far above what a conversation needs: the longest contexts are some millions of tokens.
MOST_CHARACTERS = 100_000_000
MOST_BITS = 4096
MOST_STEPS = 1_000_000


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering, without a way out and with bounded arithmetic.

    A text, list or integer that an operator would make too large is refused before it is made.
    The steps of loops and the calls of macros are counted.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        del self.globals["lipsum"]  # text of any length, and random
        self._steps = 0

    def text(self, source: str, variables: Mapping[str, Any]) -> str:
        """Render a template."""
        template = self.from_string(_Bounded(self).visit(self.parse(source)))
        pieces, length = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator gives, if it is not too large."""
        if operator == "+":
            _check_length(_length(left) + _length(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif isinstance(left, str):
            _check_widths(left, right)
        return super().call_binop(context, operator, left, right)

    def joined(self, *values: object) -> str:
        """Compute what the operator ``~`` gives."""
        texts = [str(value) for value in values]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def count_step(self) -> None:
        """Count a step of a loop or a call of a macro."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise SecurityError(f"more than {MOST_STEPS} steps of loops and calls of macros")


class _Generation(Extension):
    """``{% generation %}``: marks what the model says, for training; here it is just rendered."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounded(NodeTransformer):
    """Puts calls of the sandbox into a template, where jinja2 itself gives no way to look on."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("joined", node.nodes, node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(self._call("count_step", [], node.lineno), lineno=node.lineno)
        node.body.insert(0, step)
        return node

    def _call(self, name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        method = nodes.EnvironmentAttribute(name)
        call = nodes.Call(method, arguments, [], None, None, lineno=line)
        call.set_environment(self._sandbox)
        return call


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise SecurityError(f"expected at most {MOST_CHARACTERS} characters or items, got {length}")


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise SecurityError(f"expected integers of at most {MOST_BITS} bits, got {bits}")


def _check_product(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int):
        _check_length(left * _length(right))
    elif isinstance(right, int):
        _check_length(_length(left) * right)


def _check_power(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_widths(form: str, values: object) -> None:
    """Refuse to format values with a wide field: ``'%1000000000d' % 1``."""
    widths = [int(digits) for digits in re.findall(r"\d+", form) if len(digits) < 20]
    if "*" in form:  # the width is among the values
        widths += [v for v in (values if isinstance(values, tuple) else ()) if isinstance(v, int)]
    _check_length(max(map(abs, widths), default=0))
