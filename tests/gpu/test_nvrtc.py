"""Every kernel compiles for the GPUs that we mean, and keeps all it computes with in registers."""

from __future__ import annotations

from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from llama_layers.backends.cupy import compile as kernels
from llama_layers.backends.cupy import launch
from tests.support import cupy_stand_in as stand_in
from tests.support import nvrtc

# Of a multiprocessor, for compute capabilities 8.0 and 9.0, and what a block has of shared memory
# without asking (CUDA C++ programming guide, technical specifications per compute capability).
REGISTERS = 65536
SHARED = 48 * 1024
FORMATS = (np.float32, ml_dtypes.bfloat16, np.float16)
# Head sizes and groups of published models, from SmolLM2 and Phi to Llama 3 and Gemma.
HEADS = [(64, 3), (64, 4), (80, 1), (96, 1), (128, 1), (128, 5), (128, 8), (256, 8)]


def asked_for():
    """Every (source, macros) that launch.py may ask for, by asking it."""
    found = {}

    def note(source, name, grid, block, args, **macros):
        key = source, tuple(sorted(macros.items()))
        found[key] = max(found.get(key, 0), int(np.prod(block)))

    def empty(*shape, dtype=np.float32):
        return stand_in.empty(shape, dtype)

    with (
        mock.patch.object(launch, "launch", note),
        mock.patch.object(launch, "cupy", return_value=stand_in),
    ):
        for dtype in FORMATS:
            for tokens in (1, 2, 5, 8):
                # By 16 bytes, and number by number; logits in float32. Some stand for the rest.
                for columns in (16, 15) if tokens in (1, 8) else (16,):
                    w, x = empty(5, columns, dtype=dtype), empty(tokens, columns, dtype=dtype)
                    launch.gemv_swiglu(x, w, w, empty(tokens, 5, dtype=dtype))
                    if tokens in (1, 8):
                        launch.gemv(x, w, empty(tokens, 5))
            launch.embed(empty(8, dtype=np.int32), w, x)
            for columns in (576, 4096, 16384, 4095):
                x = empty(1, columns, dtype=dtype)
                launch.norm(x, x[0], x, 1e-5)
            for width, group in HEADS:
                keys = empty(1, 9, 2, width, dtype=dtype)
                q = empty(1, 2 * group * width, dtype=dtype)
                scratch = launch.attend_scratch(1, 2 * group, width, 9)
                launch.attend(q, keys, keys, None, q, scratch)
                launch.rope_cache(q, None, None, None, None, keys, keys, q)
        logits, ids = empty(8, 9), empty(8, dtype=np.int32)
        scratch = launch.draw_scratch(*logits.shape)
        launch.argmax(logits, ids, scratch)
        launch.sample(logits, None, None, np.float32(1), ids, scratch)
        launch.advance(None, ids, None)
    return found


VARIANTS = asked_for()
# Of attention on many tokens, and of what is computed number by number.
VARIANTS |= {("softmax", (("MASK", m), ("SPLIT", s))): 256 for m in range(3) for s in range(2)}
VARIANTS |= {
    ("pointwise", (("FORMAT", f), ("INTERLEAVED", i))): 256 for f in range(3) for i in range(2)
}


@pytest.fixture(params=["12", "13"])
def cuda(request):
    """A major version of CUDA that is at hand."""
    if nvrtc.library(request.param) is None:
        pytest.skip(f"needs {nvrtc.PACKAGES[request.param]}, of the extra nvrtc")
    return request.param


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_what_the_assembler_says_is_read(cuda, architecture):
    source = """
    extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1; }
    extern "C" __global__ void shares(float* x) {
      __shared__ float y[300];
      y[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      x[threadIdx.x] = y[299 - threadIdx.x];
    }
    extern "C" __global__ void __launch_bounds__(1024) spills(float* x, const int* n) {
      float y[100];
      for (int i = 0; i < 100; ++i) y[i] = x[i * threadIdx.x];
      for (int i = 0; i < *n; ++i) y[n[i]] += y[n[i + 1]];
      for (int i = 0; i < 100; ++i) x[i] = y[i];
    }
    """
    found = nvrtc.compile_kernels(cuda, architecture, source)
    assert sorted(found) == ["plain", "shares", "spills"]
    assert 0 < found["plain"].registers < 32
    assert (found["plain"].local, found["plain"].shared) == (0, 0)
    assert found["shares"].shared == 1200
    assert found["spills"].local >= 400


def test_errors_and_warnings_are_raised(cuda):
    for source in ("__global__ void f() { nothing(); }", "__global__ void f() { int unused; }"):
        with pytest.raises(RuntimeError, match=r"(?s)NVRTC.*(nothing|unused)"):
            nvrtc.compile_kernels(cuda, "sm_90", source)


# Each compiler and each architecture once: all four pairs would take a minute more.
@pytest.mark.parametrize(
    ("cuda", "architecture"), [("12", "sm_80"), ("13", "sm_90")], indirect=["cuda"]
)
@pytest.mark.parametrize("source", sorted({source for source, _ in VARIANTS}))
def test_kernels(cuda, architecture, source):
    """All numbers in registers, shared memory that need not be asked for, and 512 threads at least
    on a multiprocessor, of 1024 or 2048: so many loads hide each other's time."""
    for (of, macros), threads in VARIANTS.items():
        if of != source:
            continue
        options = kernels.options(macros)
        found = nvrtc.compile_kernels(cuda, architecture, kernels.text(source), options)
        assert found
        for name, resources in found.items():
            assert resources.local == 0, (name, macros, resources)
            assert resources.shared <= SHARED, (name, macros, resources)
            assert resources.registers * max(512, threads) <= REGISTERS, (name, macros, resources)


def test_every_source_is_compiled():
    assert {path.stem for path in kernels.KERNELS.glob("*.cu")} == {s for s, _ in VARIANTS}
