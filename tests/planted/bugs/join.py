"""Bugs in how traces of ranks are joined."""

from __future__ import annotations

from dataclasses import replace

from llama_layers.verify.profiles import CONTRACT
from tests.planted.planting import wrong

OTHERS = "verify/test_join.py::test_the_split_of_another_engine"


@wrong("llama_layers.verify.split_sites:Ways._keys_of", OTHERS)
def key_heads_shifted(right, self, queries):
    return tuple((key or 0) ^ 1 for key in right(self, queries))


@wrong("llama_layers.verify.split_sites:_own", "verify/test_join.py::test_our_own_ranks")
def heads_of_zeros_kept(right, part, places, axis):
    return right(part, tuple(0 if place is None else place for place in places), axis)


@wrong(
    "llama_layers.verify.partial_sums:_sum",
    "verify/test_join.py::test_sums_recorded_before_they_were_added",
)
def the_parts_of_rank_0_alone(right, reads, first):
    return right(reads[:1], first)


@wrong(
    "llama_layers.verify.ranks:AddedParts.off",
    "verify/test_join.py::test_sums_recorded_before_they_were_added",
)
def sums_taken_for_what_the_ranks_went_on_with(right, self, how):
    return 0 * right(self, how)


ONE_WRONG_SUM = "verify/test_by_rank.py::test_a_sum_that_one_rank_gets_wrong_in_every_layer"


@wrong("llama_layers.verify.by_rank:settled", ONE_WRONG_SUM)
def a_wrong_sum_taken_for_a_part(right, trace, judged):
    return trace, judged


@wrong(
    "llama_layers.verify.partial_sums:looks_added",
    "verify/test_by_rank.py::test_a_sum_that_one_rank_of_many_gets_wrong",
)
def the_first_two_ranks_asked_alone(right, sites):
    return right(of_ranks[:1] + of_ranks[-1:] for of_ranks in sites)


@wrong(
    "llama_layers.verify.by_rank:_wrong_parts",
    "verify/test_by_rank.py::test_the_rank_whose_part_of_a_sum_is_wrong",
)
def the_part_of_another_rank_blamed(right, trace, judged, site):
    found = right(trace, judged, site)
    return found and [(rank + 1) % trace.size for rank in found]


@wrong(
    "llama_layers.verify.by_rank:_misplaced",
    "verify/test_by_rank.py::test_what_another_rank_should_have",
)
def the_order_of_ranks_not_looked_at(right, places, judged, site):
    return []


@wrong(
    "llama_layers.verify.split_sites:Split.unpadded",
    "verify/test_join.py::test_logits_of_some_tokens_on_each_rank",
)
def padding_of_logits_given_to_a_rank(right, self, places):
    return places


@wrong(
    "llama_layers.verify.by_rank:_told", "verify/test_by_rank.py::test_the_rank_that_is_wrong_alone"
)
def rank_0_shown_whoever_is_wrong(right, look, by_rank, ranks):
    return right(look, dict.fromkeys(by_rank, look), ranks)


@wrong(
    "llama_layers.verify.by_rank:_sharing",
    "verify/test_by_rank.py::test_a_key_head_that_is_another_on_one_rank",
)
def every_rank_asked_for_a_head(right, trace, name):
    return list(range(trace.size))


OWN_NUMBERS = "verify/test_by_rank.py::test_what_a_rank_makes_of_its_own_wrong_numbers"


@wrong("llama_layers.verify.defined:_own", OWN_NUMBERS)
def a_rank_blamed_for_the_heads_of_others(right, site, recorded, shape):
    return None


@wrong("llama_layers.verify.join:JoinedTrace.of_rank", OWN_NUMBERS)
def every_rank_held_against_the_arrays_of_rank_0(right, self, rank):
    return self


@wrong(
    "llama_layers.verify.rank_order:_order",
    "verify/test_by_rank.py::test_files_of_ranks_in_another_order",
)
def the_order_of_files_taken_as_it_is(right, trace, judged, site):
    return None


@wrong(
    "llama_layers.verify.report.results:Element.ratio",
    "verify/test_by_rank.py::test_the_rank_that_computed_a_wrong_head",
)
def nan_taken_for_no_error(right, self):
    return right(self) if self.computed == self.computed else 0.0


@wrong(
    "llama_layers.verify.mistakes.shares:_of_ranks",
    "verify/test_by_rank.py::test_the_part_of_a_rank_that_all_count_wrong",
)
def parts_of_ranks_not_known(right, width, at):
    return iter(())


@wrong(
    "llama_layers.verify.ranks:AddedParts.off",
    "verify/test_by_rank.py::test_ranks_that_add_in_fewer_bits_than_they_record",
)
def parts_added_in_the_dtype_of_their_arrays(right, self, how):
    return right(self, replace(how, profile=CONTRACT))


@wrong(
    "llama_layers.verify.look:parallel_profile",
    "verify/test_by_rank.py::test_ranks_that_add_in_the_dtype_that_they_record",
)
def ranks_of_the_files_forgotten(right, metadata):
    return None
