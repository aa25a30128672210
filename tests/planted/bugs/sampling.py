"""Bugs of sampling: temperature, filters, and the draw."""

from __future__ import annotations

import numpy as np

from tests.planted.planting import wrong

SAMPLE = "llama_layers.model.sampling:sample"
WEIGHTS = "llama_layers.model.sampling:_weights"
GENERATOR = "llama_layers.model.sampling:random_generator"
FREQUENCIES = "test_sampling.py::test_frequencies"
GREEDY = "test_sampling.py::test_greedy_is_the_first_of_the_largest[numpy]"
RANDOMNESS = "test_sampling.py::test_rng_is_the_only_randomness[numpy]"


@wrong(SAMPLE, FREQUENCIES)
def temperature_ignored(right, logits, *, temperature=1.0, **options):
    return right(logits, temperature=1.0 if temperature else 0.0, **options)


@wrong(SAMPLE, FREQUENCIES)
def multiplied_by_the_temperature(right, logits, *, temperature=1.0, **options):
    return right(logits, temperature=1 / temperature if temperature else 0.0, **options)


@wrong(SAMPLE, GREEDY)
def the_last_of_the_largest_logits(right, logits, *, temperature=1.0, **options):
    if temperature == 0:
        return logits.shape[1] - 1 - np.argmax(logits[:, ::-1], axis=-1)
    return right(logits, temperature=temperature, **options)


@wrong(SAMPLE, GREEDY)
def the_smallest_logit(right, logits, *, temperature=1.0, **options):
    return right(-logits if temperature == 0 else logits, temperature=temperature, **options)


@wrong(SAMPLE, "test_sampling.py::test_refuses")
def NaN_taken_for_a_number(right, logits, **options):
    return right(np.nan_to_num(logits), **options)


@wrong(
    "llama_layers.model.sampling:_below_largest",
    "test_sampling.py::test_shift_of_a_row_changes_nothing",
)
def probabilities_without_the_shift(right, logits, temperature):
    with np.errstate(over="ignore"):
        return logits.astype(np.float64) / temperature


@wrong(SAMPLE, "test_sampling.py::test_ids_are_those_of_the_naive_filters")
def one_token_too_many_of_top_k(right, logits, *, top_k=None, **options):
    return right(logits, top_k=top_k and top_k + 1, **options)


@wrong(WEIGHTS, FREQUENCIES)
def equals_of_the_last_of_top_k_dropped(right, scaled, top_k, top_p, min_p):
    if top_k is not None and top_k < scaled.shape[-1]:
        smallest = np.sort(scaled, axis=-1)[:, -top_k, None]
        scaled = np.where(scaled > smallest, scaled, -np.inf)
    return right(scaled, None, top_p, min_p)


def nucleus(weights, top_p, *, sign=-1, before=lambda sums, own: sums - own, total=None):
    """The weights that top_p keeps, tokens taken in another order or counted otherwise."""
    if top_p is None:
        return weights
    order = np.argsort(sign * weights, axis=-1, kind="stable")
    own = np.take_along_axis(weights, order, axis=-1)
    total = own.sum(axis=-1, keepdims=True) if total is None else total
    dropped = before(np.cumsum(own, axis=-1), own) >= top_p * total
    kept = np.empty_like(weights)
    np.put_along_axis(kept, order, np.where(dropped, 0.0, own), axis=-1)
    return kept


@wrong(WEIGHTS, FREQUENCIES)
def top_p_stops_one_token_early(right, scaled, top_k, top_p, min_p):
    return nucleus(right(scaled, top_k, None, min_p), top_p, before=lambda sums, own: sums)


@wrong(WEIGHTS, FREQUENCIES)
def top_p_takes_one_token_too_many(right, scaled, top_k, top_p, min_p):
    def before(sums, own):
        earlier = sums - own
        return np.concatenate([earlier[:, :1], earlier[:, :-1]], axis=-1)

    return nucleus(right(scaled, top_k, None, min_p), top_p, before=before)


@wrong(WEIGHTS, FREQUENCIES)
def top_p_of_the_unfiltered_probabilities(right, scaled, top_k, top_p, min_p):
    total = np.exp(scaled).sum(axis=-1, keepdims=True)
    return nucleus(right(scaled, top_k, None, min_p), top_p, total=total)


@wrong(WEIGHTS, FREQUENCIES)
def top_p_the_unlikeliest_first(right, scaled, top_k, top_p, min_p):
    return nucleus(right(scaled, top_k, None, min_p), top_p, sign=1)


@wrong(WEIGHTS, FREQUENCIES)
def min_p_as_a_probability_and_not_a_share_of_the_largest(right, scaled, top_k, top_p, min_p):
    weights = right(scaled, top_k, top_p, None)
    return np.where(weights >= (min_p or 0) * weights.sum(axis=-1, keepdims=True), weights, 0.0)


@wrong(WEIGHTS, FREQUENCIES)
def min_p_excludes_its_own_edge(right, scaled, top_k, top_p, min_p):
    weights = right(scaled, top_k, top_p, None)
    return np.where(weights > (min_p or 0) * weights.max(axis=-1, keepdims=True), weights, 0.0)


@wrong(WEIGHTS, FREQUENCIES)
def draws_not_scaled_to_the_sum_that_filters_leave(right, scaled, top_k, top_p, min_p):
    sums = np.minimum(np.cumsum(right(scaled, top_k, top_p, min_p), axis=-1), 1.0)
    return np.diff(sums, axis=-1, prepend=0.0)


class Draws:
    """A generator whose numbers are changed."""

    def __init__(self, generator, change):
        self.generator, self.change = generator, change

    def random(self, shape):
        return self.change(self.generator, shape)


@wrong(GENERATOR, "test_sampling.py::test_rows_are_drawn_apart")
def one_draw_for_all_rows(right, rng):
    return Draws(right(rng), lambda generator, shape: generator.random((1, 1)))


@wrong(GENERATOR, "test_sampling.py::test_nothing_impossible_is_drawn_at_either_end")
def a_draw_of_0_takes_the_first_token_possible_or_not(right, rng):
    return Draws(right(rng), lambda generator, shape: generator.random(shape) - 1e-300)


@wrong(GENERATOR, RANDOMNESS)
def the_seed_ignored(right, rng):
    return right(None)


@wrong(GENERATOR, RANDOMNESS)
def the_global_random_state_used(right, rng):
    return np.random
