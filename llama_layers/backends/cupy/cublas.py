"""Matrix products by cuBLAS, of CuPy arrays where they are, without copies.

A few functions of the libcublas that CuPy itself loads, of CUDA 12 or 13, through ctypes.

- CuPy's own calls cannot be captured in a CUDA graph: it sets the stream before each, and refuses
  to in a capture. Its products of more than two dimensions copy their operands, and those of two
  copy what has a leading dimension of its own, and give no float32 for 16-bit operands.
- nvmath-python has bindings, but is a heavy dependency for a handful of functions, and is not there
  where CuPy alone is installed.

**Sums.** `CUBLAS_COMPUTE_32F` sums 16-bit numbers in float32. That alone does not hold
[the contract](rounding.md): for a result of 16 bits cuBLAS may split a long sum into parts and
round each to 16 bits before it adds them. That errs by a 16-bit roundoff of the *parts*, of
whatever size, and where they cancel it is beyond the bound. So
`CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION` is always set. TF32 is off unless the environment
has ``CUPY_TF32=1``, as in CuPy.

**Streams.** Each stream has a handle and a workspace of its own, so that streams that run at once
give the same bits as alone (cuBLAS, "Results reproducibility"), and a captured product allocates
nothing. Handles are never destroyed: that would wait for the whole device.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from ctypes import POINTER, byref, c_double, c_float, c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from typing import Any, NamedTuple

from llama_layers.arrays.dtypes import accumulate_format, dtype_name, float_format
from llama_layers.arrays.types import Namespace
from llama_layers.backends.libraries import CupyArray, cupy
from llama_layers.errors import BackendError

# Bytes of a workspace: what NVIDIA recommends for Hopper and Blackwell (cublasSetWorkspace).
WORKSPACE = 32 << 20

# From library_types.h (CUDA_R_...) and cublas_api.h.
_DATA_TYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F = 68, 70
_OP_N, _OP_T = 0, 1
_DEFAULT_MATH, _TF32_MATH, _NO_REDUCED_PRECISION_REDUCTION = 0, 3, 16
_GEMM_DEFAULT = -1
_PER_THREAD_STREAM = 2  # one number that stands for a stream of each thread

_OPERATION = (c_int, c_int, c_int, c_int, c_int)  # transa, transb, m, n, k
_MATRIX = (c_void_p, c_int, c_int)  # numbers, type, leading dimension
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (POINTER(c_void_p),),
    "cublasDestroy_v2": (c_void_p,),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasSetMathMode": (c_void_p, c_int),
    "cublasGemmEx": (
        *(c_void_p, *_OPERATION, c_void_p, *_MATRIX, *_MATRIX, c_void_p, *_MATRIX),
        *(c_int, c_int),
    ),
    "cublasGemmStridedBatchedEx": (
        *(c_void_p, *_OPERATION, c_void_p, *_MATRIX, c_longlong, *_MATRIX, c_longlong),
        *(c_void_p, *_MATRIX, c_longlong, c_int, c_int, c_int),
    ),
}


class _Handle(NamedTuple):
    """A cuBLAS context, and the memory that it works in."""

    value: int
    workspace: Any


class _Layout(NamedTuple):
    """How cuBLAS has to read an array to find its transpose, or its transposes."""

    operation: int
    leading: int
    batch: int


_handles: dict[tuple[int, int, int], _Handle] = {}
_creating = threading.Lock()


@cache
def available() -> bool:
    """Whether there is a libcublas; CuPy for AMD GPUs, for one, has none."""
    try:
        _library()
    except (ImportError, OSError, RuntimeError):  # no pathfinder, no such file, none found
        return False
    return True


def matmul(
    a: CupyArray, b: CupyArray, out: CupyArray, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """``out = alpha * (a @ b) + beta * out`` in one call, without a copy.

    Shapes are [M, K], [K, N] and [M, N], or [P, M, K], [P, K, N] and [P, M, N], and arrays are on
    the current device. Operands are of one dtype, and `out` of the same or, for 16-bit ones,
    float32. One of the last two axes must have its numbers side by side: for `out`, the last. The
    other's stride is free, and so is that over P, which may be zero for an operand. `alpha` and
    `beta` have the format of the sums. Without a `beta` the numbers in `out` are not read.
    """
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    name, out_name = dtype_name(a.dtype), dtype_name(out.dtype)
    sums = accumulate_format(float_format("a", a)).name
    if dtype_name(b.dtype) != name or out_name not in (name, sums):
        raise TypeError(f"matmul: no product of {name} and {dtype_name(b.dtype)} in {out_name}")
    shapes = ((rows, inner), (inner, columns), (rows, columns))
    batch = tuple(out.shape[:-2])
    for array, shape in zip((a, b, out), shapes, strict=True):
        if tuple(array.shape) != (*batch, *shape):
            raise ValueError(f"matmul: expected shape {[*batch, *shape]}, got {list(array.shape)}")
    # cuBLAS counts down columns, so that what it takes out for is out.T = b.T @ a.T.
    of_a, of_b, of_out = _laid_out("a", a), _laid_out("b", b), _laid_out("out", out)
    if of_out.operation != _OP_N:
        raise ValueError("matmul: out: expected the numbers of a row side by side")
    scalar = c_double if sums == "float64" else c_float
    operands = [(array.data.ptr, _DATA_TYPE[dtype_name(array.dtype)]) for array in (b, a, out)]
    matrices = [
        (*operand, layout.leading, layout.batch)
        for operand, layout in zip(operands, (of_b, of_a, of_out), strict=True)
    ]
    keep = 4 if batch else 3  # the stride over P
    arguments = (
        *(_handle(), of_b.operation, of_a.operation, columns, rows, inner),
        *(byref(scalar(alpha)), *matrices[0][:keep], *matrices[1][:keep]),
        *(byref(scalar(beta)), *matrices[2][:keep], *batch),
        *(_COMPUTE_64F if sums == "float64" else _COMPUTE_32F, _GEMM_DEFAULT),
    )
    _call("cublasGemmStridedBatchedEx" if batch else "cublasGemmEx", *arguments)


def readable(array: CupyArray) -> CupyArray:
    """The array, or a copy if cuBLAS cannot read it as it lies in memory."""
    return array.copy() if _layout(array) is None else array


def _laid_out(name: str, array: CupyArray) -> _Layout:
    if (found := _layout(array)) is None:
        raise ValueError(
            f"matmul: {name}: expected a matrix with a leading dimension, got shape "
            f"{list(array.shape)} with strides {list(array.strides)}"
        )
    return found


def _layout(array: CupyArray) -> _Layout | None:
    """How to read a row-major array; an axis of one element has no stride to speak of."""
    rows, columns = array.shape[-2:]
    *batch, down, right = (stride // array.itemsize for stride in array.strides)
    if right == 1 or columns == 1:
        leading = columns if rows == 1 else down
        if leading >= columns:
            return _Layout(_OP_N, leading, *(batch or (0,)))
    if down == 1 or rows == 1:
        leading = rows if columns == 1 else right
        if leading >= rows:
            return _Layout(_OP_T, leading, *(batch or (0,)))
    return None


def _handle() -> int:
    cuda = cupy().cuda
    stream, device = cuda.get_current_stream(), cuda.Device().id
    thread = threading.get_ident() if stream.ptr == _PER_THREAD_STREAM else 0
    key = (device, stream.ptr, thread)
    if key not in _handles:
        if stream.is_capturing():
            raise BackendError("cuBLAS: no handle can be made in a capture; multiply once before")
        with _creating:
            if key not in _handles:
                _handles[key] = _create(cuda, stream.ptr)
    return _handles[key].value


def _create(cuda: Namespace, stream: int) -> _Handle:
    """A handle for one stream; its workspace is set last, since setting a stream takes it away."""
    handle = c_void_p()
    _call("cublasCreate_v2", byref(handle))
    assert handle.value is not None  # or the call would have failed
    mode = _TF32_MATH if os.environ.get("CUPY_TF32") == "1" else _DEFAULT_MATH
    try:
        workspace = cuda.alloc(WORKSPACE)
        _call("cublasSetMathMode", handle, mode | _NO_REDUCED_PRECISION_REDUCTION)
        _call("cublasSetStream_v2", handle, stream)
        _call("cublasSetWorkspace_v2", handle, workspace.ptr, WORKSPACE)
    except Exception:  # whatever went wrong, nobody else can free the handle
        _call("cublasDestroy_v2", handle)
        raise
    return _Handle(handle.value, workspace)


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        called = _library().cublasGetStatusName(status).decode()
        raise BackendError(f"{name.removesuffix('_v2')}: {called}")


@cache
def _library() -> Any:
    """The libcublas that CuPy loads, or has loaded, with its functions' signatures."""
    library = _load()
    for name, parameters in _SIGNATURES.items():
        getattr(library, name).argtypes = parameters
    library.cublasGetStatusName.argtypes = (c_int,)
    library.cublasGetStatusName.restype = ctypes.c_char_p
    return library


def _load() -> Any:
    pathfinder = importlib.import_module("cuda.pathfinder")  # CuPy finds it so, too
    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
