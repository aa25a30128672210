"""Bugs in how traces of ranks are joined."""

from __future__ import annotations

from tests.planted.planting import wrong

OTHERS = "verify/test_join.py::test_the_split_of_another_engine"


@wrong("llama_layers.verify.join:_Ways._keys_of", OTHERS)
def key_heads_shifted(right, self, queries):
    return tuple((key or 0) ^ 1 for key in right(self, queries))


@wrong("llama_layers.verify.join:_own", "verify/test_join.py::test_our_own_ranks")
def heads_of_zeros_kept(right, part, places, axis):
    return right(part, tuple(0 if place is None else place for place in places), axis)


@wrong(
    "llama_layers.verify.join:_sum",
    "verify/test_join.py::test_sums_recorded_before_they_were_added",
)
def the_parts_of_rank_0_alone(right, reads, first):
    return right(reads[:1], first)


@wrong(
    "llama_layers.verify.join:_sum_error",
    "verify/test_join.py::test_sums_recorded_before_they_were_added",
)
def sums_taken_for_what_the_ranks_went_on_with(right, reads, first):
    return 0 * right(reads, first)


@wrong(
    "llama_layers.verify.by_rank:_told", "verify/test_join.py::test_the_rank_that_is_wrong_alone"
)
def rank_0_shown_whoever_is_wrong(right, look, by_rank, ranks):
    return right(look, {}, ranks)


@wrong(
    "llama_layers.verify.by_rank:_sharing",
    "verify/test_join.py::test_a_key_head_that_is_another_on_one_rank",
)
def every_rank_asked_for_a_head(right, trace, name):
    return list(range(trace.size))
