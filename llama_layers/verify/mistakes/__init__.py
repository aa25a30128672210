"""Mistakes that ports make, one subject a file."""

from llama_layers.verify.mistakes import (
    across_heads,
    anywhere,
    attention,
    attention_solved,
    batches,
    caches,
    fitted,
    hidden_states,
    kernels,
    layouts,
    logits,
    logprobs,
    logprobs_solved,
    masks,
    mlp,
    multipliers,
    narrow_sums,
    norms,
    projections,
    quantised,
    rope,
    rope_rounding,
    rope_solved,
    rounding,
    shares,
    sinks,
    slots,
    solved,
    streams,
    tiles,
    weighing,
)
from llama_layers.verify.mistakes.registry import REGISTERED, Kind, Mistake

# Each registers its own; the order is that in which they are tried.
_SUBJECTS = (
    hidden_states,
    multipliers,
    streams,
    norms,
    projections,
    shares,
    layouts,
    rope,
    rope_rounding,
    rope_solved,
    masks,
    caches,
    sinks,
    weighing,
    kernels,
    across_heads,
    attention,
    slots,
    fitted,
    logits,
    logprobs,
    logprobs_solved,
    attention_solved,
    mlp,
    rounding,
    quantised,
    narrow_sums,
    tiles,
    batches,
    solved,
    anywhere,
)
MISTAKES: tuple[Mistake, ...] = tuple(
    mistake for subject in _SUBJECTS for mistake in REGISTERED[subject.__name__]
)
"""Every mistake."""

__all__ = ["MISTAKES", "Kind", "Mistake"]
