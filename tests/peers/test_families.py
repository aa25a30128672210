"""Each family: random checkpoints of transformers' own class, loaded here, run and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llama_layers import KVCache, Llama, LlamaConfig, forward, load
from llama_layers.checkpoint import convert
from llama_layers.config.families import FAMILIES
from llama_layers.verify import check
from llama_layers.verify.recorders import record_transformers

pytestmark = pytest.mark.peer

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The family, and options of its config: each family with all of its switches at least once.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {}),
    "olmo2, biases": (
        "olmo2",
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 7, "head_dim": 12}),
    "exaone4, every second": ("exaone4", {"sliding_window": 7, "sliding_window_pattern": 2}),
    "exaone4, no window": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4, no biases": ("glm4", {"head_dim": 8, "attention_bias": False}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 8}),
    "hunyuan_v1_dense, biases": (
        "hunyuan_v1_dense",
        {
            "head_dim": 12,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 100.0,
                "factor": 1.0,
                "alpha": 50.0,
                "beta_fast": 32,
                "mscale": 1.0,
            },
        },
    ),
    "ministral": (
        "ministral",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
        },
    ),
    "cwm": ("cwm", {"sliding_window": 7, "head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8, "tie_word_embeddings": False}),
    "ernie4_5, biases": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "exaone": ("exaone", {"attention_bias": True, "mlp_bias": True}),
    "helium": ("helium", {"head_dim": 8}),
    "helium, biases": ("helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "internlm3": ("internlm3", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "seed_oss, other biases": (
        "seed_oss",
        {"head_dim": 8, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3, windows": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "glm": ("glm", {"head_dim": 12}),  # of which 6 are rotated
    "glm, no biases": ("glm", {"head_dim": 8, "attention_bias": False}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3, longrope": (
        "phi3",
        {
            "num_attention_heads": 2,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 8.0],
            },
        },
    ),
    "granite_swa": (
        "granite_swa",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "sliding_window": 7,
            "layer_rope_theta": [10000.0, 0, 500.0],
            "tie_word_embeddings": False,
        },
    ),
    "granite_swa, defaults": ("granite_swa", {"sliding_window": 7, "attention_bias": True}),
    "granite, defaults": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "hyperclovax": (
        "hyperclovax",
        {
            "embedding_multiplier": 10.0,
            "attention_multiplier": 0.08,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.12,
            "head_dim": 8,
        },
    ),
    "hyperclovax, no post norm": ("hyperclovax", {"use_post_norm": False}),
    "gemma": ("gemma", {"head_dim": 10}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 7,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "vaultgemma": (
        "vaultgemma",
        {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7},
    ),
}
TOKENS = 40  # past the context length


@dataclass(frozen=True)
class Pair:
    """One checkpoint, in transformers and here."""

    directory: Path
    theirs: Any
    ours: Llama
    exact: Llama

    def theirs_on(self, ids: Any, **options: Any) -> Any:
        with torch.no_grad():
            return self.theirs(torch.from_numpy(ids), use_cache=False, **options).logits.numpy()

    @property
    def depends_on_length(self) -> bool:
        """Whether tokens fed later change how earlier ones would be rotated."""
        scaling = self.ours.config.rope_scaling
        return scaling is not None and scaling.depends_on_length

    def assert_rounded_as_well(self, logits: Any, theirs: Any, exact: Any) -> None:
        """Our error is at most 4 times theirs, or 4 ulps of the largest logit."""
        assert logits.dtype == np.float32
        assert exact.dtype == np.float64
        ulps = 4 * np.spacing(np.abs(exact).max().astype(np.float32))
        error, their_error = (np.abs(run - exact).max() for run in (logits, theirs))
        assert their_error < 1e-3 * np.abs(exact).max()
        assert error <= 4 * their_error + ulps


def written(directory: Path, case: str) -> Path:
    """A checkpoint of random weights, of a size that makes attention sharp."""
    family, options = CASES[case]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **BASE | options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and parameter.mean() > 0.5 else 0.0
        torch.nn.init.normal_(parameter, centre, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each pair, made when first asked for."""
    made: dict[str, Pair] = {}

    def get(case: str) -> Pair:
        if case not in made:
            directory = written(tmp_path_factory.mktemp("family"), case)
            made[case] = Pair(
                directory,
                transformers.AutoModelForCausalLM.from_pretrained(
                    directory, dtype=torch.float32, attn_implementation="eager"
                ).eval(),
                load(directory),
                load(directory, dtype="float64"),
            )
        return made[case]

    return get


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    return pairs(request.param)


def in_chunks(model: Llama, ids: Any, cuts: list[int], mask: Any = None) -> Any:
    """The logits of a pass that is cut before some tokens."""
    cache, parts = KVCache.create(model, *ids.shape), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        own = None if mask is None else mask[:, :stop]
        output = forward(model, ids[:, start:stop], cache=cache, attention_mask=own)
        parts.append(output.logits)
        cache = output.cache
    return np.concatenate(parts, axis=1)


def theirs_in_chunks(pair: Pair, ids: Any, cuts: list[int]) -> Any:
    """The logits of transformers, with a cache that keeps keys as they were rotated."""
    cache, parts = transformers.DynamicCache(config=pair.theirs.config), []
    for part in np.split(ids, cuts, axis=1):
        with torch.no_grad():
            output = pair.theirs(torch.from_numpy(part), cache=cache, use_cache=True)
        parts.append(output.logits.numpy())
    return np.concatenate(parts, axis=1)


def test_every_family_has_a_case():
    old = {"llama", "mistral", "qwen2", "qwen3"}  # in test_decoder_random.py
    assert {family for family, _ in CASES.values()} == set(FAMILIES) - old


def test_whole_in_chunks_and_token_by_token(pair, rng):
    ids = rng.integers(0, 61, (2, TOKENS))
    theirs, exact = pair.theirs_on(ids), forward(pair.exact, ids).logits
    for cuts in ([], [3, 17, 33], list(range(1, TOKENS))):
        if pair.depends_on_length:
            theirs, exact = theirs_in_chunks(pair, ids, cuts), in_chunks(pair.exact, ids, cuts)
        pair.assert_rounded_as_well(in_chunks(pair.ours, ids, cuts), theirs, exact)


def test_padding(pair, rng):
    ids = rng.integers(0, 61, (2, TOKENS))
    mask = np.ones((2, TOKENS), np.int64)
    mask[1, :7] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    theirs = pair.theirs_on(
        ids, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
    )
    cuts = [] if pair.depends_on_length else [11]
    exact, ours = (in_chunks(model, ids, cuts, mask) for model in (pair.exact, pair.ours))
    valid = mask.astype(bool)
    pair.assert_rounded_as_well(ours[valid], theirs[valid], exact[valid])


def test_vectors_instead_of_ids(pair, rng):
    x = rng.standard_normal((1, 5, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = pair.theirs(inputs_embeds=torch.from_numpy(x)).logits.numpy()
    exact = forward(pair.exact, inputs_embeds=x.astype(np.float64)).logits
    pair.assert_rounded_as_well(forward(pair.ours, inputs_embeds=x).logits, theirs, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_recorded_site_passes(pair, rng, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pair.directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    ids = rng.integers(0, 61, (2, 9))
    first = model.model.layers[0].self_attn
    trace = record_transformers(model, ids, probabilities=not hasattr(first, "sinks"))
    ours = load(pair.directory, dtype=dtype)
    report = check(trace, ours, profile="transformers")
    assert not report.failures, report
    assert {r.verdict for r in report.results if r.site.name in trace.arrays} <= {"PASS", "WARN"}
    assert {r.site.name for r in report.results} >= set(trace.arrays)


def test_transformers_reads_what_we_convert(pair, tmp_path):
    directory = convert(pair.directory, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = pair.theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_model_in_memory(pair, rng):
    ids = rng.integers(0, 61, (1, 7))
    model = Llama.from_state_dict(pair.theirs.state_dict(), pair.theirs.config)
    expected = forward(pair.ours, ids).logits
    np.testing.assert_allclose(
        forward(model, torch.from_numpy(ids)).logits.numpy(), expected, atol=1e-4
    )


def test_the_config_is_written_as_it_was_read(pair):
    config = pair.ours.config
    assert LlamaConfig.from_json(config.to_json()) == config
