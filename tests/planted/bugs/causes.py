"""Bugs in what a diagnosis takes for evidence, and in mistakes that it tries."""

from __future__ import annotations

import numpy as np

from llama_layers.verify.operations import Linear
from tests.planted.planting import wrong

EVIDENCE = "llama_layers.verify.mistakes.evidence"
SHOWN = "verify/test_evidence.py::"
NAMED = "verify/test_mistakes.py::test_named_first"
CODES = "verify/test_named_places.py::test_orders_and_codes_are_told"
PARTS = "verify/test_by_rank.py::test_the_part_of_a_rank_that_all_count_wrong"
LATER = "verify/test_gaps.py::"
UNBOUNDED = "verify/test_unbounded.py::"


@wrong(f"{EVIDENCE}:is_linear", f"{SHOWN}test_products_with_a_factor_are_linear_in_it")
def too_few_rows_taken_for_evidence(right, pairs):
    return bool(right(pairs))


@wrong(f"{EVIDENCE}:_without_repeats", f"{SHOWN}test_products_with_a_factor_are_linear_in_it")
def repeated_tokens_counted_again(right, pair):
    return pair


@wrong(f"{EVIDENCE}:is_of_low_rank", f"{SHOWN}test_low_rank")
def every_error_is_of_full_rank(right, error, scale):
    return False


@wrong(f"{EVIDENCE}:_even", f"{SHOWN}test_errors_of_a_few_are_not_spread")
def an_error_in_one_channel_taken_for_spread(right, sizes):
    return True


@wrong(f"{EVIDENCE}:has_no_mean", f"{SHOWN}test_errors_to_one_side_have_a_mean")
def means_of_channels_not_looked_at(right, error):
    size = float(np.mean(np.square(error)))
    return bool(abs(error.mean()) <= 5 * np.sqrt(size / error.size))


@wrong(f"{EVIDENCE}:on_a_coarser_grid", f"{SHOWN}test_grids_and_proportions")
def every_array_on_a_coarser_grid(right, computed, rounded):
    return True


@wrong("llama_layers.verify.mistakes.fitted:fitted", f"{NAMED}[scores capped, self_attn.attention]")
def a_number_of_the_grid_not_refined(right, error, low, high):
    grid = np.geomspace(low, high, 97)
    return float(grid[np.argmin([error(float(number)) for number in grid])])


@wrong(
    "llama_layers.verify.mistakes.weighing:_of_largest",
    f"{NAMED}[only the largest scores, self_attn.attention]",
)
def one_key_too_many(right, heads, count):
    return right(heads, count + 1)


@wrong(
    "llama_layers.verify.mistakes.weighing:_own_of_zeros",
    f"{NAMED}[newest slot not written, self_attn.attention]",
)
def the_newest_slot_hidden(right, heads):
    return heads.weigh(heads.probabilities())


@wrong("llama_layers.verify.mistakes.codes:pruned", f"{NAMED}[weights pruned, self_attn.q_proj0]")
def the_largest_weights_pruned(right, array, keep, of, last=False):
    return np.where(right(array, keep, of, last) == 0, array, 0)


@wrong(
    "llama_layers.verify.mistakes.quantised_wrong:_scales",
    f"{NAMED}[scales of another block, mlp.up_proj]",
)
def all_scales_alike(right, codes, scaling, some):
    return np.ones_like(right(codes, scaling, some))


@wrong("llama_layers.verify.mistakes.columns:_inside", CODES)
def blocks_left_in_order(right, block):
    return {}


@wrong(
    "llama_layers.verify.mistakes.columns:_order",
    f"{NAMED}[input channels in another order, mlp.down_proj]",
)
def an_order_taken_for_its_inverse(right, pairs, energies, group):
    found = right(pairs, energies, group)
    return None if found is None else np.argsort(found)


@wrong(
    "llama_layers.verify.mistakes.tiles:_elsewhere",
    f"{NAMED}[a tile in another place, self_attn.o_proj]",
)
def tiles_one_column_away(right, exact, mine):
    found = right(exact, mine)
    return found and (found[0], found[1] - 1 if found[1] else 1)


@wrong(
    "llama_layers.verify.mistakes.streams:_row_of",
    "verify/test_diagnose.py::test_other_ids_are_told",
)
def the_first_row_that_begins_alike(right, row, table, dtype):
    return 0


@wrong(
    "llama_layers.verify.mistakes.predicted:rounded",
    f"{NAMED}[norm computed in bfloat16, input_layernorm]",
)
def nothing_rounded(right, numbers, form):
    return numbers


@wrong("llama_layers.verify.gap_scale:_fitted", f"{LATER}test_a_factor")
def a_factor_not_fitted(right, part, places, factor):
    found = right(part, places, factor)
    return found and found * 1.01


@wrong("llama_layers.verify.gap_scale:_words", f"{LATER}test_a_small_mistake_in_bfloat16")
def the_factor_said_for_the_scale(right, part, place, factor):
    return factor, ""


@wrong(
    "llama_layers.verify.whole_layers:left_out",
    f"{UNBOUNDED}test_a_layer_that_was_not_recorded_was_left_out",
)
def the_attention_of_a_layer_left_out_alone(right, layers):
    change = right(layers)

    def half(site, operation, known):
        return operation if site.role != "attention_residual" else change(site, operation, known)

    return half


@wrong(
    "llama_layers.verify.whole_layers:weights_of",
    f"{UNBOUNDED}test_the_outputs_of_layers[another layer's weights]",
)
def norms_of_another_layer_not_taken(right, model, layer, other):
    change = right(model, layer, other)
    return lambda site, operation, known: (
        change(site, operation, known) if isinstance(operation, Linear) else operation
    )


@wrong(
    "llama_layers.verify.remedies:_Trial._remedy",
    "verify/test_remedies.py::test_no_option_makes_others_fail_instead",
)
def an_option_that_makes_others_fail(right, self, candidate, left, some):
    return right(self, candidate, [one for one in left if one.verdict in self._wrong], some)


@wrong(
    "llama_layers.verify.mistakes.codes:Scaling.fits", f"{NAMED}[weights quantised, mlp.down_proj1]"
)
def blocks_that_are_not_full_not_tried(right, self, shape):
    return right(self, shape) and not (self.blocks and shape[-1] % self.blocks)


@wrong("llama_layers.verify.mistakes.shares:_changed", PARTS)
def the_part_before_it_left_out(right, linear, part, factor, outputs):
    return right(linear, part - (part[0] and part[1] - part[0]), factor, outputs)


@wrong("llama_layers.verify.fitness:_goes_with", f"{SHOWN}test_what_is_left_of_a_change")
def what_is_left_of_a_change_not_looked_at(right, e, d, axes):
    return False


@wrong("llama_layers.verify.mistakes.codes:Codes.of", CODES)
def every_scale_in_float32(right, self, array, scaling, scales="float32", limits=None):
    return right(self, array, scaling, "float32", limits)


@wrong(
    "llama_layers.verify.operation:Operation.at_tokens",
    "verify/test_some_tokens.py::test_at_some_tokens",
)
def the_first_tokens_for_the_worst(right, self, tokens):
    return right(self, np.arange(len(tokens)))
