"""Traces of ranks joined to one: our own, those of other ways to split, and wrong ones."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.errors import TraceError
from llama_layers.parallel import run_ranks, sharded
from llama_layers.testing import configs
from llama_layers.verify import check, join_ranks, record
from tests.support.random_models import model_of, random_weights
from tests.support.rank_traces import (
    CONFIG,
    IDS,
    LAYER,
    engine,
    whole_model,
    whole_trace,
    wrong_on,
)
from tests.support.remote import Remote, same


@pytest.fixture(scope="module")
def model():
    return whole_model()


@pytest.fixture(scope="module")
def whole():
    return whole_trace()


@given(
    config=configs(max_heads=16, max_head_dim=4),
    size=st.integers(2, 16),
    seed=st.integers(0, 99),
    pairs=st.booleans(),
)
def test_our_own_ranks(config, size, seed, pairs):
    """With heads of zeros, the same key head on several ranks, and ranks without a head."""
    if config.qk_norm == "full":
        size = config.num_key_value_heads
    weights = random_weights(config, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 3))
    options = {"sites": ["*"]} if pairs else {}
    traces = run_ranks(size, lambda group: record(sharded(weights, config, group), ids, **options))
    joined = join_ranks(traces, config)
    model = model_of(config, weights)
    whole = record(model, ids, **options)
    assert list(joined.arrays) == list(whole.arrays)
    for name in whole.arrays:
        found = joined.arrays[name]
        np.testing.assert_allclose(found, whole.arrays[name], rtol=1e-9, atol=1e-9, err_msg=name)
        assert found.dtype == whole.arrays[name].dtype
    assert check(joined, model, explain=False).agrees


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("flat", [False, True])
def test_the_split_of_another_engine(model, whole, size, flat):
    joined = join_ranks(engine(whole, model, size, flat=flat), CONFIG)
    assert joined.differing == {}
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(joined.arrays[name], array)
    assert check(joined, model).verdict == "PASS"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_sums_recorded_before_they_were_added(model, whole, dtype):
    ranks = engine(whole, model, 4, reduced=False)
    narrow = [
        replace(
            t, arrays={n: np.asarray(a).astype(dtype) for n, a in t.arrays.items()}, metadata={}
        )
        for t in ranks
    ]
    joined = join_ranks(narrow, CONFIG)
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"{LAYER}.{role}"
        expected = sum(t.arrays[name].astype(np.float64) for t in narrow)
        np.testing.assert_array_equal(joined.arrays[name], expected.astype(dtype))
        assert joined.arrays[name].dtype == dtype
    assert joined.metadata["tensor_parallel"] == f"4 ranks, {np.dtype(dtype).name} reduce"
    if dtype == np.float32:
        both = [check(joined, model, explain=False, executor=pool) for pool in (None, Remote())]
        assert both[0].agrees
        same(*both)
        name = f"{LAYER}.attention_residual"  # which was not computed from these very sums
        wrong = narrow
        for rank in range(4):
            wrong = wrong_on(wrong, rank, name, lambda a: a * 1.0001)
        assert check(join_ranks(wrong, CONFIG), model, explain=False).first.site.name == name


def test_refused(model, whole):
    def said(ranks):
        with pytest.raises(TraceError) as error:
            join_ranks(ranks, CONFIG)
        return str(error.value)

    ranks = engine(whole, model, 2)
    other = replace(ranks[1], input_ids=IDS + 1)
    assert said([ranks[0], other]) == "rank 1: expected the input_ids of rank 0, got others"
    other = replace(ranks[1], input_ids=None)
    assert said([ranks[0], other]) == "rank 1: expected the input_ids of rank 0, got none"
    assert said([other, ranks[0]]) == "rank 1: expected no input_ids, as on rank 0, got some"
    stated = [replace(t, metadata={"tensor_parallel": "3 ranks, float32 reduce"}) for t in ranks]
    assert said(stated) == (
        "metadata tensor_parallel: expected 2 ranks, one for each trace, got 3 ranks, float32 "
        "reduce"
    )
    profile = "tensor parallel, 4 ranks, float32 reduce"
    with pytest.raises(ValueError, match="profile: expected 2 ranks, one for each trace, got 4"):
        check(join_ranks(ranks, CONFIG), model, profile=profile)
    fewer = {n: a for n, a in ranks[1].arrays.items() if n != "model.norm"}
    assert "rank 1: expected the sites of rank 0" in said(
        [ranks[0], replace(ranks[1], arrays=fewer)]
    )
    three = engine(whole, model, 4)[:3]
    assert said(three) == (
        "model.layers.0.self_attn.q_proj: expected parts of 8 query heads, got 2 + 2 + 2: "
        "is a rank's file missing?"
    )
    name = f"{LAYER}.self_attn.q_rope"
    turned = wrong_on(ranks, 1, name, lambda a: np.swapaxes(a, 1, 2))
    assert said(turned) == (
        f"rank 1: {name}: expected a part of shape [B, S, 8, 4], where B is 1 and S 5, "
        f"got [1, 4, 5, 4]"
    )
    short = wrong_on(ranks, 1, "model.norm", lambda a: a[:, -1:])
    assert said(short) == (
        "rank 1: model.norm: expected float32 in [1, 5, 10], as rank 0 has, "
        "got float32 in [1, 1, 10]"
    )
    with pytest.raises(ValueError, match="traces: expected traces, one of each rank, got none"):
        join_ranks([], CONFIG)


def test_a_command(tmp_path, model, whole):
    from llama_layers.cli import main
    from tests.support import tiny

    weights = random_weights(CONFIG, dtype=np.float32)
    path = tiny.write_single(tmp_path, weights, CONFIG)
    files = []
    for rank, trace in enumerate(wrong_on(engine(whole, model, 2), 1, "model.norm")):
        files.append(tmp_path / f"rank{rank}.safetensors")
        trace.save(files[-1])
    for jobs in ("1", "2"):
        command = ["check", *map(str, files), "--model", str(path), "--jobs", jobs]
        assert main([*command, "--tensor-parallel", "--no-diagnose"]) == 1
    assert main(command) == 2


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("last", [False, True])
def test_logits_of_some_tokens_on_each_rank(model, whole, padding, last):
    logits = whole.arrays["lm_head"][:, -1:] if last else whole.arrays["lm_head"]
    table = np.pad(logits, [(0, 0), (0, 0), (0, padding)])
    parts = np.split(table, [5 if not padding else 8], axis=-1)
    ranks = [
        replace(trace, arrays={**trace.arrays, "lm_head": part})
        for trace, part in zip(engine(whole, model, 2), parts, strict=True)
    ]
    joined = join_ranks(ranks, CONFIG)
    np.testing.assert_array_equal(joined.arrays["lm_head"], table)
    tokens = [token for places in joined.places["lm_head"] for token in places]
    assert tokens == list(range(CONFIG.vocab_size))
    assert check(joined, model, explain=False).agrees
    wrong = wrong_on(ranks, 0, "lm_head")
    result = check(join_ranks(wrong, CONFIG), model, explain=False).first
    assert (result.site.name, result.note.split(";")[-1].strip()) == (
        "lm_head",
        "its worst elements are those of rank 0",
    )


def test_logits_on_one_rank_only(model, whole):
    ranks = engine(whole, model, 2)
    others = {name: array for name, array in ranks[0].arrays.items() if name != "lm_head"}
    joined = join_ranks([replace(ranks[0], arrays=others), ranks[1]], CONFIG)
    assert list(joined.arrays) == list(whole.arrays)
    assert check(joined, model).verdict == "PASS"


def test_a_rank_with_another_dtype_or_metadata(model, whole):
    ranks = engine(whole, model, 2)
    name = f"{LAYER}.self_attn.q_proj"
    array = ranks[1].arrays[name].astype(np.float64)
    others = [ranks[0], replace(ranks[1], arrays={**ranks[1].arrays, name: array})]
    with pytest.raises(TraceError, match=r"rank 1: .*q_proj: expected float32, .* got float64"):
        join_ranks(others, CONFIG)
    others = [ranks[0], replace(ranks[1], metadata={**ranks[1].metadata, "dtype": "bfloat16"})]
    with pytest.raises(
        TraceError, match=r"rank 1: metadata dtype: expected that of rank 0, float3"
    ):
        join_ranks(others, CONFIG)


def test_metadata_that_says_nothing_of_ranks(model, whole):
    with pytest.raises(TraceError, match=r"metadata tensor_parallel: .*, got 'yes'"):
        check(replace(whole, metadata={"tensor_parallel": "yes"}), model)


def test_what_are_no_traces(whole):
    assert join_ranks((trace for trace in [whole]), CONFIG).size == 1
    for wrong, said in (
        (whole, "got Trace"),
        ("rank0.safetensors", "got str"),
        (["rank0.safetensors"], "got str for rank 0; Trace.load opens a file"),
        (3, "got int"),
    ):
        with pytest.raises(TypeError, match=f"traces: expected traces, one of each rank, {said}"):
            join_ranks(wrong, CONFIG)
    with pytest.raises(TypeError, match="config: expected a LlamaConfig, got str"):
        join_ranks([whole], "model")
