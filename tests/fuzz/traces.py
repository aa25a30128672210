"""Traces in safetensors, .npz and .npy files with something wrong in them."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save

from llama_layers import Llama
from llama_layers.verify import Trace, check, compare, record, to_html
from llama_layers.verify.aliases import alias_table
from tests.fuzz.mutations import mutated_bytes, mutated_json, one_of, strange
from tests.support.random_models import CONFIGS, model_of, random_weights

# Causes are looked for only a little, so that a hang is not confused with that.
_check: Any = import_module("llama_layers.verify.check")
_check.SECONDS, _check.AGAIN = 0.5, 0.2
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
KINDS = ("gqa", "biases", "window", "yarn")
TOKENS = ("input_ids", "positions", "attention_mask")
# Texts of metadata that no config, dtype or layout is.
TEXTS = ("", "[]", "[" * 5000, '"config.json"', "float8", "interleaved", "\x1b[2J", "9" * 5000)
DTYPES = ("<f2", "<f4", ">f4", "<f8", "<i8", ">u8", "|b1", "|i1", "<c8", "bfloat16")


@cache
def _model(kind: str) -> Llama:
    return model_of(CONFIGS[kind], random_weights(CONFIGS[kind], 0, np.float32))


@cache
def _right(kind: str) -> Trace:
    return record(_model(kind), IDS, sites=["*"], attention_mask=MASK)


def mutated(rng: np.random.Generator, directory: Path) -> Path:
    """A trace of a few sites in which something is wrong, or nothing."""
    kind = one_of(rng, KINDS)
    arrays, metadata = _changed(rng, *_part(rng, _right(kind)))
    file = one_of(rng, (_safetensors, _archive, _directory))(rng, directory, arrays, metadata)
    file.with_name("kind").write_text(kind)
    return file


def run(path: Path) -> bool:
    """Read and check a trace; whether it was accepted. AssertionError if it was read wrongly."""
    model = _model(path.with_name("kind").read_text())
    right = _right(path.with_name("kind").read_text())
    try:
        trace = Trace.load(path)
        arrays = {name: trace.arrays[name] for name in trace.arrays}
    except (ValueError, TypeError, OSError):
        return False
    _assert_same(arrays, _independent(path))
    accepted = False
    few = len(arrays) == 1  # mistakes are looked for in one site only, which takes a second
    for judge in (lambda: check(trace, model, explain=few), lambda: compare(trace, right)):
        try:
            report = judge()
        except (ValueError, TypeError):
            continue
        accepted = True
        text = report.text(every=True)
        assert text.replace("\n", "").isprintable(), text
        json.dumps(report.to_json(), allow_nan=False)
        if hasattr(report, "results") and hasattr(report, "missing"):
            assert to_html(report)
    return accepted


def _part(rng: np.random.Generator, right: Trace) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Some sites, one after the other or not, with some of the tokens and the metadata."""
    names, count = list(right.arrays), int(rng.integers(1, 7))
    first = int(rng.integers(len(names)))
    few = names[first : first + count] if rng.random() < 0.7 else rng.choice(names, count)
    arrays = {str(name): np.array(right.arrays[name]) for name in few}
    for name in TOKENS:
        if rng.random() < 0.6:
            arrays[name] = np.array(getattr(right, name)).astype(int)
    metadata = {key: text for key, text in right.metadata.items() if rng.random() < 0.5}
    return arrays, metadata


def _changed(
    rng: np.random.Generator, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """With other names, dtypes, shapes, numbers or texts."""
    for _ in range(one_of(rng, (0, 1, 1, 2, 3))):
        name = one_of(rng, list(arrays))
        array, how = arrays[name], int(rng.integers(8))
        if how == 0:
            arrays[_other_name(rng, name)] = arrays.pop(name)
        elif how == 1:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arrays[name] = array.astype(_dtype(one_of(rng, DTYPES)))
        elif how == 2:
            arrays[name] = _reshaped(rng, array)
        elif how in (3, 4) and array.size:
            arrays[name] = _renumbered(rng, array)
        elif how == 5:
            text = one_of(rng, TEXTS) if rng.random() < 0.5 else _other_config(rng)
            metadata[one_of(rng, ("config", "dtype", "accumulate", "rope_layout", "Dtype"))] = text
        elif how == 6 and len(arrays) > 1:
            del arrays[name]
        else:
            arrays[name] = np.asarray(array, order="F")
    return arrays, metadata


def _other_config(rng: np.random.Generator) -> str:
    config = CONFIGS[one_of(rng, KINDS)].to_json()
    return mutated_json(rng, config).decode("utf-8", "replace")


def _dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name


def _other_name(rng: np.random.Generator, name: str) -> str:
    aliases = [a for row in alias_table() for cell in row for a in cell.split("|") if a]
    return str(
        one_of(
            rng,
            (
                one_of(rng, aliases).format(1),
                one_of(rng, ("logits", "hidden_states.1", "x\n\x1b[2J", "__metadata__", "", "a/b")),
                f"{name}.output",
                name.replace("0", "9" * int(rng.integers(1, 30))),
                name[:-1],
                "y" * 5000,
            ),
        )
    )


def _reshaped(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    how = int(rng.integers(6))
    if how == 0:
        return array[None]
    if how == 1 and array.ndim:
        return array[int(rng.integers(len(array) + 1)) :]
    if how == 2 and array.ndim > 1:
        return array[:, -1:]
    if how == 3 and array.ndim > 1:
        return array.swapaxes(0, 1)
    return array.reshape(-1) if how == 4 else array[..., :0] if array.ndim else array


def _renumbered(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """A few numbers, or all of them, that are extreme or off."""
    array = array.copy()
    if array.dtype.kind in "iu":
        odd = one_of(rng, (-1, 0, 2**31, 2**53, 2**62, 2**63 - 1, 10**8))
        array.reshape(-1)[rng.integers(array.size)] = np.asarray(odd).astype(array.dtype)
    elif array.dtype.kind == "f" and rng.random() < 0.5:
        odd = one_of(rng, (np.nan, np.inf, -np.inf, 0.0, 1e30, 1e-40))
        array.reshape(-1)[: int(rng.integers(1, array.size + 1))] = odd
    elif array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            array = array * array.dtype.type(one_of(rng, (0, -1, 2, 1.01)))
    return array


def _safetensors(
    rng: np.random.Generator, directory: Path, arrays: dict[str, np.ndarray], metadata: Any
) -> Path:
    arrays = {n: _native(np.ascontiguousarray(a)) for n, a in arrays.items() if a.dtype != "c8"}
    arrays.pop("__metadata__", None)
    content = save(arrays, metadata)
    if rng.random() < 0.3:
        length = int.from_bytes(content[:8], "little")
        header = mutated_json(rng, json.loads(content[8 : 8 + length]))
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    elif rng.random() < 0.2:
        content = mutated_bytes(rng, content)
    file = directory / "t.safetensors"
    file.write_bytes(content)
    return file


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("=")) if not array.dtype.isnative else array


def _npy(rng: np.random.Generator, array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    content = file.getvalue()
    if rng.random() < 0.2:
        start = 10 + int.from_bytes(content[8:10], "little")
        content = _with_header(rng, content[10:start].decode("latin1"), content[start:])
    return mutated_bytes(rng, content) if rng.random() < 0.08 else content


def _with_header(rng: np.random.Generator, header: str, numbers: bytes) -> bytes:
    """Another header, of the right form or not."""
    old, new = one_of(
        rng,
        (
            ("False", "True"),
            ("(", f"({one_of(rng, (0, 1, 2, -1, 10**9, 10**25, True, '3L', '', ' '))}, "),
            ("<f4", one_of(rng, ("<f8", ">f4", "<f2", "|O", "|V2", "<U1", "|S4", "<M8[ns]"))),
            ("'", '"'),
            (",", ", ,"),
            ("}", f"'x': {strange(rng)!r}"[:3000] + "}"),
            ("{", "{" * int(rng.integers(2, 300))),
        ),
    )
    text = header.replace(old, new, 1).encode("latin1", "replace")
    version = one_of(rng, ((1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, 1)))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + numbers


def _bits(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What a file that knows no bfloat16 keeps of an array."""
    if array.dtype == ml_dtypes.bfloat16:
        return f"{name}.bfloat16", array.view(np.uint16)
    return name, array


def _archive(
    rng: np.random.Generator, directory: Path, arrays: dict[str, np.ndarray], metadata: Any
) -> Path:
    file = directory / "t.npz"
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as opened:
        warnings.simplefilter("ignore")  # of two members with one name
        for name, array in arrays.items():
            method = one_of(rng, (*methods * 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            name, array = _bits(name, array)
            for _ in range(2 if rng.random() < 0.02 else 1):
                opened.writestr(f"{name}.npy", _npy(rng, array), compress_type=method)
        if rng.random() < 0.03:  # zeros that unpack to a thousand times their size
            opened.writestr("lm_head.npy", bytes(2**25), compress_type=zipfile.ZIP_DEFLATED)
    content = file.read_bytes()
    if rng.random() < 0.3:
        end = content.rindex(b"PK\x05\x06")
        start = content.index(b"PK\x01\x02")
        if rng.random() < 0.5:  # in the directory
            content = content[:start] + mutated_bytes(rng, content[start:end]) + content[end:]
        else:
            content = mutated_bytes(rng, content)
    file.write_bytes(content)
    return file


def _directory(
    rng: np.random.Generator, directory: Path, arrays: dict[str, np.ndarray], metadata: Any
) -> Path:
    place = directory / "arrays"
    place.mkdir()
    for name, array in arrays.items():
        name, array = _bits(name.replace("/", "_")[:200].replace("\0", ""), array)
        (place / f"{name}.npy").write_bytes(_npy(rng, array))
    if rng.random() < 0.5:
        said = dict(metadata)
        text = mutated_json(rng, said) if rng.random() < 0.4 else json.dumps(said).encode()
        (place / "metadata.json").write_bytes(text)
    return place


def _independent(path: Path) -> dict[str, np.ndarray]:
    """All arrays, read by the safetensors package or NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix == ".npy"]
            found = {file.stem: np.load(file) for file in files}
        else:
            with np.load(path) as archive:
                found = {name: archive[name] for name in archive.files}
    return {name.removesuffix(".bfloat16"): array for name, array in found.items()}


def _assert_same(arrays: dict[str, Any], stored: dict[str, np.ndarray]) -> None:
    """Each array is one that is stored: under its name, or under one that means the same site."""
    for name, array in arrays.items():
        others = [stored[name]] if name in stored else list(stored.values())
        assert any(_same(array, other) for other in others), name


def _same(array: np.ndarray, stored: np.ndarray) -> bool:
    if stored.dtype.kind == "V" or array.dtype == ml_dtypes.bfloat16:
        stored = stored.view(array.dtype) if stored.dtype.isnative else stored.byteswap().view("u2")
        return array.shape == stored.shape and array.tobytes() == stored.tobytes()
    native = _native(np.asarray(stored))
    return (array.shape, array.dtype, array.tobytes()) == (
        native.shape, native.dtype, native.tobytes()
    )  # fmt: skip
