"""Hugging Face directories with something wrong in their config, index, headers or bytes."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from llama_layers import inv_freq, load
from tests.fuzz.mutations import mutated_bytes, mutated_json, one_of
from tests.support import tiny

_SIZES = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps
""".split()


@cache
def _originals() -> list[dict[str, bytes]]:
    """Directories that are right, as the contents of their files."""
    with TemporaryDirectory() as scratch:
        made = [
            tiny.write_single(Path(scratch, "single"), tiny.arrays()),
            tiny.write_single(Path(scratch, "tied"), tiny.arrays(tiny.TIED), tiny.TIED),
            tiny.write_single(Path(scratch, "qwen2"), tiny.arrays(tiny.QWEN2), tiny.QWEN2),
            tiny.write_single(Path(scratch, "meta"), tiny.meta(tiny.arrays())),
            tiny.write_sharded(Path(scratch, "sharded"), tiny.arrays()),
        ]
        return [{file.name: file.read_bytes() for file in path.iterdir()} for path in made]


def mutated(rng: np.random.Generator, directory: Path) -> Path:
    """A directory with one file that is wrong, or two."""
    files = dict(one_of(rng, _originals()))
    for _ in range(one_of(rng, [1, 1, 1, 2])):
        name = one_of(rng, sorted(files))
        if name.endswith(".json"):
            files[name] = mutated_json(rng, _parsed(files[name]))
        elif rng.random() < 0.7:
            files[name] = _with_mutated_header(rng, files[name])
        else:
            files[name] = mutated_bytes(rng, files[name])
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def _with_mutated_header(rng: np.random.Generator, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = mutated_json(rng, _parsed(content[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def run(path: Path) -> bool:
    """Load what is there; whether it was accepted. An AssertionError if it was read wrongly."""
    try:
        model = load(path)
        arrays = tiny.all_arrays(model)
        frequencies = inv_freq(model.config)
    except (ValueError, TypeError, OSError):
        return False
    said = json.loads((path / "config.json").read_text())
    for name in _SIZES:
        assert getattr(model.config, name) == said[name], name
    assert np.isfinite(frequencies).all(), frequencies
    stored = _independent(path)
    for name, array in arrays.items():
        meta = name not in stored
        expected = stored[tiny.meta_name(name) if meta else name]
        if meta and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            array = tiny.permuted(np.asarray(array), getattr(model.config, heads))
        assert np.asarray(array).tobytes() == expected.tobytes(), name
        assert math.prod(array.shape) == expected.size, name
    return True


def _independent(path: Path) -> dict[str, Any]:
    """All tensors, read by the safetensors package."""
    single = path / "model.safetensors"
    if single.exists():
        return load_file(single)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = {name: load_file(path / name) for name in set(index["weight_map"].values())}
    return {name: array for shard in shards.values() for name, array in shard.items()}
