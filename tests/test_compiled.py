"""The compiled bodies for few tokens: bounds, fixed order of summation, threads, and all caches."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle
from tests.support.compiled_route import compiled_first
from tests.support.random_models import CONFIGS, model_of, random_weights, run_in_chunks

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

import llama_layers
from llama_layers import KVCache, forward
from llama_layers.backends.numba import decode, sizes
from llama_layers.backends.numba import linear as fast_linear
from llama_layers.backends.numba.threadpool import ThreadPool, num_threads
from llama_layers.backends.numpy import ROUTES
from llama_layers.backends.numpy.linear import linear_2d
from llama_layers.layers.linear import linear_2d as dispatched
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import Bound, linear_bound

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def compiled(x, weight, bias=None, team=1):
    """x @ weight.T + bias in so many threads, by the kernel and nothing else."""
    with (
        mock.patch.object(fast_linear, "num_threads", return_value=team),
        mock.patch.object(fast_linear, "SMALL", 0),
        mock.patch.object(fast_linear, "ONE_THREAD", 0),
        np.errstate(all="ignore"),
    ):
        assert fast_linear.linear_2d.takes(np, x, weight, bias)
        return fast_linear.linear_2d(np, x, weight, bias)


@st.composite
def products(draw):
    """x [M, K], a weight [N, K] that may begin anywhere in memory, a bias [N] or None."""
    kind = draw(st.sampled_from(sorted(DTYPES)))
    tokens = draw(st.integers(1, sizes.MAX_DECODE_TOKENS))
    rows, count = draw(st.integers(sizes.ROWS, 21)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((tokens, count), dtype=np.float32) * 2.0 ** draw(st.integers(-9, 9))
    place = draw(st.integers(0, 17))
    memory = rng.standard_normal(place + rows * count).astype(DTYPES[kind])
    weight = memory[place:].reshape(rows, count)
    bias = draw(st.none() | arrays((rows,), dtype=kind, max_magnitude=8.0))
    return x.astype(np.float32), weight, bias


@given(products(), st.integers(1, 4))
def test_a_product_is_within_the_bound_of_naive_loops(problem, team):
    x, weight, bias = problem
    bound = linear_bound(x, weight, bias)
    exact = oracle.linear(x, weight, bias)
    assert_within_bound(compiled(x, weight, bias, team), Bound(exact, bound.limit, bound.usual))


@given(products(), st.integers(1, 4), st.data())
def test_a_row_does_not_depend_on_the_others_or_on_threads(problem, team, data):
    x, weight, bias = problem
    token = data.draw(st.integers(0, len(x) - 1))
    whole = compiled(x, weight, bias, team)
    assert_same_bits(whole[token : token + 1], compiled(x[token : token + 1], weight, bias))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row_and_token(dtype, value):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 37), dtype=np.float32), rng.standard_normal((9, 37))
    weight = weight.astype(DTYPES[dtype])
    clean = compiled(x, weight)
    x[3, 36] = value
    weight[8, 2] = value
    y = compiled(x, weight)
    wrong = np.zeros((5, 9), bool)
    wrong[3], wrong[:, 8] = True, True
    assert not np.isfinite(y[wrong]).any()
    assert_same_bits(y[~wrong], clean[~wrong])


def test_sixteen_bit_inputs_are_rounded_once():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40)).astype(ml_dtypes.bfloat16)
    weight = rng.standard_normal((8, 40)).astype(ml_dtypes.bfloat16)
    y = compiled(x, weight)
    assert y.dtype == x.dtype
    assert_within_bound(y, linear_bound(x, weight))


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((17, 8), lambda x, w: (x, w)),
        ((17, 8), lambda x, w: (x.astype(np.float64), w)),
        ((0, 8), lambda x, w: (x, w)),
        ((2, 8), lambda x, w: (x, w[:3])),
        ((2, 8), lambda x, w: (x, np.asfortranarray(w))),
        ((2, 8), lambda x, w: (x.astype(np.float64), w)),
        ((2, 8), lambda x, w: (x.astype(np.float64), w.astype(np.float64))),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_blas(shape, change, monkeypatch):
    monkeypatch.setattr(fast_linear, "SMALL", 0)
    rng = np.random.default_rng(0)
    turned = np.roll(np.eye(8, dtype=np.float32), 1, axis=1)
    x, weight = change(rng.standard_normal(shape, dtype=np.float32), turned)
    with compiled_first():
        y = dispatched(np, x, weight, None)
    assert_same_bits(y, np.roll(x, -1, axis=1)[:, : len(weight)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_many_tokens_and_narrow_weights(x_dtype, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes.MAX_DECODE_TOKENS + 1, 40)).astype(DTYPES[x_dtype])
    weight = rng.standard_normal((9, 40)).astype(DTYPES[dtype])
    bias = rng.standard_normal(9).astype(DTYPES[dtype])
    with compiled_first():
        y = dispatched(np, x, weight, bias)
    assert y.dtype == x.dtype
    assert_within_bound(y, linear_bound(x, weight, bias, flushes=True))


def test_small_products_do_not_load_numba():
    code = """
import sys, numpy
from llama_layers import linear
assert (linear(numpy.eye(8, dtype="f4"), 2 * numpy.eye(8, dtype="f4")) == 2 * numpy.eye(8)).all()
assert "llama_layers.backends.numba" in sys.modules
assert "numba" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"LLAMA_LAYERS_FAST": "1"}
    )


def test_kernels_are_compiled_anew_if_any_source_has_changed(tmp_path):
    """Though neither the size nor the time of the file tells: nor may Python keep what it read."""
    from llama_layers.backends.numba.kernels import jit

    package = Path(llama_layers.__file__).parent
    shutil.copytree(
        package, tmp_path / "llama_layers", ignore=shutil.ignore_patterns("*.nb[ci]", "*.pyc")
    )
    source = tmp_path / Path(jit.__file__).relative_to(package.parent).with_name("llvm.py")
    code = """
import ml_dtypes, numpy
from llama_layers.backends.numba.linear import linear_2d
ones = numpy.ones((4, 1), ml_dtypes.bfloat16)
print(linear_2d(numpy, ones[:1].astype("f4"), ones, None)[0, 0])
"""
    environment = os.environ | {
        "LLAMA_LAYERS_FAST": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = []
    for shift in (16, 15):
        text, times = source.read_text(), (source.stat().st_atime, source.stat().st_mtime)
        source.write_text(text.replace("[16] * bits", f"[{shift}] * bits"))
        os.utime(source, times)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True,
            env=environment,
        )  # fmt: skip
        found.append(float(run.stdout))
    assert found[0] == 1
    assert found[1] != 1


def test_exponentials():
    """Within a unit and a half in the last place, over every exponent of a number below zero."""
    from llama_layers.backends.numba.kernels.pointwise import exp

    numbers = -np.arange(0, 0x7F800001, 0x1FFF, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, np.linspace(-105, -86, 5000, dtype=np.float32)])
    numbers = np.concatenate([numbers, np.float32([0.0, -0.0, -np.inf])])
    found = np.array([exp(number) for number in numbers])  # numba gives Python's floats back
    assert (found == found.astype(np.float32)).all()
    exact = np.exp(numbers.astype(np.float64))
    assert (abs(found - exact) <= 1.5 * np.spacing(exact.astype(np.float32))).all()
    assert np.isnan(exp(np.float32(np.nan)))


def decoded(model, ids, cuts, team=2, **options):
    """The logits of ids fed in chunks, all of them through the kernel of whole layers."""
    kernel = mock.Mock(side_effect=decode._run)
    with (
        mock.patch.object(decode, "_run", kernel),
        mock.patch.object(decode, "num_threads", return_value=team),
        mock.patch.object(fast_linear, "SMALL", 0),
        compiled_first(),
        np.errstate(all="ignore"),
    ):
        logits = run_in_chunks(model, ids, cuts, **options)
    assert kernel.call_count == len(cuts) + 1
    return logits


def plain(model, ids, cuts, **options):
    """The same without compiled bodies."""
    by_blas = {"NumPy": {"linear_2d": linear_2d}}
    with mock.patch.dict(ROUTES, by_blas, clear=True), np.errstate(all="ignore"):
        return run_in_chunks(model, ids, cuts, **options)


def models(config, dtype):
    """A random model in a dtype, and one of the same numbers in float64."""
    weights = random_weights(config, 0, DTYPES[dtype])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return model_of(config, weights), model_of(config, wide)


def assert_as_exact(model, exact, ids, cuts, keep=None, team=2, **options):
    """No farther from float64 than 4 times what NumPy alone is, nor than 8 roundings."""
    options["keep"] = keep
    kept = np.ones(ids.shape, bool) if keep is None else keep
    compiled, alone, reference = (
        logits[kept]
        for logits in (
            decoded(model, ids, cuts, team, **options),
            plain(model, ids, cuts, **options),
            plain(exact, ids, cuts, **options),
        )
    )
    allowed = 4 * abs(alone - reference).max() + 8 * 2.0**-24 * abs(reference).max()
    assert abs(compiled - reference).max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=5)
@given(data=st.data())
def test_whole_layers(kind, dtype, data):
    config = CONFIGS[kind]
    batch, team = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = rng.integers(0, config.vocab_size, (batch, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), max_size=5)) | {5, 8})
    keep = np.arange(12) >= rng.integers(0, 4, (batch, 1)) if data.draw(st.booleans()) else None
    assert_as_exact(*models(config, dtype), ids, cuts, keep, team)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 48, 64, 80])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 1), (10, 2)])
def test_widths_and_groups(head_dim, heads):
    """Heads that fill vectors, and some that do not; groups that fill a tile, or not."""
    config = replace(
        CONFIGS["gqa"],
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        hidden_size=20,
        intermediate_size=26,
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
    assert_as_exact(*models(config, "float32"), ids, [5, 8, 9])


def test_attention_in_chunks():
    """More tokens than a unit of attention takes; the last chunks may hold nothing allowed."""
    config = replace(CONFIGS["window"], sliding_window=7, max_position_embeddings=1024)
    count = 2 * sizes.CHUNK + 3
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, count))
    cuts = [*range(16, count - 1, 16), count - 1]
    for changed in (config, replace(CONFIGS["gqa"], max_position_embeddings=1024)):
        assert_as_exact(*models(changed, "float32"), ids, cuts)


def test_a_ring():
    config = replace(CONFIGS["window"], sliding_window=5)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    assert_as_exact(*models(config, "float32"), ids, [*range(3, 24, 3)], rolling=3)


def test_a_sequence_does_not_depend_on_its_batch_or_on_threads():
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 12))
    cuts = [5, 6, 7, 10]
    whole = decoded(model, ids, cuts, team=3)
    for row in range(3):
        assert_same_bits(whole[row : row + 1], decoded(model, ids[row : row + 1], cuts, team=1))


def test_scores_that_overflow_give_nan_and_what_padding_hides_gives_zeros():
    """As the definition does: a token of padding attends to nothing, and gets no NaN."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    keep = np.ones((2, 12), bool)
    keep[1, :4] = False
    own, other = (run(model, ids, [5, 8], keep=keep) for run in (decoded, plain))
    np.testing.assert_array_equal(np.isfinite(own), np.isfinite(other))
    model.weights.layers[0].self_attn.qkv.fused[:] *= np.float32(1e25)
    own, other = (run(model, ids, [5, 8]) for run in (decoded, plain))
    assert not np.isfinite(own).all()
    np.testing.assert_array_equal(np.isnan(own), np.isnan(other))


def test_weights_changed_in_place_count_and_so_do_exchanged_layers():
    model, _ = models(CONFIGS["biases"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    before = decoded(model, ids, [6])
    model.weights.layers[0].input_layernorm[:] *= 2
    model.weights.layers[1].mlp.down_bias[:] += 1
    changed = decoded(model, ids, [6])
    assert abs(changed - before).max() > 1e-2
    np.testing.assert_allclose(changed, plain(model, ids, [6]), rtol=1e-4, atol=1e-4)
    model.weights.layers[0] = model.weights.layers[1]
    exchanged = decoded(model, ids, [6])
    assert abs(exchanged - changed).max() > 1e-2
    np.testing.assert_allclose(exchanged, plain(model, ids, [6]), rtol=1e-4, atol=1e-4)


def test_several_caches_take_turns():
    """Buffers are looked at anew where they are others than for the token before."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    expected = [decoded(model, ids[i : i + 1], range(1, 12)) for i in range(2)]
    caches = [KVCache.create(model, 1, 12) for _ in range(2)]
    found = [[], []]
    with compiled_first(), mock.patch.object(fast_linear, "SMALL", 0):
        for token in range(12):
            for i in range(2):
                output = forward(model, ids[i : i + 1, token : token + 1], cache=caches[i])
                caches[i] = output.cache if token % 3 else output.cache.copy()
                found[i].append(output.logits)
    for parts, logits in zip(found, expected, strict=True):
        assert_same_bits(np.concatenate(parts, axis=1), logits)


def goes_another_way(model, ids, **options):
    with (
        mock.patch.object(decode, "_run", side_effect=AssertionError("by the kernel")),
        compiled_first(),
    ):
        return forward(model, ids, **options).logits


def test_what_the_kernel_of_layers_does_not_take():
    """Taps, whole prompts, float64 and weights of several dtypes go by the definition."""
    model, exact = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    expected = plain(model, ids, [])
    seen = []

    def tap(name, array):
        seen.append(name)
        return array

    cache = KVCache.create(model, 1, 12)
    np.testing.assert_allclose(goes_another_way(model, ids, cache=cache, tap=tap), expected, 1e-4)
    assert "model.layers.0.self_attn.q_proj" in seen
    np.testing.assert_allclose(goes_another_way(model, ids), expected, 1e-4)
    twice = np.tile(ids, (2, 1))
    cache = KVCache.create(model, 2, 12)
    np.testing.assert_allclose(goes_another_way(model, twice, cache=cache)[:1], expected, 1e-4)
    cache = KVCache.create(exact, 1, 12)
    np.testing.assert_allclose(goes_another_way(exact, ids, cache=cache), expected, 1e-3)
    weights = model.weights.layers[0]
    mixed = replace(weights, input_layernorm=weights.input_layernorm.astype(ml_dtypes.bfloat16))
    model.weights.layers[0] = mixed
    cache = KVCache.create(model, 1, 12)
    goes_another_way(model, ids, cache=cache)


def test_layers_of_other_sizes_than_the_first():
    """The kernel would read beyond them."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    mlp = model.weights.layers[1].mlp
    rows = len(mlp.gate_proj) - 4
    smaller = replace(
        mlp,
        gate_proj=mlp.gate_proj[:rows],
        up_proj=mlp.up_proj[:rows],
        down_proj=np.ascontiguousarray(mlp.down_proj[:, :rows]),
    )
    model.weights.layers[1] = replace(model.weights.layers[1], mlp=smaller)
    cache = KVCache.create(model, 1, 12)
    found = goes_another_way(model, ids, cache=cache)
    np.testing.assert_allclose(found, plain(model, ids, []), rtol=1e-4, atol=1e-5)


def test_as_many_threads_as_blas_has():
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        assert num_threads() == 1


def test_a_team_runs_each_thread_once_and_grows():
    team, ran = ThreadPool(), []
    for size in (1, 3, 2, 4):
        team.run(size, lambda thread, size, mark: ran.append((mark, size, thread)), size)
        assert sorted(r for r in ran if r[0] == size) == [(size, size, t) for t in range(size)]


def test_an_error_in_any_thread_is_raised():
    def kernel(thread, size):
        if thread == 1:
            raise ValueError("in thread 1")

    with pytest.raises(ValueError, match="in thread 1"):
        ThreadPool().run(2, kernel)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_team_of_its_own():
    team = ThreadPool()
    team.run(2, lambda thread, size: None)
    child = os.fork()
    if child == 0:
        team.run(2, lambda thread, size: None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupted_team_waits_for_nobody_and_goes_on_working():
    team, ended = ThreadPool(), []

    def kernel(thread, size, stop):
        if thread == 0:
            raise KeyboardInterrupt
        deadline = time.monotonic() + 30
        while not stop[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.1)
        ended.append(bool(stop[-1]))

    stop = np.zeros(2, np.int64)
    with pytest.raises(KeyboardInterrupt):
        team.run(2, kernel, stop, stop=stop)
    assert ended == [True]  # by now: what it works on may go
    ran = []
    team.run(2, lambda thread, size: ran.append(thread))
    assert sorted(ran) == [0, 1]


def test_waiting_ends_when_it_is_to_no_purpose():
    from llama_layers.backends.numba.kernels.spin_wait import spin_until

    state = np.zeros(2, np.int64)
    address = state.ctypes.data
    thread = threading.Thread(target=spin_until, args=(address, 1, address + 8), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    state[1] = 1
    thread.join(30)
    assert not thread.is_alive()


def test_threads_work_on_after_the_main_one_has_ended():
    code = """
import threading, numpy as np
from llama_layers import linear
x, w = np.ones((1, 2, 2048), np.float32), np.ones((2048, 2048), np.float32)
linear(x, w)
def work():
    threading.main_thread().join()
    print(linear(x, w)[0, 0, 0])
threading.Thread(target=work).start()
"""
    environment = os.environ | {"LLAMA_LAYERS_FAST": "1", "OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert (run.stdout, run.stderr) == ("2048.0\n", "")


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("swapped", ["x", "weight", "both"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_bytes_in_the_other_order(tokens, swapped, kind, monkeypatch):
    monkeypatch.setattr(fast_linear, "SMALL", 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 24)).astype(np.float32)
    weight = rng.standard_normal((8, 24)).astype(kind)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    if swapped != "weight":
        x = x.astype(x.dtype.newbyteorder())
    if swapped != "x":
        weight = weight.astype(weight.dtype.newbyteorder())
    with compiled_first():
        np.testing.assert_allclose(dispatched(np, x, weight, None), exact, atol=1e-4)


@pytest.mark.parametrize("steps", [[6], [4, 5]])
def test_padding_with_nan_reaches_no_token(steps):
    """Before the first token of a sequence, in the kernel's cache."""
    weights = random_weights(CONFIGS["gqa"], 0, np.float32)
    weights["model.embed_tokens.weight"][0] = np.nan
    model = model_of(CONFIGS["gqa"], weights)
    ids = np.array([[0, 3, 5, 2, 7, 1], [4, 3, 5, 2, 7, 1]])
    keep = ids > 0
    logits = decoded(model, ids, [c for c in steps if c < 6], keep=keep)
    assert np.isfinite(logits[keep]).all()


def test_kernels_work_where_nothing_can_be_kept(monkeypatch):
    from llama_layers.backends.numba.kernels import jit

    real = jit.njit

    def njit(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(jit, "njit", njit)

    def double(x):
        return 2 * x

    found = None
    with contextlib.suppress(RuntimeError):
        found = jit.compiled(double)(21)
    assert found == 42
