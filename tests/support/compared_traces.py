"""Traces to be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers.verify import Trace, record
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
LAYER = "model.layers.1"
F32 = 2.0**-24


def traced(config=GQA, weights=None, dtype=np.float32, **options):
    weights = random_weights(config) if weights is None else weights
    model = model_of(config, {name: array.astype(dtype) for name, array in weights.items()})
    return record(model, IDS, **options)


def made(differences, dtype=np.float32, **fields):
    """A pair of traces that differ by a given amount at each site."""
    shape = (1, 3, 4)
    tokens = {"input_ids": np.array([[1, 2, 3]]), **fields}
    a = {name: np.ones(shape, dtype) for name in differences}
    b = {name: np.full(shape, 1 + by).astype(dtype) for name, by in differences.items()}
    return Trace(a, **tokens), Trace(b, **tokens)


def by_name(comparison):
    return {result.site.name: result for result in comparison.results}


def without_config(trace):
    return replace(trace, metadata={})
