"""Random errors at the sites of every kind of block: `check` fails there, and never raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers.verify import check, record, sites
from tests.support.random_models import CONFIGS, GQA, ONE_SWITCH, model_of, random_weights

NARROW = {
    f"{width} of {field}": replace(GQA, **{field: width})
    for width in (1, 3)
    for field in ("hidden_size", "intermediate_size")
} | {
    f"heads of 2, {norm}": replace(
        GQA, head_dim=2, num_attention_heads=1, num_key_value_heads=1, qk_norm=norm
    )
    for norm in ("none", "head", "full")
}
CHOICES = {**CONFIGS, **ONE_SWITCH, **NARROW}
IDS = np.arange(7)[None]


def one_channel(array, rng):
    array[..., rng.integers(array.shape[-1])] *= 1.1


def one_head(array, rng):
    axis = min(2, array.ndim - 1)
    np.moveaxis(array, axis, 0)[rng.integers(array.shape[axis])] *= 1.1


def all_of_it(array, rng):
    array *= 1.1


def each_channel(array, rng):
    array *= rng.uniform(0.5, 1.5, array.shape[-1])


def another_order(array, rng):
    array[:] = np.roll(array, 1, axis=-1)


def a_constant(array, rng):
    array += 0.5


def each_token(array, rng):
    array *= rng.uniform(0.5, 1.5, (array.shape[1], *(1,) * (array.ndim - 2)))


ERRORS = (one_channel, one_head, all_of_it, each_channel, another_order, a_constant, each_token)


def planted(trace, name, error, rng):
    """The trace with an error at a site; None where the error changes nothing."""
    array = np.array(trace.arrays[name], np.float32)
    error(array, rng)
    if np.allclose(array, trace.arrays[name], rtol=1e-2, atol=1e-2):
        return None
    return replace(trace, arrays={**trace.arrays, name: array})


def traced(kind):
    config = CHOICES[kind]
    model = model_of(config, random_weights(config, dtype=np.float32))
    every = [site.name for site in sites(config)]
    return model, record(model, IDS, sites=every)


def assert_fails_there(model, trace, name, error, rng):
    wrong = planted(trace, name, error, rng)
    if wrong is not None:
        assert name in {r.site.name for r in check(wrong, model).failures}, (name, error.__name__)


@pytest.mark.parametrize("kind", CHOICES)
def test_a_few_errors(kind):
    rng = np.random.default_rng(list(kind.encode()))
    model, trace = traced(kind)
    norms = [n for n in trace.arrays if n.endswith(("q_norm", "k_norm"))][:1]
    for name in [*norms, rng.choice(sorted(trace.arrays))]:
        assert_fails_there(model, trace, name, ERRORS[rng.integers(len(ERRORS))], rng)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, len(CHOICES), 4))
def test_an_error_at_every_role(number):
    """In some kinds of models, with another error at a role in each."""
    rng = np.random.default_rng(0)
    model, trace = traced([*CHOICES][number])
    for role, name in enumerate(sorted(n for n in trace.arrays if "layers.1" not in n)):
        assert_fails_there(model, trace, name, ERRORS[(role + number) % len(ERRORS)], rng)
