"""The public strategies and assertions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.families import SWITCHES
from llama_layers.testing import (
    UnusualErrorWarning,
    arrays,
    assert_same_bits,
    assert_within_bound,
    configs,
    hidden_states,
    input_ids,
    qkv_weights,
)
from llama_layers.verify import Bound

FORMATS = {
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
}
SEARCH = settings(max_examples=2000, database=None, derandomize=True)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_arrays_keep_to_shape_dtype_and_magnitude(name, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    largest = data.draw(st.sampled_from([1.0, 1024.0, np.inf]))
    x = data.draw(arrays(shape, dtype=name, max_magnitude=largest))
    assert x.shape == shape
    assert x.dtype == FORMATS[name]
    assert np.isfinite(x.astype(np.float64)).all()
    assert (abs(x.astype(np.float64)) <= largest).all()


@given(data=st.data())
def test_arrays_lie_where_they_are_asked_for(backend, data):
    x = data.draw(arrays((2, 3), xp=backend.xp, device=backend.device))
    assert backend.holds(x)
    assert dtype_name(x.dtype) == "float32"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "wanted",
    [
        lambda x, info: (np.signbit(x) & (x == 0)).any(),
        lambda x, info: ((x != 0) & (abs(x) < float(info.smallest_normal))).any(),
        lambda x, info: (x == float(info.max)).any(),
        lambda x, info: len(set(x)) > 4,  # not a constant with a few exceptions
        lambda x, info: len(set(x)) == 1 and abs(x[0]) not in (0, 1),
    ],
    ids=["negative zero", "subnormal", "largest", "random", "constant"],
)
def test_arrays_are_awkward(name, wanted):
    info = ml_dtypes.finfo(FORMATS[name])
    strategy = arrays((8,), dtype=name, max_magnitude=np.inf)
    find(strategy, lambda x: wanted(x.astype(np.float64), info), settings=SEARCH)


def test_arrays_shrink_to_simple_ones():
    x = find(arrays((3, 3)), lambda x: (x > 0.25).any(), settings=SEARCH)
    assert set(x.ravel()) == {1}


KINDS = {
    "multi-head": lambda c: c.num_key_value_heads == c.num_attention_heads > 1,
    "grouped-query": lambda c: 1 < c.num_key_value_heads < c.num_attention_heads,
    "multi-query": lambda c: 1 == c.num_key_value_heads < c.num_attention_heads,
    "other width of heads": lambda c: c.num_attention_heads * c.head_dim != c.hidden_size,
    "odd width": lambda c: c.hidden_size % c.num_attention_heads,
    "biases": lambda c: c.attention_bias and c.model_type == "llama",
    "tied": lambda c: c.tie_word_embeddings,
    "biases of the MLP": lambda c: c.mlp_bias,
    "window": lambda c: c.sliding_window is not None,
    "windows of some layers": lambda c: len(set(map(c.window_of, range(c.num_hidden_layers)))) == 2,
    "mistral": lambda c: c.model_type == "mistral",
    "qwen2": lambda c: c.model_type == "qwen2",
    "plain RoPE": lambda c: c.rope_scaling is None,
    "some layers without RoPE": lambda c: {k is None for k in c.rope_kinds} == {True, False},
    "partial RoPE": lambda c: c.partial_rotary_factor < 1 and c.llama_4_scaling_beta,
    **{
        kind: lambda c, kind=kind: c.rope_scaling is not None and c.rope_scaling.rope_type == kind
        for kind in ("linear", "dynamic", "yarn", "llama3", "longrope")
    },
}


def test_configs_are_of_every_kind():
    missing = set(KINDS)

    def wanted(config):
        missing.difference_update([kind for kind in missing if KINDS[kind](config)])
        return not missing

    find(configs(), wanted, settings=settings(SEARCH, phases=[Phase.generate]))


def test_configs_have_all_switches_in_any_family():
    """Also those that no Llama has, and many at once."""
    seen = set()

    def wanted(config):
        seen.update([*config.switches, len(config.switches)])
        return seen >= {*SWITCHES, 10}

    find(configs(model_types=["llama"]), wanted, settings=settings(SEARCH, phases=[Phase.generate]))


@given(data=st.data(), config=configs(model_types=["llama"], max_heads=3, max_head_dim=4))
def test_what_a_config_asks_for_fits_it(backend, data, config):
    assert config.model_type == "llama"
    assert config.num_attention_heads <= 3
    assert config.head_dim <= 4
    where = {"xp": backend.xp, "device": backend.device}
    x = data.draw(hidden_states(config, max_batch=3, max_seq=2, **where))
    assert 1 <= x.shape[0] <= 3
    assert 1 <= x.shape[1] <= 2
    assert x.shape[2] == config.hidden_size
    w = data.draw(qkv_weights(config, **where))
    assert (w.num_heads, w.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (w.head_dim, w.hidden_size) == (config.head_dim, config.hidden_size)
    assert (w.bias is not None) == config.qkv_bias
    ids = data.draw(input_ids(config, max_batch=3, max_seq=2, **where))
    assert backend.holds(ids)
    assert ids.ndim == 2
    numbers = to_numpy(ids)
    assert ((numbers >= 0) & (numbers < config.vocab_size)).all()


def bound(exact, limit, usual):
    return Bound(np.array(exact), np.array(limit), np.array(usual))


def test_within_bound_passes():
    assert_within_bound(np.array([[1.0, 2.5]]), bound([[1.0, 2.0]], [[0.0, 1.0]], [[0.0, 0.5]]))
    assert_within_bound(
        np.zeros((0, 2)), bound(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 2)))
    )


def test_within_bound_fails_and_says_where():
    with pytest.raises(AssertionError) as caught:
        assert_within_bound(
            np.array([[1.0, 5.0], [4.0, 2.0]]),
            bound([[1.0, 2.0], [2.0, 2.0]], [[1.0, 0.5], [1.0, 1.0]], [[1.0, 0.5], [1.0, 1.0]]),
        )
    message = str(caught.value)
    assert message.startswith("FAIL: error 6 times its limit at [0, 1]: ")
    assert "computed 5.0, exact 2.0, limit 0.5; 2 of 4 elements beyond it" in message
    for word in ("FAIL: ", "WARN: ", "PASS: "):
        assert word in message


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_within_bound_fails_for_numbers_that_are_none(wrong):
    with pytest.raises(AssertionError, match="FAIL: error inf times"):
        assert_within_bound(np.array([wrong]), bound([1.0], [1.0], [1.0]))


def test_within_bound_warns():
    with pytest.warns(UnusualErrorWarning, match=r"WARN: error 2 times its usual size at \[1\]"):
        assert_within_bound(np.array([0.0, 0.5]), bound([0.0, 0.0], [0.0, 1.0], [0.0, 0.25]))


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_same_bits(name, data):
    x = data.draw(arrays((2, 3), dtype=name, max_magnitude=np.inf))
    assert_same_bits(x, np.asfortranarray(x))
    assert_same_bits(x[:, ::2], x.copy()[:, ::2])
    place = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    word, changed = np.dtype(f"u{x.itemsize}"), x.copy()
    changed.view(word)[place] ^= word.type(1 << data.draw(st.integers(0, 8 * x.itemsize - 1)))
    with pytest.raises(
        AssertionError, match=rf"1 of 6 elements differ.*\[{place[0]}, {place[1]}\]"
    ):
        assert_same_bits(x, changed)


def test_same_bits_of_zeros_and_nans():
    quiet = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert_same_bits(quiet, quiet.copy())
    with pytest.raises(AssertionError, match=r"0x7fc00000\) and nan \(0x7fc00001\)"):
        assert_same_bits(quiet[:1], quiet[1:])
    with pytest.raises(AssertionError, match=r"0\.0 \(0x00000000\) and -0\.0 \(0x80000000\)"):
        assert_same_bits(np.float32([0.0]), np.float32([-0.0]))


def test_same_bits_of_unlike_arrays():
    with pytest.raises(AssertionError, match=r"shapes differ: \[2\] and \[1, 2\]"):
        assert_same_bits(np.zeros(2), np.zeros((1, 2)))
    with pytest.raises(AssertionError, match="dtypes differ: float64 and float32"):
        assert_same_bits(np.zeros(2), np.zeros(2, np.float32))
