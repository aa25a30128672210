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
from tests.support.random_models import GQA, model_of, random_weights
from tests.support.remote import Remote, same

IDS = np.array([[3, 1, 4, 1, 5]])
# 8 query heads, 2 key heads.
CONFIG = replace(GQA, num_attention_heads=8, num_key_value_heads=2, intermediate_size=12)
LAYER = "model.layers.1"


@given(
    config=configs(max_heads=16, max_head_dim=4).filter(lambda c: c.qk_norm != "full"),
    size=st.integers(2, 16),
    seed=st.integers(0, 99),
    pairs=st.booleans(),
)
def test_our_own_ranks(config, size, seed, pairs):
    """With heads of zeros, the same key head on several ranks, and ranks without a head."""
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


@pytest.fixture(scope="module")
def model():
    return model_of(CONFIG, random_weights(CONFIG, dtype=np.float32))


@pytest.fixture(scope="module")
def whole(model):
    return record(model, IDS)


def engine(trace, model, size, *, reduced=True, flat=False):
    """Traces of ranks as other engines split: contiguous heads, one key head each at the least."""
    heads, keys, width = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    ranks = []
    for rank in range(size):
        q = np.arange(heads)[rank * heads // size : (rank + 1) * heads // size]
        kv = np.arange(rank * keys // size, max((rank + 1) * keys // size, rank * keys // size + 1))
        channels = np.array_split(np.arange(CONFIG.intermediate_size), size)[rank]
        arrays = {}
        for name, array in trace.arrays.items():
            role = name.split(".", 3)[-1]
            units = {"q_": q, "k_": kv, "v_": kv, "at": q}.get(role.removeprefix("self_attn.")[:2])
            if role.startswith("self_attn.") and units is not None:
                some = array.reshape(1, -1, array.size // array.shape[1] // width, width)[
                    :, :, units
                ]
                array = some.reshape(1, array.shape[1], -1) if flat or array.ndim == 3 else some
            elif role in ("mlp.gate_proj", "mlp.up_proj", "mlp.act"):
                array = array[..., channels]
            elif role in ("self_attn.o_proj", "mlp.down_proj") and not reduced:
                layer = model.weights.layers[int(name.split(".")[2])].named()[f"{role}.weight"]
                source = "self_attn.attention" if "o_proj" in role else "mlp.act"
                x = trace.arrays[name.replace(role, source)].reshape(1, array.shape[1], -1)
                some = channels
                if "o_proj" in role:
                    some = (q[:, None] * width + np.arange(width)).ravel()
                array = x[..., some] @ layer[:, some].T
            arrays[name] = array
        ranks.append(replace(trace, arrays=arrays))
    return ranks


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


def wrong_on(ranks, rank, name, change=lambda array: array * 1.01):
    arrays = dict(ranks[rank].arrays)
    arrays[name] = change(np.array(arrays[name])).astype(arrays[name].dtype)
    return [replace(t, arrays=arrays) if r == rank else t for r, t in enumerate(ranks)]


@pytest.mark.parametrize("role", ["input_layernorm", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_is_wrong_alone(model, whole, role, rank):
    ranks = wrong_on(engine(whole, model, 2), rank, f"{LAYER}.{role}")
    report = check(join_ranks(ranks, CONFIG), model, explain=False)
    assert report.first.site.name == f"{LAYER}.{role}"
    said = f"ranks differ here: wrong on rank {rank}, right on rank {1 - rank}"
    assert report.first.note == said
    assert f"{said[0].upper()}{said[1:]}." in report.text(width=100)


def test_ranks_that_are_all_wrong(model, whole):
    ranks = engine(whole, model, 2)
    for rank, factor in enumerate((1.01, 1.02)):
        ranks = wrong_on(ranks, rank, "model.norm", lambda a, f=factor: a * f)
    report = check(join_ranks(ranks, CONFIG), model, explain=False)
    assert report.first.note == "ranks differ here: wrong on ranks 0, 1"


def test_ranks_that_differ_by_rounding(model, whole):
    ranks = wrong_on(engine(whole, model, 2), 1, "model.norm", lambda a: np.nextafter(a, 9))
    report = check(join_ranks(ranks, CONFIG), model)
    assert report.agrees
    assert report.results[-2].note == "ranks differ here, none by more than rounding allows"


def test_the_rank_that_computed_a_wrong_head(model, whole):
    for name, rank in ((f"{LAYER}.self_attn.q_rope", 3), (f"{LAYER}.mlp.act", 2)):
        ranks = wrong_on(engine(whole, model, 4), rank, name)
        report = check(join_ranks(ranks, CONFIG), model, explain=False)
        assert report.first.site.name == name
        assert report.first.note == f"its worst elements are those of rank {rank}"


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_key_head_that_is_another_on_one_rank(model, whole, rank):
    name = f"{LAYER}.self_attn.k_rope"
    ranks = wrong_on(engine(whole, model, 4), rank, name)
    result = check(join_ranks(ranks, CONFIG), model, explain=False).first
    assert result.site.name == name
    assert result.note == f"ranks differ here: wrong on rank {rank}, right on rank {rank ^ 1}"


def test_refused(model, whole):
    def said(ranks):
        with pytest.raises(TraceError) as error:
            join_ranks(ranks, CONFIG)
        return str(error.value)

    ranks = engine(whole, model, 2)
    other = replace(ranks[1], input_ids=IDS + 1)
    assert said([ranks[0], other]) == "rank 1: expected the input_ids of rank 0, got others"
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


SPOILT = {
    "a reduce that was forgotten": None,
    "NaN": lambda a: a * np.nan,
    "a factor": lambda a: a * 1.5,
    "zeros": np.zeros_like,
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("role", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_sum_that_one_rank_gets_wrong_in_every_layer(model, whole, how, rank, role):
    ranks = engine(whole, model, 2)
    for layer in range(CONFIG.num_hidden_layers):
        name = f"model.layers.{layer}.{role}"
        change = SPOILT[how]
        if change is None:
            own = engine(whole, model, 2, reduced=False)[rank].arrays[name]
            change = lambda _, own=own: own  # noqa: E731
        ranks = wrong_on(ranks, rank, name, change)
    for pool in (None, Remote()):
        result = check(join_ranks(ranks, CONFIG), model, explain=False, executor=pool).first
        assert result.site.name == f"model.layers.0.{role}"
        said = f"ranks differ here: wrong on rank {rank}, right on rank {1 - rank}"
        if SPOILT[how] is None:
            said += f"; the parts of other ranks were not added on rank {rank}"
        assert result.note == said


@pytest.mark.parametrize("rank", [0, 2])
def test_a_sum_that_one_rank_of_many_gets_wrong(model, whole, rank):
    """Others have the same bits: no model is needed to tell."""
    ranks = engine(whole, model, 4)
    for layer in range(CONFIG.num_hidden_layers):
        ranks = wrong_on(ranks, rank, f"model.layers.{layer}.mlp.down_proj", np.zeros_like)
    joined = join_ranks(ranks, CONFIG)
    assert not joined.parts
    assert check(joined, model, explain=False).first.note.startswith(
        f"ranks differ here: wrong on rank {rank}, right on ranks"
    )


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("how", ["NaN", "a factor", "zeros"])
def test_the_rank_whose_part_of_a_sum_is_wrong(model, whole, rank, how):
    name = f"{LAYER}.self_attn.o_proj"
    ranks = wrong_on(engine(whole, model, 4, reduced=False), rank, name, SPOILT[how])
    result = check(join_ranks(ranks, CONFIG), model, explain=False).first
    assert result.site.name == name
    assert result.note == f"it is a sum, to which the parts of rank {rank} are wrong"


def test_a_bias_that_every_rank_adds():
    config = replace(CONFIG, attention_bias=True)
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights)
    trace = record(model, IDS)
    right = engine(trace, model, 2, reduced=False)
    for biased in (1, 2):
        ranks = right
        for rank in range(biased):
            for layer in range(config.num_hidden_layers):
                name = f"model.layers.{layer}.self_attn.o_proj"
                bias = weights[f"{name}.bias"]
                ranks = wrong_on(ranks, rank, name, lambda a, bias=bias: a + bias)
        report = check(join_ranks(ranks, config), model, explain=False)
        found = {r.verdict for r in report.results if r.site.role == "self_attn.o_proj"}
        assert found == ({"PASS"} if biased == 1 else {"FAIL"})
    said = "it is a sum, whose parts are right on each rank, but perhaps for a bias"
    assert report.first.note == said


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (1, 1)])
def test_ranks_in_another_order(model, whole, order):
    ranks = engine(whole, model, 2)
    result = check(join_ranks([ranks[i] for i in order], CONFIG), model, explain=False).first
    assert result.site.role == "self_attn.q_proj"
    for rank, other in enumerate(order):
        said = f"rank {rank} has what rank {other} should have"
        assert (said in result.note) == (rank != other)
    assert result.note.endswith("the ranks may be in another order")


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_rank_is_named(model, whole, rank):
    weight = model.weights.layers[1].input_layernorm
    ranks = wrong_on(
        engine(whole, model, 2), rank, f"{LAYER}.input_layernorm", lambda a: a / weight
    )
    for pool in (None, Remote()):
        result = check(join_ranks(ranks, CONFIG), model, executor=pool).first
        assert [cause.name for cause in result.explanations] == ["norm weight skipped"]


def test_an_embedding_that_is_wrong_on_one_rank(model, whole):
    ranks = wrong_on(engine(whole, model, 2), 1, "model.embed_tokens")
    result = check(join_ranks(ranks, CONFIG), model, explain=False).first
    assert result.site.name == "model.embed_tokens"
    assert result.note == "ranks differ here: wrong on rank 1, right on rank 0"


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
