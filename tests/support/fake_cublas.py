"""What stands in for libcublas: the functions that we call, as NVIDIA documents them.

Written from the cuBLAS reference, sections "Data Layout", "cublasGemmEx",
"cublasGemmStridedBatchedEx", "cublasSetStream", "cublasSetWorkspace", "cublasMath_t" and "CUDA
Graphs Support". Functions are C functions with the prototypes of cublas_api.h, so that ctypes
passes what it would pass to the library. Where the reference leaves something to cuBLAS, this takes
what is worst for us: sums of 16-bit results are split and their parts rounded unless the mode
forbids it, and a product without a workspace fails in a capture.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_int, c_longlong, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama_layers.backends.cupy import cublas
from tests.support import cupy_stand_in as stand_in
from tests.support.cupy_streams import capturing

NOT_INITIALIZED, ALLOC_FAILED, INVALID_VALUE, NOT_SUPPORTED = 1, 3, 7, 15
NAMES = {
    0: b"CUBLAS_STATUS_SUCCESS",
    1: b"CUBLAS_STATUS_NOT_INITIALIZED",
    3: b"CUBLAS_STATUS_ALLOC_FAILED",
    7: b"CUBLAS_STATUS_INVALID_VALUE",
    13: b"CUBLAS_STATUS_EXECUTION_FAILED",
    14: b"CUBLAS_STATUS_INTERNAL_ERROR",
    15: b"CUBLAS_STATUS_NOT_SUPPORTED",
}
TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}  # CUDA_R_...
COMPUTE_32F, COMPUTE_64F = 68, 70
SUPPORTED = {  # (compute type, type of A and B, type of C)
    *((COMPUTE_32F, 14, 14), (COMPUTE_32F, 14, 0), (COMPUTE_32F, 2, 2), (COMPUTE_32F, 2, 0)),
    *((COMPUTE_32F, 0, 0), (COMPUTE_64F, 1, 1)),
}
TF32, NO_REDUCED_PRECISION_REDUCTION = 3, 16

MATRIX = (c_void_p, c_int, c_int)
GEMM = (c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p)


@dataclass
class Context:
    """What a handle stands for."""

    stream: int = 0
    workspace: tuple[int, int] | None = None
    mode: int = 0


@dataclass(frozen=True)
class Matrices:
    """One of the three arguments of a product: matrices in column-major order."""

    address: int
    kind: int
    leading: int
    stride: int
    rows: int
    columns: int
    memory: weakref.ref[Any]

    def view(self, index: int) -> np.ndarray:
        dtype = np.dtype(TYPES[self.kind])
        size = dtype.itemsize
        if not self.rows or not self.columns:
            return np.zeros((self.rows, self.columns), dtype)
        count = (self.columns - 1) * self.leading + self.rows
        first = self.address + index * self.stride * size
        memory = self.memory()
        assert memory is not None, "cuBLAS: an array was freed"
        inside = memory.ptr <= first <= first + count * size <= memory.ptr + memory.size
        assert inside, "cuBLAS: a matrix beyond its memory"
        flat = np.frombuffer((ctypes.c_char * (count * size)).from_address(first), dtype)
        flat.flags.writeable = True
        shape, strides = (self.rows, self.columns), (size, self.leading * size)
        return np.lib.stride_tricks.as_strided(flat, shape, strides)


class FakeCublas:
    """The library: attributes are its C functions."""

    def __init__(self) -> None:
        self.contexts: dict[int, Context] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[str, int] = {}
        self.memories: weakref.WeakSet[Any] = weakref.WeakSet()
        self._declare("cublasCreate_v2", self._create, POINTER(c_void_p))
        self._declare("cublasDestroy_v2", self._destroy, c_void_p)
        self._declare("cublasSetStream_v2", self._set_stream, c_void_p, c_void_p)
        self._declare("cublasSetWorkspace_v2", self._workspace, c_void_p, c_void_p, c_size_t)
        self._declare("cublasSetMathMode", self._set_mode, c_void_p, c_int)
        self._declare(
            "cublasGemmEx", self._gemm, *GEMM, *MATRIX, *MATRIX, c_void_p, *MATRIX, c_int, c_int
        )
        batched = *MATRIX, c_longlong
        self._declare(
            "cublasGemmStridedBatchedEx",
            self._gemm_batched,
            *(*GEMM, *batched, *batched, c_void_p, *batched, c_int, c_int, c_int),
        )
        texts = {status: ctypes.create_string_buffer(name) for status, name in NAMES.items()}
        self.cublasGetStatusName = CFUNCTYPE(c_void_p, c_int)(
            lambda status: ctypes.addressof(texts[status])
        )

    def _declare(self, name: str, function: Callable[..., int], *parameters: Any) -> None:
        def called(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return self.fail.get(name) or function(*arguments)

        setattr(self, name, CFUNCTYPE(c_int, *parameters)(called))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of a function so far."""
        return [arguments for called, arguments in self.calls if called == name]

    def _create(self, handle: Any) -> int:
        if capturing():
            return NOT_INITIALIZED
        value = 1000 + len(self.named("cublasCreate_v2"))
        self.contexts[value] = Context()
        handle[0] = value
        return 0

    def _destroy(self, handle: int) -> int:
        return 0 if self.contexts.pop(handle, None) else NOT_INITIALIZED

    def _set_stream(self, handle: int, stream: int | None) -> int:
        if handle not in self.contexts:
            return NOT_INITIALIZED
        self.contexts[handle].stream = stream or 0
        self.contexts[handle].workspace = None  # "unconditionally resets" it
        return 0

    def _workspace(self, handle: int, address: int, size: int) -> int:
        if handle not in self.contexts:
            return NOT_INITIALIZED
        if address % 256:
            return INVALID_VALUE
        memory = self._memory(address)()
        assert address + size <= memory.ptr + memory.size, "cuBLAS: a workspace beyond its memory"
        self.contexts[handle].workspace = (address, size)
        return 0

    def _set_mode(self, handle: int, mode: int) -> int:
        if handle not in self.contexts:
            return NOT_INITIALIZED
        if mode & ~NO_REDUCED_PRECISION_REDUCTION not in (0, 1, 2, TF32):
            return INVALID_VALUE
        self.contexts[handle].mode = mode
        return 0

    def _gemm(self, *a: Any) -> int:
        """cublasGemmEx as a batch of one."""
        return self._product(
            a[:7], (*a[7:10], 0), (*a[10:13], 0), a[13], (*a[14:17], 0), 1, *a[17:]
        )

    def _gemm_batched(self, *a: Any) -> int:
        return self._product(a[:7], a[7:11], a[11:15], a[15], a[16:20], *a[20:])

    def _product(
        self,
        operation: tuple[Any, ...],
        first: tuple[Any, ...],
        second: tuple[Any, ...],
        beta: int,
        third: tuple[Any, ...],
        batch: int,
        compute: int,
        algorithm: int,
    ) -> int:
        """C = alpha op(A) op(B) + beta C, for op(A) m x k, op(B) k x n and C m x n."""
        handle, of_a, of_b, m, n, k, alpha = operation
        if handle not in self.contexts:
            return NOT_INITIALIZED
        if min(m, n, k, batch) < 0 or of_a not in (0, 1) or of_b not in (0, 1) or algorithm != -1:
            return INVALID_VALUE
        shapes = (m, k) if of_a == 0 else (k, m), (k, n) if of_b == 0 else (n, k), (m, n)
        matrices = (first, second, third)
        if any(
            matrix[2] < max(1, shape[0]) for matrix, shape in zip(matrices, shapes, strict=True)
        ):
            return INVALID_VALUE
        if first[1] != second[1] or (compute, first[1], third[1]) not in SUPPORTED:
            return NOT_SUPPORTED
        context = self.contexts[handle]
        stream = next(s for s in stand_in.Stream.all if s.ptr == context.stream)
        if stream.is_capturing() and context.workspace is None:
            return ALLOC_FAILED
        sums = np.float64 if compute == COMPUTE_64F else np.float32
        scalar = ctypes.c_double if compute == COMPUTE_64F else ctypes.c_float
        factor, keep = (sums(scalar.from_address(p).value) for p in (alpha, beta))  # read now
        a, b, c = (
            Matrices(*matrix, *shape, self._memory(matrix[0]))
            for matrix, shape in zip(matrices, shapes, strict=True)
        )
        mode = context.mode
        # A stream keeps the arrays of its work alive, as CuPy's pool does; a graph does not.
        alive = None if stream.is_capturing() else [matrix.memory() for matrix in (a, b, c)]

        def run(_: Any = alive) -> None:
            for index in range(batch):
                left, right = (
                    matrix.view(index).T if flag else matrix.view(index)
                    for matrix, flag in ((a, of_a), (b, of_b))
                )
                result = c.view(index)
                total = factor * _sum(left, right, sums, result.dtype, mode)
                if keep != 0:
                    total = total + keep * result.astype(sums)
                with np.errstate(over="ignore"):
                    result[...] = total.astype(result.dtype)
            c.memory().check_margins()

        stream.enqueue(run)
        return 0

    def _memory(self, address: int) -> weakref.ref[Any]:
        inside = [m for m in self.memories if m.ptr <= address < m.ptr + m.size]
        assert len(inside) == 1, "cuBLAS: an address of no array"
        return weakref.ref(inside[0])


def _sum(a: np.ndarray, b: np.ndarray, sums: Any, out: np.dtype[Any], mode: int) -> np.ndarray:
    """The product, summed in a format."""
    wide_a, wide_b = a.astype(sums), b.astype(sums)
    if mode & TF32 == TF32 and a.dtype == np.float32:
        wide_a, wide_b = _tf32(wide_a), _tf32(wide_b)
    with np.errstate(all="ignore"):
        if out.itemsize == 2 and not mode & NO_REDUCED_PRECISION_REDUCTION:
            half = a.shape[1] // 2
            low = (wide_a[:, :half] @ wide_b[:half]).astype(out).astype(sums)
            return low + (wide_a[:, half:] @ wide_b[half:]).astype(out).astype(sums)
        return wide_a @ wide_b


def _tf32(array: np.ndarray) -> np.ndarray:
    """Rounded to ten bits of fraction, ties to even."""
    bits = array.view(np.uint32).astype(np.uint64)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return bits.astype(np.uint32).view(np.float32)


@contextmanager
def replaced(found: bool = True) -> Iterator[FakeCublas]:
    """The library in the place of libcublas; one that is not found has nothing in its place."""
    fake = FakeCublas()
    taken = stand_in.Memory.__init__

    def remembered(self: Any, size: int) -> None:
        taken(self, size)
        fake.memories.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.Memory, "__init__", remembered)
        patch.setattr(cublas, "_load", lambda: fake if found else ctypes.CDLL("no such library"))
        patch.setattr(cublas, "_handles", {})
        _forget()
        yield fake
        stand_in.Device().synchronize()
    _forget()


def _forget() -> None:
    for function in (cublas._library, cublas.available):
        function.cache_clear()
