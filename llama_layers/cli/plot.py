"""The picture of ``llama-layers qkv --plot``: how Q, K and V are spread, and each head's norm."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.linear import QKV

COLOURS = {"Q": "#3b6fb6", "K": "#d9822b", "V": "#4a9a5b"}


def draw(path: Path, cases: Sequence[tuple[str, Sequence[str], QKV]]) -> None:
    """Write a picture with two rows of three panels for each (title, tokens, qkv)."""
    figure = Figure(figsize=(11, 5.6 * len(cases)), layout="constrained")
    rows = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
    for row, (title, tokens, qkv) in zip(rows, cases, strict=True):
        row.suptitle(title, fontweight="bold")
        axes = row.subplots(2, 3, height_ratios=(1, 1.15))
        arrays = [to_numpy(array)[0].astype(np.float64) for array in qkv]
        _histograms(axes[0], arrays)
        _norm_maps(axes[1], arrays, tokens)
    with warnings.catch_warnings():  # a letter that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=130)


def _histograms(axes: Sequence[Axes], arrays: Sequence[np.ndarray]) -> None:
    """One histogram each, with counts on a log scale: the tails are what matters."""
    for axis, (name, colour), array in zip(axes, COLOURS.items(), arrays, strict=True):
        finite = array[np.isfinite(array)]
        axis.hist(finite, bins=60, color=colour, log=True)
        axis.set_title(f"{name} {list(array.shape)}", color=colour)
        axis.set_xlabel("value")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("elements")


def _norm_maps(axes: Sequence[Axes], arrays: Sequence[np.ndarray], tokens: Sequence[str]) -> None:
    """One map each: heads down, tokens across, the Euclidean norm as the colour."""
    for axis, name, array in zip(axes, COLOURS, arrays, strict=True):
        norms = np.linalg.norm(array, axis=-1).T
        image = axis.imshow(norms, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axis.set_title(f"norm of each head of {name}")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(tokens) <= 16:
            axis.set_xticks(range(len(tokens)), [_label(token) for token in tokens], rotation=45)
        axis.set_xlabel("token")
        axis.figure.colorbar(image, ax=axis, shrink=0.9)
    axes[0].set_ylabel("head")


def _label(token: str) -> str:
    """A token as a tick: visible spaces, and no `$` that matplotlib would take for mathematics."""
    return token.replace(" ", "\u00b7").replace("\n", "\\n").replace("$", r"\$")
