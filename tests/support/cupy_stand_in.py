"""What stands in for CuPy where there is no GPU: its arrays, streams, graphs and kernels.

Made to fail where a GPU fails, or where it would go wrong without a word:

- arrays are no NumPy arrays, and mixing the two raises;
- new memory holds NaN, and so does a margin round every array, which a kernel may not write to;
- what a stream is given runs when somebody waits for it, and not before;
- while a stream captures, nothing but kernels and copies on the device may be asked for;
- a graph knows addresses only: replayed after an array was freed, it raises.

Functions of the array API come from NumPy. Tests put this module in the place of ``cupy``.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.cupy_memory import (
    Device,
    Memory,
    MemoryPointer,
    MemoryPool,
    PinnedMemory,
    PinnedMemoryPointer,
    alloc,
    alloc_pinned_memory,
)
from tests.support.cupy_streams import (
    Event,
    Graph,
    Stream,
    before_eager,
    capturing,
    enqueue,
    get_current_stream,
    get_elapsed_time,
    not_in_capture,
    stream_or_current,
)
from tests.support.emulator import Emulated, EmulatedError

__name__ = "cupy"  # array_api_compat knows libraries by their names
__version__ = "14.2.0"

SEED = 0
"""Seeds the orders of blocks and threads."""
get_default_memory_pool = MemoryPool


class ndarray:  # noqa: N801
    """An array on the device."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memptr = alloc(size) if memptr is None else memptr
        offset = memptr.ptr - memptr.mem.ptr
        assert offset + size <= memptr.mem.size, "an array beyond its memory"
        whole = memptr.mem.numbers((memptr.mem.size,), np.uint8)
        self._numbers = whole[offset : offset + size].view(dtype).reshape(shape)
        self._memory = memptr.mem

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._memory, self._numbers.ctypes.data - self._memory.ptr)

    @property
    def device(self) -> Device:
        return self._memory.device

    def get(self, stream: Stream | None = None, out: Any = None, blocking: bool = True) -> Any:
        """The numbers in main memory; there after the stream was waited for, unless blocking."""
        stream = stream_or_current(stream)
        not_in_capture("a copy to main memory")
        result = np.empty(self.shape, self.dtype) if out is None else out
        assert result.shape == self.shape
        assert result.dtype == self.dtype
        stream.enqueue(lambda: np.copyto(result, self._numbers))
        if blocking:
            stream.synchronize()
        return result

    def set(self, arr: Any, stream: Stream | None = None) -> None:
        not_in_capture("a copy from main memory")
        assert isinstance(arr, np.ndarray)
        assert arr.shape == self.shape
        assert arr.dtype == self.dtype
        copy = arr.copy()
        stream_or_current(stream).enqueue(lambda: np.copyto(self._numbers, copy))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    __array_ufunc__ = None  # NumPy's operators give way to these

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *dir(self._numbers)]

    def __getattr__(self, name: str) -> Any:
        """Attributes and methods as NumPy's arrays have them."""
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.__dict__["_numbers"], name)
        if callable(found) and name not in ("dtype", "flags"):
            return _on_device(found, owner=self)
        return _wrapped(found, self) if isinstance(found, np.ndarray) else found

    def __getitem__(self, key: Any) -> ndarray:
        picked = self._numbers[_unwrapped(key)]
        if np.shares_memory(picked, self._numbers) or not picked.size:
            return _view(picked, self)  # a view costs the device nothing
        before_eager("an index array")
        return _wrapped(picked, self)

    def __setitem__(self, key: Any, value: Any) -> None:
        before_eager("an assignment")
        self._numbers[_unwrapped(key)] = _unwrapped(value)

    def __matmul__(self, other: ndarray) -> ndarray:
        """As CuPy: in 16 bits summed in float32, and only 2-D operands where that is not slow."""
        before_eager("a product")
        x, y = self._numbers, other._numbers
        assert x.dtype == y.dtype, "CuPy would make a copy of an operand"
        if x.dtype in (np.float16, ml_dtypes.bfloat16):
            assert x.ndim == y.ndim == 2, "CuPy would copy the operands, or fail"
            x, y = x.astype(np.float32), y.astype(np.float32)
        with np.errstate(all="ignore"):
            return _wrapped((x @ y).astype(self.dtype), self)

    def __len__(self) -> int:
        return len(self._numbers)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __index__(self) -> int:
        return self.get().__index__()

    def __float__(self) -> float:
        return float(self.get())

    def __repr__(self) -> str:
        return f"stand-in {self._numbers!r}"

    __hash__ = None  # type: ignore[assignment]


def _operator(name: str) -> Callable[..., Any]:
    def call(self: ndarray, *others: Any) -> Any:
        return _on_device(getattr(self._numbers, name), owner=self)(*others)

    return call


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs "
    "and rand or ror xor rxor invert lshift rshift lt le gt ge eq ne iadd isub imul itruediv"
).split():
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _view(numbers: np.ndarray, owner: ndarray) -> ndarray:
    array = ndarray.__new__(ndarray)
    array._numbers, array._memory = numbers, owner._memory
    return array


def _wrapped(value: Any, owner: ndarray | None = None) -> Any:
    """NumPy's result as an array of the device: a view of the operand's memory, or new memory."""
    if isinstance(value, tuple | list):
        return type(value)(_wrapped(v, owner) for v in value)
    if not isinstance(value, np.ndarray | np.generic):
        return value
    value = np.asarray(value)
    if owner is not None and value.size and np.shares_memory(value, owner._numbers):
        return _view(value, owner)
    array = ndarray(value.shape, value.dtype)
    array._numbers[...] = value
    return array


def _unwrapped(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value._numbers
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple | list):
        return type(value)(_unwrapped(v) for v in value)
    return value


def _on_device(function: Callable[..., Any], owner: ndarray | None = None) -> Callable[..., Any]:
    """A function of NumPy's as one of the device's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before_eager(function.__name__)
        kwargs.pop("device", None)
        out = kwargs.get("out")
        plain = [_unwrapped(a) for a in args]
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            result = function(*plain, **{k: _unwrapped(v) for k, v in kwargs.items()})
        if out is not None:
            return out
        source = (
            owner if owner is not None else next((a for a in args if isinstance(a, ndarray)), None)
        )
        if source is not None and result is source._numbers:
            return source
        return _wrapped(result, source)

    return call


def asarray(a: Any, dtype: Any = None, *, copy: bool | None = None, device: Any = None) -> Any:
    """From a NumPy array, a number, a list, or an array of the device."""
    if isinstance(a, ndarray):
        same = dtype is None or a.dtype == dtype
        return a if same and not copy else a.astype(dtype or a.dtype)
    before_eager("a copy from main memory")
    return _wrapped(np.asarray(a, dtype=dtype))


array = asarray


def ascontiguousarray(a: ndarray) -> ndarray:
    return a if a.flags.c_contiguous else a.copy()


def empty(shape: Any, dtype: Any = float, *, device: Any = None) -> ndarray:
    return ndarray(shape, dtype)


def empty_like(like: ndarray, dtype: Any = None, **_: Any) -> ndarray:
    return ndarray(like.shape, like.dtype if dtype is None else dtype)


def asnumpy(a: ndarray) -> np.ndarray:
    return a.get()


def is_available() -> bool:
    return True


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = getattr(np, name)
    if isinstance(found, type | float | np.dtype) or name in ("newaxis", "isdtype", "result_type"):
        return found
    return _on_device(found)


class RawModule:
    """Kernels from source."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self._emulated = Emulated(code, tuple(o for o in options if o.startswith("-D")))

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._emulated, name)


class RawKernel:
    """A kernel."""

    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, emulated: Emulated, name: str) -> None:
        self._emulated, self.name = emulated, name
        self.kinds = emulated.kinds[name]

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
        *, shared_mem: int = 0,
    ) -> None:  # fmt: skip
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        assert len(args) == len(self.kinds), f"{self.name}: {len(self.kinds)} parameters"
        values, memories = [], []
        for kind, value in zip(self.kinds, args, strict=True):
            values.append(self._value(kind, value))
            if isinstance(value, ndarray):
                memories.append(weakref.ref(value._memory))
        # A stream keeps the arrays of its work alive, as CuPy's pool does; a graph does not.
        alive = None if capturing() else args

        def run(_: Any = alive) -> None:
            if any(memory() is None for memory in memories):
                raise EmulatedError(f"{self.name}: an array of this graph was freed")
            self._emulated.run(
                self.name, tuple(map(int, grid)), tuple(map(int, block)), values,
                shared=shared_mem, seed=SEED,
            )  # fmt: skip
            for memory in memories:
                memory().check_margins()

        enqueue(run)

    def _value(self, kind: str, value: Any) -> int | float:
        """As CuPy passes it; a type that the kernel would misread is refused."""
        if kind == "P":
            if isinstance(value, ndarray):
                return value.data.ptr
            assert isinstance(value, np.uint64), f"{self.name}: expected a pointer, got {value!r}"
            return int(value)
        assert isinstance(value, np.generic), f"{self.name}: expected a number, got {value!r}"
        same = {"q": "l", "Q": "L"}  # NumPy's names for 64 bits
        kinds = {kind, same.get(kind, kind)}
        assert value.dtype.char in kinds, f"{self.name}: expected {kind}, got {value.dtype}"
        return value.item()


class _Runtime:
    is_hip = False

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3  # noqa: N815

    def getDeviceCount(self) -> int:  # noqa: N802
        return 1

    def getDevice(self) -> int:  # noqa: N802
        return 0

    def memcpyAsync(  # noqa: N802
        self, dst: int, src: int, size: int, kind: int, stream: int
    ) -> None:
        if kind != self.memcpyDeviceToDevice:
            not_in_capture("a copy from or to main memory")
        found = next(s for s in Stream.all if s.ptr == stream)
        found.enqueue(lambda: ctypes.memmove(dst, src, size))

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {
            "name": b"stand-in", "multiProcessorCount": 4, "major": 9, "minor": 0,
            "totalGlobalMem": 8 << 30,
        }  # fmt: skip

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 6 << 30, 8 << 30

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13000

    def driverGetVersion(self) -> int:  # noqa: N802
        return 13000


runtime = _Runtime()
cuda = SimpleNamespace(
    Device=Device, Stream=Stream, Event=Event, Graph=Graph, get_current_stream=get_current_stream,
    alloc=alloc, alloc_pinned_memory=alloc_pinned_memory, MemoryPointer=MemoryPointer,
    runtime=runtime, is_available=is_available, Memory=Memory, get_elapsed_time=get_elapsed_time,
    compiler=SimpleNamespace(CompileException=EmulatedError), PinnedMemory=PinnedMemory,
    PinnedMemoryPointer=PinnedMemoryPointer,
)  # fmt: skip
