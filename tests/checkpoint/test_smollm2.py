"""Real weights: SmolLM2-135M, pulled."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np

from llama_layers import load
from llama_layers.checkpoint import open_checkpoint

# From the model's own config.json on Hugging Face.
PUBLISHED = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def test_config(smollm2):
    config = load(smollm2).config
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED


def test_opening_reads_no_weights(smollm2):
    load(smollm2)
    tracemalloc.start()
    try:
        model = load(smollm2)
        assert tracemalloc.get_traced_memory()[1] < 2e6
        assert not model.weights.layers[29].self_attn.qkv.fused.flags.owndata
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_opening_maps_and_does_not_read(smollm2):
    """Resident memory grows by a few pages, of 538 MB."""
    code = (
        "import sys, llama_layers\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * 4096\n"
        "from llama_layers import load\n"
        "before = resident()\n"
        "model = load(sys.argv[1])\n"
        "model.weights.layers[0], model.weights.lm_head\n"
        "print(resident() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 60e6


def test_the_weights_look_trained(smollm2):
    weights = load(smollm2, layers=[0]).weights
    qkv = weights.layers[0].self_attn.qkv
    assert qkv.q.shape == (576, 576)
    for matrix in (qkv.q, qkv.k, qkv.v, weights.embed_tokens):
        assert 0.01 < np.std(matrix) < 1
        assert abs(np.mean(matrix)) < 0.01


def test_tokenizer(smollm2):
    tokenizer = load(smollm2).tokenizer
    texts = ["The capital of France is", "12345", "naïve 東京 🙂\n\n\t x", "<|im_start|>user\n"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>") == [1, 2, 0]


def test_the_chat_template_is_kept(smollm2):
    assert "<|im_start|>" in open_checkpoint(smollm2).chat_template
