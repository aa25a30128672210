"""An option that allows what a check found, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remedy:
    """An option of a check that allows what a port does on purpose, tried on the trace.

    Attributes
    ----------
    option : str
        As the command takes it: "--dtype bfloat16".
    instead : str
        What has the same effect, as a trace's metadata or in Python; may be empty.
    left : int
        How many of the sites that were tried fail or differ with it.
    failing : int
        How many of them fail or differ without it.
    tried : int
        How many sites were tried.
    sites : int
        How many sites the trace has.
    of : str
        What is counted: "failing site", or "warning" where no site fails.
    """

    option: str
    instead: str
    left: int
    failing: int
    tried: int
    sites: int
    of: str = "failing site"

    @property
    def sentence(self) -> str:
        """What to do if the cause is meant, and what comes of it."""
        leaves = f"{self.left} of {self.failing} {self.of}s" if self.left else f"no {self.of}"
        tried = (
            ""
            if self.tried == self.sites
            else f"; {self.tried} of the {self.sites} sites were tried"
        )
        instead = f" ({self.instead})" if self.instead else ""
        return f"If that is meant: {self.option}{instead} leaves {leaves}{tried}."
