"""A model split among ranks gives what the whole model gives; the ranks are threads."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import (
    KVCache,
    LlamaConfig,
    Mask,
    check,
    forward,
    generate,
    load,
    record,
    rms_norm,
)
from llama_layers.parallel import run_ranks, sharded
from llama_layers.parallel.plan import Shard
from llama_layers.testing import configs
from llama_layers.verify import join_ranks
from tests.support import decoder_oracle, random_models, tiny
from tests.support.engines import DTYPES

MOST_RANKS = 16
sizes = st.integers(1, MOST_RANKS)


@st.composite
def splits(draw, **options):
    """A config and a number of ranks that it can be split among."""
    config = draw(configs(**options))
    if config.qk_norm != "full":
        return config, draw(sizes)
    keys = config.num_key_value_heads
    return config, draw(st.sampled_from([n for n in range(1, MOST_RANKS + 1) if keys % n == 0]))


def close(found, expected):
    """As float64 sums in another order are: no mistake in a plan is as small."""
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(splits(max_heads=16, max_head_dim=4), st.integers(0, 99))
def test_logits_are_those_of_naive_loops(split, seed):
    config, size = split
    weights = random_models.random_weights(config, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, 3))
    found = run_ranks(size, lambda group: forward(sharded(weights, config, group), ids).logits)
    close(found[0][0], decoder_oracle.logits(weights, config, ids[0]))
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


@given(splits(max_heads=16))
def test_a_reduce_after_each_output_projection(split):
    """And one of two numbers a token, where norms go over all heads."""
    config, size = split
    weights = random_models.random_weights(config, dtype=np.float32)
    ids = np.zeros((2, 3), dtype=int) % config.vocab_size

    def reduced(group):
        forward(sharded(weights, config, group), ids)
        return group.reduced

    sums = [2 * 3 * config.hidden_size * 4] * 2
    if config.qk_norm == "full":
        sums = [2 * 3 * 2 * 4, *sums]
    assert run_ranks(size, reduced) == [sums * config.num_hidden_layers] * size


@given(configs(max_heads=16), sizes)
def test_parts_are_even_and_cover_the_model(config, size):
    shards = [Shard(config, rank, size) for rank in range(size)]
    heads = [h for shard in shards for h in shard.query_heads if h is not None]
    assert heads == list(range(config.num_attention_heads))
    channels = [c for shard in shards for c in shard.channels]
    assert channels == list(range(config.intermediate_size))
    group = config.num_attention_heads // config.num_key_value_heads
    for shard in shards:
        own = [h for h in shard.query_heads if h is not None]
        assert len(own) in (len(heads) // size, len(heads) // size + 1)
        assert len(shard.channels) in (len(channels) // size, len(channels) // size + 1)
        assert {h // group for h in own} <= set(shard.kv_heads)
        assert len(shard.kv_heads) <= max(1, len(own))


@pytest.mark.parametrize("kind", random_models.CONFIGS)
def test_a_cache_on_every_rank(kind):
    config = random_models.CONFIGS[kind]
    weights = random_models.random_weights(config)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 7))
    cuts = [2, 3, 6]  # with frequencies that depend on the length, other numbers than of a whole
    whole = random_models.run_in_chunks(random_models.model_of(config, weights), ids, cuts)
    for size in (2,) if config.qk_norm == "full" else (2, 3):
        for logits in run_ranks(
            size,
            lambda group: random_models.run_in_chunks(sharded(weights, config, group), ids, cuts),
        ):
            close(logits, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["norms of projections", "olmo2"])
def test_norms_over_the_heads_of_all_ranks(kind, dtype):
    """Each rank has the weights of its heads, and what ranks recorded is right together."""
    config = replace(random_models.CONFIGS[kind], num_attention_heads=8, num_key_value_heads=4)
    weights = random_models.random_weights(config, dtype=DTYPES[dtype])
    parts = [Shard(config, rank, 4).part for rank in range(4)]
    for name in ("q_norm", "k_norm"):
        name = f"model.layers.1.self_attn.{name}.weight"
        joined = np.concatenate([part(name, weights[name]) for part in parts])
        np.testing.assert_array_equal(joined, weights[name])
    ids = np.array([[1, 2, 3, 4]])
    traces = run_ranks(4, lambda group: record(sharded(weights, config, group), ids))
    model = random_models.model_of(config, weights)
    report = check(join_ranks(traces, config), model)
    assert report.agrees
    assert not report.missing
    # A rank that divides by the root mean square of its own heads.
    name = "model.layers.1.self_attn.q_norm"
    w = parts[2](f"{name}.weight", weights[f"{name}.weight"])
    x = traces[2].arrays[name.replace("norm", "proj")]
    traces[2].arrays[name] = rms_norm(x, w, eps=config.rms_norm_eps)
    report = check(join_ranks(traces, config), model)
    assert report.first.site.name == name
    assert "rank 2" in report.first.note


@pytest.mark.parametrize("size", [3, 4])
def test_norms_over_heads_that_ranks_share_are_refused(size):
    config = random_models.CONFIGS["olmo2"]
    weights = random_models.random_weights(config)
    message = (
        rf"^size: expected a number of ranks that divides num_key_value_heads = 2, .* got {size}"
    )
    with pytest.raises(ValueError, match=message):
        run_ranks(size, lambda group: sharded(weights, config, group))


def test_the_cache_has_the_heads_of_the_rank():
    config = replace(random_models.GQA, num_attention_heads=9, num_key_value_heads=3)
    weights = random_models.random_weights(config)

    def heads(group):
        return KVCache.create(sharded(weights, config, group), 1, 4).keys[0].shape[2]

    assert run_ranks(3, heads) == [1, 1, 1]
    assert run_ranks(2, heads) == [2, 2]  # heads 0 to 3, 4 to 8, of which 3 and 4 share keys
    assert run_ranks(9, heads) == [1] * 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_are_summed_in_float32(dtype):
    """1 + 2**-12 sixteen times is 16 + 2**-8: float16 holds it, and no sum of float16 finds it."""
    from llama_layers.arrays.dtypes import dtype_of
    from llama_layers.layers.group import reduce_partial

    kind = dtype_of(np, dtype)

    def summed(group):
        part = 256.0 if group.rank == 0 else 1.0
        return reduce_partial(np.asarray([part], kind), group)

    for result in run_ranks(16, summed):  # in bfloat16 256 + 1 is 256; in all 271
        assert result.dtype == kind
        assert result[0] == np.asarray(271.0, kind)


def test_ranks_draw_the_same_tokens():
    config = random_models.GQA
    weights = random_models.random_weights(config)
    ids = np.tile(np.array([[1, 2, 3]]), (16, 1))

    def drawn(group):
        options = {"max_new_tokens": 1, "temperature": 2.0, "eos_token_id": ()}
        model = sharded(weights, config, group)
        return [step.tolist() for step in generate(model, ids, rng=group.rank, **options)]

    first, *others = run_ranks(4, drawn)
    assert others == [first] * 3
    assert len(set(first[0])) > 1


def test_a_loaded_model(tmp_path):
    from safetensors.numpy import save_file

    config = replace(random_models.CONFIGS["biases"], num_key_value_heads=1)
    weights = random_models.random_weights(config, dtype=np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    ids = np.array([[1, 2, 3]])
    whole = forward(load(tmp_path), ids).logits
    for logits in run_ranks(3, lambda group: forward(load(tmp_path, parallel=group), ids).logits):
        np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_a_loaded_part_keeps_no_more_than_itself(tmp_path, dtype):
    config = random_models.GQA
    path = tiny.write_single(tmp_path, random_models.random_weights(config, 0, np.float32), config)

    def held(group):
        layer = load(path, parallel=group, dtype=dtype).weights.layers[0]
        return [a for a in layer.arrays().values() if a is not None and a.ndim == 2]

    for arrays in run_ranks(2, held):
        for array in arrays:
            assert array.base is None or not array.flags.writeable  # which is a view of the file


def test_ranks_with_other_models_are_named(tmp_path):
    from safetensors.numpy import save_file

    config = random_models.GQA
    for rank in range(3):
        path = tmp_path / str(rank)
        path.mkdir()
        save_file(
            random_models.random_weights(config, rank // 2, np.float32), path / "model.safetensors"
        )
        (path / "config.json").write_text(json.dumps(replace(config, rms_norm_eps=1e-2).to_json()))
    with pytest.raises(ValueError, match=r"rank 2: .*the model of rank 0, got another: model"):
        run_ranks(3, lambda group: load(tmp_path / str(group.rank), parallel=group))
    (tmp_path / "1" / "config.json").write_text(
        json.dumps(replace(config, rms_norm_eps=1e-3).to_json())
    )
    with pytest.raises(ValueError, match=r"rank 1: .*rms_norm_eps is 0.001, not 0.01"):
        run_ranks(2, lambda group: load(tmp_path / str(group.rank), parallel=group))
    dtypes = ["float32", "bfloat16"]
    with pytest.raises(ValueError, match=r"rank 1: .* the dtype to load is bfloat16, not float32"):
        run_ranks(2, lambda group: load(path, dtype=dtypes[group.rank], parallel=group))


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.down_proj"])
def test_one_tensor_of_another_model_is_named(tmp_path, name):
    """A stale copy on one computer, say."""
    config, key = random_models.GQA, f"{name}.weight"
    weights = random_models.random_weights(config, 0, np.float32)
    for rank, factor in enumerate((1, 1.5)):
        (tmp_path / str(rank)).mkdir()
        other = weights | {key: (weights[key] * factor).astype(np.float32)}
        tiny.write_single(tmp_path / str(rank), other, config)
    with pytest.raises(ValueError, match=rf"rank 1: .* got another: {key} is float32 in .* CRC-32"):
        run_ranks(2, lambda group: load(tmp_path / str(group.rank), parallel=group))


def test_other_ids_on_a_rank_are_named():
    """As where each rank draws its own tokens: they would compute a mixture of two texts."""
    weights = random_models.random_weights(random_models.GQA)

    def run(ids):
        return run_ranks(
            3, lambda group: forward(sharded(weights, random_models.GQA, group), ids(group.rank))
        )

    for other in ([[1, 2]], [[1, 2, 3, 4]], [[1], [2], [4]]):
        with pytest.raises(ValueError, match=r"input_ids: expected the same .* others on rank 2"):
            run(lambda rank, other=other: np.array(other if rank == 2 else [[1], [2], [3]]))


def test_other_arguments_on_a_rank_are_named():
    config, ids = random_models.GQA, np.array([[1, 2, 3]])
    weights = random_models.random_weights(config)
    vectors = np.random.default_rng(0).standard_normal((1, 3, config.hidden_size))
    cases = {
        "inputs_embeds": (vectors, vectors + 1e-9),
        "positions": (np.arange(3), np.arange(1, 4)),
        "attention_mask": (np.ones((1, 3), bool), np.array([[False, True, True]])),
        "mask": (np.ones((3, 3), bool), np.tri(3, dtype=bool)),
        "last_only": (False, True),
    }
    cases["mask "] = tuple(Mask(np.arange(3), np.arange(3), window) for window in (None, 1))
    for name, values in cases.items():
        argument = name.strip()

        def run(group, argument=argument, values=values):
            given = {argument: values[group.rank == 2]}
            first = () if argument == "inputs_embeds" else (ids,)
            return forward(sharded(weights, config, group), *first, **given)

        said = f"^{argument}: expected the same on every rank, got others on rank 2"
        with pytest.raises(ValueError, match=said):
            run_ranks(3, run)


@pytest.mark.parametrize(
    ("name", "values"), [("max_new_tokens", (3, 5)), ("top_k", (None, 2)), ("eos_token_id", (1, 2))]
)
def test_other_options_of_generate_on_a_rank_are_named(name, values):
    config, ids = random_models.GQA, np.array([[1, 2, 3]])
    weights = random_models.random_weights(config)

    def run(group):
        options = {"max_new_tokens": 1, "temperature": 1.0, name: values[group.rank]}
        return list(generate(sharded(weights, config, group), ids, **options))

    with pytest.raises(ValueError, match=f"^{name}: expected the same on every rank"):
        run_ranks(2, run)


def test_a_longer_cache_on_a_rank_is_named():
    config, ids = random_models.GQA, np.array([[1, 2, 3]])
    weights = random_models.random_weights(config)

    def run(group):
        model = sharded(weights, config, group)
        cache = forward(model, ids, cache=KVCache.create(model, 1, 9)).cache
        other = cache if group.rank else KVCache.create(model, 1, 9)
        return forward(model, ids, cache=other)

    with pytest.raises(ValueError, match=r"^cache: expected the same on every rank"):
        run_ranks(2, run)


def test_check_takes_a_whole_model():
    config, ids = random_models.GQA, np.array([[1, 2]])
    weights = random_models.random_weights(config)
    trace = record(random_models.model_of(config, weights), ids)
    with pytest.raises(ValueError, match="model: expected a whole model, got the part of it"):
        run_ranks(2, lambda group: check(trace, sharded(weights, config, group)))


def test_an_error_on_one_rank_ends_all():
    def run(group):
        if group.rank == 1:
            raise FileNotFoundError("the third shard")
        return group.all_reduce(np.zeros(3, np.float32))

    with pytest.raises(FileNotFoundError, match="the third shard"):
        run_ranks(3, run)


def test_a_rank_that_has_ended_is_named():
    def run(group):
        return group.rank == 1 or group.gather(0)

    with pytest.raises((RuntimeError, TimeoutError)) as error:
        run_ranks(3, run, timeout=5)
    assert re.fullmatch("rank [02] waits for rank 1, which has ended", str(error.value))
    # One that ends when all have come hinders nobody.
    assert run_ranks(3, lambda group: group.gather(group.rank)) == [[0, 1, 2]] * 3


def test_a_rank_that_does_not_come_is_named():
    late = threading.Event()

    def run(group):
        if group.rank == 1:
            late.wait(30)
            return None
        try:
            return group.gather(0)
        finally:
            late.set()

    with pytest.raises(TimeoutError, match=r"^rank 0 waited 0.05 seconds for rank 1; `timeout`"):
        run_ranks(2, run, timeout=0.05)


def test_wrong_ranks():
    for size in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"^size: expected a positive integer, got"):
            run_ranks(size, lambda group: None)
    with pytest.raises(TypeError, match=r"^run: expected a function of a group, got int"):
        run_ranks(2, 3)
    with pytest.raises(ValueError, match=r"^timeout: expected seconds above zero, got 0"):
        run_ranks(2, lambda group: None, timeout=0)


def test_refuses():
    config = LlamaConfig.smollm2_135m()
    with pytest.raises(ValueError, match=re.escape("rank: expected an integer from 0 to 1, got 2")):
        Shard(config, 2, 2)
    with pytest.raises(ValueError, match=r"size: expected a positive integer, got 0"):
        Shard(config, 0, 0)
    with pytest.raises(TypeError, match="parallel: expected a communicator of mpi4py"):
        load("smollm2-135m", parallel=4)
