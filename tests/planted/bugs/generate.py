"""Bugs of text generation: penalties, ends, padding and chunks of prompts."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np

from tests.planted.planting import wrong

GENERATE = "llama_layers.model.generate:generate"
PENALISED = "llama_layers.model.generate:_penalised"
SEEN = "llama_layers.model.generate:_used"
PREFILL = "llama_layers.model.generate:_prefill"
REPETITION = "test_generation.py::test_repetition_penalty"
ENDS = "test_generation_ends.py::test_eos_is_the_last_token_given"
AT_THE_CALL = "test_generation.py::test_refuses_at_the_call"


@wrong(PENALISED, REPETITION)
def the_negative_logit_of_a_repeated_token_raised(right, xp, logits, seen, penalty):
    return xp.where(seen, logits / penalty, logits)


@wrong(PENALISED, REPETITION)
def repetition_rewarded(right, xp, logits, seen, penalty):
    return right(xp, logits, seen, 1 / penalty)


@wrong(PENALISED, REPETITION)
def every_token_penalised(right, xp, logits, seen, penalty):
    return right(xp, logits, np.ones_like(seen), penalty)


class Unchanging(np.ndarray):
    """An array that nothing can be written to."""

    def __setitem__(self, *_):
        pass


@wrong(SEEN, REPETITION)
def new_tokens_not_penalised(right, *arguments):
    return right(*arguments).view(Unchanging)


@wrong(SEEN, REPETITION)
def tokens_of_other_rows_penalised(right, *arguments):
    seen = right(*arguments)
    return np.repeat(seen.any(axis=0, keepdims=True), len(seen), axis=0)


@wrong(SEEN, "test_generation.py::test_padding_is_not_repeated")
def padding_penalised(right, model, input_ids, attention_mask):
    return right(model, input_ids, None)


def ends_of(model, options):
    from llama_layers.model.generate import _ends

    return _ends(model, options.get("eos_token_id"))


def endless(right, model, input_ids, options):
    """The steps of a generation that nothing ends."""
    return right(model, input_ids, **options | {"eos_token_id": ()})


@wrong(GENERATE, ENDS)
def the_last_token_not_given(right, model, input_ids, **options):
    ended = np.zeros(input_ids.shape[0], bool)
    for ids in right(model, input_ids, **options):
        ended |= np.isin(ids, ends_of(model, options))
        if ended.all():
            return
        yield ids


@wrong(GENERATE, ENDS)
def ends_with_the_first_row_that_ends(right, model, input_ids, **options):
    for ids in right(model, input_ids, **options):
        yield ids
        if np.isin(ids, ends_of(model, options)).any():
            return


@wrong(GENERATE, ENDS)
def never_ends_before_the_count(right, model, input_ids, **options):
    return endless(right, model, input_ids, options)


@wrong(GENERATE, ENDS)
def ends_with_the_config_ignored(right, model, input_ids, **options):
    if options.get("eos_token_id") is None:
        return endless(right, model, input_ids, options)
    return right(model, input_ids, **options)


@wrong(GENERATE, ENDS)
def ended_rows_go_on(right, model, input_ids, **options):
    ended = np.zeros(input_ids.shape[0], bool)
    for ids in endless(right, model, input_ids, options):
        yield ids
        ended |= np.isin(ids, ends_of(model, options))
        if ended.all():
            return


@wrong(GENERATE, ENDS)
def ends_forgotten_in_the_next_step(right, model, input_ids, **options):
    for ids in endless(right, model, input_ids, options):
        yield ids
        if np.isin(ids, ends_of(model, options)).all():
            return


@wrong("llama_layers.model.generate:_ends", "test_generation_ends.py::test_token_0_may_be_the_end")
def token_0_never_ends_a_sequence(right, model, eos_token_id):
    return tuple(end for end in right(model, eos_token_id) if end)


@wrong(
    GENERATE, "test_generation_ends.py::test_a_row_that_has_ended_is_padded_without_a_padding_id"
)
def rows_that_have_ended_go_on_without_a_padding_id(right, model, input_ids, **options):
    if model.config.pad_token_id is not None:
        return right(model, input_ids, **options)
    return endless(right, model, input_ids, options)


@wrong(PREFILL, "test_generation.py::test_greedy_is_the_argmax_of_full_passes")
def the_last_token_of_the_prompt_fed_twice(
    right, model, input_ids, attention_mask, cache, more, tap
):
    from llama_layers.model.generate import _advance

    _, cache = right(model, input_ids, attention_mask, cache, more, tap)
    return _advance(model, input_ids[:, -1:], cache, tap=tap)


@wrong(PREFILL, "test_generation.py::test_ring_is_the_full_cache")
def the_mask_of_the_first_chunk_of_a_prompt_for_each(
    right, model, input_ids, attention_mask, cache, more, tap
):
    from llama_layers.model.generate import CHUNK

    if attention_mask is not None and cache is None:
        attention_mask = attention_mask[:, np.arange(input_ids.shape[1]) % CHUNK]
    return right(model, input_ids, attention_mask, cache, more, tap)


@wrong("llama_layers.model.generate:_check_prompts", AT_THE_CALL)
def prompts_that_end_in_padding_accepted(right, xp, input_ids, attention_mask):
    return None


@wrong("llama_layers.model.generate:check_options", AT_THE_CALL)
def options_refused_at_the_first_step_only(right, *options):
    return None


@wrong("llama_layers.model.generate:random_generator", AT_THE_CALL)
def a_seed_refused_at_the_first_step_only(right, rng):
    return rng


@wrong("llama_layers.model.generate:check_count", AT_THE_CALL)
def the_count_of_new_tokens_unchecked(right, name, value, *limits):
    return value


@wrong("llama_layers.arrays.checks:is_integer", "test_sampling.py::test_refuses")
def bools_taken_for_integers(right, value):
    return isinstance(value, Integral)


@wrong("llama_layers.arrays.checks:check_number", "test_sampling.py::test_refuses")
def bools_taken_for_numbers(right, name, value):
    if not isinstance(value, Real):
        right(name, value)
