"""Which rank is wrong, and what ranks that add in their own way are taken for."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import forward
from llama_layers.errors import TraceError
from llama_layers.parallel import ThreadGroup, run_ranks, sharded
from llama_layers.verify import Trace, check, join_ranks, record
from tests.support.random_models import model_of, random_weights
from tests.support.rank_traces import (
    CONFIG,
    IDS,
    LAYER,
    SPOILT,
    by_heads,
    engine,
    whole_model,
    whole_trace,
    wrong_on,
)
from tests.support.remote import Remote


@pytest.fixture(scope="module")
def model():
    return whole_model()


@pytest.fixture(scope="module")
def whole():
    return whole_trace()


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
        ranks = wrong_on(ranks, rank, name, SPOILT["NaN"])
        report = check(join_ranks(ranks, CONFIG), model, explain=False)
        assert report.first.note == f"its worst elements are those of rank {rank}"


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_key_head_that_is_another_on_one_rank(model, whole, rank):
    name = f"{LAYER}.self_attn.k_rope"
    ranks = wrong_on(engine(whole, model, 4), rank, name)
    result = check(join_ranks(ranks, CONFIG), model, explain=False).first
    assert result.site.name == name
    assert result.note == f"ranks differ here: wrong on rank {rank}, right on rank {rank ^ 1}"


def test_what_a_rank_makes_of_its_own_wrong_numbers(model, whole):
    """Rank 1 alone has key head 1, and shares key head 0: rank 0 is right, and so is attention."""
    ranks = by_heads(whole, (0, 3, 8))
    for role in ("v_proj", "attention"):
        ranks = wrong_on(ranks, 1, f"{LAYER}.self_attn.{role}", lambda a: a * 2)
    report = check(join_ranks(ranks, CONFIG), model, explain=False)
    assert [r.site.role for r in report.failures] == ["self_attn.v_proj", "self_attn.o_proj"]
    assert report.first.note == "ranks differ here: wrong on rank 1, right on rank 0"
    wrong = wrong_on(ranks, 1, f"{LAYER}.self_attn.attention")
    _, attention, *_ = check(join_ranks(wrong, CONFIG), model, explain=False).failures
    assert (attention.site.role, attention.note) == ("self_attn.attention", "wrong on rank 1")


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
    assert result.note == f"the part that rank {rank} adds is wrong"


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
    said = "the part that each rank adds is right, except perhaps for its bias"
    assert report.first.note == said


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (0, 3, 2, 1)])
def test_files_of_ranks_in_another_order(model, whole, order, dtype):
    """They are refused before anything is judged; those of one head and of two may not fit."""
    judged = []
    for uneven in (False, True):
        bounds = [0, *(rank + 1 + uneven for rank in range(len(order) - 1)), 8]
        ranks = [
            replace(t, metadata={}, arrays={n: a.astype(dtype) for n, a in t.arrays.items()})
            for t in by_heads(whole, bounds)
        ]
        said = f"those of ranks {', '.join(map(str, order))}, as model.layers.0|in another order"
        with pytest.raises(TraceError, match=said):
            check(join_ranks([ranks[r] for r in order], CONFIG), model, progress=judged.append)
        assert judged == []
    if dtype == np.float32:
        assert check(join_ranks(ranks, CONFIG), model, explain=False).agrees


def test_one_layer_of_ranks_in_another_order_is_a_failure(model, whole):
    ranks = engine(whole, model, 2)
    names = [name for name in ranks[0].arrays if name.startswith(LAYER)]
    arrays = [trace.arrays for trace in ranks]
    ranks = [
        replace(trace, arrays=own | {name: other[name] for name in names})
        for trace, own, other in zip(ranks, arrays, arrays[::-1], strict=True)
    ]
    result = check(join_ranks(ranks, CONFIG), model, explain=False).first
    assert result.site.name == f"{LAYER}.self_attn.q_proj"


@pytest.mark.parametrize("order", [(0, 0), (1, 1)])
def test_what_another_rank_should_have(model, whole, order):
    ranks = engine(whole, model, 2)
    result = check(join_ranks([ranks[i] for i in order], CONFIG), model, explain=False).first
    assert result.site.role == "self_attn.q_proj"
    for rank, other in enumerate(order):
        said = f"rank {rank} has what rank {other} should have"
        assert (said in result.note) == (rank != other)
    assert result.note.endswith("the ranks may be in another order")


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


def added_in(dtype, parts):
    """The sum of parts, if they and each of their sums are rounded to a dtype."""
    total = parts[0].astype(dtype)
    for part in parts[1:]:
        total = (total + part.astype(dtype)).astype(dtype)
    return total.astype(np.float32)


def reducing(weights, config, size, dtype=np.float32, *, reduced=True):
    """Traces of ranks that add in bfloat16, recorded after that or before."""

    class Group(ThreadGroup):
        def all_reduce(self, array):
            self.reduced.append(array)
            return added_in(ml_dtypes.bfloat16, self.gather(array))

    def run(group):
        own, arrays = Group(group.rank, group.size, group.meeting), {}
        part = sharded(weights, config, own)

        def tap(name, array):
            arrays[name] = array.astype(dtype)
            return arrays[name].astype(array.dtype)

        forward(part, IDS, tap=tap)
        names = [n for n in arrays if n.endswith(("o_proj", "down_proj"))]
        if not reduced:
            arrays.update((n, a.astype(dtype)) for n, a in zip(names, own.reduced, strict=True))
        return Trace(arrays, metadata={"config": json.dumps(part.config.to_json())})

    return run_ranks(size, run)


BOTH_SIDES = replace(CONFIG, norm_placement="both")


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("config", [CONFIG, BOTH_SIDES], ids=["norms before", "on both sides"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_add_in_fewer_bits_than_they_record(config, size, reduced):
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights)
    traces = reducing(weights, config, size, reduced=reduced)
    joined = join_ranks(traces, config)
    profile = f"tensor parallel, {size} ranks, bfloat16 reduce"
    report = check(joined, model)
    causes = [cause.name for cause in report.first.explanations]
    assert causes == (["parts of ranks added in bfloat16"] if reduced else [])
    assert [(r.option, r.left) for r in report.remedies] == [(f'--profile "{profile}"', 0)]
    assert check(joined, model, profile=profile, explain=False).verdict == "PASS"
    said = {"tensor_parallel": f"{size} ranks, bfloat16 reduce"}
    report = check(replace(joined, metadata=said), model, explain=False)
    assert {r.profile for r in report.results} == {"", profile}
    assert report.verdict == "WARN"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("reduced", [True, False])
def test_ranks_that_add_in_the_dtype_that_they_record(size, reduced):
    weights = random_weights(CONFIG, dtype=ml_dtypes.bfloat16)
    traces = reducing(weights, CONFIG, size, ml_dtypes.bfloat16, reduced=reduced)
    report = check(join_ranks(traces, CONFIG), model_of(CONFIG, weights))
    profile = f"tensor parallel, {size} ranks, bfloat16 reduce"
    assert report.verdict == "WARN"
    assert {r.profile for r in report.results} == {"", profile}
    assert [r.option for r in report.remedies] == [f'--profile "{profile}"']


@pytest.mark.parametrize(
    ("sign", "part", "cause", "channels"),
    [
        (1, slice(0, 7), "a part of the sum added twice", "0..6"),
        (-1, slice(7, 12), "a part of the sum left out", "7..11"),
    ],
)
def test_the_part_of_a_rank_that_all_count_wrong(model, whole, sign, part, cause, channels):
    """Ranks with five heads of eight and three, and as many channels in proportion."""
    name, ranks = f"{LAYER}.mlp.down_proj", by_heads(whole, (0, 5, 8))
    weight = model.weights.layers[1].named()["mlp.down_proj.weight"]
    wrong = sign * whole.arrays[f"{LAYER}.mlp.act"][..., part] @ weight[:, part].T
    for rank in range(2):
        ranks = wrong_on(ranks, rank, name, lambda a: a + wrong)
    result = check(join_ranks(ranks, CONFIG), model).first
    assert result.site.name == name
    assert [found.name for found in result.explanations][:1] == [cause]
    assert f"channels {channels} " in result.explanations[0].detail
