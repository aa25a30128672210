"""Named mistakes, one subject a file; each is data and one function."""

from llama_layers.verify.hypotheses import (
    anywhere,
    attention,
    caches,
    masks,
    mlp,
    norms,
    precision,
    projections,
    rope,
    rope_solved,
    streams,
)
from llama_layers.verify.hypotheses.hypothesis import Hypothesis

HYPOTHESES: tuple[Hypothesis, ...] = (
    *streams.HYPOTHESES,
    *norms.HYPOTHESES,
    *projections.HYPOTHESES,
    *rope.HYPOTHESES,
    *rope_solved.HYPOTHESES,
    *masks.HYPOTHESES,
    *caches.HYPOTHESES,
    *attention.HYPOTHESES,
    *mlp.HYPOTHESES,
    *precision.HYPOTHESES,
    *anywhere.HYPOTHESES,
)

__all__ = ["HYPOTHESES"]
