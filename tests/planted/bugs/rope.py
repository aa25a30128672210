"""Bugs of RoPE: the rotation, its table, and every scaling of the frequencies."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import numpy as np

from tests.planted.planting import wrong

ROTATE = "llama_layers.layers.rope:rotate"
BY_NUMPY = "llama_layers.backends.numpy.pointwise:rotate"
TABLE = "llama_layers.layers.rope:rope_table"
FREQUENCIES = "llama_layers.layers.rope:inv_freq"
FACTOR = "llama_layers.layers.rope:attention_factor"

BASIS = "test_rope.py::test_basis_vectors[definition-numpy]"
PAIRS = "test_rope.py::test_half_is_interleaved_permuted"
PAPERS = "test_rope.py::test_frequencies_are_the_papers"
OF_TABLE = "test_rope.py::test_table_is_of_these_frequencies"
PUBLISHED = "test_rope.py::test_published_frequencies_of_llama3_1"


@wrong(ROTATE, BASIS, "RoPE rotated the other way")
def rotated_the_other_way(right, xp, x, cos, sin, layout):
    return right(xp, x, cos, -sin, layout)


@wrong(ROTATE, "test_rope.py::test_norms_of_pairs_are_kept", "RoPE on half of the channels")
def only_one_half_rotated(right, xp, x, cos, sin, layout):
    half = x.shape[3] // 2
    return xp.concat([right(xp, x, cos, sin, layout)[..., :half], x[..., half:]], axis=-1)


@wrong("llama_layers.layers.rope:apply_rope", BASIS, "RoPE layout interleaved")
def interleaved_pairs_by_default(right, x, cos, sin, *, layout="interleaved", **rest):
    return right(x, cos, sin, layout=layout, **rest)


@wrong(
    "llama_layers.layers.rope:apply_rope",
    "test_rope_layers.py::test_channels_beyond_the_rotated_ones_stay",
)
def channels_beyond_the_rotated_ones_left_out(right, x, cos, sin, *, rotary_dim=None, **rest):
    y = right(x, cos, sin, rotary_dim=rotary_dim, **rest)
    return y if rotary_dim is None else np.where(np.arange(y.shape[3]) < rotary_dim, y, 0)


@wrong("llama_layers.model.inputs:_rope", "test_forward.py::test_like_naive_loops")
def rope_of_the_first_layer_in_all(right, positions, config, kind, x):
    return right(positions, config, config.rope_kinds[0], x)


@wrong("llama_layers.layers.temperature:temperatures", "test_rope_layers.py::test_temperature")
def temperature_of_the_position_after(right, positions, config):
    return right(positions + 1, config)


@wrong(
    "llama_layers.config.rope_keys:_no_rope_layers",
    "test_rope_layers.py::test_layers_without_rope",
)
def rope_in_every_layer(right, arguments, keys):
    right(arguments, keys)


@wrong(
    "llama_layers.layers.frequencies:_divisors",
    "test_rope_layers.py::test_longrope_depends_on_the_length",
)
def short_factors_at_every_length(right, scaling, length):
    return right(scaling, None)


@wrong(ROTATE, PAIRS)
def interleaved_pairs_put_back_in_halves(right, xp, x, cos, sin, layout):
    y = right(xp, x, cos, sin, layout)
    return y if layout == "half" else xp.concat([y[..., 0::2], y[..., 1::2]], axis=-1)


@wrong(BY_NUMPY, "test_rope.py::test_basis_vectors[body-numpy]")
def rotated_the_other_way_by_NumPy(right, xp, x, cos, sin, layout):
    return right(xp, x, cos, -sin, layout)


@wrong(BY_NUMPY, PAIRS)
def pairs_always_halves_by_NumPy(right, xp, x, cos, sin, layout):
    return right(xp, x, cos, sin, "half")


@wrong(BY_NUMPY, "test_rope.py::test_memory_order_is_free")
def angles_mixed_up_where_tokens_are_adjacent(right, xp, x, cos, sin, layout):
    if x.strides[1] < x.strides[3]:
        cos, sin = (angles.ravel().reshape(angles.shape, order="F") for angles in (cos, sin))
    return right(xp, x, cos, sin, layout)


@wrong(TABLE, "test_rope.py::test_position_0_changes_no_bit", "RoPE cosine and sine swapped")
def cosine_and_sine_swapped(right, positions, config, *, like):
    return right(positions, config, like=like)[::-1]


@wrong(TABLE, "test_rope.py::test_turning_back", "RoPE table in few bits")
def table_narrowed_to_the_precision_of_bfloat16(right, positions, config, *, like):
    return tuple((table * 256).round() / 256 for table in right(positions, config, like=like))


@wrong(TABLE, OF_TABLE, "attention factor of yarn misused")
def attention_factor_on_the_cosine_only(right, positions, config, *, like):
    from llama_layers.layers.rope import attention_factor

    cos, sin = right(positions, config, like=like)
    return cos, sin / attention_factor(config)


@wrong(
    TABLE,
    "test_tap.py::test_every_site_in_order_with_its_numbers",
    "RoPE position off by one",
)
def positions_start_at_one(right, positions, config, *, like):
    return right(positions + 1, config, like=like)


@wrong(TABLE, "test_forward.py::test_like_naive_loops", "RoPE at other positions")
def every_chunk_starts_at_position_0(right, positions, config, *, like):
    return right(positions - positions[..., :1], config, like=like)


@wrong(FREQUENCIES, PAPERS, "another rope_theta")
def another_theta(right, config, *, length=None):
    return right(replace(config, rope_theta=10000.0), length=length)


@wrong(FREQUENCIES, PAPERS, "RoPE exponent")
def exponent_over_half_the_head(right, config, *, length=None):
    return right(replace(config, rope_theta=config.rope_theta**2), length=length)


@wrong(FREQUENCIES, "test_rope.py::test_phases_are_exact_to_float32")
def frequencies_in_float32(right, config, *, length=None):
    return right(config, length=length).astype(np.float32)


def scaled(config, kind):
    return config.rope_scaling is not None and config.rope_scaling.rope_type == kind


def unscaled(config, **changes):
    return replace(config, rope_scaling=None, **changes)


def rescaled(config, kind, **changes):
    """The config with other parameters of its RoPE scaling, if it is of this kind."""
    if not scaled(config, kind):
        return config
    return replace(config, rope_scaling=replace(config.rope_scaling, **changes))


@wrong(FREQUENCIES, PAPERS, "RoPE scaling ignored")
def linear_scaling_ignored(right, config, *, length=None):
    return right(unscaled(config) if scaled(config, "linear") else config, length=length)


@wrong(FREQUENCIES, PAPERS, "RoPE scaling factor inverted")
def linear_scaling_the_wrong_way(right, config, *, length=None):
    factor = config.rope_scaling.factor if scaled(config, "linear") else 1
    return right(config, length=length) * factor**2


@wrong(FREQUENCIES, PAPERS, "RoPE scaling ignored")
def dynamic_scaling_stuck_at_the_trained_context(right, config, *, length=None):
    return right(config)


@wrong(FREQUENCIES, OF_TABLE, "RoPE with other frequencies")
def dynamic_length_off_by_one(right, config, *, length=None):
    return right(config, length=length and max(1, length - 1))


@wrong(FREQUENCIES, PAPERS, "RoPE with other frequencies")
def dynamic_exponent_without_the_D_minus_2_of_the_paper(right, config, *, length=None):
    if not scaled(config, "dynamic"):
        return right(config, length=length)
    trained, factor = config.max_position_embeddings, config.rope_scaling.factor
    stretch = factor * max(length or 0, trained) / trained - (factor - 1)
    return right(unscaled(config, rope_theta=config.rope_theta * stretch))


@wrong(FREQUENCIES, PAPERS, "another ramp of RoPE scaling")
def yarn_ramp_upside_down(right, config, *, length=None):
    if not scaled(config, "yarn"):
        return right(config, length=length)
    plain = right(unscaled(config))
    return plain + plain / config.rope_scaling.factor - right(config)


@wrong(FREQUENCIES, PAPERS, "another parameter of RoPE scaling")
def yarn_ramp_never_truncated(right, config, *, length=None):
    return right(rescaled(config, "yarn", truncate=False), length=length)


@wrong(FREQUENCIES, PAPERS, "another ramp of RoPE scaling")
def yarn_ramp_truncated_inwards(right, config, *, length=None):
    with mock.patch.multiple(math, floor=math.ceil, ceil=math.floor):
        return right(config, length=length)


@wrong(FREQUENCIES, PAPERS, "another ramp of RoPE scaling")
def yarn_of_the_stretched_context(right, config, *, length=None):
    stretched = rescaled(config, "yarn", original_max_position_embeddings=None)
    return right(stretched, length=length)


@wrong(FACTOR, OF_TABLE, "attention factor of yarn missing")
def attention_factor_dropped(right, config):
    return 1.0


@wrong(FACTOR, PAPERS, "another parameter of RoPE scaling")
def mscale_ignored(right, config):
    return right(rescaled(config, "yarn", mscale=None, mscale_all_dim=None))


@wrong(FREQUENCIES, PUBLISHED, "RoPE scaling ignored")
def llama3_scaling_read_and_not_used(right, config, *, length=None):
    return right(unscaled(config) if scaled(config, "llama3") else config, length=length)


@wrong(FREQUENCIES, PUBLISHED, "another ramp of RoPE scaling")
def llama3_band_upside_down(right, config, *, length=None):
    if not scaled(config, "llama3"):
        return right(config, length=length)
    plain = right(unscaled(config))
    return plain + plain / config.rope_scaling.factor - right(config)


@wrong(FREQUENCIES, PAPERS, "another ramp of RoPE scaling")
def llama3_without_its_band(right, config, *, length=None):
    if not scaled(config, "llama3"):
        return right(config, length=length)
    plain, factor = right(unscaled(config)), config.rope_scaling.factor
    return np.where(right(config) / plain > (1 + 1 / factor) / 2, plain, plain / factor)
