"""Metadata of published GGUF files, each in a tiny file of its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import open_checkpoint
from llama_layers.checkpoint.gguf.config import ARCHITECTURES
from tests.support import gguf_files

# Those of which a published log becomes a tiny file here.
OURS = "llama qwen2 qwen3 granite smollm3 gemma gemma2 gemma3 phi3 mistral3".split()
# What a log may have that is rightly refused, with a part of the message.
REFUSED = {"llama.expert_count": "expert_count: expected 0"}


@pytest.fixture(scope="module")
def logs(corpus: Path) -> dict[str, dict]:
    files = sorted((corpus / "gguf_log").glob("*.json"))
    assert files
    return {file.stem: gguf_files.read_log(file) for file in files}


def write(file, metadata, tensors):
    file.write_bytes(gguf_files.encode(metadata, tensors).content)
    return file


def test_models_of_our_architectures(logs, tmp_path):
    ours = {name: log for name, log in logs.items() if log["general.architecture"][1] in OURS}
    assert ours
    for name, log in ours.items():
        metadata, tensors = gguf_files.shrunk(log)
        file = write(tmp_path / f"{name}.gguf", metadata, tensors)
        if reasons := [REFUSED[key] for key in log if key in REFUSED and log[key][1] != 0]:
            with pytest.raises(ValueError, match=reasons[0]):
                open_checkpoint(file)
            continue
        checkpoint = open_checkpoint(file)
        check_config(checkpoint, log, metadata)
        norm = load(file).weights.norm + checkpoint.config.norm_weight_offset
        assert np.array_equal(norm, tensors["output_norm.weight"]), name


def check_config(checkpoint, log, metadata):
    """The numbers of a config are those that the log says, in decimals."""
    config, arch = checkpoint.config, log["general.architecture"][1]
    said = {key.removeprefix(arch + "."): value for key, (_, value) in log.items()}
    assert config.max_position_embeddings == said["context_length"]
    assert config.rms_norm_eps == said["attention.layer_norm_rms_epsilon"]
    assert config.rope_theta == said.get("rope.freq_base", 10000.0)
    assert config.num_attention_heads // config.num_key_value_heads == said[
        "attention.head_count"
    ] // said.get("attention.head_count_kv", said["attention.head_count"])
    assert config.head_dim == said.get(
        "attention.key_length", said["embedding_length"] // said["attention.head_count"]
    )
    assert config.vocab_size == len(metadata["tokenizer.ggml.tokens"][1])
    if arch.startswith("gemma"):
        assert config.sliding_window == said.get("attention.sliding_window")
    longer = said.get("rope.scaling.original_context_length", math.inf) < said["context_length"]
    assert config.rotary_dim == said.get("rope.dimension_count", config.head_dim)
    if not longer and "rope.scaling.type" not in said and "rope.scaling.factor" not in said:
        assert config.rope_scaling is None
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    for name, token in ids.items():
        assert token == metadata.get(f"tokenizer.ggml.{name}_token_id", ("u32", None))[1]
    ends = [
        metadata[key][1]
        for key in (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
        if key in metadata
    ] + [i for i, token in enumerate(metadata["tokenizer.ggml.tokens"][1]) if token == "</s>"]
    assert checkpoint.generation_config == {"eos_token_id": list(dict.fromkeys(ends))}
    assert checkpoint.chat_template == said.get("tokenizer.chat_template")


def test_other_architectures_are_named(logs, tmp_path):
    for name, log in logs.items():
        architecture = log["general.architecture"][1]
        if architecture in ARCHITECTURES:
            continue
        metadata = {key: value for key, value in log.items() if not value[0].startswith("arr")}
        file = write(tmp_path / f"{name}.gguf", metadata, gguf_files.llama())
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(file)
        said = f", got {architecture[:30]!r}"[:-1]
        assert said in str(caught.value)
