"""Traces: what is recorded, and what a file keeps of it."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from random_models import GQA, model_of, random_weights

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, compare, record

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
POSITIONS = np.array([[2, 3, 4, 5, 6], [0, 0, 0, 1, 2]])


def traced(dtype=np.float32, **options):
    model = model_of(GQA, random_weights(GQA, 0, dtype))
    return model, record(model, IDS, **options)


def test_a_file_keeps_all_of_a_trace(tmp_path):
    _, trace = traced(positions=POSITIONS, attention_mask=MASK)
    trace.save(tmp_path / "port.safetensors")
    found = Trace.load(tmp_path / "port.safetensors")
    assert set(found.arrays) == set(trace.arrays)
    for name, array in trace.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)
    assert np.array_equal(found.input_ids, IDS)
    assert np.array_equal(found.positions, POSITIONS)
    assert np.array_equal(found.attention_mask, MASK)
    assert dict(found.metadata) == {"format": "llama_layers.trace 1", **trace.metadata}


def test_a_file_is_not_overwritten_unless_asked(tmp_path):
    _, trace = traced()
    file = tmp_path / "port.safetensors"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists; force=True overwrites it$"):
        trace.save(file)
    assert file.read_text() == "mine"
    trace.save(file, force=True)
    assert len(Trace.load(file).arrays) == len(trace.arrays)


def test_what_is_outside_the_layers_is_recorded_in_any_case():
    _, trace = traced(layers=[1])
    assert {name for name in trace.arrays if not name.startswith("model.layers.1")} == {
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    }
    assert "model.layers.1.self_attn.q_rope" in trace.arrays
    assert "model.layers.1" in trace.arrays


@pytest.mark.parametrize(
    ("weights", "computed"),
    [(ml_dtypes.bfloat16, "float32"), (np.float32, "float32"), (np.float64, "float64")],
)
def test_a_trace_says_its_formats(weights, computed):
    """NumPy computes in float32 with weights in bfloat16."""
    model, trace = traced(weights, sites=["*"])
    assert {array.dtype.name for array in trace.arrays.values()} == {computed}
    assert trace.metadata["weights"] == np.dtype(weights).name
    assert trace.metadata["dtype"] == trace.metadata["accumulate"] == computed
    report = check(trace, model)
    assert report.verdict == "PASS"
    assert report.weights == np.dtype(weights).name


def test_shapes_that_are_no_sites():
    """Neither what has as many numbers, nor what the last token alone would have."""
    model, trace = traced()
    scores = record(model, IDS, sites=["scores"], layers=[1]).arrays
    name = "model.layers.1.self_attn.scores"
    for wrong in (
        {name: scores[name].reshape(2, 4, 25)},
        {"model.layers.1.mlp.act": trace.arrays["model.layers.1.mlp.act"][:, -1:]},
        {"model.layers.1.mlp.act": trace.arrays["model.layers.1.mlp.act"][0]},
        {"lm_head": trace.arrays["lm_head"][:, -2:]},
        {"lm_head": trace.arrays["lm_head"][:1, -1:]},
    ):
        with pytest.raises(ValueError, match=r"expected shape \[2, ") as error:
            check(replace(trace, arrays={**trace.arrays, **wrong}), model)
        assert type(error.value) is TraceError
        assert next(iter(wrong)) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_ids", IDS - 4, "input_ids: expected ids from 0 to 12, got -3 to 5"),
        ("attention_mask", MASK[:1], r"attention_mask: expected 0 and 1 in shape \[2, 5\]"),
        ("positions", POSITIONS[:1], r"positions: expected integers in shape \[5\] or \[2, 5\]"),
        ("metadata", {"dytpe": "float32"}, "metadata: expected keys such as 'dtype', got 'dytpe'"),
        ("metadata", {"Rope-Layout": "half"}, "keys such as 'rope_layout', got 'Rope-Layout'"),
        ("metadata", {"accumulate": "tf32"}, "metadata accumulate: expected one of .*'tf32'"),
    ],
)
def test_tokens_that_are_none(field, value, message):
    model, trace = traced()
    with pytest.raises(TraceError, match=message):
        check(replace(trace, **{field: value}), model)


@pytest.mark.parametrize("part", [np.s_[:0], np.s_[:, :0]])
@pytest.mark.parametrize("with_ids", [False, True])
def test_nothing_to_check_is_no_agreement(part, with_ids):
    model, trace = traced()
    arrays = {name: array[part] for name, array in trace.arrays.items()}
    empty = Trace(arrays, IDS[part] if with_ids else None)
    with pytest.raises(TraceError, match="trace: expected one sequence of one token at the least"):
        check(empty, model)
    with pytest.raises(TraceError, match="expected one token at the least, got shape"):
        compare(empty, empty)


def test_metadata_for_people_is_let_be():
    model, trace = traced()
    said = {"weights_path": "a", "model": "b", "text": "c", "engine": "d", "device": "e"}
    assert check(replace(trace, metadata={**trace.metadata, **said}), model).agrees


def test_logits_without_their_axis_of_tokens():
    model, trace = traced()
    arrays = {**trace.arrays, "lm_head": trace.arrays["lm_head"][:, -1]}
    with pytest.raises(
        TraceError, match=r"\[2, 5, 13\] .* or, of the last token, \[2, 1, 13\], got"
    ):
        check(replace(trace, arrays=arrays), model)


def test_extent_is_told_by_no_axis_of_heads():
    """Without ids: the first array has heads apart, and no batch."""
    model = model_of(GQA, random_weights(GQA, 0, np.float32))
    trace = record(model, IDS[:1])
    arrays = {name: array[0] for name, array in trace.arrays.items()}
    name = "model.layers.0.self_attn.q_proj"
    arrays = {name: arrays.pop(name).reshape(5, 4, 4), **arrays}
    assert check(Trace(arrays), model).agrees
