"""Whole models on a GPU: on a real one with ``-m gpu``, and the same on what stands in for it.

The single functions have their properties on CuPy arrays in the suite's own tests, which take a
`backend`, and in ``test_bodies_on_gpu.py``.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cupy_stand_in as stand_in
import ml_dtypes
import numpy as np
import pytest
from emulator import compiler
from fake_cublas import replaced
from installed import installed
from random_models import CONFIGS, model_of, random_weights, run_in_chunks

from llama_layers import KVCache, forward, generate, load
from llama_layers.backends.cupy import decode
from llama_layers.backends.cupy.detect import gpu_problem
from llama_layers.testing import assert_same_bits

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass
class Device:
    """What tests need of a GPU."""

    xp: Any
    used: Callable[[], int]
    """Bytes that arrays have."""
    replays: int
    """How often the same is asked for; an emulated GPU takes its time."""
    tokens: int

    def array(self, numbers: Any) -> Any:
        return self.xp.asarray(numbers)


def bytes_in_use():
    """Of the stand-in's arrays."""
    return sum(o.size for o in gc.get_objects() if isinstance(o, stand_in.Memory))


@pytest.fixture(scope="module", params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "stand-in":
        if compiler() is None or sys.platform != "linux":
            pytest.skip("needs Linux and a C++ compiler")
        with installed() as xp, replaced():
            yield Device(xp, bytes_in_use, 5, 24)
        return
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    xp = pytest.importorskip("cupy")
    yield Device(xp, xp.get_default_memory_pool().used_bytes, 1000, 10_000)


def random_ids(config, batch, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, count))


def pair(device, config, dtype="float32"):
    """A random model on the device, and the same numbers in float64 on the CPU."""
    weights = random_weights(config, 0, DTYPES[dtype])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return model_of(config, weights, device.array), model_of(config, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_oracle(device, kind, dtype):
    """Of several tokens at once and of one after the other, padded; by some 30 roundings."""
    config = CONFIGS[kind]
    model, exact = pair(device, config, dtype)
    ids = random_ids(config, 3, 9)
    keep = np.arange(9) >= np.array([[0], [1], [3]])
    cuts = range(4, 9)
    found = run_in_chunks(model, ids, cuts, keep=keep, array=device.array)[keep]
    expected = run_in_chunks(exact, ids, cuts, keep=keep)[keep]
    error = abs(found.astype(np.float64) - expected).max()
    assert error <= 32 * ROUNDOFF[dtype] * abs(expected).max()


def test_a_model_of_usual_sizes(device):
    """Heads of 64, loads of 16 bytes, several blocks and pieces of the context."""
    config = replace(
        CONFIGS["gqa"], hidden_size=192, intermediate_size=256, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, vocab_size=2500, max_position_embeddings=256,
    )  # fmt: skip
    model, exact = pair(device, config, "bfloat16")
    ids = random_ids(config, 2, 72)
    cuts = range(66, 72)
    found = run_in_chunks(model, ids, cuts, array=device.array).astype(np.float64)
    expected = run_in_chunks(exact, ids, cuts)
    assert abs(found - expected).max() <= 32 * ROUNDOFF["bfloat16"] * abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(device, dtype):
    model, _ = pair(device, CONFIGS["biases"], dtype)
    ids = random_ids(model.config, decode.MOST, 6)
    cuts = range(1, 6)
    whole = run_in_chunks(model, ids, cuts, array=device.array)
    for row in (0, 3, 7):
        alone = run_in_chunks(model, ids[row : row + 1], cuts, array=device.array)
        assert_same_bits(whole[row, 1:], alone[0, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_give_the_same_bits(device, dtype):
    model, _ = pair(device, CONFIGS["gqa"], dtype)
    ids = device.array(random_ids(model.config, 3, 6))
    cache = forward(model, ids[:, :5], cache=KVCache.create(model, 3, 8)).cache
    first = forward(model, ids[:, 5:], cache=cache).logits.get()
    for _ in range(device.replays):
        assert_same_bits(forward(model, ids[:, 5:], cache=cache).logits.get(), first)


def test_memory_does_not_grow_with_tokens(device):
    config = replace(CONFIGS["gqa"], max_position_embeddings=device.tokens + 8)
    model, _ = pair(device, config)
    ids = device.array(random_ids(config, 1, 3))
    seen = []
    steps = generate(model, ids, max_new_tokens=device.tokens, eos_token_id=())
    for count, _ in enumerate(steps):
        if count in (10, device.tokens - 2):
            gc.collect()
            seen.append(device.used())
    assert seen[0] == seen[1]


def assert_like_the_cpu(device, on_cpu, model, ids, more):
    """Logits in float32 to some roundings, and the same tokens by the likeliest each time."""
    found = forward(model, device.array(ids)).logits.get()
    expected = forward(on_cpu, ids).logits
    assert abs(found - expected).max() <= 2.0**-14 * abs(expected).max()
    options = {"max_new_tokens": more, "eos_token_id": ()}
    tokens = [step.get() for step in generate(model, device.array(ids), **options)]
    np.testing.assert_array_equal(tokens, list(generate(on_cpu, ids, **options)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_models_are_like_those_of_the_cpu(device, kind):
    weights = random_weights(CONFIGS[kind], 0, np.float32)
    on_cpu = model_of(CONFIGS[kind], weights)
    model = model_of(CONFIGS[kind], weights, device.array)
    assert_like_the_cpu(device, on_cpu, model, random_ids(CONFIGS[kind], 2, 4), 5)


@pytest.mark.gpu
def test_smollm2_is_like_that_of_the_cpu(request):
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    try:
        path = request.getfixturevalue("smollm2")
    except OSError as error:  # a machine without a network
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    xp = pytest.importorskip("cupy")
    device = Device(xp, xp.get_default_memory_pool().used_bytes, 1000, 10_000)
    on_cpu, model = (load(path, backend=b, dtype="float32") for b in ("numpy", "cupy"))
    ids = np.array([on_cpu.tokenizer.encode("The capital of France is")])
    assert_like_the_cpu(device, on_cpu, model, ids, 20)


@pytest.mark.gpu
def test_sanitizers_find_nothing():
    """Accesses out of bounds, and races in shared memory."""
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    if (program := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer is not installed")
    nodes = f"{os.path.dirname(__file__)}/test_on_gpu.py"
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-m", "gpu", "-k", "usual_sizes or (oracle and gqa)", nodes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
