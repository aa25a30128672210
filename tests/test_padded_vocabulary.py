"""Embeddings and heads with rows of padding, which belong to no token.

The rows would win every draw, so whatever reads one shows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import array_api_strict
import gguf
import numpy as np
import pytest

from llama_layers import (
    CheckpointError,
    KVCache,
    Llama,
    LlamaWeights,
    TraceError,
    check,
    compare,
    forward,
    generate,
    load,
    record,
)
from llama_layers.arrays.transfer import to_numpy
from llama_layers.checkpoint import convert, expected_tensors, open_checkpoint
from llama_layers.cli import main
from llama_layers.testing import assert_same_bits
from llama_layers.verify import Trace
from tests.support import decoder_oracle as oracle
from tests.support import tiny
from tests.support.random_models import model_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = np.array([[3, 1, 39, 12]])
CONFIGS = {"untied": tiny.CONFIG, "tied": tiny.TIED}


def padded(weights, rows, head_rows=None):
    """The weights with tables of more rows, whose numbers are large."""
    found = dict(weights)
    for name, count in ((EMBEDDING, rows), (HEAD, head_rows or rows)):
        if name in found:
            table = found[name]
            more = np.full((count - len(table), table.shape[1]), 100, table.dtype)
            found[name] = np.concatenate([table, more])
    return found


def from_safetensors(config, weights, tmp_path):
    return load(tiny.write_single(tmp_path / "model", weights, config))


def from_meta(config, weights, tmp_path):
    return load(tiny.write_single(tmp_path / "model", tiny.meta(weights, config), config))


def from_gguf(config, weights, tmp_path):
    return load(tiny.write_gguf(tmp_path / "model.gguf", weights, config))


def from_state_dict(config, weights, tmp_path):
    return Llama.from_state_dict(weights, config)


def from_named(config, weights, tmp_path):
    return Llama(config, LlamaWeights.from_named(weights, config))


def by_hand(config, weights, tmp_path):
    return model_of(config, weights)


def of_another_library(config, weights, tmp_path):
    return load(tiny.write_single(tmp_path / "model", weights, config), backend=array_api_strict)


def of(source, ids):
    """Token ids of the library that a model is of."""
    return array_api_strict.asarray(ids) if source is of_another_library else ids


SOURCES = [
    from_safetensors, from_meta, from_gguf, from_state_dict, from_named, by_hand,
    of_another_library,
]  # fmt: skip


@pytest.mark.parametrize("tables", [(64, 64), (41, 48), (64, 40), (128, 512)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_model_is_the_one_without_padding(source, name, tables, tmp_path):
    config = CONFIGS[name]
    weights = tiny.arrays(config)
    model = source(config, padded(weights, *tables), tmp_path)
    assert (model.weights.lm_head is model.weights.embed_tokens) == (name == "tied")
    for key, array in tiny.all_arrays(model).items():
        assert_same_bits(array, weights[key])
    found, expected = forward(model, of(source, IDS)).logits, oracle.logits(weights, config, IDS[0])
    assert found.shape == (1, 4, 40)
    assert np.allclose(to_numpy(found)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_no_row_of_padding_is_looked_up_or_drawn(source, tmp_path):
    model = source(tiny.CONFIG, padded(tiny.arrays(), 64), tmp_path)
    for wrong in (40, 63):
        with pytest.raises(ValueError, match=f"expected ids from 0 to 39, got .* to {wrong}"):
            forward(model, of(source, np.array([[3, wrong]])))
    for temperature in (0, 2.0):
        steps = generate(
            model, of(source, IDS), max_new_tokens=12, temperature=temperature,
            rng=np.random.default_rng(0), eos_token_id=(),
        )  # fmt: skip
        drawn = np.concatenate([to_numpy(step) for step in islice(steps, 12)])
        assert len(drawn) == 12
        assert drawn.max() < 40


def test_blocks_of_a_gguf_file(tmp_path):
    config = replace(tiny.CONFIG, intermediate_size=64)
    weights, kind = tiny.arrays(config), gguf.GGMLQuantizationType.Q8_0
    files = [
        tiny.write_gguf(tmp_path / f"{i}.gguf", found, config, quantised=kind)
        for i, found in enumerate((weights, padded(weights, 64, 48)))
    ]
    whole, more = map(load, files)
    for name, array in tiny.all_arrays(whole).items():
        assert np.array_equal(tiny.all_arrays(more)[name], array), name


def test_a_vocabulary_in_the_file_counts_without_a_number_of_its_own(tmp_path):
    config = replace(tiny.CONFIG, vocab_size=12)
    weights = tiny.arrays(config)
    file = tiny.write_gguf(
        tmp_path / "model.gguf", padded(weights, 16), config, keys={"vocab_size": None},
        metadata=tiny.TOKENIZER,
    )  # fmt: skip
    tiny.assert_holds(load(file), weights)


def test_another_number_of_tokens_for_weights_that_are_there(tmp_path):
    fewer = replace(tiny.CONFIG, vocab_size=33)
    weights = tiny.arrays()
    first = {n: a[:33] if n in (EMBEDDING, HEAD) else a for n, a in weights.items()}
    for source in (from_safetensors, from_named, by_hand):
        model = source(tiny.CONFIG, weights, tmp_path)
        tiny.assert_holds(replace(model, config=fewer), first)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("source", SOURCES)
def test_fewer_rows_than_tokens_are_refused(source, name, tmp_path):
    weights = tiny.arrays()
    weights[name] = weights[name][:39]
    message = r"(embed_tokens|lm_head).*expected (shape )?\[40, 32\].*got \[39, 32\]"
    with pytest.raises((CheckpointError, ValueError), match=message):
        forward(source(tiny.CONFIG, weights, tmp_path), IDS)


@pytest.mark.parametrize("source", SOURCES)
def test_twice_as_many_rows_are_of_another_vocabulary(source, tmp_path):
    forward(source(tiny.CONFIG, padded(tiny.arrays(), 79), tmp_path), of(source, IDS))
    message = r"(embed_tokens|lm_head).*expected (shape )?\[40, 32\].*got \[80, 32\]"
    with pytest.raises((CheckpointError, ValueError), match=message):
        forward(source(tiny.CONFIG, padded(tiny.arrays(), 80), tmp_path), of(source, IDS))


def test_more_tokens_than_the_rows_of_weights_that_are_there(tmp_path):
    model = from_safetensors(tiny.CONFIG, tiny.arrays(), tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens.*expected shape \[41, 32\].*\[40, 32\]"):
        forward(replace(model, config=replace(tiny.CONFIG, vocab_size=41)), IDS)


@pytest.mark.parametrize("rows", [(64, 48), (48, 64)], ids=str)
def test_a_tied_head_in_the_file_is_compared_where_there_are_tokens(rows, tmp_path):
    weights = tiny.arrays(tiny.TIED)
    both = padded(weights | {HEAD: weights[EMBEDDING]}, *rows)
    for source in (from_safetensors, from_gguf, from_state_dict):
        config = tiny.CONFIG if source is from_gguf else tiny.TIED  # a file there says it by itself
        model = source(config, both, tmp_path)
        assert np.array_equal(model.weights.lm_head, weights[EMBEDDING])
    both[HEAD][39] += 1
    with pytest.raises(CheckpointError, match="differs"):
        from_state_dict(tiny.TIED, both, tmp_path)
    with pytest.raises(CheckpointError, match="differs"):
        from_safetensors(tiny.TIED, both, tmp_path)


def test_a_conversion_leaves_it_out(tmp_path):
    weights = tiny.arrays()
    source = tiny.write_single(tmp_path / "source", padded(weights, 64))
    found = open_checkpoint(convert(source, tmp_path / "new"))
    assert found.tensors[EMBEDDING].padding == found.tensors[HEAD].padding == 0
    assert {name: info.shape for name, info in found.tensors.items()} == expected_tensors(
        tiny.CONFIG
    )
    tiny.assert_holds(load(tmp_path / "new"), weights)


def test_info_says_so(tmp_path, capsys):
    path = tiny.write_single(tmp_path / "model", padded(tiny.arrays(), 41, 64))
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "40, head of its own; padded to 64 rows in the file" in said
    assert main(["info", str(tiny.write_single(tmp_path / "whole", tiny.arrays()))]) == 0
    assert "padded" not in capsys.readouterr().out


def ported(metadata=()):
    """A model, and a trace of a port whose head gives logits for rows of padding, too."""
    model = by_hand(tiny.CONFIG, tiny.arrays(), None)
    trace = record(model, IDS)
    logits = trace.arrays["lm_head"]
    more = np.full((*logits.shape[:2], 24), 1e9, np.float32)
    arrays = dict(trace.arrays) | {"lm_head": np.concatenate([logits, more], axis=-1)}
    return model, Trace(arrays, IDS, metadata=dict(metadata))


def test_logits_of_padding_are_not_judged():
    model, trace = ported()
    report = check(trace, model)
    assert report.agrees
    assert report.results[-1].shape == (1, 4, 40)
    assert "24 logits of each token are beyond the vocabulary" in report.text()
    wrong = trace.arrays["lm_head"]
    wrong[0, 1, 39] += 1
    report = check(trace, model)
    assert report.first.site.name == "lm_head"
    assert report.first.judgement.index == (0, 1, 39)
    wrong[0, 1, 39] -= 1
    assert check(replace(trace, input_ids=None), model).agrees
    short = replace(trace, arrays=dict(trace.arrays) | {"lm_head": wrong[..., :39]})
    with pytest.raises(TraceError, match=r"lm_head: expected shape \[1, 4, 40\]"):
        check(short, model)


def test_a_config_may_count_the_padding():
    theirs = json.dumps(tiny.CONFIG.to_json() | {"vocab_size": 64})
    model, trace = ported({"config": theirs})
    assert check(trace, model).agrees
    ours = record(model, IDS)
    for pair in ((ours, trace), (trace, ours)):
        assert compare(*pair).agrees
    fewer = replace(trace, metadata={"config": theirs.replace("64", "39", 1)})
    with pytest.raises(TraceError, match="with vocab_size 40, got 39"):
        check(fewer, model)


def test_through_a_cache():
    model = by_hand(tiny.CONFIG, padded(tiny.arrays(), 64), None)
    output = forward(model, IDS, cache=KVCache.create(model, 1, 8), last_only=True)
    assert output.logits.shape == (1, 1, 40)
