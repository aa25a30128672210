"""Mistakes that ports make, one subject a file, in the order in which they are tried."""

from llama_layers.verify.mistakes import (  # isort: skip  # each registers its own
    hidden_states,
    streams,
    norms,
    projections,
    rope,
    rope_rounding,
    rope_solved,
    attention,
    masks,
    caches,
    weighing,
    fitted,
    logits,
    attention_solved,
    mlp,
    rounding,
    narrow_sums,
    anywhere,
)
from llama_layers.verify.mistakes.registry import MISTAKES, Kind, Mistake, mistake

__all__ = ["MISTAKES", "Kind", "Mistake", "mistake"]
