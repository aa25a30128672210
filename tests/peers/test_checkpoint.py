"""Checkpoints against transformers, which reads the same files by itself."""

from __future__ import annotations

import copy
import json

import pytest
import tokenizers
import torch
import transformers

from llama_layers import load
from llama_layers.checkpoint import convert
from tests.support import tiny
from tests.support.torch_models import FAMILY, assert_same_weights, random_model

pytestmark = pytest.mark.peer

TEXTS = [
    "The capital of France is",
    "In 2024, 1234567 people paid $3.50 for x²+½.",
    "naïve façade — 東京 タワー 한국어 עברית العربية 🙂👩‍👩‍👧",
    "tabs\tand\r\nnewlines\n\n\n  and   spaces   ",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|><repo_name>",
    "don't we'll I'M they've it's 'S",
    "def f(x):\n    return x**2  # comment",
    "",
]


@pytest.fixture(scope="module")
def tokenizer_of_gguf(gguf_file):
    return transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


@pytest.fixture
def gguf_tokenizer(tokenizer_of_gguf):
    """A tokenizer of the test's own: reading the file takes seconds."""
    return copy.deepcopy(tokenizer_of_gguf)


def assert_same_ids(paths, reference, texts):
    for path in paths:
        tokenizer = load(path).tokenizer
        for text in texts:
            ids = tokenizer.encode(text)
            assert ids == reference(text)["input_ids"], text
            assert tokenizer.decode(ids) == text


def test_smollm2_tokenizer(smollm2, gguf_file, gguf_tokenizer):
    assert_same_ids((smollm2, gguf_file), gguf_tokenizer, TEXTS)


def test_smollm2_tokenizer_on_numbers_that_are_no_digits(smollm2, gguf_file, gguf_tokenizer):
    """transformers reads GGUF without the step that sets numbers apart, and no text of digits
    shows it. llama.cpp defines that step, for the pre-tokenizer "smollm", by this expression."""
    backend = gguf_tokenizer.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    texts = ["chapter \u2167", "x \u00bd\u0663 \u096b", "a \u2460\u2461 \u3007", *TEXTS]
    assert_same_ids((smollm2, gguf_file), gguf_tokenizer, texts)


def test_smollm2_in_transformers(smollm2):
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert reference.dtype == torch.float32
    assert_same_weights(load(smollm2), reference)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in TEXTS:
        ids = load(smollm2).tokenizer.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_transformers_writes(tmp_path, family, tied, dtype):
    reference = random_model(family, tie_word_embeddings=tied).to(dtype)
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load(tmp_path), reference)


@pytest.mark.parametrize("family", FAMILY)
def test_what_transformers_reads(tmp_path, family):
    source = random_model(family)
    source.save_pretrained(tmp_path / "source")
    path = convert(tmp_path / "source", tmp_path / "out")
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert reference.dtype == torch.float32
    assert_same_weights(load(path), reference)
    ours, theirs = (
        json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "source")
    )
    assert ours["rope_theta"] == theirs["rope_parameters"]["rope_theta"]
    ids = torch.arange(20)[None]
    assert torch.equal(source(ids).logits, reference(ids).logits)


def test_llama_with_all_biases(tmp_path):
    reference = random_model("llama", attention_bias=True, mlp_bias=True)
    reference.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_torch_as_the_backend(tmp_path, dtype):
    weights = tiny.arrays()
    model = load(tiny.write_single(tmp_path, weights), backend=torch, dtype=dtype)
    embedding = model.weights.embed_tokens
    assert embedding.dtype == getattr(torch, dtype)
    expected = torch.from_numpy(weights["model.embed_tokens.weight"]).to(embedding.dtype)
    assert torch.equal(embedding, expected)


def test_jax_as_the_backend(tmp_path):
    import jax

    weights = tiny.arrays()
    path = tiny.write_single(tmp_path, weights)
    embedding = load(path, backend=jax.numpy, dtype="bfloat16").weights.embed_tokens
    assert embedding.dtype == jax.numpy.bfloat16
    with pytest.raises(TypeError, match="turned float64 into float32; pass dtype='float32'"):
        _ = load(path, backend=jax.numpy, dtype="float64").weights.embed_tokens
