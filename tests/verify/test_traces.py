"""Traces: what is recorded, and what a file keeps of it."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, compare, record
from llama_layers.verify.stored import info_of
from llama_layers.verify.validate import first_tokens, validated
from tests.support.random_models import GQA, model_of, random_weights

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


def test_the_repr_is_short():
    arrays = {"model.norm": np.zeros((2, 5, 4), np.float32)}
    assert repr(Trace(arrays)) == "Trace(arrays: 1)"
    found = Trace({**arrays, "lm_head": np.zeros((2, 5, 9))}, IDS, metadata={"engine": "mine\n1"})
    assert repr(found) == r"Trace(arrays: 2, input_ids: [2, 5], engine: 'mine\n1')"


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
        ("input_ids", IDS.astype(np.uint64) + 2**63, "input_ids: expected ids from 0 to 12, got 9"),
        ("attention_mask", MASK.astype(str), "attention_mask: expected 0 and 1, got <U21"),
        ("positions", POSITIONS[:1], r"positions: expected integers in shape \[5\] or \[2, 5\]"),
        ("positions", POSITIONS - 1, "positions: expected zero or more, got -1"),
        ("positions", POSITIONS.astype(float), "positions: expected integers .* got float64 in"),
        ("positions", POSITIONS.astype(object), "positions: expected integers .* got object in"),
        ("positions", POSITIONS + 2**62, r"positions: expected at most 2\*\*53, .*, got 46116860"),
        ("positions", POSITIONS.astype(np.uint64) + 2**63, "at most .*, got 9223372036854775814"),
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
    with pytest.raises(TraceError, match="trace: expected at least one sequence of one token"):
        check(empty, model)
    with pytest.raises(TraceError, match="expected at least one token, got shape"):
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


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_positions_of_any_integers(dtype):
    model, trace = traced(positions=POSITIONS)
    assert check(replace(trace, positions=POSITIONS.astype(dtype)), model).verdict == "PASS"


@pytest.mark.parametrize(
    "positions",
    [
        np.array([0, 1, 2, 3, 10**6]),
        np.arange(5) + 10**8,
        np.arange(5) * 2**50,
        np.array([0, 1, 2, 3, 2**53]),
    ],
    ids=str,
)
def test_large_positions_take_no_more_memory(positions):
    """A table of all of them up to the largest would take gigabytes and more."""
    model, trace = traced(positions=positions, sites=["q_proj", "q_rope"], layers=[0])
    assert check(trace, model).verdict == "PASS"
    name = "model.layers.0.self_attn.q_rope"
    array = trace.arrays[name] * np.linspace(1, 5, 4, dtype=np.float32)
    tracemalloc.start()
    try:
        report = check(replace(trace, arrays={**trace.arrays, name: array}), model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.first.site.name == name
    assert peak < 64 * 2**20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrays": [1]}, "arrays: expected a mapping of arrays by name, got list"),
        ({"arrays": {1: np.ones(1)}}, "arrays: expected texts for keys, got int"),
        ({"arrays": {}, "input_ids": [[1]]}, "input_ids: expected an array of integers, got list"),
        ({"arrays": {}, "positions": 3}, "positions: expected an array of integers, got int"),
        ({"arrays": {}, "metadata": None}, "metadata: expected a mapping of texts by name, got No"),
        ({"arrays": {}, "metadata": {1: "2"}}, "metadata: expected texts for keys, got int"),
        ({"arrays": {}, "metadata": {"a": 2}}, "metadata a: expected a text, got int; json.dumps"),
    ],
)
def test_what_makes_no_trace(fields, message):
    with pytest.raises(TypeError, match=message):
        Trace(**fields)


def test_arguments_that_are_no_model_or_trace():
    model, trace = traced()
    with pytest.raises(TypeError, match="model: expected a Llama, got int"):
        record(3, IDS)
    with pytest.raises(TypeError, match="model: expected a Llama, got int"):
        check(trace, 3)
    with pytest.raises(TypeError, match="trace: expected a Trace, got str"):
        check("x", model)
    for not_an_array in ("x", 3, None, [1.0]):
        with pytest.raises(TraceError, match=r"model\.norm: expected an array, got"):
            check(Trace({"model.norm": not_an_array}, IDS), model)
        with pytest.raises(TraceError, match=r"model\.norm: expected an array, got"):
            compare(Trace({"model.norm": not_an_array}), Trace({"model.norm": not_an_array}))


def test_signalling_nan():
    """Which NumPy warns of where it widens them."""
    model, trace = traced()
    arrays = {name: np.array(array) for name, array in trace.arrays.items()}
    for name in ("lm_head", "model.layers.1"):
        arrays[name].view(np.uint32)[0, 0, 0] = 0x7F800001
    found = Trace({name: arrays[name] for name in ("lm_head", "model.layers.1")}, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(replace(trace, arrays=arrays), model).verdict == "FAIL"
        assert check(found, model).verdict == "FAIL"
        assert not compare(trace, replace(trace, arrays=arrays)).agrees


def test_layers_are_counted_no_further_than_there_are():
    model, _ = traced()
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 1, got 2"):
        record(model, IDS, layers=range(10**15))


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"__metadata__": np.ones(1)}, ValueError, "got '__metadata__', which is taken"),
        ({"model.norm": np.array(["x"])}, TypeError, "model.norm: expected a dtype such as"),
        ({"model.norm": np.array([{}])}, TypeError, "model.norm: expected a dtype such as"),
        ({"model.norm": np.ones(1, complex)}, TypeError, "model.norm: expected a dtype such as"),
        ({"model.norm": 3.0}, TraceError, "model.norm: expected an array, got float"),
        (
            {"model.norm": memoryview(b"")},  # which has a shape and no dtype
            TraceError,
            "model.norm: expected an array, got memoryview",
        ),
    ],
)
def test_what_no_file_holds(tmp_path, arrays, error, message):
    with pytest.raises(error, match=message):
        Trace(arrays).save(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_a_batch_of_one_may_be_left_out():
    model, _ = traced()
    one = {"model.norm": np.zeros((5, GQA.hidden_size), np.float32)}
    assert check(Trace(one, IDS[:1]), model).first.site.name == "model.norm"
    with pytest.raises(TraceError, match=r"model\.norm: expected shape \[2, 5, 10\]"):
        check(Trace(one, IDS), model)


class TestComparedWithoutModel:
    """Arrays of any shapes: a TraceError where they cannot be what their names say."""

    @pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4, 5)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_axes(self, shape, masked):
        trace = Trace({"model.norm": np.ones(shape)}, attention_mask=MASK if masked else None)
        with pytest.raises(TraceError, match=r"model\.norm: expected"):
            compare(trace, trace)

    @pytest.mark.parametrize("shape", [(1, 2, 5, 6), (5, 5), (1, 100_000, 1, 100_000)])
    def test_pairs(self, shape):
        name = "model.layers.0.self_attn.scores"
        trace = Trace({name: np.broadcast_to(np.float32(1), shape)})
        with pytest.raises(TraceError, match=f"{name}: expected shape"):
            compare(trace, trace)

    def test_masks(self):
        arrays = {"model.norm": np.ones((2, 5, 3))}
        for mask, message in (
            (MASK[:, :3], "attention_mask: expected a number for each of 5 tokens"),
            (MASK[None], "attention_mask: expected 0 and 1 in shape"),
            (MASK.astype(str), "attention_mask: expected 0 and 1 in shape"),
        ):
            trace = Trace(arrays, attention_mask=mask)
            with pytest.raises(TraceError, match=message):
                compare(trace, trace)

    def test_tokens_of_crossed_shapes(self):
        """Held against each other element by element they would be as many as a product."""
        arrays = {"model.norm": np.ones((1, 2, 3))}
        a = Trace(arrays, positions=np.zeros((10**6, 1), int))
        b = Trace(arrays, positions=np.zeros((1, 10**6), int))
        with pytest.raises(TraceError, match="positions: expected the same in both traces, got sh"):
            compare(a, b)

    def test_a_config_of_a_million_layers(self):
        config = json.dumps(GQA.to_json() | {"num_hidden_layers": 10**6})
        trace = Trace({"model.norm": np.ones((1, 2, 10))}, metadata={"config": config})
        with pytest.raises(TraceError, match="expected at most 10000, got 1000000"):
            compare(trace, trace)


def test_the_first_tokens_of_a_trace():
    model, trace = traced(sites=["layer", "scores", "lm_head"])
    first = first_tokens(validated(trace, model.config), 2)
    assert first.count == 2
    assert np.array_equal(first.input_ids, IDS[:, :2])
    assert first.positions.tolist() == [0, 1]
    for name, array in trace.arrays.items():
        expected = array[:, :, :2, :2] if name.endswith("scores") else array[:, :2]
        assert np.array_equal(first.array(name), expected)
        assert info_of(first.arrays, name) == (expected.shape, "float32")


@pytest.mark.parametrize("spoilt", ["a mask", "only the last token", "few tokens"])
def test_all_tokens_where_the_first_do_not_stand_alone(spoilt):
    model, trace = traced()
    arrays = dict(trace.arrays)
    if spoilt == "only the last token":
        arrays["lm_head"] = arrays["lm_head"][:, -1:]
    mask = MASK if spoilt == "a mask" else None
    whole = validated(replace(trace, arrays=arrays, attention_mask=mask), model.config)
    assert first_tokens(whole, 5 if spoilt == "few tokens" else 2) is whole
