"""GGUF files with something wrong in their metadata, their header or their bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llama_layers import load
from tests.fuzz.mutations import mutated_bytes, one_of
from tests.support import tiny

_CONFIG = replace(tiny.CONFIG, vocab_size=12)
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, _CONFIG.num_hidden_layers)
_TENSORS = {
    _NAMES.get_name(name, try_suffixes=(".weight", ".bias")): array
    for name, array in tiny.with_permuted_rope_rows(tiny.arrays(_CONFIG), _CONFIG).items()
}
_KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    **{f"llama.{key}": value for key, value in tiny.gguf_keys(_CONFIG, "llama").items()},
    **tiny.TOKENIZER,
}
# Types of values by their number in the format, and how struct packs them.
_PACKED = dict(enumerate("B b H h I i f ? _ _ Q q d".split()))
_STRING, _ARRAY = 8, 9


def mutated(rng: np.random.Generator, directory: Path) -> Path:
    """A file that is wrong."""
    keys = {key: _typed(value) for key, value in _KEYS.items()}
    header = b"".join(_string(key) + value for key, value in keys.items())
    count = len(keys)
    if rng.random() < 0.6:
        key = one_of(rng, list(keys))
        other = one_of(rng, list(keys))
        wrong = keys[other] if rng.random() < 0.3 else _strange(rng)
        twice = rng.random() < 0.1
        count += twice
        header = b"".join(
            _string(k) + (wrong if k == key and not twice else v) for k, v in keys.items()
        )
        header += _string(key) + wrong if twice else b""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(_TENSORS), count) + header + _infos(rng)
    if rng.random() < 0.5:
        header = mutated_bytes(rng, header)
    file = directory / "m.gguf"
    data = b"".join(_padded(array.tobytes()) for array in _TENSORS.values())
    file.write_bytes(_padded(header) + data)
    return file


def _infos(rng: np.random.Generator) -> bytes:
    """Where the tensors are; now and then a wrong name, shape, type or offset."""
    infos, offset = b"", 0
    wrong = rng.integers(len(_TENSORS)) if rng.random() < 0.4 else -1
    names = list(_TENSORS)
    for place, (name, array) in enumerate(_TENSORS.items()):
        shape, kind, at = array.shape[::-1], 0, offset
        if place == wrong:
            change = rng.integers(4)
            name = one_of(rng, names) if change == 0 else name
            kind = int(rng.integers(0, 45)) if change == 1 else kind
            shape = (
                tuple(one_of(rng, [0, 1, 32, 2**32, 2**63]) for _ in shape)
                if change == 2
                else shape
            )
            at = one_of(rng, [0, 1, 32, offset + 32, 2**63, 2**64 - 32]) if change == 3 else at
        infos += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
        offset += len(_padded(array.tobytes()))
    return infos


def _typed(value: Any) -> bytes:
    """A value with its type, as a writer would choose it."""
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else 5
        items = (_string(item) if kind == _STRING else struct.pack("<i", item) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(items)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack(
        "<If" if isinstance(value, float) else "<II", 6 if isinstance(value, float) else 4, value
    )


def _strange(rng: np.random.Generator) -> bytes:
    """A value that few keys expect."""
    kind = one_of(rng, [*range(13), 13, 2**31])
    if kind == _STRING:
        return struct.pack("<I", kind) + _string(one_of(rng, ["", "x" * 300, "\x1b[2J\n", "yarn"]))
    if kind == _ARRAY:
        inner = one_of(rng, [0, 4, 6, _STRING, _ARRAY])
        content = {0: bytes(3), 4: bytes(12), 6: bytes(12), _STRING: _string("a") * 3}
        deep = struct.pack("<IQ", _ARRAY, 1) * one_of(rng, [1, 3, 1000]) + struct.pack(
            "<IQB", 0, 1, 7
        )
        length = one_of(rng, [0, 1, 2, 3, 2**40, 2**63]) if rng.random() < 0.3 else 3
        if inner == _ARRAY:
            return struct.pack("<I", _ARRAY) + deep
        return struct.pack("<IIQ", _ARRAY, inner, length) + content[inner]
    if kind not in _PACKED:
        return struct.pack("<I", kind) + rng.bytes(8)
    size = struct.calcsize(_PACKED[kind])
    extreme = rng.choice([0, 1, 255]) if rng.random() < 0.7 else rng.integers(256)
    return struct.pack("<I", kind) + bytes([int(extreme)]) * size


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 32)


def run(path: Path) -> bool:
    """Load what is there; whether it was accepted. An AssertionError if it was read wrongly."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)  # a tokenizer that is guessed, and says so
        try:
            model = load(path)
            arrays = tiny.all_arrays(model)
        except (ValueError, TypeError, OSError):
            return False
        try:
            ids = model.tokenizer.encode("ab 12 b")
            model.tokenizer.decode(ids)
            model.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
        except (ValueError, TypeError, OSError):
            pass
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, array in arrays.items():
        tensor = stored[_NAMES.get_name(name, try_suffixes=(".weight", ".bias"))]
        for kind, count in heads.items():
            if kind in name:
                array = tiny.permuted(np.asarray(array), getattr(model.config, count))
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(np.asarray(array, np.float32), expected, equal_nan=True), name
    return True
