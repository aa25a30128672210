"""Mistakes that ports make, one subject a file."""

from llama_layers.verify.mistakes import (
    anywhere,
    attention,
    attention_solved,
    caches,
    fitted,
    hidden_states,
    kernels,
    layouts,
    logits,
    masks,
    mlp,
    narrow_sums,
    norms,
    projections,
    rope,
    rope_rounding,
    rope_solved,
    rounding,
    slots,
    streams,
    weighing,
)
from llama_layers.verify.mistakes.registry import REGISTERED, Kind, Mistake

# Each registers its own; the order is that in which they are tried.
_SUBJECTS = (
    hidden_states,
    streams,
    norms,
    projections,
    layouts,
    rope,
    rope_rounding,
    rope_solved,
    masks,
    caches,
    weighing,
    kernels,
    attention,
    slots,
    fitted,
    logits,
    attention_solved,
    mlp,
    rounding,
    narrow_sums,
    anywhere,
)
MISTAKES: tuple[Mistake, ...] = tuple(
    mistake for subject in _SUBJECTS for mistake in REGISTERED[subject.__name__]
)
"""Every mistake."""

__all__ = ["MISTAKES", "Kind", "Mistake"]
