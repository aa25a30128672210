"""The tensors of a checkpoint to a GPU, in parts: none is ever whole in main memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from llama_layers.backends.cupy.upload import Part, Source, upload
from llama_layers.checkpoint.casting import cast
from llama_layers.checkpoint.opened import NUMPY_DTYPES, Checkpoint
from llama_layers.checkpoint.progress import progress
from llama_layers.layers.weights import Names

# Bytes that a thread reads at a time, where rows are not larger.
PART = 4 << 20


def uploaded(
    checkpoint: Checkpoint, arrays: Sequence[Names], dtype: str | None, device: Any
) -> dict[Names, Any]:
    """Tensors as arrays on a ``cupy.cuda.Device``, with progress on stderr.

    Without a dtype, those that become one array have the same.
    """
    sources = {names: source(checkpoint, names, dtype) for names in arrays}
    total = sum(part.nbytes for s in sources.values() for part in s.parts)
    with progress("to the GPU", total) as advance:

        def done(names: Names, nbytes: int) -> None:
            for name in names:
                checkpoint.forget(name)
            advance(nbytes)

        return upload(sources, device, done)


def source(checkpoint: Checkpoint, names: Names, dtype: str | None) -> Source:
    """Tensors as one array of some dtype."""
    infos = [checkpoint.tensors[name] for name in names]
    stored = NUMPY_DTYPES[dtype or infos[0].read_dtype]
    parts = []
    for info in infos:
        row = math.prod(info.shape[1:]) * stored.itemsize
        for start, stop in ranges(info.shape[0], info.rows_at_once, max(1, PART // row)):
            read = partial(_read, checkpoint, info.name, start, stop, dtype)
            parts.append(Part((stop - start) * row, read))
    rows = sum(info.shape[0] for info in infos)
    return Source((rows, *infos[0].shape[1:]), stored, parts)


def ranges(count: int, step: int, most: int) -> list[tuple[int, int]]:
    """Ends of ranges that make up `count`: multiples of `step`, of `most` each if that holds one.

    `count` is a multiple of `step`.
    """
    size = max(step, most // step * step)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _read(
    checkpoint: Checkpoint, name: str, start: int, stop: int, dtype: str | None
) -> NDArray[Any]:
    return cast(name, checkpoint.read_part(name, start, stop), dtype)
