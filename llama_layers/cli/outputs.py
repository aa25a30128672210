"""Files that a command writes: over none that exists unless asked, and over none that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_layers.files.output import check_output


def check_outputs(
    outputs: Iterable[Path | None], force: bool, *, model: str | None, read: Iterable[Path] = ()
) -> None:
    """Refuse what cannot be written to, and in any case a file of the model or another one read."""
    for output in outputs:
        check_output(output, force)
        if output is None or not output.exists():
            continue
        if output.resolve() in {path.resolve() for path in read} | _files_of(model):
            raise ValueError(f"{output}: expected a file to write, got one that is read here")


def _files_of(model: str | None) -> set[Path]:
    from llama_layers.checkpoint import open_checkpoint

    return set() if model is None else {file.resolve() for file in open_checkpoint(model).files()}
