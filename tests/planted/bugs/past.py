"""Bugs in what a check knows of earlier tokens, and in the options that it offers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.planted.planting import wrong

PAST = "verify/test_past.py::"
REMEDIES = "verify/test_remedies.py::"


@wrong("llama_layers.verify.past:Past.joined", f"{PAST}test_arrays_of_the_past[gqa]")
def past_after_the_new_tokens(right, past, layer, role, array):
    joined = right(past, layer, role, array)
    return np.roll(joined, array.shape[1], axis=1)


@wrong(
    "llama_layers.verify.past:Past.lacks", f"{PAST}test_without_them_attention_is_not_judged[None]"
)
def no_want_of_a_past(right, past, layer):
    return False


@wrong("llama_layers.verify.validate:Recorded.keep_with_past", f"{PAST}test_padding_of_the_past")
def padding_of_the_past_seen(right, recorded, before):
    return right(replace(recorded, past=replace(recorded.past, keep=None)), before)


@wrong("llama_layers.verify.record:_past", f"{PAST}test_our_recorder[window-options2]")
def ring_recorded_in_its_own_order(right, cache, layers):
    arrays, keep = right(cache, layers)
    return {name: np.roll(array, 1, axis=1) for name, array in arrays.items()}, keep


@wrong(
    "llama_layers.verify.look:Sites._bound",
    f"{REMEDIES}test_a_cache_that_the_first_tokens_do_not_read",
)
def cache_read_by_all_tokens(right, sites, failing):
    return failing.bound(failing.formats)


@wrong("llama_layers.verify.remedies:_other_dtypes", f"{REMEDIES}test_what_is_left_is_counted")
def dtype_not_offered(right, judged, failing):
    return iter(())


@wrong("llama_layers.verify.remedies:_both", f"{REMEDIES}test_two_choices_at_once")
def second_option_without_the_first(right, first, then):
    return then


@wrong("llama_layers.verify.remedies:_Trial._left", f"{REMEDIES}test_what_is_left_is_counted")
def nothing_is_ever_left(right, trial, changed, some):
    return []
