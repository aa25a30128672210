"""Partial sums that ranks add in a format: within the bound if they are right, and only then."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.verify import RoundingProfile, check, linear_bound, record
from llama_layers.verify.profiles import CONTRACT, PROFILES, profile_named
from tests.support.random_models import GQA, model_of, random_weights

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def partial_sums(x, w, size, dtype):
    """What each rank computes: float32 sums one product after the other, rounded at the end."""
    parts = []
    for columns in np.array_split(np.arange(x.shape[-1]), size):
        total = np.zeros((*x.shape[:-1], len(w)), np.float32)
        for k in columns:
            total = total + x[..., k, None] * w[:, k]
        parts.append(total.astype(dtype))
    return parts


def in_a_row(parts):
    total = parts[0]
    for part in parts[1:]:
        total = (total + part).astype(total.dtype)
    return total


def in_a_tree(parts):
    while len(parts) > 1:
        pairs = [in_a_row(parts[i : i + 2]) for i in range(0, len(parts), 2)]
        parts = pairs[::-1]
    return parts[0]


@given(
    size=st.integers(1, 16),
    dtype=st.sampled_from(sorted(DTYPES)),
    out=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
    add=st.sampled_from([in_a_row, in_a_tree]),
    scale=st.sampled_from([1.0, 2.0**-20]),
)
def test_no_order_of_additions_exceeds_it(size, dtype, out, seed, add, scale):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 24)).astype(np.float32)
    w = (rng.standard_normal((8, 24)) * scale).astype(np.float32)
    found = add(partial_sums(x, w, size, DTYPES[dtype])).astype(DTYPES[out])
    bound = linear_bound(x, w, ranks=size, reduce=dtype, dtype=out)
    if size > 1:
        assert bound.ratio(found).max() <= 1
    assert np.isfinite(bound.limit).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_the_worst_that_can_happen_is_just_allowed(size, dtype):
    """The first part is rounded down, and so is each of its sums with the others."""
    u = 2.0**-11 if dtype == "float16" else 2.0**-8
    x = np.ones((1, size), np.float32)
    w = np.full((1, size), u, np.float32)
    w[0, 0] = 1 + u
    found = in_a_row(partial_sums(x, w, size, DTYPES[dtype]))
    assert found == 1  # and should be 1 + size u
    ratio = linear_bound(x, w, ranks=size, reduce=dtype).ratio(found)
    assert 0.85 < ratio <= 1
    if dtype == "float16":  # in bfloat16 a rounding is as much as the terms of second order
        assert linear_bound(x, w, ranks=size - 1, reduce=dtype).ratio(found) > 1


def test_a_bias_is_one_more_term():
    u, x = 2.0**-11, np.ones((1, 2), np.float32)
    w, b = np.float32([[1 + u, u]]), np.float32([u])
    found = in_a_row([*partial_sums(x, w, 2, np.float16), b.astype(np.float16)])
    assert found == 1
    assert 0.85 < linear_bound(x, w, b, ranks=2, reduce="float16").ratio(found) <= 1


def test_float32_is_rounded_where_it_is_added_only():
    """Two parts that are added without an error are within the sums' own bound."""
    x, w = np.ones((1, 2), np.float32), np.float32([[1, 2.0**-24]])
    (limit,), (more,) = (
        linear_bound(x, w, ranks=ranks, reduce="float32").limit[0] / 2.0**-24 for ranks in (1, 2)
    )
    assert limit == pytest.approx(2, rel=1e-3)
    assert more == pytest.approx(3, rel=1e-3)


def test_overflow_of_the_reduce():
    x, w = np.full((1, 2), 40000, np.float32), np.float32([[1, 1]])
    assert np.isinf(linear_bound(x, w, ranks=2, reduce="float16").limit)
    assert np.isfinite(linear_bound(x, w, ranks=2, reduce="bfloat16").limit)


SUMMED = ("self_attn.o_proj", "mlp.down_proj")
PROFILE = "tensor parallel, 2 ranks, bfloat16 reduce"


@pytest.fixture(scope="module")
def model():
    config = replace(GQA, num_attention_heads=16, num_key_value_heads=4, intermediate_size=64)
    return model_of(config, random_weights(config, dtype=np.float32))


def sharded(model, reduce, size=2):
    """A trace of a run on some ranks, by what makes a whole of their partial sums."""
    trace = record(model, np.array([[3, 1, 4, 1, 5, 9]]))
    arrays = dict(trace.arrays)
    for layer, weights in enumerate(model.weights.layers):
        for role in SUMMED:
            x = arrays[
                f"model.layers.{layer}.{'self_attn.attention' if 'o_' in role else 'mlp.act'}"
            ]
            w = weights.named()[f"{role}.weight"]
            x = x.reshape(*x.shape[:2], w.shape[1])
            y = reduce([p.astype(np.float32) for p in partial_sums(x, w, size, np.float32)])
            arrays[f"model.layers.{layer}.{role}"] = y.astype(np.float32)
    return replace(trace, arrays=arrays)


def narrow(dtype):
    return lambda parts: in_a_row([part.astype(dtype) for part in parts])


REDUCES = {
    "right": (narrow(ml_dtypes.bfloat16), True),
    "the other way round": (lambda parts: narrow(ml_dtypes.bfloat16)(parts[::-1]), True),
    "added in float32": (
        lambda p: in_a_row([a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in p]), True,
    ),
    "forgotten": (lambda parts: parts[0], False),
    "one rank twice": (lambda parts: parts[0] + parts[0], False),
    "in fewer bits": (narrow(ml_dtypes.float8_e4m3fn), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", REDUCES)
def test_a_right_reduce_passes_and_a_wrong_one_fails(model, kind):
    reduce, right = REDUCES[kind]
    report = check(sharded(model, reduce), model, profile=PROFILE, explain=False)
    found = {r.verdict for r in report.results if r.site.role in SUMMED}
    assert (found <= {"PASS", "WARN"}) == right
    if not right:
        assert found == {"FAIL"}
    assert report.profile == PROFILE


def test_fewer_bits_than_stated(model):
    trace = sharded(model, narrow(ml_dtypes.bfloat16))
    for profile in (None, "tensor parallel, 2 ranks, float32 reduce"):
        report = check(trace, model, profile=profile, explain=False)
        assert {r.site.role for r in report.failures} >= set(SUMMED)


def test_no_other_product_is_excused(model):
    trace = record(model, np.array([[3, 1, 4]]))
    name = "model.layers.1.mlp.gate_proj"
    rounded = trace.arrays[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    report = check(
        replace(trace, arrays=dict(trace.arrays) | {name: rounded}), model, profile=PROFILE
    )
    assert report.first.site.name == name


def test_a_trace_that_says_how_it_was_reduced(model):
    trace = sharded(model, narrow(ml_dtypes.bfloat16))
    said = dict(trace.metadata) | {"tensor_parallel": "2 ranks, bfloat16 reduce"}
    report = check(replace(trace, metadata=said), model)
    notes = {r.note for r in report.results if r.site.role in SUMMED}
    assert notes == {f"rounds as {PROFILE} does: partial sums of ranks to bfloat16"}


def test_names():
    assert profile_named(PROFILE) == RoundingProfile(PROFILE, ranks=2, reduce="bfloat16")
    name = f"transformers, {PROFILE}"
    both = replace(PROFILES["transformers"], name=name, ranks=2, reduce="bfloat16")
    assert profile_named(name) == both
    one = profile_named("tensor parallel, 1 rank, float32 reduce")
    assert replace(one, name=CONTRACT.name, reduce=None) == CONTRACT
    for wrong in (
        "tensor parallel", "tensor parallel, 0 ranks, float32 reduce", f"nobody, {PROFILE}",
        "tensor parallel, 2 ranks, tf32 reduce", f"{PROFILE}, {PROFILE}",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="one such as 'tensor parallel, 2"):
            profile_named(wrong)
    with pytest.raises(ValueError, match="ranks: expected a positive integer, got 0"):
        linear_bound(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), ranks=0)
