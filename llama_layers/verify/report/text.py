"""A report's blocks as plain text."""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from llama_layers.verify.report.blocks import Block, Cause, Headline, Panel, Sentences, Table
from llama_layers.verify.report.template import render


class Readable(ABC):
    """A result that consists of blocks, and so can be read."""

    @abstractmethod
    def blocks(self) -> list[Block]:
        """Return the parts, the verdict first.

        Returns
        -------
        list of Block
            For a renderer.
        """

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """The blocks in a notebook."""
        return render("notebook", self.blocks())

    def text(self, *, every: bool = False, width: int = 80) -> str:
        """Return all of it as plain text for people to read.

        Parameters
        ----------
        every : bool, optional
            Whether to print a line for each site, not only for each role.
        width : int, optional
            How many columns the lines may take, where they can be broken.

        Returns
        -------
        str
            Without a line break at the end.
        """
        return render_text(self.blocks(), every=every, width=width)


def render_text(blocks: Iterable[Block], *, every: bool, width: int) -> str:
    """Render blocks, an empty line between them; long tables only if `every` is set."""
    return "\n\n".join(filter(None, (_rendered(block, every, width) for block in blocks)))


def _rendered(block: Block, every: bool, width: int) -> str:
    match block:
        case Headline():
            return _wrapped(str(block), width)
        case Cause():
            details = (_wrapped(s, width, "  ") for s in block.sentences if s)
            return "\n".join((_wrapped(block.title, width), *details))
        case Sentences():
            return "\n".join(_wrapped(sentence, width) for sentence in block.sentences)
        case Table() if every or not block.long:
            remark = f"\n{_wrapped(block.remark, width)}" if block.remark else ""
            return _table(block.rows, block.left) + remark
        case Panel():
            return render_text(block.blocks, every=every, width=width)
    return ""  # for the page alone


def _wrapped(text: str, width: int, indent: str = "") -> str:
    """Break a paragraph into lines, all but the first indented. No word is broken."""
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Align rows in columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
