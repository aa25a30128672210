"""Trace files that are malformed: a TraceError that says so, before much is read."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import Trace, array_files, check, record
from llama_layers.verify.npy import read_header
from llama_layers.verify.stored import info_of
from tests.support.random_models import GQA, model_of, random_weights

MODEL = model_of(GQA, random_weights(GQA, 0, np.float32))
IDS = np.array([[1, 2, 3]])
SITE = "model.norm"


def npy(header, data=bytes(120), version=(1, 0)):
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + data


def file_of(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def archive(path, content, method=zipfile.ZIP_DEFLATED, name=f"{SITE}.npy"):
    with zipfile.ZipFile(path, "w", method) as opened:
        opened.writestr("input_ids.npy", file_of(IDS))
        opened.writestr(name, content)
    return path


def refused(path):
    with pytest.raises(TraceError) as error:
        check(Trace.load(path), MODEL)
    message = str(error.value)
    assert message.isprintable()
    return message


HEADER = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"'''",
        b"{",
        b"[" * 9000,
        b"{'descr': '<f4'}",
        b"\xff\xfe\x00",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 10), }\0",
        b"{'descr': '<f4',\v'fortran_order': False, 'shape': (1, 3, 10), }",
        b"{'descr': '<f4',\xa0'fortran_order': False, 'shape': (1, 3, 10), }",
        *(
            HEADER.format(*entries).encode()
            for entries in (
                ("'<f4'", "False", "(99999999999999999999999999,)"),
                ("'<f4'", "False", "(9223372036854775807, 9223372036854775807)"),
                ("'<f4'", "False", "(True,)"),
                ("'<f4'", "False", "(-1,)"),
                ("'<f4'", "False", "(3)"),
                ("'<f4'", "False", "3"),
                ("'<f4'", "False", "(1, , 3)"),
                ("'<f4'", "0", "(1, 3, 10)"),
                ("'|O'", "False", "(1, 3, 10)"),
                ("'<U9'", "False", "(3,)"),
                ("'<f3'", "False", "(3,)"),
                ("[('a', '<f4')]", "False", "(3,)"),
                ("'<f4'", "False", "(" + "1, " * 65 + ")"),
                ("__import__('os').abort()", "False", "(3,)"),
                ("'<f4', 'descr': '<f2'", "False", "(1, 3, 10)"),
            )
        ),
    ],
)
def test_headers(tmp_path, header):
    (tmp_path / f"{SITE}.npy").write_bytes(npy(header))
    assert refused(tmp_path).startswith(f"{tmp_path / SITE}.npy: expected an array of numbers: ")
    path = archive(tmp_path / "t.npz", npy(header))
    assert refused(path).startswith(f"{path}, {SITE}.npy: expected an array of numbers: ")


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }",
        "{'shape': (1, 2, 3), 'fortran_order': True, 'descr': '>f8'}    \n",
        '{"descr":"|u1","fortran_order":False,"shape":(7,)}',
        "{'descr': '<f2', 'fortran_order': False, 'shape': (), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (3L, 0), }",
        "{ 'descr' : '|b1' , 'fortran_order' : False , 'shape' : ( 4 , ) }",
        HEADER.format("'<f4'", "False", "(5,)") + 300 * " ",
    ],
)
@pytest.mark.filterwarnings("ignore:Reading .* Python 2")
def test_headers_read_as_numpy_reads_them(text):
    for version in ((1, 0), (2, 0)) if "L" in text else ((1, 0), (2, 0), (3, 0)):
        content = npy(text.encode(), bytes(range(200)), version)
        expected = np.load(io.BytesIO(content))
        header = read_header(io.BytesIO(content))
        assert (header.shape, header.dtype) == (expected.shape, expected.dtype)
        if expected.ndim > 1 and expected.size:
            assert header.order == ("C" if expected.flags.c_contiguous else "F")
        start = content[header.start : header.start + header.nbytes]
        assert start == expected.tobytes(header.order)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_byte_and_axis_orders(tmp_path, order, dtype):
    trace = record(MODEL, IDS)
    arrays = {n: np.asarray(a.astype(dtype), order=order) for n, a in trace.arrays.items()}
    np.savez_compressed(tmp_path / "t.npz", input_ids=IDS.astype(">i4"), **arrays)
    (tmp_path / "d").mkdir()
    for name, array in {"input_ids": IDS.astype(">i4"), **arrays}.items():
        np.save(tmp_path / "d" / f"{name}.npy", array)
    for path in (tmp_path / "t.npz", tmp_path / "d"):
        found = Trace.load(path)
        for name, array in arrays.items():
            assert np.array_equal(found.arrays[name], array)
            assert found.arrays[name].dtype.isnative
        assert np.array_equal(found.input_ids, IDS)
    assert check(Trace(arrays, IDS), MODEL, explain=False).results  # in memory, too


class TestArchives:
    def test_damaged_numbers(self, tmp_path):
        path = tmp_path / "t.npz"
        trace = record(MODEL, IDS)
        np.savez_compressed(path, input_ids=IDS, **trace.arrays)
        content = bytearray(path.read_bytes())
        for name in (b"input_ids.npy", b"lm_head.npy"):
            spoilt = content.copy()
            start = spoilt.index(name) + len(name)
            spoilt[start + 40 : start + 60] = bytes(20)
            path.write_bytes(spoilt)
            assert f"{name.decode()}: expected an array of numbers: " in refused(path)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
    def test_compression(self, tmp_path, method):
        path = tmp_path / "t.npz"
        archive(path, file_of(np.ones((1, 3, 10))), 0 if method == 99 else method)
        if method == 99:
            content = bytearray(path.read_bytes())
            entry = content.rindex(b"PK\x01\x02")
            content[entry + 10] = method
            path.write_bytes(content)
        assert f"got compression {method}; NumPy stores (0) or deflates (8)" in refused(path)

    def test_encrypted(self, tmp_path):
        path = archive(tmp_path / "t.npz", file_of(np.ones((1, 3, 10))))
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        assert "got an encrypted member" in refused(path)

    @pytest.mark.parametrize("name", [f"{SITE}.npy", "input_ids.npy", "unknown.npy"])
    def test_what_unpacks_to_far_more(self, tmp_path, name):
        """64 MiB of zeros in some 300 KB."""
        count = 2**24
        header = HEADER.format("'<f4'", "False", f"(1, {count // 10}, 10)").encode()
        path = tmp_path / "t.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
            opened.writestr(name, npy(header, bytes(4 * count)))
        tracemalloc.start()
        try:
            message = refused(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert "at most 100 times the packed size is read, or 16 MiB" in message
        assert peak < 10 * path.stat().st_size

    def test_sizes_that_lie(self, tmp_path):
        """A shape of terabytes in a member of a few bytes allocates nothing."""
        header = HEADER.format("'<f4'", "False", "(1, 99999999999, 10)").encode()
        assert "cut off" in refused(archive(tmp_path / "t.npz", npy(header)))

    def test_shapes_are_refused_unread(self, tmp_path):
        path = archive(tmp_path / "t.npz", file_of(np.ones((1, 3, 9999), np.float32)), 0)
        content = bytearray(path.read_bytes())
        content[content.rindex(b"NUMPY") + 9999] ^= 1  # its check sum fails if it is read
        path.write_bytes(content)
        assert f"{SITE}: expected shape [1, 3, 10]" in refused(path)

    def test_many_zeros_are_no_bomb(self, tmp_path):
        np.savez_compressed(tmp_path / "t.npz", lm_head=np.zeros((1, 2**19, 4), np.float32))
        assert Trace.load(tmp_path / "t.npz").arrays["lm_head"].shape == (1, 2**19, 4)


@pytest.mark.parametrize("chunk", [50, 120, 999])
def test_bytes_after_the_numbers_are_not_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(array_files, "_CHUNK", chunk)
    array = np.arange(30, dtype=np.float32).reshape(1, 3, 10)
    path = archive(tmp_path / "t.npz", file_of(array) + bytes(99))
    arrays = Trace.load(path).arrays
    np.testing.assert_array_equal(arrays[SITE], array)
    assert info_of(arrays, SITE).dtype == "float32"


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.safetensors", b"", "got an empty file"),
            ("t", b"GGUF\x03\0\0\0\0", "got a GGUF file"),
            ("t.bin", b"PK\x03\x04" + bytes(99), "got a zip archive: an .npz file needs a name"),
            ("t.pt", b"\x80\x02" + bytes(99), "expected a safetensors file"),
            ("t", struct.pack("<Q", 60) + b"{" + bytes(51), "cut off: it has 60 bytes, fewer"),
            ("t.npy", file_of(IDS), "name the directory that it is in"),
            ("t.npz", b"", "expected an .npz file"),
            ("t.npz", bytes(100), "expected an .npz file"),
        ],
    )
    def test_kinds(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / name)

    @pytest.mark.parametrize("name", ["t.npz", "t.safetensors", "t.npy"])
    def test_a_fifo_is_not_waited_for(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        path = tmp_path if name == "t.npy" else tmp_path / name
        assert "got no regular file" in refused(path)

    def test_nested_metadata(self, tmp_path):
        np.save(tmp_path / f"{SITE}.npy", np.ones((1, 3, 10)))
        (tmp_path / "metadata.json").write_text("[" * 100_000)
        assert "nested too deeply" in refused(tmp_path)
        trace = record(MODEL, IDS)
        for config, message in (
            ("[" * 100_000, "nested too deeply"),
            ("[]", "got a JSON list"),
            ('"config.json"', "got a JSON str"),  # no file is opened by that name
            ("1" * 5000, "expected a config.json"),
        ):
            Trace(trace.arrays, IDS, metadata={"config": config}).save(
                tmp_path / "t.safetensors", force=True
            )
            assert message in refused(tmp_path / "t.safetensors")

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I64", "F4"])
    def test_other_dtypes(self, tmp_path, dtype):
        count = {"I64": 8, "F4": 0.5}.get(dtype, 1) * 30
        tensor = {"dtype": dtype, "shape": [1, 3, 10], "data_offsets": [0, int(count)]}
        header = json.dumps({SITE: tensor}).encode()
        path = tmp_path / "t.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(int(count)))
        assert "expected one of the dtypes float16, bfloat16, float32, float64" in refused(path)

    def test_one_name_twice(self, tmp_path):
        tensor = '"lm_head":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        header = f"{{{tensor},{tensor}}}".encode()
        path = tmp_path / "t.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        assert "'lm_head' appears twice" in refused(path)


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "full.safetensors"
    trace = record(MODEL, IDS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="full"):
            trace.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
