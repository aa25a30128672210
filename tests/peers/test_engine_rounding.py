"""Where transformers rounds in bfloat16, bit for bit: the table of docs/engines.md."""

import sys

import numpy as np
import pytest

from llama_layers import LlamaConfig
from llama_layers.config.families import FAMILIES

torch = pytest.importorskip("torch")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peer
BF16 = torch.bfloat16
SIZES = {
    "vocab_size": 5,
    "hidden_size": 256,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator).to(BF16)


def config(**changes):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 4096,
    }
    return transformers.LlamaConfig(**sizes | changes)


def test_rms_norm_rounds_before_the_weight(generator):
    norm = llama.LlamaRMSNorm(256, eps=1e-5).to(BF16)
    norm.weight.data = normal(generator, 256)
    x = normal(generator, 64, 256)
    wide = x.float()
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    twice = normed.to(BF16) * norm.weight  # a product of bfloat16 numbers, rounded again
    once = (normed * norm.weight.float()).to(BF16)
    assert torch.equal(norm(x), twice)
    assert not torch.equal(norm(x), once)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_rounds_its_norms_as_the_table_says(generator, family):
    known = getattr(transformers, FAMILIES[family].architecture, None)
    if known is None:
        pytest.skip("transformers reads its code from the checkpoint")
    module = sys.modules[known.__module__]
    (norm,) = (c for n, c in vars(module).items() if n.endswith("RMSNorm"))
    norm = norm(256, eps=1e-5).to(BF16)
    norm.weight.data = normal(generator, 256)
    weight = norm.weight.float() + LlamaConfig(**SIZES, model_type=family).norm_weight_offset
    wide = (x := normal(generator, 64, 256)).float()
    row = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    before = FAMILIES[family].rounds_before_weight
    ways = {True: (row.to(BF16).float() * weight).to(BF16), False: (row * weight).to(BF16)}
    assert torch.equal(norm(x), ways[before])
    assert not torch.equal(norm(x), ways[not before])


def test_rope_tables_and_arithmetic_are_bfloat16(generator):
    rope = llama.LlamaRotaryEmbedding(config())
    positions = torch.arange(2000, 2032)[None]
    q, k = normal(generator, 1, 4, 32, 16), normal(generator, 1, 2, 32, 16)
    cos, sin = rope(q, positions)
    assert cos.dtype == sin.dtype == BF16
    turned, _ = llama.apply_rotary_pos_emb(q, k, cos, sin)
    # Each product is rounded to bfloat16, and so is their sum.
    first, second = q[..., :8], q[..., 8:]
    c, s = cos[:, None, :, :8], sin[:, None, :, :8]
    by_hand = torch.cat([first * c + (-second) * s, second * c + first * s], dim=-1)
    assert torch.equal(turned, by_hand)
    wide = torch.cat(
        [
            first.float() * c.float() - second.float() * s.float(),
            second.float() * c.float() + first.float() * s.float(),
        ],
        dim=-1,
    ).to(BF16)
    assert not torch.equal(turned, wide)


def test_eager_attention_rounds_scores_and_probabilities(generator):
    attention = llama.LlamaAttention(config(attn_implementation="eager"), layer_idx=0).to(BF16)
    q, k, v = (normal(generator, 1, 4, 6, 16) for _ in range(3))
    attention.num_key_value_groups = 1
    output, probabilities = llama.eager_attention_forward(
        attention.eval(), q, k, v, None, scaling=0.25
    )
    scores = (q @ k.transpose(2, 3)) * 0.25
    assert scores.dtype == BF16
    softmax = torch.softmax(scores, dim=-1, dtype=torch.float32)
    assert probabilities.dtype == BF16
    assert torch.equal(probabilities, softmax.to(BF16))
    assert torch.equal(output, (softmax.to(BF16) @ v).transpose(1, 2))


def test_the_gated_product_rounds_twice(generator):
    mlp = llama.LlamaMLP(config()).to(BF16)
    captured = {}
    mlp.down_proj.register_forward_pre_hook(lambda module, args: captured.update(x=args[0]))
    x = normal(generator, 1, 8, 64)
    mlp(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    twice = torch.nn.functional.silu(gate.float()).to(BF16) * up
    once = (torch.nn.functional.silu(gate.float()) * up.float()).to(BF16)
    assert torch.equal(captured["x"], twice)
    assert not torch.equal(captured["x"], once)


def test_logits_are_bfloat16(generator):
    model = transformers.LlamaForCausalLM(config()).to(BF16).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == BF16


def test_float64_models_drop_to_float32():
    """Why the oracle is our own float64 pass: transformers' norm is float32 in any model."""
    norm = llama.LlamaRMSNorm(8, eps=0.0).double()
    x = torch.linspace(1, 2, 8, dtype=torch.float64)
    exact = x.numpy() / np.sqrt(np.mean(x.numpy() ** 2))
    error = np.abs(norm(x).detach().numpy() - exact).max()
    assert 2.0**-53 * 100 < error < 2.0**-22
