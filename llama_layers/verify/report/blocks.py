"""The parts of a report: their content, without a word on how they look.

`text` and `html` render them. Headings, maps, facts and elements are for the page alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Headline:
    """The verdict, a sentence with the first failure or the largest error, and what it is about."""

    kind: ClassVar = "headline"
    verdict: str
    said: str
    about: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.said}"


@dataclass(frozen=True)
class Heading:
    """The title of the blocks that follow."""

    kind: ClassVar = "heading"
    title: str


@dataclass(frozen=True)
class Cause:
    """What would explain the first failure: a title, and sentences below it."""

    kind: ClassVar = "cause"
    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Sentences:
    """Sentences, each a paragraph of its own."""

    kind: ClassVar = "sentences"
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers under column heads.

    Attributes
    ----------
    rows : sequence of sequence of str
        The first row holds the heads.
    left : sequence of int
        The columns that are aligned to the left.
    remark : str
        A sentence below the table; may be empty.
    histograms : sequence of sequence of int
        For each row how many elements have which error over limit; may be empty.
    long : bool
        Whether it is shown on demand only.
    """

    kind: ClassVar = "table"
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    remark: str = ""
    histograms: Sequence[Sequence[int]] = ()
    long: bool = False


@dataclass(frozen=True)
class Facts:
    """Terms and what they are."""

    kind: ClassVar = "facts"
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A site in a map: its verdict, its error over limit if it has one, and both in words."""

    verdict: str
    ratio: float | None
    title: str


@dataclass(frozen=True)
class Map:
    """Sites down, layers across.

    Attributes
    ----------
    layers : sequence of int
        The columns.
    rows : mapping of str to sequence of Cell or None
        By role; one cell where a role is outside the layers, None where nothing was recorded.
    """

    kind: ClassVar = "map"
    layers: Sequence[int]
    rows: Mapping[str, Sequence[Cell | None]]

    @property
    def verdicts(self) -> set[str]:
        """The verdicts that occur."""
        return {cell.verdict for row in self.rows.values() for cell in row if cell is not None}


@dataclass(frozen=True)
class Elements:
    """The worst elements of a site.

    Attributes
    ----------
    title : str
        The site and its verdict.
    rows : sequence of sequence of str
        The first row holds the heads.
    role : str
        The role whose cells in a map lead here; empty where none do.
    remark : str
        A sentence above the table; may be empty.
    opened : bool
        Whether it is shown without a click.
    """

    kind: ClassVar = "elements"
    title: str
    rows: Sequence[Sequence[str]]
    role: str = ""
    remark: str = ""
    opened: bool = False


@dataclass(frozen=True)
class Panel:
    """Blocks that belong together."""

    kind: ClassVar = "panel"
    blocks: tuple[Block, ...]


Block = Headline | Heading | Cause | Sentences | Table | Facts | Map | Elements | Panel


def section(title: str, blocks: Iterable[Block]) -> Iterator[Block]:
    """Put a heading above blocks, if there are any."""
    found = list(blocks)
    if found:
        yield Heading(title)
        yield from found
