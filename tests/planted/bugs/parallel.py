"""Bugs in how a model is split among ranks, and in what they send each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers import rms_norm
from tests.planted.planting import wrong

LOGITS = "test_parallel.py::test_logits_are_those_of_naive_loops"


@wrong(
    "llama_layers.parallel.plan:_share", "test_parallel.py::test_parts_are_even_and_cover_the_model"
)
def a_head_on_two_ranks(right, count, rank, size):
    share = right(count, rank, size)
    return range(max(0, share.start - 1), share.stop)


@wrong(
    "llama_layers.parallel.plan:_share", "test_parallel.py::test_parts_are_even_and_cover_the_model"
)
def ranks_in_the_wrong_order(right, count, rank, size):
    return right(count, size - 1 - rank, size)


@wrong("llama_layers.parallel.plan:Shard.part", LOGITS)
def a_bias_added_on_every_rank(right, self, name, array):
    return array if name.endswith(("o_proj.bias", "down_proj.bias")) else right(self, name, array)


@wrong(
    "llama_layers.layers.decoder:rms_norms_over_ranks",
    "test_parallel.py::test_a_cache_on_every_rank[olmo2]",
)
def a_norm_of_the_heads_of_a_rank(right, arrays, weights, group, *, eps, offset):
    return [rms_norm(x, w, eps=eps, offset=offset) for x, w in zip(arrays, weights, strict=True)]


@wrong("llama_layers.layers.mlp:reduce_partial", LOGITS)
def the_sum_after_the_MLP_forgotten(right, y, group):
    return y


@wrong("llama_layers.layers.decoder:reduce_partial", LOGITS)
def the_sum_after_attention_forgotten(right, y, group):
    return y


@wrong("llama_layers.parallel.plan:Shard.part", LOGITS)
def key_heads_of_another_rank(right, self, name, array):
    part = right(self, name, array)
    return np.roll(array, self.whole.head_dim, 0)[: len(part)] if "k_proj.w" in name else part


@wrong("llama_layers.parallel.plan:Shard.part", LOGITS)
def the_slices_of_the_next_rank(right, self, name, array):
    other = replace(self, rank=(self.rank + 1) % self.size)
    return right(
        other if "down_proj" in name and other.config == self.config else self, name, array
    )


@wrong(
    "llama_layers.layers.group:accumulate_format",
    "test_parallel.py::test_narrow_numbers_are_summed_in_float32",
)
def narrow_numbers_summed_as_they_are(right, form):
    return form


@wrong(
    "llama_layers.model.forward:check_shared",
    "test_parallel.py::test_other_ids_on_a_rank_are_named",
)
def other_ids_on_a_rank_taken(right, group, **arguments):
    return None


@wrong(
    "llama_layers.layers.group:_digest",
    "test_parallel.py::test_other_arguments_on_a_rank_are_named",
)
def other_masks_on_a_rank_taken(right, value):
    return None if "bool" in str(getattr(value, "dtype", "")) else right(value)


@wrong(
    "llama_layers.parallel.threads:_Meeting.end",
    "test_parallel.py::test_a_rank_that_has_ended_is_named",
)
def a_rank_that_has_ended_waited_for(right, self, rank, failed):
    return None


@wrong(
    "llama_layers.model.generate:random_generator",
    "test_parallel.py::test_ranks_draw_the_same_tokens",
)
def every_rank_draws_for_itself(right, rng):
    class Own(np.random.Generator):
        def __reduce__(self):
            return np.random.default_rng, ()

    return Own(np.random.PCG64(rng))


@wrong(
    "llama_layers.parallel.plan:_share",
    "test_ranks.py::test_the_memory_of_a_rank_in_the_documentation",
)
def all_channels_on_every_rank(right, count, rank, size):
    return range(count) if count > 1000 else right(count, rank, size)


@wrong(
    "llama_layers.parallel.ending:_outside",
    "test_ranks.py::test_a_traceback_ends_at_the_call",
)
def a_traceback_left_long(right, trace):
    return trace
