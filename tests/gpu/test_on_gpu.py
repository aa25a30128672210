"""Whole models on a GPU: on a real one with ``-m gpu``, and the same on what stands in for it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import forward, generate, load
from tests.support.installed import GPUS, gpu, on_device, real_cupy, times
from tests.support.random_models import (
    CONFIGS,
    KINDS_AND_DTYPES,
    model_of,
    random_weights,
    run_in_chunks,
)
from tests.test_forward import assert_rows_close

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(name="cupy", scope="module", params=GPUS)
def cupy_for_all(request):
    """One for all tests here, whose kernels are the same."""
    with gpu(request.param) as module:
        yield module


def random_ids(config, batch, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, count))


def pair(config, dtype="float32"):
    """A random model on the device, and the same numbers in float64 on the CPU."""
    weights = random_weights(config, 0, DTYPES[dtype])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return model_of(config, weights, on_device), model_of(config, wide)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_like_naive_loops(cupy, kind, dtype):
    """Several tokens at once, some more, and then one after the other; padded."""
    config = CONFIGS[kind]
    weights = random_weights(config, 0, DTYPES[dtype])
    ids = random_ids(config, 3, 9)
    keep = np.arange(9) >= np.array([[0], [1], [3]])
    cuts = (3, 5, 6, 7, 8)
    model = model_of(config, weights, on_device)
    found = run_in_chunks(model, ids, cuts, keep=keep, array=on_device)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    assert_rows_close(found, wide, config, ids, keep, cuts, 32 * ROUNDOFF[dtype])


def test_a_model_of_usual_sizes(cupy):
    """Heads of 64, loads of 16 bytes, several blocks and pieces of the context."""
    config = replace(
        CONFIGS["gqa"], hidden_size=192, intermediate_size=256, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, vocab_size=2500, max_position_embeddings=256,
    )  # fmt: skip
    model, exact = pair(config, "bfloat16")
    ids = random_ids(config, 2, 72)
    cuts = range(66, 72)
    found = run_in_chunks(model, ids, cuts, array=on_device).astype(np.float64)
    expected = run_in_chunks(exact, ids, cuts)
    assert abs(found - expected).max() <= 32 * ROUNDOFF["bfloat16"] * abs(expected).max()


def test_memory_does_not_grow_with_tokens(cupy):
    tokens = times(cupy, 10_000, 24)
    used = cupy.get_default_memory_pool().used_bytes
    config = replace(CONFIGS["gqa"], max_position_embeddings=tokens + 8)
    model, _ = pair(config)
    ids = on_device(random_ids(config, 1, 3))
    seen = []
    steps = generate(model, ids, max_new_tokens=tokens, eos_token_id=())
    for count, _ in enumerate(steps):
        if count in (10, tokens - 2):
            gc.collect()
            seen.append(used())
    assert seen[0] == seen[1]


def assert_like_the_cpu(on_cpu, model, ids, more):
    """Logits in float32 to some roundings, and the same tokens by the likeliest each time."""
    found = forward(model, on_device(ids)).logits.get()
    expected = forward(on_cpu, ids).logits
    assert abs(found - expected).max() <= 2.0**-14 * abs(expected).max()
    options = {"max_new_tokens": more, "eos_token_id": ()}
    tokens = [step.get() for step in generate(model, on_device(ids), **options)]
    np.testing.assert_array_equal(tokens, list(generate(on_cpu, ids, **options)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_models_are_like_those_of_the_cpu(cupy, kind):
    weights = random_weights(CONFIGS[kind], 0, np.float32)
    on_cpu = model_of(CONFIGS[kind], weights)
    model = model_of(CONFIGS[kind], weights, on_device)
    assert_like_the_cpu(on_cpu, model, random_ids(CONFIGS[kind], 2, 4), 5)


@pytest.mark.gpu
def test_smollm2_is_like_that_of_the_cpu(request):
    real_cupy()
    try:
        path = request.getfixturevalue("smollm2")
    except OSError as error:  # a machine without a network
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    on_cpu, model = (load(path, backend=b, dtype="float32") for b in ("numpy", "cupy"))
    ids = np.array([on_cpu.tokenizer.encode("The capital of France is")])
    assert_like_the_cpu(on_cpu, model, ids, 20)


@pytest.mark.gpu
def test_sanitizers_find_nothing():
    """Accesses out of bounds, and races in shared memory."""
    real_cupy()
    if (program := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer is not installed")
    nodes = f"{os.path.dirname(__file__)}/test_on_gpu.py"
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-m", "gpu", "-k", "usual_sizes or (naive and gqa)", nodes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
