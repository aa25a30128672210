"""The parts of a report: their content, without a word on how they look.

`text` and `html` render them. Headings, facts, maps, elements and strips are for the page alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llama_layers.verify.extent import Extent

Rows = Sequence[Sequence[str]]  # the first holds the heads


@dataclass(frozen=True)
class Headline:
    """The verdict, the reason for it in a sentence, and what it is a verdict on."""

    verdict: str
    said: str
    about: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.said}"


@dataclass(frozen=True)
class Heading:
    """The title of the blocks that follow."""

    title: str


@dataclass(frozen=True)
class Cause:
    """A mistake that would explain the first failure: a title, and sentences below it."""

    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Sentences:
    """Sentences, each a paragraph of its own."""

    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers, with a remark below."""

    rows: Rows
    left: Sequence[int] = (0,)  # the columns that are aligned to the left
    remark: str = ""
    histograms: Sequence[Sequence[int]] = ()  # how many elements have which error, for each row
    long: bool = False  # shown on demand only


@dataclass(frozen=True)
class Facts:
    """Terms and what they are."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A site in a map: its verdict, its error over limit if it has one, and both in words."""

    verdict: str
    ratio: float | None
    title: str


@dataclass(frozen=True)
class Map:
    """Roles down, layers across; one cell for a role outside the layers."""

    layers: Sequence[int]
    rows: Mapping[str, Sequence[Cell | None]]

    @property
    def verdicts(self) -> set[str]:
        """The verdicts that occur."""
        return {cell.verdict for row in self.rows.values() for cell in row if cell is not None}


@dataclass(frozen=True)
class Elements:
    """The worst elements of a site, with a remark above."""

    title: str
    rows: Rows
    remark: str = ""
    role: str = ""  # whose cells in a map lead here
    opened: bool = False  # shown without a click


@dataclass(frozen=True)
class Strips:
    """The positions along each axis of an array that have wrong elements."""

    extents: Sequence[Extent]


@dataclass(frozen=True)
class Panel:
    """Blocks that belong together."""

    blocks: tuple[Block, ...]


Block = Headline | Heading | Cause | Sentences | Table | Facts | Map | Elements | Strips | Panel


def section(title: str, blocks: Iterable[Block]) -> Iterator[Block]:
    """Put a heading above blocks, if there are any."""
    found = list(blocks)
    if found:
        yield Heading(title)
        yield from found
