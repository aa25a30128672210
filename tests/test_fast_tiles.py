"""The tiles of products for other processors than this: values, and what is in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="needs numba, of the extra fast")

import llama_layers
from llama_layers.backends.numba.kernels import processor

AVX2 = processor.missing("avx2", "fma", "f16c")
needs_avx2 = pytest.mark.skipif(AVX2 is not None, reason=f"the processor has no {AVX2}")


def run(code, directory, *arguments, **environment):
    """What a process prints that compiles everything anew."""
    own = {"PYTHONPATH": str(Path(llama_layers.__file__).parents[1]), "NUMBA_CACHE_DIR": directory}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | own | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


LANES = """
import sys
import ml_dtypes, numpy as np
from llama_layers.backends.numba.kernels import processor
processor.missing = lambda *features: None if sys.argv[1] == "16" else features[0]
from llama_layers.backends.numba.kernels import gemm
from llama_layers.backends.numba.kernels import outer_tiles as tiles
rng = np.random.default_rng(0)
for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
    for tokens, rows, count in ((1, 1, 1), (29, 77, 19), (13, 40, 1100), (1061, 33, 40)):
        x = rng.integers(-8, 8, (tokens, count)).astype(np.float32)
        weight = rng.integers(-8, 8, (rows, count)).astype(dtype)
        y = np.empty((tokens, rows), np.float32)
        product = gemm.product(x, weight, np.arange(rows, dtype=np.float32), y, 2)
        sync = np.zeros(3, np.int64)
        for thread in range(2):
            gemm.multiply(thread, 2, sync, product)
        exact = np.einsum("ik,jk->ij", x.astype(int), weight.astype(int)) + np.arange(rows)
        assert (y == exact).all(), (dtype, tokens, rows, count)
print(tiles.LANES)
"""


@needs_avx2
@pytest.mark.parametrize("lanes", ["8", "16"])
def test_tiles_of_each_width_multiply(tmp_path, lanes):
    """Also in two halves, or in half of what there is: slow, but right. Sums are of integers."""
    assert run(LANES, tmp_path, lanes).strip() == lanes


LOOPS = """
import re, sys
from numba import float32, intp, uint32
from llama_layers.backends.numba.kernels import panels
from llama_layers.backends.numba.kernels import processor
from llama_layers.backends.numba.kernels import outer_tiles as tiles
assert processor.missing("avx512f", "avx512bf16") == (None if tiles.WIDE else "avx512f")
for unit, name in ((float32, "vfmadd"), (uint32, "vdpbf16ps"))[: 1 + tiles.WIDE]:
    kernel = panels.panel_times
    kernel.compile((unit[:, :, ::1], *[intp] * 11))
    text = kernel.inspect_asm(kernel.signatures[-1])
    loops = re.split(r"^\\S+:$|\\tj\\w+\\t.*$", text, flags=re.MULTILINE)
    register = "%zmm" if tiles.WIDE else "%ymm"
    for loop in loops:
        vectors = [line for line in loop.splitlines() if register in line]
        if count := sum(name in line for line in vectors):
            print(name, count, any("(%rsp)" in line for line in vectors))
"""
AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512bf16"


@needs_avx2
@pytest.mark.parametrize(
    ("name", "features", "instructions", "sums"),
    [
        ("znver3", "+avx2,+fma,+f16c", ["vfmadd"], [48, 32, 16, 12, 8, 4]),
        ("znver4", f"+avx2,+fma,+f16c,{AVX512}", ["vfmadd", "vdpbf16ps"], [24, 16, 8]),
    ],
)
def test_sums_stay_in_registers(name, features, instructions, sums, tmp_path):
    """Of each tile's loop, for a processor that need not be this one: it is compiled, not run."""
    printed = run(LOOPS, tmp_path, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    expected = {f"{instruction} {count} False" for instruction in instructions for count in sums}
    assert set(printed.splitlines()) == expected
