"""Sampling against the logits processors of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from llama_layers.model import generate as generation
from llama_layers.model import sampling

pytestmark = pytest.mark.peer

OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.03},
    {"min_p": 0.4},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.7, "min_p": 0.2},
    {"temperature": 0.3, "top_p": 0.3},
]
WARPERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_kept_tokens_and_probabilities(options, spread, rng):
    logits = spread * rng.standard_normal((50, 100), dtype=np.float32)
    scores = torch.from_numpy(logits).double()
    for name, warper in WARPERS.items():  # in the order of transformers' own pipeline
        if name in options:
            scores = warper(options[name])(None, scores)
    theirs = torch.softmax(scores, dim=-1).numpy()
    filters = {name: options.get(name) for name in ("top_k", "top_p", "min_p")}
    scaled = logits.astype(np.float64) / options.get("temperature", 1.0)
    weights = sampling._weights(scaled, **filters)
    np.testing.assert_array_equal(weights > 0, theirs > 0)
    ours = weights / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty(penalty, rng):
    logits = rng.standard_normal((5, 60), dtype=np.float32)
    ids = rng.integers(0, 60, (5, 30))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()
    seen = (ids[:, :, None] == np.arange(60)).any(axis=1)
    ours = generation._penalised(np, logits, seen, penalty)
    assert ours.dtype == logits.dtype
    np.testing.assert_array_equal(ours, theirs)
