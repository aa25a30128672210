"""Bugs of the site of log-probabilities: what it is of, its bound, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.planted.planting import wrong

ARRAYS = "llama_layers.verify.logprob_arrays"
SUMS = "llama_layers.verify.log_softmax:LogSum"
SUMMARY = "llama_layers.verify.logprob_summary"
SOLVED = "llama_layers.verify.mistakes.logprobs_solved"
SITE = "verify/test_logprobs_site.py"
WRITTEN_OUT = "test_logits_that_were_rounded_where_they_were_written_out"
MISTAKES = "verify/test_logprob_mistakes.py"


@wrong(f"{ARRAYS}:columns", f"{SITE}::TestShapes::test_of_the_last_tokens[3]")
def fewer_numbers_are_of_the_first_tokens(right, shape, extent):
    found = right(shape, extent)
    return slice(0, shape[-1]) if found and shape[-1] < extent[1] else found


@wrong(f"{ARRAYS}:next_tokens", f"{SITE}::TestShapes::test_padding_may_have_anything[right]")
def padding_has_log_probabilities(right, given, input_ids, keep, extent, vocabulary):
    return right(given, input_ids, None, extent, vocabulary)


@wrong(f"{ARRAYS}:next_tokens", f"{SITE}::TestShapes::test_next_ids")
def the_token_after_the_last_is_not_read(right, given, input_ids, keep, extent, vocabulary):
    return right(None, input_ids, keep, extent, vocabulary)


@wrong(f"{SUMS}.of", f"{SITE}::test_bound_holds_what_is_right[5.0-5000]")
def the_sum_of_exponentials_is_exact(right, cls, logits, allowed=None):
    found = right(cls, logits, allowed)
    return replace(found, errors=tuple(np.zeros_like(e) for e in found.errors))


@wrong(f"{SUMS}.below", f"{SITE}::{WRITTEN_OUT}[float16]")
def logits_are_as_exact_as_they_were_recorded(right, total, a):
    return right(total, replace(a, off=np.zeros(()), usual=np.zeros(())))


@wrong(f"{SUMMARY}:difference_of", f"{SITE}::TestSummary::test_of_a_known_difference")
def the_estimates_have_the_other_sign(right, names, first, second, ids):
    return right(names, second, first, ids)


@wrong(f"{SUMMARY}:_divergence", f"{SITE}::TestSummary::test_divergence")
def the_divergence_is_that_of_the_other(right, first, second, keep):
    return right(second, first.astype(np.float64), keep)


@wrong(f"{SOLVED}:_Rows.of", f"{MISTAKES}::test_a_few_wrong_tokens_are_no_temperature[1]")
def a_number_is_fitted_to_one_token(right, cls, op, at):
    module = __import__(cls.__module__, fromlist=["_FEWEST"])
    fewest, module._FEWEST = module._FEWEST, 1
    try:
        return right(cls, op, at)
    finally:
        module._FEWEST = fewest
