"""Mistakes in RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Formula,
    Hypothesis,
    wide,
)
from llama_layers.verify.operations import Norm

_EPS = (1e-5, 1e-6, 1e-8, 0.0)
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _formula(norm: Norm, exact: Float64Array) -> Formula:
    """A result whose errors are relative to itself, but for sums over a row."""
    return Formula(exact, np.abs(exact), norm.x.shape[-1] + 10)


def _parts(norm: Norm) -> tuple[Float64Array, Float64Array, Float64Array]:
    """x, its mean square and the weight."""
    x = wide(norm.x)
    return x, np.mean(np.square(x), axis=-1, keepdims=True), wide(norm.weight)


def _another_eps(norm: Norm, failing: FailingSite) -> Iterator[Change]:
    for eps in _EPS:
        if eps != norm.eps:
            yield Change(
                replace(norm, eps=eps),
                f"The port seems to add an eps of {eps:g}; this model has {norm.eps:g}.",
            )


def _eps_outside(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    yield _formula(norm, x / (np.sqrt(square) + norm.eps) * weight)


def _weight_plus_one(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    normed = x / np.sqrt(square + norm.eps)
    magnitude = np.abs(normed) * (np.abs(weight) + 1)
    yield Formula(normed * (weight + 1), magnitude, x.shape[-1] + 10)


def _no_weight(norm: Norm, failing: FailingSite) -> Iterator[Norm]:
    yield replace(norm, weight=np.ones_like(norm.weight))


def _another_weight(norm: Norm, failing: FailingSite) -> Iterator[Change]:
    weights, role = failing.model.weights, failing.site.role
    for index, layer in enumerate(weights.layers):
        for name in _NORMS:
            if (index, name) != (failing.site.layer, role):
                yield Change(
                    replace(norm, weight=to_numpy(getattr(layer, name))),
                    f"The port seems to scale with the weight of model.layers.{index}.{name}; this "
                    f"is {failing.site.name}.",
                )
    if role != "model.norm":
        yield Change(
            replace(norm, weight=to_numpy(weights.norm)),
            "The port seems to scale with the weight of model.norm.",
        )


def _mean_subtracted(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, _, weight = _parts(norm)
    mean = np.mean(x, axis=-1, keepdims=True)
    square = np.mean(np.square(x - mean), axis=-1, keepdims=True)
    size = np.abs(x) + np.mean(np.abs(x), axis=-1, keepdims=True)
    # Cancellation in the centred row reaches its mean square, too.
    off = np.mean(np.square(size), axis=-1, keepdims=True) / np.maximum(square + norm.eps, 1e-300)
    root = np.sqrt(square + norm.eps)
    for centred in (x - mean, x):
        exact = centred / root * weight
        magnitude = size / root * np.abs(weight) + np.abs(exact) * np.sqrt(off)
        yield Formula(exact, magnitude, x.shape[-1] + 10)


def _sum_for_mean(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    yield _formula(norm, x / np.sqrt(square * x.shape[-1] + norm.eps) * weight)


def _one_less(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    count = x.shape[-1]
    if count > 1:
        yield _formula(norm, x / np.sqrt(square * count / (count - 1) + norm.eps) * weight)


def _no_root(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    yield _formula(norm, x / (square + norm.eps) * weight)


def _over_everything(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, square, weight = _parts(norm)
    for axes in ((1,), (0, 1)):
        together = np.mean(square, axis=axes, keepdims=True)
        exact = x / np.sqrt(together + norm.eps) * weight
        yield Formula(exact, np.abs(exact), x.size + 10)


def _none(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x = wide(norm.x)
    yield Formula(x, np.abs(x), 1)


def _not_divided(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    x, _, weight = _parts(norm)
    yield _formula(norm, x * weight)


def _another_input(norm: Norm, failing: FailingSite) -> Iterator[Change]:
    for name, x in failing.streams(norm.x.shape):
        yield Change(
            replace(norm, x=x),
            f"The port seems to normalise the array of {name}; it should be "
            f"{failing.site.routes[0][0]}.",
        )


def _another_token(norm: Norm, failing: FailingSite) -> Iterator[Change]:
    """Where only the last token was kept: one of the others in its place."""
    (name,) = failing.site.routes[0]
    stream = failing.recorded.array(name)
    if norm.x.shape[1] == 1 < stream.shape[1]:
        for token in range(stream.shape[1] - 1):
            yield Change(
                replace(norm, x=stream[:, token : token + 1]),
                f"The port seems to go on with token {token}; it should be the last.",
            )


HYPOTHESES = (
    Hypothesis("another eps", Norm, _another_eps),
    Hypothesis(
        "eps outside the root",
        Norm,
        _eps_outside,
        "The port seems to add eps to the root; it should be added to the mean square, under it.",
    ),
    Hypothesis(
        "norm weight plus one",
        Norm,
        _weight_plus_one,
        "The port seems to scale with the weight plus one, as Gemma does; Llama takes the weight.",
    ),
    Hypothesis(
        "norm weight skipped",
        Norm,
        _no_weight,
        "The port seems to normalise and not to scale with the weight.",
    ),
    Hypothesis("another norm's weight", Norm, _another_weight),
    Hypothesis(
        "mean subtracted",
        Norm,
        _mean_subtracted,
        "The port seems to subtract the mean, as LayerNorm does; RMSNorm does not.",
    ),
    Hypothesis(
        "sum in the place of the mean",
        Norm,
        _sum_for_mean,
        "The port seems to divide by the root of the sum of squares; it should be their mean.",
    ),
    Hypothesis(
        "mean over one less",
        Norm,
        _one_less,
        "The port seems to divide the sum of squares by H - 1; it should be H.",
    ),
    Hypothesis(
        "root forgotten",
        Norm,
        _no_root,
        "The port seems to divide by the mean square; it should be its root.",
    ),
    Hypothesis(
        "normalised over several tokens",
        Norm,
        _over_everything,
        "The port seems to take one mean square for several tokens; each has its own.",
    ),
    Hypothesis(
        "norm skipped",
        Norm,
        _none,
        "The port seems to pass its input on; it should be normalised and scaled.",
    ),
    Hypothesis(
        "weight without the norm",
        Norm,
        _not_divided,
        "The port seems to scale with the weight and not to normalise.",
    ),
    Hypothesis("another token's norm", Norm, _another_token),
    Hypothesis("input from the wrong place", Norm, _another_input),
)
