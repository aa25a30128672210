"""Bugs of sampling and generation."""

from __future__ import annotations

from catalogue import Mutant

_FREQUENCIES = "test_sampling.py::test_frequencies"
_FILTERS = "test_sampling.py::test_ids_are_those_of_the_naive_filters"

SAMPLING = [
    Mutant(
        "temperature ignored",
        "sampling.py",
        "return (wide - largest) / temperature",
        "return wide - largest",
        _FREQUENCIES,
    ),
    Mutant(
        "multiplied by the temperature",
        "sampling.py",
        "return (wide - largest) / temperature",
        "return (wide - largest) * temperature",
        _FREQUENCIES,
    ),
    Mutant(
        "the last of the largest logits",
        "sampling.py",
        "return xp.argmax(logits, axis=-1)",
        "return logits.shape[1] - 1 - xp.argmax(xp.flip(logits, axis=-1), axis=-1)",
        "test_sampling.py::test_greedy_is_the_first_of_the_largest[numpy]",
    ),
    Mutant(
        "the smallest logit",
        "sampling.py",
        "return xp.argmax(logits, axis=-1)",
        "return xp.argmin(logits, axis=-1)",
        "test_sampling.py::test_greedy_is_the_first_of_the_largest[numpy]",
    ),
    Mutant(
        "probabilities without the shift",
        "sampling.py",
        "return (wide - largest) / temperature",
        "return wide / temperature",
        "test_sampling.py::test_shift_of_a_row_changes_nothing",
    ),
    Mutant(
        "one token too many of top_k",
        "sampling.py",
        "host.partition(scaled, -top_k, axis=-1)[:, -top_k, None]",
        "host.partition(scaled, -top_k - 1, axis=-1)[:, -top_k - 1, None]",
        _FILTERS,
    ),
    Mutant(
        "equals of the last of top_k dropped",
        "sampling.py",
        "weights = host.where(scaled >= smallest_kept, weights, 0.0)",
        "weights = host.where(scaled > smallest_kept, weights, 0.0)",
        _FREQUENCIES,
    ),
    Mutant(
        "top_p stops one token early",
        "sampling.py",
        "before = host.cumsum(descending, axis=-1) - descending",
        "before = host.cumsum(descending, axis=-1)",
        _FREQUENCIES,
    ),
    Mutant(
        "top_p takes one token too many",
        "sampling.py",
        "before = host.cumsum(descending, axis=-1) - descending",
        "before = host.cumsum(descending, axis=-1) - descending\n"
        "        before[:, 1:] = before[:, :-1].copy()",
        _FREQUENCIES,
    ),
    Mutant(
        "top_p of the unfiltered probabilities",
        "sampling.py",
        "top_p * descending.sum(axis=-1, keepdims=True)",
        "top_p * host.exp(scaled).sum(axis=-1, keepdims=True)",
        _FREQUENCIES,
    ),
    Mutant(
        "top_p the unlikeliest first",
        "sampling.py",
        "order = host.argsort(-weights, axis=-1, stable=True)",
        "order = host.argsort(weights, axis=-1, stable=True)",
        _FREQUENCIES,
    ),
    Mutant(
        "min_p as a probability, not a share of the largest",
        "sampling.py",
        "weights >= min_p * weights.max(axis=-1, keepdims=True)",
        "weights >= min_p * weights.sum(axis=-1, keepdims=True)",
        _FREQUENCIES,
    ),
    Mutant(
        "min_p excludes its own edge",
        "sampling.py",
        "weights >= min_p * weights.max(axis=-1, keepdims=True)",
        "weights > min_p * weights.max(axis=-1, keepdims=True)",
        _FREQUENCIES,
    ),
    Mutant(
        "one draw for all rows",
        "sampling.py",
        "random((logits.shape[0], 1))",
        "random((1, 1))",
        "test_sampling.py::test_rows_are_drawn_apart",
    ),
    Mutant(
        "a draw of 0 takes the first token, possible or not",
        "sampling.py",
        "host.argmax(cumulative > drawn, axis=-1)",
        "host.argmax(cumulative >= drawn, axis=-1)",
        "test_sampling.py::test_nothing_impossible_is_drawn_at_either_end",
    ),
    Mutant(
        "draws not scaled to what the filters leave",
        "sampling.py",
        " * cumulative[:, -1:]",
        "",
        _FREQUENCIES,
    ),
    Mutant(
        "the seed ignored",
        "sampling.py",
        "host.random.default_rng(rng)",
        "host.random.default_rng()",
        "test_sampling.py::test_rng_is_the_only_randomness[numpy]",
    ),
    Mutant(
        "the global random state used",
        "sampling.py",
        "random_generator(rng).random(",
        "host.random.random_sample(",
        "test_sampling.py::test_rng_is_the_only_randomness[numpy]",
    ),
    Mutant(
        "NaN taken for a number",
        "sampling.py",
        "if bool(xp.any(logits != logits)):",
        "if False:",
        "test_sampling.py::test_refuses",
    ),
]

GENERATION = [
    Mutant(
        "a repeated token's negative logit raised",
        "generation.py",
        "xp.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        "test_generation.py::test_repetition_penalty",
    ),
    Mutant(
        "repetition rewarded",
        "generation.py",
        "xp.where(logits < 0, logits * penalty, logits / penalty)",
        "xp.where(logits < 0, logits / penalty, logits * penalty)",
        "test_generation.py::test_repetition_penalty",
    ),
    Mutant(
        "every token penalised",
        "generation.py",
        "return xp.where(from_numpy(seen, xp, device(logits)), lowered, logits)",
        "return lowered",
        "test_generation.py::test_repetition_penalty",
    ),
    Mutant(
        "new tokens not penalised",
        "generation.py",
        "seen[host.arange(drawn.shape[0]), drawn] = True",
        "pass",
        "test_generation.py::test_repetition_penalty",
    ),
    Mutant(
        "tokens of other rows penalised",
        "generation.py",
        "seen[row, tokens[keep != 0]] = True",
        "seen[:, tokens[keep != 0]] = True",
        "test_generation.py::test_repetition_penalty",
    ),
    Mutant(
        "padding penalised",
        "generation.py",
        "seen[row, tokens[keep != 0]] = True",
        "seen[row, tokens] = True",
        "test_generation.py::test_padding_is_not_repeated",
    ),
    Mutant(
        "eos not given",
        "generation.py",
        """\
        yield ids
        ended = ended | host.isin(drawn, ends)
""",
        """\
        ended = ended | host.isin(drawn, ends)
        if ended.all():
            return
        yield ids
""",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "ends with the first row that ends",
        "generation.py",
        "if ended.all():",
        "if ended.any():",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "never ends before the count",
        "generation.py",
        "if ended.all():",
        "if False:",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "eos forgotten in the next step",
        "generation.py",
        "ended = ended | host.isin(drawn, ends)",
        "ended = host.isin(drawn, ends)",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "ended rows go on",
        "generation.py",
        "if ended.any():",
        "if False:",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "token 0 taken for no eos",
        "generation.py",
        "() if given is None else (given,)",
        "() if not given else (given,)",
        "test_generation.py::test_token_0_may_be_the_end",
    ),
    Mutant(
        "the config's eos ignored",
        "generation.py",
        "        given = model.config.eos_token_id\n",
        "        given = None\n",
        "test_generation.py::test_eos_is_the_last_token_given",
    ),
    Mutant(
        "the prompt fed twice",
        "generation.py",
        "return logits, cache\n\n\ndef _advance(",
        "return _advance(model, input_ids[:, -1:], cache)\n\n\ndef _advance(",
        "test_generation.py::test_greedy_is_the_argmax_of_full_passes",
    ),
    Mutant(
        "the mask of a prompt's first chunk for each",
        "generation.py",
        "None if attention_mask is None else attention_mask[:, part],",
        "None if attention_mask is None else attention_mask[:, : input_ids[:, part].shape[1]],",
        "test_generation.py::test_ring_is_the_full_cache",
    ),
    Mutant(
        "prompts that end in padding accepted",
        "generation.py",
        "if not bool(xp.all(attention_mask[:, -1] != 0)):",
        "if False:",
        "test_generation.py::test_refuses_at_the_call",
    ),
    Mutant(
        "options refused at the first step only",
        "generation.py",
        "    check_options(temperature, top_k, top_p, min_p)\n",
        "",
        "test_generation.py::test_refuses_at_the_call",
    ),
]

MISUSE = [
    Mutant(
        "bools taken for integers",
        "scalars.py",
        "isinstance(value, Integral) and not isinstance(value, bool)",
        "isinstance(value, Integral)",
        "test_sampling.py::test_refuses",
    ),
    Mutant(
        "bools taken for numbers",
        "scalars.py",
        "if not isinstance(value, Real) or isinstance(value, bool):",
        "if not isinstance(value, Real):",
        "test_sampling.py::test_refuses",
    ),
    Mutant(
        "the count of new tokens unchecked",
        "generation.py",
        'max_new_tokens = check_count("max_new_tokens", max_new_tokens, MOST_TOKENS)',
        "pass",
        "test_generation.py::test_refuses_at_the_call",
    ),
    Mutant(
        "a seed refused at the first step only",
        "generation.py",
        'options |= {"rng": random_generator(rng)}',
        'options |= {"rng": rng}',
        "test_generation.py::test_refuses_at_the_call",
    ),
    Mutant(
        "what a tap gives is not looked at",
        "tap.py",
        "if found != expected:",
        "if False:",
        "test_tap.py::test_what_a_tap_must_give",
    ),
    Mutant(
        "rows that have ended go on without a padding id",
        "generation.py",
        "candidates = (model.config.pad_token_id, *ends)",
        "candidates = (model.config.pad_token_id,)",
        "test_generation.py::test_a_row_that_has_ended_is_padded_without_a_padding_id",
    ),
    Mutant(
        "a copied cache shares its memory",
        "cache.py",
        "namespace(array=array).asarray(array, copy=True)",
        "array",
        "test_cache.py::test_a_copy_goes_its_own_way",
    ),
    Mutant(
        "logits after padding are given",
        "batch.py",
        "& ~keep[:, -1])",
        "& False)",
        "test_forward.py::test_the_last_token_is_no_padding",
    ),
]

MUTANTS = [*SAMPLING, *GENERATION, *MISUSE]
