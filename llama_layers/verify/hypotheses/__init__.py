"""Named mistakes, one subject a file; each is data and one function."""

from llama_layers.verify.hypotheses import (
    anywhere,
    attention,
    attention_solved,
    caches,
    fitted,
    hidden_states,
    logits,
    masks,
    mlp,
    norms,
    precision,
    projections,
    rope,
    rope_rounding,
    rope_solved,
    streams,
    weighing,
)
from llama_layers.verify.hypotheses.hypothesis import Hypothesis

HYPOTHESES: tuple[Hypothesis, ...] = (
    *hidden_states.HYPOTHESES,
    *streams.HYPOTHESES,
    *norms.HYPOTHESES,
    *projections.HYPOTHESES,
    *rope.HYPOTHESES,
    *rope_rounding.HYPOTHESES,
    *rope_solved.HYPOTHESES,
    *masks.HYPOTHESES,
    *caches.HYPOTHESES,
    *weighing.HYPOTHESES,
    *attention.HYPOTHESES,
    *fitted.HYPOTHESES,
    *logits.HYPOTHESES,
    *attention_solved.HYPOTHESES,
    *mlp.HYPOTHESES,
    *precision.HYPOTHESES,
    *anywhere.HYPOTHESES,
)

# Those of too few bits.
ROUNDINGS: tuple[Hypothesis, ...] = (*precision.HYPOTHESES, *rope_rounding.HYPOTHESES)

__all__ = ["HYPOTHESES", "ROUNDINGS"]
