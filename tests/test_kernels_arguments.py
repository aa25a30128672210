"""What reaches compiled kernels: arrays that fit each other, however the caller's lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from tests.support.compiled_route import compiled_first
from tests.support.layouts import LAYOUTS
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers import (
    KVCache,
    Llama,
    Mask,
    apply_rope,
    attention,
    forward,
    linear,
    rms_norm,
    swiglu,
)
from llama_layers.backends import numba as fast
from llama_layers.backends.numba import attention as fast_attention
from llama_layers.backends.numba import linear as fast_linear
from llama_layers.backends.numba import pointwise
from llama_layers.backends.numba.kernel_dtypes import FLOAT32, readable, ready
from llama_layers.backends.numba.threadpool import ThreadPool
from llama_layers.layers.cache_state import changed
from llama_layers.layers.tensors import ARRAYS

# Zero steps: every row is the first, for the other layouts too.
FIRST = {"repeated": lambda a: np.broadcast_to(a[:1], a.shape)}

RNG = np.random.default_rng(0)


def numbers(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


CALLS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, eps=1e-5), [numbers(9, 24), numbers(24)]),
    "swiglu": (swiglu, [numbers(9, 24), numbers(9, 24)]),
    "apply_rope": (apply_rope, [numbers(2, 9, 3, 8), numbers(9, 4), numbers(9, 4)]),
    "apply_rope of each": (apply_rope, [numbers(2, 9, 3, 8), numbers(2, 9, 4), numbers(2, 9, 4)]),
    "attention": (attention, [numbers(2, 9, 4, 8), numbers(2, 11, 2, 8), numbers(2, 11, 2, 8)]),
    "attention, masked": (
        lambda q, k, v, mask: attention(q, k, v, mask=mask),
        [*(numbers(2, n, h, 8) for n, h in ((9, 4), (11, 2), (11, 2))), numbers(2, 9, 11) < 1],
    ),
    "attention in slots": (
        lambda q, k, v, queries, keys, keep: attention(q, k, v, mask=Mask(queries, keys, 4, keep)),
        [
            *(numbers(2, n, h, 8) for n, h in ((9, 4), (11, 2), (11, 2))),
            *(np.arange(2, 11), np.arange(11), numbers(2, 11) < 1),
        ],
    ),
    "linear of few": (linear, [numbers(3, 40), numbers(12, 40), numbers(12)]),
    "linear of many": (linear, [numbers(40, 40), numbers(12, 40), numbers(12)]),
    "linear of bfloat16": (
        linear,
        [numbers(*shape, dtype=ml_dtypes.bfloat16) for shape in ((40, 31), (12, 31), (12,))],
    ),
    "linear by float16": (linear, [numbers(3, 40), numbers(12, 40, dtype=np.float16), numbers(12)]),
}


@pytest.fixture
def small(monkeypatch):
    """Kernels for small arrays, too."""
    for module in (pointwise, fast_attention, fast_linear):
        monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr("llama_layers.backends.numba.linear.ONE_THREAD", 0)
    with compiled_first():
        yield


@pytest.mark.parametrize(
    ("call", "place"), [(name, i) for name, (_, a) in CALLS.items() for i in range(len(a))]
)
def test_arguments_lie_in_memory_in_every_way(call, place, small):
    """The numbers are those of arrays that lie as kernels take them, up to rounding."""
    function, arrays = CALLS[call]
    half = arrays[0].dtype.itemsize == 2
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-5}
    for changes, given in ((LAYOUTS, arrays), (FIRST, _repeated(arrays, place))):
        expected = function(*given)
        for how, layout in changes.items():
            laid_out = [layout(a) if i == place else a for i, a in enumerate(given)]
            found = function(*laid_out).astype(np.float64)
            np.testing.assert_allclose(found, expected.astype(np.float64), **tolerance, err_msg=how)


def _repeated(arrays, place):
    """The arrays, of which one has equal rows, in memory of their own."""
    return [FIRST["repeated"](a).copy() if i == place else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("shapes", [((2, 9, 4), (9, 4)), ((9, 4), (2, 9, 4)), ((1, 9, 4), (9, 4))])
def test_tables_of_as_many_rows_as_there_are_sequences_or_one(shapes, layout, small):
    """A cosine for each sequence, and sines for all: a kernel may not look for more of these."""
    x = numbers(2, 9, 3, 8)
    cos, sin = (numbers(*shape) for shape in shapes)
    whole = (np.ascontiguousarray(np.broadcast_to(a, (2, 9, 4))) for a in (cos, sin))
    found = apply_rope(x, cos, sin, layout=layout)
    np.testing.assert_allclose(found, apply_rope(x, *whole, layout=layout), 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int64])
def test_arrays_made_ready(dtype):
    array = (numbers(4, 6) * 4).astype(dtype)
    assert ready(array, dtype) is array
    for layout in LAYOUTS.values():
        found = ready(layout(array), dtype)
        assert type(found) is np.ndarray
        assert found.dtype == np.dtype(dtype)
        assert found.flags.carray
        np.testing.assert_array_equal(found, array)


def test_what_kernels_read_from_where_it_lies():
    array = numbers(4, 6)
    readable_as_it_is = {"apart", "backwards", "apart and backwards", "columns first"}
    readable_as_it_is |= {"read-only", "mapped"}
    assert readable(array) == FLOAT32
    for how, layout in LAYOUTS.items():
        assert (readable(layout(array)) == FLOAT32) == (how in readable_as_it_is), how


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 0, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)),
        ((2, 5, 4, 8), (2, 0, 2, 8), (2, 0, 2, 8)),
        ((2, 5, 0, 8), (2, 5, 2, 8), (2, 5, 2, 8)),
        ((2, 5, 4, 0), (2, 5, 2, 0), (2, 5, 2, 0)),
        ((0, 5, 4, 8), (0, 5, 2, 8), (0, 5, 2, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_sizes_of_zero(shapes, small):
    # Parts of others, whose strides NumPy keeps.
    q, k, v = (numbers(2, 5, 4, 8)[tuple(map(slice, shape))] for shape in shapes)
    found = attention(q, k, v)
    assert found.shape == q.shape
    assert not found.any()
    table = np.ones((2, *shapes[0][1:2], shapes[0][3] // 2), np.float32)
    assert apply_rope(q, *table).shape == q.shape
    assert rms_norm(q, np.ones(q.shape[-1], np.float32), eps=1.0).shape == q.shape
    assert swiglu(q, q).shape == q.shape
    assert linear(q, numbers(6, q.shape[-1])).shape == (*q.shape[:-1], 6)


class Later(Sequence):
    """Layers that nobody looks at before they are used."""

    def __init__(self, layers):
        self.layers = layers

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]


def test_a_plan_is_for_the_sizes_of_one_config(small):
    """Of weights that are not looked at when a model is made, and two configs of as many rows."""
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    weights = replace(model.weights, layers=Later(model.weights.layers))
    first = Llama(GQA, weights)
    decoded(first, KVCache.create(first, 1, 8), np.array([[1]]))
    other = replace(GQA, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    second = Llama(other, weights)
    with pytest.raises(ValueError, match="expected shape"):
        decoded(second, KVCache.create(second, 1, 8), np.array([[1]]))


def decoded(model, cache, ids):
    return forward(model, ids, cache=cache).logits


@pytest.mark.parametrize("name", [path for path in ARRAYS if not path.endswith("_norm")])
@pytest.mark.parametrize("how", LAYOUTS)
def test_weights_of_a_model_lie_in_memory_in_every_way(how, name, small):
    config = CONFIGS["biases"]
    model = model_of(config, random_weights(config, dtype=np.float32))
    ids = np.array([[1, 2, 3]])
    expected = decoded(model, KVCache.create(model, 1, 8), ids)
    layer = model.weights.layers[1]
    model.weights.layers[1] = _with(layer, name.split("."), LAYOUTS[how](layer.arrays()[name]))
    found = decoded(model, KVCache.create(model, 1, 8), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def _with(part, names, array):
    first, *others = names
    return replace(part, **{first: _with(getattr(part, first), others, array) if others else array})


@pytest.mark.parametrize("how", [how for how in LAYOUTS if how != "read-only"])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_caches_lie_in_memory_in_every_way(how, name, small):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids = np.array([[1, 2, 3]])
    expected = decoded(model, KVCache.create(model, 1, 8), ids)
    cache = KVCache.create(model, 1, 8)
    arrays = tuple(map(LAYOUTS[how], getattr(cache, name)))
    found = decoded(model, changed(cache, **{name: arrays}), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert all(array[:, :3].any() and not array[:, 3:].any() for array in arrays)


def spoilt(model, cache, how):
    """A cache that was all right when the last token went through it."""
    if how == "read-only":
        cache.values[1].setflags(write=False)
    elif how == "of another shape":
        cache.keys[1].shape = (1, 4, 4, 4)
    elif how == "a layer more":
        model.weights.layers.append(model.weights.layers[0])
    elif how == "a layer less":
        model.weights.layers.pop()
    elif how == "no layer":
        model.weights.layers[1] = None


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("read-only", ValueError, "read-only"),
        (
            "of another shape",
            ValueError,
            r"cache: expected keys of shape \[1, 8, 2, 4\], got \[1, 4",
        ),
        ("a layer more", ValueError, "weights: expected 2 layers, as config says, got 3"),
        ("a layer less", ValueError, "weights: expected 2 layers, as config says, got 1"),
        ("no layer", TypeError, "w: expected LayerWeights, got NoneType"),
    ],
)
def test_what_is_changed_in_place_is_looked_at(how, error, message, compiled, small):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    without = {} if compiled else {"decoder_layers": lambda *_: NotImplemented}
    with mock.patch.dict(fast.BODIES, without), compiled_first():
        cache = forward(model, np.array([[1]]), cache=KVCache.create(model, 1, 8)).cache
        spoilt(model, cache, how)
        with pytest.raises(error, match=message):
            forward(model, np.array([[2]]), cache=cache)


def test_memory_that_a_plan_has_the_address_of_cannot_go():
    """NumPy gives an array other memory only if nothing else looks at it."""
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    cache = KVCache.create(model, 1, 8)
    with compiled_first():
        forward(model, np.array([[1]]), cache=cache)
    layer = model.weights.layers[0]
    with pytest.raises(ValueError, match="cannot resize"):
        layer.input_layernorm.resize((10000,))
    with pytest.raises(ValueError, match="cannot resize"):
        cache.keys[0].resize((10000,))


def test_one_config_after_another_on_the_same_weights(small):
    """A plan is for the sizes of one config."""
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    other = replace(model, config=replace(GQA, rms_norm_eps=0.5))
    ids = np.array([[1, 2]])
    first, second = (decoded(m, KVCache.create(m, 1, 8), ids) for m in (model, other))
    assert abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(decoded(model, KVCache.create(model, 1, 8), ids), first)


def test_kernels_are_compiled_for_one_kind_of_arguments(small):
    """Another would take as long again."""
    from numba import typeof

    kinds = {}

    def run(self, size, kernel, *arguments, stop=None):
        found = kinds.setdefault(kernel.py_func.__name__, set())
        found.add(tuple(map(typeof, arguments)))
        real(self, size, kernel, *arguments, stop=stop)

    real = ThreadPool.run
    with mock.patch.object(ThreadPool, "run", run):
        for name, (function, arrays) in CALLS.items():
            for layout in LAYOUTS.values():
                for place in range(len(arrays)):
                    if "bfloat16" not in name:  # which is written by another kernel
                        function(*(layout(a) if i == place else a for i, a in enumerate(arrays)))
        for batch in (1, 2):
            for kind in ("biases", "some windows"):
                model = model_of(CONFIGS[kind], random_weights(CONFIGS[kind], dtype=np.float32))
                for mask in (None, np.ones((batch, 2), int)):
                    cache = KVCache.create(model, batch, 8)
                    ids = np.ones((batch, 2), int)
                    cache = forward(model, ids, cache=cache, attention_mask=mask).cache
                    forward(model, ids[:, 1:], cache=cache)
    assert len(kinds) == 7
    assert {name: len(found) for name, found in kinds.items()} == dict.fromkeys(kinds, 1)
