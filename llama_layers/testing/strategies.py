"""Hypothesis strategies for configs, weights, hidden states and token ids.

Arrays are drawn as one seed, one scale and a few special numbers at drawn places, not element by
element, so that they cost little; they shrink to constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, dtype_of
from llama_layers.arrays.transfer import from_numpy
from llama_layers.arrays.types import Array, Device, Namespace
from llama_layers.config.families import FAMILIES, names_norms_otherwise
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.weights import QKVWeights

try:
    from hypothesis import strategies as st
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "the strategies of llama_layers.testing need hypothesis: "
        "pip install 'llama-layers[testing]'"
    ) from None

# How many elements of an array are drawn one by one.
SPECIAL_ELEMENTS = 4


@st.composite
def configs(
    draw: st.DrawFn,
    *,
    model_types: Sequence[str] = tuple(FAMILIES),
    max_heads: int = 6,
    max_head_dim: int = 8,
) -> LlamaConfig:
    """Small models of every shape that a config.json can describe.

    Multi-head, grouped-query and multi-query attention; head_dim as it follows from hidden_size
    and free of it; biases; tied embeddings; each RoPE scaling; layers with RoPE of their own, or
    none; sliding windows in all layers or some; norms in every place; sinks; multipliers and caps.

    Parameters
    ----------
    model_types : sequence of str
        Families to draw from.
    max_heads : int
        Most query heads.
    max_head_dim : int
        Largest head_dim, which is even.

    Returns
    -------
    SearchStrategy of LlamaConfig
        They shrink to one layer of one Llama head.

    Examples
    --------
    >>> from hypothesis import given
    >>> from llama_layers.testing import configs
    >>> @given(configs())
    ... def test_heads_are_grouped(config):
    ...     assert config.num_attention_heads % config.num_key_value_heads == 0
    >>> test_heads_are_grouped()
    """
    num_kv_heads = draw(st.integers(1, max_heads))
    groups = draw(st.integers(1, max_heads // num_kv_heads))
    head_dim = 2 * draw(st.integers(1, max_head_dim // 2))
    num_heads = num_kv_heads * groups
    # Where head_dim is given, hidden_size can be any number.
    derived = draw(st.booleans())
    hidden_size = num_heads * head_dim if derived else draw(st.integers(1, 3 * max_head_dim))
    model_type = draw(st.sampled_from(model_types))
    num_layers = draw(st.integers(1, 3))
    switches: dict[str, Any] = {}
    if draw(st.booleans()) and not names_norms_otherwise(model_type):  # others than the family's
        placements = ["before", "after", "both"]
        if "norm_placement" in FAMILIES[model_type].keys:
            placements.remove("after")
        switches["norm_placement"] = draw(st.sampled_from(placements))
    if draw(st.booleans()):
        switches["qk_norm"] = draw(st.sampled_from(["head", "full"]))
        switches |= {n: draw(st.booleans()) for n in ("qk_norm_weight", "qk_norm_after_rope")}
    if draw(st.booleans()):
        switches |= {name: draw(st.sampled_from(values)) for name, values in _NUMBERS.items()}
    if draw(st.booleans()):
        switches["attention_sinks"] = True
    sliding_window = draw(st.none() | st.integers(1, 16))
    if sliding_window is not None and draw(st.booleans()):  # in some layers
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        switches["layer_types"] = draw(st.lists(kinds, min_size=num_layers, max_size=num_layers))
    return LlamaConfig(
        **switches,
        vocab_size=draw(st.integers(1, 64)),
        hidden_size=hidden_size,
        intermediate_size=draw(st.integers(1, 4 * max_head_dim)),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=None if derived else head_dim,  # type: ignore[arg-type]  # derived then
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        **draw(_ropes(head_dim, num_layers)),
        max_position_embeddings=draw(st.sampled_from([32, 2048])),
        sliding_window=sliding_window,
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.none() | st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        model_type=model_type,
    )


@st.composite
def arrays(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    dtype: str = "float32",
    xp: Namespace = np,
    device: Device | None = None,
    max_magnitude: float = 1024.0,
) -> Array:
    """Arrays of floats, ordinary and awkward.

    Some are normally distributed, at a scale drawn from the whole range of the format, some are
    one power of two throughout; a few elements are then set to zeros of either sign, subnormal
    numbers, the largest magnitude allowed, or any other number.

    Parameters
    ----------
    shape : sequence of int
        Of the arrays.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Of the elements.
    xp : module
        The array namespace, NumPy's if not given.
    device : object, optional
        Where the arrays shall lie; the default device of `xp` if not given.
    max_magnitude : float
        No element is further from zero; infinity allows all finite numbers.

    Returns
    -------
    SearchStrategy of Array
        They shrink to ones with a few simple numbers among them.

    Examples
    --------
    >>> import numpy as np
    >>> from hypothesis import given
    >>> from llama_layers.testing import arrays
    >>> @given(arrays((2, 3), dtype="float16", max_magnitude=8.0))
    ... def test_magnitude(x):
    ...     assert x.dtype == np.float16
    ...     assert np.all(np.abs(x) <= 8)
    >>> test_magnitude()
    """
    kind = FLOATS[dtype]
    largest = min(max_magnitude, kind.max)
    size = math.prod(shape)
    special = st.sampled_from(_special(kind, largest)) | st.floats(-largest, largest)
    lowest, highest = kind.min_exponent, math.floor(math.log2(largest))
    # Squares of most numbers drawn should neither overflow nor vanish.
    exponent = draw(st.integers(-8, min(8, highest)) | st.integers(lowest, highest))
    seed = draw(st.none() | st.integers(0, 2**32 - 1))
    normal = np.ones(size) if seed is None else np.random.default_rng(seed).standard_normal(size)
    with np.errstate(over="ignore"):  # clipped below
        values = np.ldexp(normal, exponent)
    if size:
        count = min(size, SPECIAL_ELEMENTS)
        places = st.dictionaries(st.integers(0, size - 1), special, max_size=count)
        for place, value in draw(places).items():
            values[place] = value
    narrow = np.clip(values, -largest, largest).astype(dtype_of(np, dtype))
    return from_numpy(narrow.reshape(tuple(shape)), xp, device)


@st.composite
def hidden_states(
    draw: st.DrawFn,
    config: LlamaConfig,
    *,
    max_batch: int = 2,
    max_seq: int = 4,
    dtype: str = "float32",
    xp: Namespace = np,
    device: Device | None = None,
    max_magnitude: float = 1024.0,
) -> Array:
    """Hidden states that a layer of a model can be given.

    Parameters
    ----------
    config : LlamaConfig
        The model.
    max_batch, max_seq : int
        Most texts, and most tokens in each; at least one of both.
    dtype, xp, device, max_magnitude : as for `arrays`
        What numbers, and where.

    Returns
    -------
    SearchStrategy of Array, shape [B, S, hidden_size]
        They shrink to one token of ones.

    Examples
    --------
    >>> from hypothesis import given, strategies as st
    >>> from llama_layers import LlamaConfig, qkv_projection
    >>> from llama_layers.testing import configs, hidden_states, qkv_weights
    >>> @given(st.data(), configs())
    ... def test_shape(data, config):
    ...     x = data.draw(hidden_states(config))
    ...     q, k, v = qkv_projection(x, data.draw(qkv_weights(config)))
    ...     assert q.shape == (*x.shape[:2], config.num_attention_heads, config.head_dim)
    >>> test_shape()
    """
    shape = (draw(st.integers(1, max_batch)), draw(st.integers(1, max_seq)), config.hidden_size)
    return draw(arrays(shape, dtype=dtype, xp=xp, device=device, max_magnitude=max_magnitude))


@st.composite
def qkv_weights(
    draw: st.DrawFn,
    config: LlamaConfig,
    *,
    dtype: str = "float32",
    xp: Namespace = np,
    device: Device | None = None,
    max_magnitude: float = 1024.0,
) -> QKVWeights:
    """Query, key and value projections of a model.

    Parameters
    ----------
    config : LlamaConfig
        The model, which says whether there are biases.
    dtype, xp, device, max_magnitude : as for `arrays`
        What numbers, and where.

    Returns
    -------
    SearchStrategy of QKVWeights
        They shrink to ones.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.testing import qkv_weights
    >>> strategy = qkv_weights(LlamaConfig.llama2_7b())
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = (heads + 2 * kv_heads) * config.head_dim

    def drawn(*shape: int) -> Array:
        return draw(arrays(shape, dtype=dtype, xp=xp, device=device, max_magnitude=max_magnitude))

    bias = drawn(rows) if config.qkv_bias else None
    return QKVWeights(drawn(rows, config.hidden_size), heads, kv_heads, bias)


@st.composite
def input_ids(
    draw: st.DrawFn,
    config: LlamaConfig,
    *,
    max_batch: int = 2,
    max_seq: int = 4,
    xp: Namespace = np,
    device: Device | None = None,
) -> Array:
    """Token ids of a model's vocabulary.

    Parameters
    ----------
    config : LlamaConfig
        The model.
    max_batch, max_seq : int
        Most texts, and most tokens in each; at least one of both.
    xp, device : as for `arrays`
        Where.

    Returns
    -------
    SearchStrategy of Array of int64, shape [B, S]
        They shrink to one 0.

    Examples
    --------
    >>> from hypothesis import given
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.testing import input_ids
    >>> @given(input_ids(LlamaConfig.llama2_7b()))
    ... def test_ids(ids):
    ...     assert 0 <= ids.min() <= ids.max() < 32000
    >>> test_ids()
    """
    shape = (draw(st.integers(1, max_batch)), draw(st.integers(1, max_seq)))
    id_ = st.integers(0, config.vocab_size - 1)
    size = math.prod(shape)
    ids = np.array(draw(st.lists(id_, min_size=size, max_size=size)), np.int64)
    return from_numpy(ids.reshape(shape), xp, device)


def _special(kind: FloatFormat, largest: float) -> list[float]:
    positive: NDArray[np.float64] = np.array(
        [1.0, kind.smallest_normal, kind.smallest_subnormal, 3 * kind.smallest_subnormal, largest]
    )
    return [0.0, -0.0, *positive.tolist(), *(-positive).tolist()]


_NUMBERS: dict[str, list[Any]] = {
    "embedding_multiplier": [1.0, 0.3, 12.0],
    "embedding_multiplier_rounded": [False, True],
    "attention_multiplier": [None, 0.3],
    "residual_multiplier": [1.0, 0.22],
    "logits_scaling": [1.0, 6.0],
    "norm_weight_offset": [0.0, 1.0],
    "hidden_act": ["silu", "gelu_pytorch_tanh"],
    "attn_logit_softcapping": [None, 2.0],
    "final_logit_softcapping": [None, 3.0],
}


@st.composite
def _ropes(draw: st.DrawFn, head_dim: int, num_layers: int) -> dict[str, Any]:
    """The fields of RoPE, of heads of some width and of some layers."""
    parts = [1.0, *(part for part in (0.5, 0.25) if int(head_dim * part) in range(2, 99, 2))]
    part = draw(st.sampled_from(parts))
    pairs = int(head_dim * part) // 2
    longrope = {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "short_factor": [1.0 + i / 4 for i in range(pairs)],
        "long_factor": [1.0 + i for i in range(pairs)],
    }
    thetas = st.sampled_from([10000.0, 100.0, 0.0])
    return {
        "rope_theta": draw(st.sampled_from([10000.0, 500000.0])),
        "rope_scaling": draw(st.none() | st.sampled_from([*_ROPE_SCALINGS, longrope])),
        "layer_rope_theta": draw(
            st.none() | st.lists(thetas, min_size=num_layers, max_size=num_layers)
        ),
        "sliding_rope_scaling": draw(st.sampled_from([True, False])),
        "partial_rotary_factor": part,
        "llama_4_scaling_beta": draw(st.sampled_from([0.0, 0.5])),
    }


_ROPE_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
