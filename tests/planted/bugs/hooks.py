"""Bugs of what a caller puts into a forward pass or a generation: masks, taps, processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers import Mask
from tests.planted.planting import wrong

WITH_RULE = "llama_layers.layers.mask:Mask.with_rule"
GIVEN = "test_given_masks.py::test_like_naive_loops"
TAPPED = "llama_layers.layers.attention:tapped_attention"
ASKS = "llama_layers.layers.decoder:asks_for"
MASKS = "llama_layers.model.inputs:_masks"
HOOKS = "test_generation_hooks.py"
LOOP = "llama_layers.model.generate:decode_loop"
PROCESSING = "llama_layers.model.logits_processor:Processing"
LOGPROBS = "llama_layers.model.logprobs"
NAIVE_LOGPROBS = "test_logprobs.py::test_like_naive_loops"


@wrong(WITH_RULE, f"{GIVEN}[window-None]")
def a_given_mask_sees_beyond_the_window(right, mask, allowed):
    return right(replace(mask, window=None), allowed)


@wrong(WITH_RULE, f"{GIVEN}[gqa-None]")
def a_given_mask_within_causality_only(right, mask, allowed):
    return right(mask, allowed) & mask.rows(0, mask.queries.shape[0])


@wrong(WITH_RULE, "test_given_masks.py::test_padding_stays_hidden")
def a_given_mask_sees_padding(right, mask, allowed):
    return right(replace(mask, keep=None), allowed)


@wrong(MASKS, f"{GIVEN}[window-None]")
def a_given_mask_ignored_on_layers_with_a_window(right, x, config, given, valid, cache):
    found, plain = (right(x, config, mask, valid, cache) for mask in (given, None))
    return {window: (found if window is None else plain)[window] for window in found}


@wrong(MASKS, "test_given_masks.py::test_columns_of_a_ring_are_slots")
def columns_of_a_given_mask_in_the_order_of_a_ring(right, x, config, given, valid, cache):
    if cache is None or cache.window is None or given is None:
        return right(x, config, given, valid, cache)
    count = cache.key_slots().shape[0]
    rolled = np.zeros((*given.shape[:-1], max(given.shape[-1], cache.max_len)), bool)
    rolled[..., cache.key_slots()] = given[..., :count]
    return right(x, config, rolled, valid, cache)


@wrong(MASKS, "test_given_masks.py::test_a_mask_is_used_as_it_is_in_every_layer")
def the_window_of_the_layer_put_into_a_given_mask(right, x, config, given, valid, cache):
    found = right(x, config, given, valid, cache)
    if not isinstance(given, Mask) or cache is not None:
        return found
    return {window: replace(mask, window=window) for window, mask in found.items()}


@wrong(ASKS, "test_tapped_attention.py::test_a_pattern_patched_in_from_another_text")
def probabilities_not_tapped(right, tap, *names):
    return right(tap, "scores")


@wrong(TAPPED, "test_tapped_attention.py::test_a_pattern_patched_in_from_another_text")
def probabilities_shown_and_not_used(right, q, k, v, *, tap, **options):
    def shown(name, array):
        result = tap(name, array)
        return array if name == "probabilities" else result

    return right(q, k, v, tap=shown, **options)


@wrong(TAPPED, "test_tapped_attention.py::test_an_edge_knocked_out_is_recomputed_without_it")
def scores_shown_and_not_used(right, q, k, v, *, tap, **options):
    def shown(name, array):
        result = tap(name, array)
        return array if name == "scores" else result

    return right(q, k, v, tap=shown, **options)


@wrong(TAPPED, "test_tapped_attention.py::test_like_naive_loops[numpy-gqa]")
def scores_tapped_before_they_are_scaled(right, q, k, v, *, tap, **options):
    scale = q.shape[3] ** 0.5

    def unscaled(name, array):
        return tap(name, array * scale) / scale if name == "scores" else tap(name, array)

    return right(q, k, v, tap=unscaled, **options)


@wrong(TAPPED, "test_tapped_attention.py::test_of_a_padded_batch_and_of_a_cache")
def tapped_attention_without_a_mask(right, q, k, v, *, tap, **options):
    return right(q, k, v, tap=tap, **options | {"mask": None})


@wrong(
    "llama_layers.layers.tap:SiteTap.__call__",
    "test_tapped_attention.py::test_functions_of_a_site_are_called_one_after_the_other",
)
def only_the_first_function_of_a_site_called(right, tap, name, array):
    first = {site: functions[:1] for site, functions in tap.chosen.items()}
    return right(replace(tap, chosen=first), name, array)


@wrong(LOOP, f"{HOOKS}::test_a_processor_comes_after_the_penalty_and_before_the_temperature")
def a_processor_called_after_the_temperature(right, xp, start):
    temperature = start.sampling.temperature

    def scaled(logits):
        return start.processor(logits / temperature) * temperature

    return right(xp, start if start.processor is None else start._replace(processor=scaled))


@wrong(LOOP, f"{HOOKS}::test_a_processor_comes_after_the_penalty_and_before_the_temperature")
def a_processor_called_before_the_penalty(right, xp, start):
    from llama_layers.model import generate

    def last(logits):
        return generate._penalised(xp, start.processor(logits), start.used, start.penalty)

    if start.processor is None or start.used is None:
        return right(xp, start)
    return right(xp, start._replace(processor=last, penalty=1.0))


@wrong(LOOP, f"{HOOKS}::test_logprobs_are_those_of_the_model_itself")
def logprobs_of_the_step_before(right, xp, start):
    before = None
    for ids, drawn, logprobs in right(xp, start):
        yield ids, drawn, logprobs if before is None else before
        before = logprobs


@wrong("llama_layers.model.generate:log_softmax", f"{HOOKS}::test_logprobs_of_padding_are_0[numpy]")
def logprobs_not_normalised(right, xp, logits):
    return logits


@wrong(f"{PROCESSING}.add", f"{HOOKS}::test_a_processor_sees_all_ids_so_far[numpy]")
def a_processor_sees_the_prompt_only(right, processing, ids):
    pass


@wrong("llama_layers.model.generate:_advance", f"{HOOKS}::test_a_tap_counts_the_passes")
def a_tap_called_in_the_prompt_only(right, model, ids, cache, attention_mask=None, *, tap):
    from llama_layers.layers.tap import untouched

    return right(model, ids, cache, attention_mask, tap=untouched if ids.shape[1] == 1 else tap)


@wrong(f"{LOGPROBS}:log_softmax", "test_logprobs.py::test_logits_far_apart_stay_finite")
def log_softmax_without_the_shift(right, xp, logits):
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))


@wrong(f"{LOGPROBS}:picked", f"{NAIVE_LOGPROBS}[gqa-None]")
def logprobs_of_the_first_row_for_all(right, xp, array, ids):
    return right(xp, xp.broadcast_to(array[:1], array.shape), ids)


@wrong(f"{LOGPROBS}:_predicted", "test_logprobs.py::test_on_every_library[numpy-left]")
def the_first_token_after_padding_predicted_from_padding(right, xp, attention_mask):
    return right(xp, attention_mask) | (attention_mask[:, 1:] != 0)


@wrong("llama_layers.model.forward:activations", "test_inputs_embeds.py::test_any_vectors")
def vectors_changed_in_the_memory_of_the_caller(right, xp, x):
    x = right(xp, x)
    x *= 1.5
    return x
