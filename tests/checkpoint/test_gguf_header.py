"""GGUF headers: equal to the gguf package's reading, and refused where llama.cpp refuses them."""

from __future__ import annotations

import math
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_layers import CheckpointError, ConfigError
from llama_layers.checkpoint import open_checkpoint
from llama_layers.checkpoint.gguf.header import TENSOR_TYPES, read_gguf
from tests.support import gguf_files

UNSIGNED = {f"u{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)}
SIGNED = {f"i{bits}": st.integers(-(2**bits // 2), 2**bits // 2 - 1) for bits in (8, 16, 32, 64)}
SCALARS = {
    **UNSIGNED,
    **SIGNED,
    "f32": st.floats(width=32, allow_nan=False),
    "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.text(max_size=20),
}
ARRAYS = {f"arr[{kind}]": st.lists(values, max_size=5) for kind, values in SCALARS.items()}
VALUES = st.one_of(st.tuples(st.just(kind), values) for kind, values in (SCALARS | ARRAYS).items())
METADATA = st.dictionaries(st.text(min_size=1, max_size=20), VALUES, max_size=8)


NUMBERS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@st.composite
def tensors(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=10), max_size=4, unique=True))
    return {
        name: np.arange(math.prod(shape), dtype=draw(st.sampled_from(["float32", "float16"])))
        .reshape(shape)
        for name in names
        for shape in [draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))]
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    file.write_bytes(ENCODED.content)
    open_checkpoint(file)  # which imports what it needs, once, so that memory can be measured
    return file


def plain(value):
    """A value of the metadata as Python objects."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, str | int | float) else list(value)


@given(METADATA, tensors(), st.sampled_from([2, 3]), st.sampled_from([8, 32, 64]))
def test_equal_to_the_gguf_package(file, metadata, arrays, version, alignment):
    metadata = {key: value for key, value in metadata.items() if key != "general.alignment"}
    metadata["general.alignment"] = "u32", alignment
    content = gguf_files.encode(metadata, arrays, version=version, alignment=alignment).content
    file.write_bytes(content)
    header = read_gguf(file)
    assert header.version == version
    assert {key: plain(value) for key, value in header.metadata.items()} == {
        key: pytest.approx(value, rel=1e-6) if "f32" in kind else value
        for key, (kind, value) in metadata.items()
    }
    compare(header, file)


def compare(header, file):
    """Assert that the gguf package reads the same metadata and tensors."""
    reader = gguf.GGUFReader(file)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        try:
            ours = plain(header.metadata[key])
        except CheckpointError:
            with pytest.raises(UnicodeDecodeError):
                field.contents()
        else:
            assert repr(ours) == repr(field.contents())  # so that NaN is equal to NaN
    assert len(header.tensors) == len(reader.tensors)
    for ours, theirs in zip(header.tensors.values(), reader.tensors, strict=True):
        kind = theirs.tensor_type.name
        assert (ours.name, ours.dtype) == (theirs.name, NUMBERS.get(kind, kind))
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        raw = header.data[ours.offset : ours.offset + ours.nbytes]
        assert raw.tobytes() == theirs.data.tobytes()


def test_types_of_tensors():
    """As the gguf package has them, which can dequantise each."""
    assert len({name for name, _, _ in TENSOR_TYPES.values()}) == len(TENSOR_TYPES)
    for number, (name, block, nbytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (block, nbytes)
        if name != "F64":
            zeros = np.zeros((1, nbytes), np.uint8)
            assert gguf.dequantize(zeros, kind).shape == (1, block)
    for kind in set(gguf.GGMLQuantizationType) - set(TENSOR_TYPES):
        zeros = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        with pytest.raises(NotImplementedError):
            gguf.dequantize(zeros, kind)


ENCODED = gguf_files.encode(gguf_files.MODEL, gguf_files.llama())
EXTREMES = [0, 1, 2, 7, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 256, 2**64 - 1]


@st.composite
def mutants(draw):
    """A valid file with some of what says how to read it changed, and perhaps cut off."""
    content = bytearray(ENCODED.content)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(ENCODED.lengths))
        (old,) = struct.unpack_from("<Q", content, place)
        near = st.integers(old - 40, old + 40)
        struct.pack_into("<Q", content, place, draw(st.sampled_from(EXTREMES) | near) % 2**64)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(ENCODED.types))
        struct.pack_into("<I", content, place, draw(st.integers(0, 45) | st.just(2**31)))
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@given(mutants())
@example(bytes(ENCODED.content))
def test_mutants_are_read_or_refused(file, content):
    file.write_bytes(content)
    tracemalloc.start()
    try:
        opened = open_checkpoint(file)
    except (CheckpointError, ConfigError) as error:
        opened = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(ENCODED.content)
    if isinstance(opened, ValueError):
        assert str(file) in str(opened)
        assert "\n" not in str(opened)
    else:
        compare(read_gguf(file), file)
        with np.errstate(all="ignore"):  # of floats that are read as blocks
            for name in opened.tensors:
                opened.read(name)


def refused(file, content, message):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: .*{message}") as caught:
        read_gguf(file)
    assert "\n" not in str(caught.value)


TINY = {"k": ("u32", 7)}
ARRAY = np.zeros((2, 8), np.float32)  # 64 bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a GGUF file, got an empty file"),
        (b"GGUF", "expected a GGUF file, got one that ends within its header, after 4 bytes"),
        (b"ggml" * 9, "expected a GGUF file, got one that begins b'ggml'"),
        (b"GGUF\x00\x00\x00\x03" + bytes(64), "little-endian .* got a big-endian one"),
        (gguf_files.encode(TINY, version=1).content, "version 2 or 3 of GGUF, got 1"),
        (gguf_files.encode(TINY, version=4).content, "version 2 or 3 of GGUF, got 4"),
        (gguf_files.encode(TINY, version=0).content, "version 2 or 3 of GGUF, got 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(64), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(64), "ends within its header"),
    ],
)
def test_beginnings(file, content, message):
    refused(file, content, message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([("k", ("u32", 1)), ("k", ("u32", 2))], "different keys .* got 'k' twice"),
        ([("", ("u32", 1))], "different keys .* got '' among them"),
        ([(b"\xff", ("u32", 1))], "a key of the metadata: expected UTF-8 text"),
        ([("general.alignment", ("u32", 0))], "general.alignment: expected a power of 2, got 0"),
        ([("general.alignment", ("u32", 24))], "expected a power of 2, got 24"),
        ([("general.alignment", ("str", "32"))], "expected a power of 2, got '32'"),
        ([("general.alignment", ("bool", True))], "expected a power of 2, got True"),
    ],
)
def test_metadata_that_is_refused(file, metadata, message):
    encoder = gguf_files.Encoder()
    for key, value in metadata:
        encoder.text(key)
        encoder.value(*value)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    refused(file, head + encoder.content, message)


def raw_value(kind, value=b"", count=1):
    """A file with one key, k, of a type by number."""
    key = struct.pack("<Q", 1) + b"k"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_value(13, bytes(32)), "k: expected a number, a string or an array .* got type 13"),
        (raw_value(9, struct.pack("<IQ", 9, 1) * 2000 + bytes(16)), "got an array of arrays"),
        (raw_value(9, struct.pack("<IQ", 77, 0) + bytes(16)), "k: expected .* got type 77"),
        (raw_value(8, struct.pack("<Q", 2**64 - 8) + bytes(16)), "ends within its header"),
        (raw_value(8, struct.pack("<Q", 17) + bytes(16)), "ends within its header"),
        (raw_value(9, struct.pack("<IQ", 8, 2**61) + bytes(64)), "ends within its header"),
        (raw_value(9, struct.pack("<IQQ", 8, 2, 2**64 - 8) + bytes(64)), "ends within its header"),
        (raw_value(9, struct.pack("<IQQ", 8, 2, 2**40) + bytes(64)), "ends within its header"),
        (raw_value(9, struct.pack("<IQQ", 8, 1, 65) + bytes(64)), "ends within its header"),
        (raw_value(9, struct.pack("<IQ", 10, 2**61) + bytes(64)), "ends within its header"),
        (raw_value(4, bytes(3)), "ends within its header"),
    ],
)
def test_values_that_are_refused(file, content, message):
    refused(file, content, message)


def test_text_is_decoded_when_it_is_looked_up(file):
    metadata = {"a": ("str", b"\xff"), "b": ("arr[str]", ["x", b"\xe4"]), "c": ("str", "ok")}
    file.write_bytes(gguf_files.encode(metadata).content)
    header = read_gguf(file)
    assert set(header.metadata) == {"a", "b", "c"}
    assert "a" in header.metadata
    assert header.metadata["c"] == "ok"
    assert header.metadata["b"][0] == "x"
    with pytest.raises(CheckpointError, match="a: expected UTF-8 text"):
        header.metadata["a"]
    with pytest.raises(CheckpointError, match="b: expected UTF-8 text"):
        list(header.metadata["b"])
    with pytest.raises(CheckpointError, match="b: expected UTF-8 text"):
        header.metadata["b"][-1]


def test_strings_are_a_sequence(file):
    words = ["", "ü", "a" * 300, "", "b"]
    file.write_bytes(gguf_files.encode({"w": ("arr[str]", words), "n": ("u8", 3)}).content)
    strings = read_gguf(file).metadata["w"]
    assert len(strings) == 5
    assert list(strings) == words
    assert [strings[i] for i in range(-5, 5)] == words + words
    assert strings[1:4] == words[1:4]
    assert strings[::-2] == words[::-2]
    assert "b" in strings
    assert strings.index("ü") == 1
    for index in (5, -6):
        with pytest.raises(IndexError):
            strings[index]


def test_a_bool_is_true_unless_it_is_zero(file):
    file.write_bytes(raw_value(9, struct.pack("<IQ", 7, 3) + b"\x00\x01\x80"))
    assert read_gguf(file).metadata["k"].tolist() == [False, True, True]
    file.write_bytes(raw_value(7, b"\x02"))
    assert read_gguf(file).metadata["k"] is True


def with_tensors(*tensors, alignment=32, data=bytes(256)):
    """A file with tensors given by name, sizes (fastest first), type and offset."""
    encoder = gguf_files.Encoder()
    for name, sizes, kind, offset in tensors:
        encoder.text(name)
        encoder.u32(len(sizes))
        for size in sizes:
            encoder.u64(size)
        encoder.u32(kind)
        encoder.u64(offset)
    key = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, alignment)
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + key + encoder.content
    return content + bytes(-len(content) % alignment) + data


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", [8], 0, 0), ("a", [8], 0, 32)], "tensor 'a' appears twice"),
        ([("a", [8], 0, 0), ("b", [8], 0, 0)], "b overlaps a"),
        ([("a", [9], 0, 32), ("b", [9], 0, 0)], "a overlaps b"),
        ([("a", [8], 0, 4)], "a: expected an offset that is a multiple of 32, .* got 4"),
        ([("a", [8], 0, 2**64 - 32)], "of 18446744073709551\\d* bytes or more, where a ends"),
        ([("a", [8], 0, 2**63)], "bytes or more, where a ends"),
        ([("a", [8], 0, 256)], r"of \d+ bytes or more, where a ends, got \d+"),
        ([("a", [65], 0, 0)], "bytes or more, where a ends"),
        ([("a", [2**32, 2**32], 0, 0)], "bytes or more, where a ends"),
        ([("a", [2**63, 2], 0, 0)], "bytes or more, where a ends"),
        ([("a", [1] * 5, 0, 0)], "a: expected at most 4 axes, got 5"),
        ([("a", [8], 24, 0)], "a: expected floats or blocks of them, got I8"),
        ([("a", [8], 4, 0)], "a: expected floats or blocks of them, got type 4"),
        ([("a", [2**31], 2**31, 0)], "got type 2147483648"),
        ([("a", [16, 2], 2, 0)], "a: expected rows of a multiple of 32 numbers, .* Q4_0, got 16"),
        ([("a", [], 2, 0)], "a: expected rows of a multiple of 32 numbers, .* Q4_0, got 1"),
        ([(b"\xc3", [8], 0, 0)], "the name of a tensor: expected UTF-8 text"),
    ],
)
def test_tensors_that_are_refused(file, tensors, message):
    refused(file, with_tensors(*tensors), message)


def test_tensors_that_are_fine(file):
    """Gaps, any order, an end without padding, and another alignment."""
    content = with_tensors(
        ("b", [8], 0, 128), ("a", [32, 2], 2, 0), ("empty", [0, 4], 0, 64), ("one", [], 1, 64),
        alignment=64, data=bytes(160),
    )  # fmt: skip
    file.write_bytes(content)
    start = len(content) - 160
    assert [(t.name, t.shape, t.offset, t.nbytes) for t in read_gguf(file).tensors.values()] == [
        ("b", (8,), start + 128, 32),
        ("a", (2, 32), start, 36),
        ("empty", (4, 0), start + 64, 0),
        ("one", (), start + 64, 2),
    ]


@pytest.mark.parametrize(
    ("kind", "count", "size"), [(0, 20_000_000, 1), (8, 250_000, 8), (10, 2_500_000, 8)]
)
def test_arrays_cost_no_more_than_their_size(file, kind, count, size):
    """Bytes, empty strings and numbers: nothing is made for each of them."""
    file.write_bytes(raw_value(9, struct.pack("<IQ", kind, count) + bytes(count * size)))
    tracemalloc.start()
    header = read_gguf(file)
    value = header.metadata["k"]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    assert len(value) == count
    assert value[count - 1] == ("" if kind == 8 else 0)
    assert tracemalloc.get_traced_memory()[1] < 1.1 * count * size
    tracemalloc.stop()
