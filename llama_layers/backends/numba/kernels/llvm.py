"""Short names for the LLVM types and instructions that the tiles are written with."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numba.kernel_dtypes import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.kernels.processor import missing

I64, I32, I16, I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
F32 = ir.FloatType()

# AVX-512 has 32 registers of 16 lanes of 32 bits, and masks for any load; AVX2 has 16 of 8 lanes.
WIDE = missing("avx512f", "avx512bw") is None
LANES = 16 if WIDE else 8


def integer(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    """The value at an address."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(builder: Any, value: Any, address: Any) -> None:
    """Write a value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Some lanes of two vectors side by side."""
    kind = ir.VectorType(I32, len(lanes))
    return builder.shuffle_vector(a, b, ir.Constant(kind, lanes))


def prefetch(builder: Any, address: Any, locality: int) -> None:
    """Ask for a line of memory that will be read soon, if there is such memory.

    The higher the locality, from 0 to 3, the nearer the cache that it goes to.
    """
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, near, data = (ir.Constant(I32, value) for value in (0, locality, 1))
    builder.call(function, [builder.inttoptr(address, pointer), read, near, data])


def floats_at(builder: Any, address: Any, kind: int, lanes: int) -> Any:
    """Numbers of a format, widened to float32."""
    floats = ir.VectorType(F32, lanes)
    if kind == FLOAT32:
        return load(builder, address, floats)
    stored = ir.VectorType(I16 if kind == BFLOAT16 else ir.HalfType(), lanes)
    loaded = load(builder, address, stored, align=2)
    if kind == FLOAT16:
        return builder.fpext(loaded, floats)
    return builder.bitcast(from_bfloat16(builder, loaded), floats)


def from_bfloat16(builder: Any, bits: Any) -> Any:
    """The bits of float32 numbers from those of bfloat16, which are their upper halves."""
    wide = ir.VectorType(I32, bits.type.count)
    return builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * bits.type.count))


@intrinsic(prefer_literal=True)
def number(typing, kind, address):
    """The number of a format at an address, as a float32."""
    form = kind.literal_value

    def code(context, builder, signature, arguments):
        one = floats_at(builder, arguments[1], form, 1)
        return builder.extract_element(one, ir.Constant(I32, 0))

    return types.float32(kind, types.intp), code


@intrinsic
def pointer(typing, address):
    """An address as what `carray` takes."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), code


@intrinsic
def arrive(typing, address):
    """Add 1 to a counter that other threads see, and give what it was."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, integer(1), "acq_rel")

    return types.int64(types.intp), code


@intrinsic
def arrived(typing, address):
    """Read a counter that other threads add to."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), code
