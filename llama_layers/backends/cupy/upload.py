"""Arrays from files to a GPU at the speed of the bus.

A copy runs at that speed, and beside the processor, only from pinned memory: pages that the system
may not move. Files lie in other memory, so their bytes go through two pinned buffers in turn.
While the GPU copies one of them, on a stream of its own, threads fill the other.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llama_layers.arrays.types import Namespace
from llama_layers.backends.libraries import CupyArray, cupy

# Bytes of each pinned buffer. A copy of fewer than some megabytes does not reach the bus's speed.
STAGING = 64 << 20
# One thread copies memory at less than the speed of the bus.
THREADS = min(8, os.cpu_count() or 1)

Key = TypeVar("Key")


class Part(NamedTuple):
    """Some of the numbers of an array, in C order, after those of the parts before."""

    nbytes: int
    read: Callable[[], np.ndarray]
    """Called in a thread of its own, so that parts are read at the same time."""


class Source(NamedTuple):
    """An array to be: its shape and dtype, and a way to get its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Sequence[Part]


def upload(
    sources: Mapping[Key, Source],
    device: Any,
    done: Callable[[Key, int], None],
) -> dict[Key, CupyArray]:
    """The arrays on a ``cupy.cuda.Device``; ``done`` gets what was read: of what, how many bytes.

    All of the device's memory is taken before the first byte is read. If anything fails, it is
    given back, not only to CuPy's pool but to the device.
    """
    with device:
        try:
            return _uploaded(cupy(), sources, done)
        except BaseException as error:  # raised again; a keyboard's interrupt too leaves arrays
            traceback.clear_frames(error.__traceback__)  # whose variables hold them
            cupy().get_default_memory_pool().free_all_blocks()
            raise


def _uploaded(
    xp: Namespace,
    sources: Mapping[Key, Source],
    done: Callable[[Key, int], None],
) -> dict[Key, CupyArray]:
    arrays = {key: xp.empty(source.shape, source.dtype) for key, source in sources.items()}
    staging = max([STAGING, *(part.nbytes for s in sources.values() for part in s.parts)])
    buffers = cycle([_Buffer(xp, staging) for _ in range(2)])
    stream = xp.cuda.Stream(non_blocking=True)
    # CuPy's pool gives out memory that earlier work on the current stream may still use.
    stream.wait_event(xp.cuda.get_current_stream().record())
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for key, source in sources.items():
                target = arrays[key].data.ptr
                for block in _blocks(source.parts, staging):
                    buffer = next(buffers)
                    count = buffer.fill(block, threads)
                    buffer.copy(target, count, stream)
                    target += count
                    done(key, count)
        finally:  # also before the buffers are given back
            stream.synchronize()
    return arrays


class _Buffer:
    """Pinned memory, and whether it may be written to."""

    def __init__(self, xp: Namespace, nbytes: int) -> None:
        # Not from CuPy's pool of pinned memory, which would keep it.
        memory = xp.cuda.PinnedMemoryPointer(xp.cuda.PinnedMemory(nbytes), 0)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._copied = xp.cuda.Event(block=True, disable_timing=True)
        self._runtime = xp.cuda.runtime

    def fill(self, block: Sequence[Part], threads: ThreadPoolExecutor) -> int:
        """Read parts into it, once the device has copied what it held; their bytes."""
        self._copied.synchronize()
        ends = list(accumulate(part.nbytes for part in block))

        def read(part: Part, end: int) -> None:
            flat = part.read().reshape(-1)
            self._bytes[end - part.nbytes : end] = flat.view(np.uint8)

        list(threads.map(read, block, ends))
        return ends[-1]

    def copy(self, target: int, count: int, stream: Any) -> None:
        """Have its first bytes copied to an address on the device."""
        self._runtime.memcpyAsync(
            target,
            self._bytes.ctypes.data,
            count,
            self._runtime.memcpyHostToDevice,
            stream.ptr,
        )
        self._copied.record(stream)


def _blocks(parts: Sequence[Part], most: int) -> Iterator[list[Part]]:
    """Group the parts into blocks of at most `most` bytes."""
    block: list[Part] = []
    size = 0
    for part in parts:
        if size + part.nbytes > most:
            yield block
            block, size = [], 0
        block.append(part)
        size += part.nbytes
    yield block
