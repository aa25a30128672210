"""Bugs in the bound of sums that ranks add."""

from __future__ import annotations

from dataclasses import replace

from tests.planted.planting import wrong

WORST = "verify/test_reduce.py::test_the_worst_that_can_happen_is_just_allowed"


@wrong("llama_layers.verify.ranks:Ranks.of", WORST)
def one_rounding_too_few(right, cls, how, biased):
    ranks = right(cls, how, biased)
    return ranks and replace(ranks, roundings=ranks.roundings - 1)


@wrong("llama_layers.verify.ranks:Ranks.of", WORST)
def the_reduce_in_the_format_of_sums(right, cls, how, biased):
    return right(cls, replace(how, profile=replace(how.profile, reduce=None)), biased)


@wrong("llama_layers.verify.ranks:Ranks.of", "verify/test_reduce.py::test_a_bias_is_one_more_term")
def a_bias_that_nobody_adds(right, cls, how, biased):
    return right(cls, how, False)


@wrong(
    "llama_layers.verify.ranks:Ranks.of",
    "verify/test_reduce.py::test_float32_is_rounded_where_it_is_added_only",
)
def parts_rounded_to_their_own_format(right, cls, how, biased):
    ranks = right(cls, how, biased)
    return ranks and replace(ranks, roundings=how.profile.ranks + biased)


@wrong(
    "llama_layers.verify.operations:Linear.read",
    "verify/test_reduce.py::test_no_other_product_is_excused",
)
def every_product_summed_by_ranks(right, self, how):
    return replace(right(self, how), summed=True)
