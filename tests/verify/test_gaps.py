"""A mistake at one place in each layer, of whose arrays only the outputs were recorded."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check
from tests.support.ported import CONFIGS, WEIGHTS, silu
from tests.support.random_models import model_of
from tests.verify.test_unbounded import IDS, Port, told


def layers(dtype=np.float32, **wrong):
    config, weights = CONFIGS["base"], WEIGHTS["base"]
    arrays = Port(config, weights, **wrong).run()
    kept = {n: a.astype(dtype) for n, a in arrays.items() if n.startswith("model.layers")}
    return check(Trace(kept, IDS), model_of(config, weights))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("relu for silu", {"gate": lambda g, u: np.maximum(g, 0) * u}),
        ("up left out", {"gate": lambda g, u: silu(g)}),
        ("keys and values swapped", {"qkv": "qvk"}),
        ("first key head for all", {"kv_of": lambda h: 0}),
    ],
)
def test_in_bfloat16(name, wrong):
    report = layers(ml_dtypes.bfloat16, **wrong)
    assert [failure.site.layer for failure in report.failures] == [0, 1, 2]
    for failure in report.failures:
        assert told(failure)[0] == name


def test_a_right_port_in_bfloat16():
    assert layers(ml_dtypes.bfloat16).agrees


@pytest.mark.slow
def test_a_small_mistake_in_bfloat16():
    """It differs by less than thirty times what our own run does."""
    report = layers(ml_dtypes.bfloat16, scale=0.45)
    assert report.first.difference < 30 * report.first.yardstick
    found = report.first.explanations[0]
    assert found.name == "scores scaled"
    assert re.search(r"scale scores by 0\.4[45]\d*; .* by 1 / sqrt\(D\), 0\.3535", found.detail)


def test_a_factor():
    for block in ("mlp", "attention"):
        report = layers(**{block: 0.75})
        found = {e.name: e.detail for e in report.first.explanations}
        said = found.get("added block scaled", "")
        assert said.startswith("The port seems to add 0.75 times what the block computes")


def test_what_is_rounded():
    def gate(g, u):
        g, u = (y.astype(ml_dtypes.bfloat16).astype(float) for y in (g, u))
        return silu(g) * u

    report = layers(gate=gate)
    assert told(report.first) == ["inputs rounded to bfloat16"]


def test_a_mistake_that_mixes_tokens_is_tried_on_all():
    mixed = lambda g, u: silu(g[:, ::-1]) * u[:, ::-1]  # noqa: E731
    assert told(layers(gate=mixed).first) == ["tokens in another place"]
