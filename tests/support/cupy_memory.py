"""Memory of the stand-in for CuPy: it begins as NaN, and has margins that nobody may write to."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np

from tests.support.cupy_streams import Stream, not_in_capture
from tests.support.emulator import EmulatedError

MARGIN = 4096
NAN = 0xFF  # in all bytes of a float, of any format


class Device:
    """The one GPU."""

    id = 0

    def __init__(self, device: int | Device | None = None) -> None:
        assert device in (None, 0) or isinstance(device, Device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        for stream in list(Stream.all):
            stream.synchronize()

    @property
    def compute_capability(self) -> str:
        return "90"


class Memory:
    """An allocation, with margins before and behind it."""

    def __init__(self, size: int) -> None:
        not_in_capture("an allocation")
        self.size = size
        # Aligned as CUDA aligns, which kernels with wide loads rely on.
        self._bytes = np.full(size + 2 * MARGIN + 256, NAN, np.uint8)
        self._first = MARGIN + -(self._bytes.ctypes.data + MARGIN) % 256
        self.ptr = self._bytes.ctypes.data + self._first
        self.device = Device()

    def numbers(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        inside = self._bytes[self._first : self._first + self.size]
        return inside.view(dtype).reshape(shape)

    def check_margins(self) -> None:
        before, behind = self._bytes[: self._first], self._bytes[self._first + self.size :]
        if (before != NAN).any() or (behind != NAN).any():
            raise EmulatedError("a kernel wrote beyond an array")


class MemoryPointer:
    """An address inside an allocation."""

    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem = mem
        self.ptr = mem.ptr + offset
        self.device = mem.device

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


def alloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


class PinnedMemory:
    """Main memory that a GPU can copy from and to while the CPU goes on."""

    def __init__(self, size: int) -> None:
        not_in_capture("an allocation")
        self.size = size


class PinnedMemoryPointer(bytearray):
    """Its bytes, as a buffer that keeps it."""

    def __init__(self, mem: PinnedMemory, offset: int) -> None:
        super().__init__(bytes([NAN]) * (mem.size - offset))
        self.mem = mem
        self.ptr = ctypes.addressof(ctypes.c_char.from_buffer(self))


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    return PinnedMemoryPointer(PinnedMemory(size), 0)


class MemoryPool:
    """CuPy's pool, of which every array has memory of its own here."""

    def used_bytes(self) -> int:
        """Of the arrays that are alive."""
        return sum(found.size for found in gc.get_objects() if isinstance(found, Memory))

    total_bytes = used_bytes

    def free_all_blocks(self) -> None:
        pass
