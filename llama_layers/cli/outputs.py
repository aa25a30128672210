"""Checks of the files that a command writes: none may replace another unasked, or one it reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_layers.files.output import check_output


def check_outputs(
    outputs: Iterable[Path | None], force: bool, *, model: str | None, read: Iterable[Path] = ()
) -> None:
    """Raise if a file cannot be written, or is one that the command reads, also in a directory."""
    read = list(read)
    inside = (file for place in read if place.is_dir() for file in place.iterdir())
    kept = {path.resolve() for path in (*read, *inside)}
    for output in outputs:
        check_output(output, force)
        if output is None or not output.exists():
            continue
        if output.resolve() in kept | _files_of(model):
            raise ValueError(f"{output}: expected a file to write, got one that is read here")


def check_data_and_plot(
    option: str, data: Path | None, plot: Path | None, force: bool, *, model: str | None = None
) -> None:
    """Raise unless both files can be written, the one of an option and that of --plot."""
    check_outputs((data, plot), force, model=model)
    if data is not None and data == plot:
        raise ValueError(f"{option} and --plot: expected two files, got {data} twice")
    if plot is not None:
        _check_plot(plot)


def _check_plot(path: Path) -> None:
    """Raise unless matplotlib is installed and writes the format that a path's ending names."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "--plot needs matplotlib: pip install 'llama-layers[plot]'"
        ) from None
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"--plot: expected a name ending in one of {', '.join(known)}, got {path}")


def _files_of(model: str | None) -> set[Path]:
    from llama_layers.checkpoint import open_checkpoint

    return set() if model is None else {file.resolve() for file in open_checkpoint(model).files()}
