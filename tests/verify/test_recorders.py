"""Traces in NumPy's files, and of any library's arrays."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, record
from llama_layers.verify.recorders import read_arrays, record_transformers
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.array([[3, 1, 4, 1, 5]])


def traced(dtype=np.float32):
    model = model_of(GQA, random_weights(GQA, 0, dtype))
    return model, record(model, IDS)


def written(directory, trace, names=None):
    """One .npy file an array."""
    for name, array in trace.arrays.items():
        np.save(directory / f"{(names or {}).get(name, name)}.npy", array)
    np.save(directory / "input_ids.npy", trace.input_ids)
    return directory


class TestReadArrays:
    def test_directory(self, tmp_path):
        model, trace = traced()
        (tmp_path / "notes.txt").write_text("left alone")
        for found in (read_arrays(written(tmp_path, trace)), Trace.load(tmp_path)):
            assert set(found.arrays) == set(trace.arrays)
            for name, array in trace.arrays.items():
                assert np.array_equal(found.arrays[name], array)
                assert found.arrays[name].dtype == array.dtype
            assert np.array_equal(found.input_ids, IDS)
            assert found.metadata == {}
            assert check(found, model).verdict == "PASS"

    def test_archive(self, tmp_path):
        _, trace = traced()
        tokens = {"positions": np.arange(5), "attention_mask": np.ones((1, 5))}
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "port.npz", input_ids=IDS, **tokens, **trace.arrays)
            for found in (read_arrays(tmp_path / "port.npz"), Trace.load(tmp_path / "port.npz")):
                assert set(found.arrays) == set(trace.arrays)
                for name, array in trace.arrays.items():
                    assert np.array_equal(found.arrays[name], array)
                assert np.array_equal(found.input_ids, IDS)
                assert np.array_equal(found.positions, tokens["positions"])
                assert np.array_equal(found.attention_mask, tokens["attention_mask"])

    def test_other_names(self, tmp_path):
        np.savez(tmp_path / "some.npz", **{"Qcur-0#0": np.ones(1), "Qcur-0#1": np.zeros(1)})
        np.save(tmp_path / "blocks.1.hook_resid_post.npy", np.ones((5, 10), np.float32))
        found = read_arrays(tmp_path).arrays
        assert set(found) == {
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.q_rope",
            "model.layers.1",
        }
        assert found["model.layers.0.self_attn.q_rope"] == 0

    def test_bfloat16(self, tmp_path):
        """Their bits as uint16, and what NumPy makes of ml_dtypes' arrays."""
        numbers = np.array([[1.0, -2.5, 3.140625]], ml_dtypes.bfloat16)
        np.save(tmp_path / "model.norm.bfloat16.npy", numbers.view(np.uint16))
        np.save(tmp_path / "lm_head.npy", numbers)
        np.savez(
            tmp_path / "a.npz", **{"l_out-0.bfloat16": numbers.view(np.uint16), "l_out-1": numbers}
        )
        found = read_arrays(tmp_path).arrays
        assert set(found) == {"model.norm", "lm_head", "model.layers.0", "model.layers.1"}
        for array in found.values():
            assert array.dtype == ml_dtypes.bfloat16
            assert np.array_equal(array, numbers)

    def test_metadata(self, tmp_path):
        model, trace = traced()
        written(tmp_path, trace)
        said = {"config": GQA.to_json(), "dtype": "float32", "engine": "mine 1.0"}
        (tmp_path / "metadata.json").write_text(json.dumps(said))
        found = read_arrays(tmp_path)
        assert found.metadata["engine"] == "mine 1.0"
        assert json.loads(found.metadata["config"]) == GQA.to_json()
        check(found, model)
        other = model_of(replace(GQA, rope_theta=9.0), random_weights(GQA, 0, np.float32))
        with pytest.raises(TraceError, match=r"with rope_theta of layer 0 9\.0, got 100\.0"):
            check(found, other)

    def test_arrays_are_mapped(self, tmp_path):
        """And no file stays open: a model of 80 layers has more sites than most systems allow."""
        np.save(tmp_path / "model.norm.npy", np.zeros((5, 10), np.float32))
        found = read_arrays(tmp_path)
        assert isinstance(found.arrays["model.norm"], np.memmap)
        (tmp_path / "model.norm.npy").unlink()  # one that is open would stay
        np.save(tmp_path / "model.norm.npy", np.ones((5, 10), np.float32))
        assert np.array_equal(found.arrays["model.norm"], np.ones((5, 10)))


def numpy_file(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class TestRefusedFiles:
    """Each by its name."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "got an empty file"),
            (b"no numbers", "expected an array of numbers"),
            (numpy_file(np.ones((5, 10)))[:-1], "expected an array of numbers"),
            (numpy_file(np.ones((5, 10)))[:20], "expected an array of numbers"),
            (numpy_file(np.array([{}], object)), "expected an array of numbers"),
            (pickle.dumps({"a": 1}), "expected an array of numbers"),
        ],
    )
    def test_npy(self, tmp_path, content, message):
        (tmp_path / "model.norm.npy").write_bytes(content)
        with pytest.raises(TraceError) as error:
            Trace.load(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'model.norm.npy'}: ")
        assert message in str(error.value)

    def test_pickle_is_never_read(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return pytest.fail, ("unpickled",)

        np.save(tmp_path / "model.norm.npy", np.array([Evil()], object), allow_pickle=True)
        with pytest.raises(TraceError, match=r"model\.norm\.npy: expected an array of numbers"):
            Trace.load(tmp_path)
        np.savez(tmp_path / "a.npz", lm_head=np.array([Evil()], object))
        (tmp_path / "model.norm.npy").unlink()
        with pytest.raises(TraceError, match=r"a\.npz, lm_head\.npy: expected an array of numbers"):
            Trace.load(tmp_path).arrays["lm_head"]

    def test_npz(self, tmp_path):
        file = tmp_path / "a.npz"
        file.write_bytes(b"PK no archive")
        with pytest.raises(TraceError) as error:
            Trace.load(file)
        assert str(error.value).startswith(f"{file}: expected an .npz file: ")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model.norm.npy", numpy_file(np.ones(5))[:-1])
        with pytest.raises(TraceError, match=r"a\.npz, model\.norm\.npy: expected an array"):
            Trace.load(file).arrays["model.norm"]

    def test_one_name_twice(self, tmp_path):
        np.save(tmp_path / "lm_head.npy", np.ones(1))
        np.savez(tmp_path / "b.npz", lm_head=np.ones(1))
        with pytest.raises(TraceError, match=r"lm_head\.npy: 'lm_head' is in b\.npz already"):
            Trace.load(tmp_path)

    def test_one_site_twice(self, tmp_path):
        for name in ("result_norm", "model.norm"):
            np.save(tmp_path / f"{name}.npy", np.ones(1))
        with pytest.raises(TraceError) as error:
            Trace.load(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}: 'model.norm' and 'result_norm': both mean")

    def test_nothing(self, tmp_path):
        with pytest.raises(TraceError, match=r"expected arrays in \.npy or \.npz files, got none"):
            Trace.load(tmp_path)
        with pytest.raises(FileNotFoundError, match="none: no such file"):
            read_arrays(tmp_path / "none")

    def test_bits_that_are_none(self, tmp_path):
        np.save(tmp_path / "model.norm.bfloat16.npy", np.ones(2, np.float32))
        with pytest.raises(TraceError, match="expected the bits of bfloat16 numbers as uint16"):
            read_arrays(tmp_path).arrays["model.norm"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "expected a JSON object"),
            ("[]", "expected a JSON object, got list"),
            ('{"dtype": 32}', "expected a text for dtype, got 32"),
        ],
    )
    def test_metadata(self, tmp_path, content, message):
        np.save(tmp_path / "lm_head.npy", np.ones(1))
        (tmp_path / "metadata.json").write_text(content)
        with pytest.raises(TraceError) as error:
            Trace.load(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'metadata.json'}: {message}")


def test_arrays_of_another_library(tmp_path):
    """Nothing has to become NumPy's before it is a trace."""
    model, trace = traced()
    arrays = {name: array_api_strict.asarray(array) for name, array in trace.arrays.items()}
    found = Trace(arrays, array_api_strict.asarray(IDS))
    expected = [result.difference for result in check(trace, model).results]
    assert [result.difference for result in check(found, model).results] == expected
    found.save(tmp_path / "port.safetensors")
    saved = Trace.load(tmp_path / "port.safetensors").arrays
    assert all(np.array_equal(saved[name], array) for name, array in trace.arrays.items())


def test_no_model_of_transformers():
    with pytest.raises(TypeError, match=r"model: expected the causal language model of .* got int"):
        record_transformers(3, IDS)
