"""Mistakes in the factors of the embedding, the residual stream and the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from llama_layers.layers.sites import HEAD
from llama_layers.verify.build import logits_of
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Changed, by_token, evaluated, mistake
from llama_layers.verify.operations import (
    Attention,
    Embedding,
    Linear,
    Logits,
    Residual,
    Scores,
)

# How far apart a factor is and what it is rounded from.
_ROUNDED = 2**-7


@mistake(Embedding, "embedding not multiplied")
def _(embedding: Embedding, at: FailingSite) -> Changed | None:
    """The array is the rows of the embedding, as the module embed_tokens of some models gives
    them; what enters the first layer is {0:.6g} times that."""
    if embedding.factor == 1:
        return None
    return replace(embedding, factor=1.0), embedding.factor


@mistake(Embedding, "another embedding multiplier")
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Multiplies the embedding by {0}; it should multiply by {1:.6g}."""
    factor, width = embedding.factor, embedding.table.shape[1]
    wrongs = {factor**2: "the square of its factor", 1 / factor: "1 / factor"}
    if math.isclose(factor, math.sqrt(width), rel_tol=_ROUNDED):
        wrongs[float(width)] = "hidden_size, not its root"
    for wrong, said in wrongs.items():
        if factor != 1:
            yield replace(embedding, factor=wrong), said, factor


@mistake(Embedding, "embedding multiplier rounded otherwise")
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Multiplies the embedding by {0:.10g}, which is {1:.10g} in {2}; it should multiply by
    {3:.10g}."""
    exact = at.config.embedding_multiplier
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        wrong = float(np.asarray(exact, dtype))
        if wrong not in (1, embedding.factor):
            name = np.dtype(dtype).name
            yield replace(embedding, factor=wrong), wrong, exact, name, embedding.factor


@mistake(Residual, "residual multiplier left out")
def _(residual: Residual, at: FailingSite) -> Changed | None:
    """Adds what the block computes as it is; it should multiply it by {0:.6g} first."""
    if residual.multiplier == 1:
        return None
    return replace(residual, multiplier=1.0), residual.multiplier


@mistake(Residual, "residual multiplier in the wrong place")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Multiplies {0} by residual_multiplier; it should multiply what the block computes."""
    by = residual.multiplier
    if by != 1:
        plain = replace(residual, multiplier=1.0)
        yield by_token(plain, lambda r: r.x * by + r.added), "the residual stream"
        yield by_token(plain, lambda r: (r.x + r.added) * by), "the sum"


@mistake(Residual, "residual multiplier divides")
def _(residual: Residual, at: FailingSite) -> Changed | None:
    """Divides by residual_multiplier; it should multiply by it."""
    by = residual.multiplier
    return None if by == 1 else replace(residual, multiplier=1 / by)


@mistake(Linear, "logits for what the head gives", roles=(HEAD,))
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """The array is the logits, scaled or capped; write it as logits, since lm_head is what the
    matrix gives."""
    if not at.config.changes_logits:
        return None
    logits: Any = logits_of(np.zeros((1, 1)), at.config)
    return evaluated(linear, lambda n: Logits.formula(replace(logits, products=Linear.formula(n))))


@mistake(Logits, "logits scaling multiplies")
def _(logits: Logits, at: FailingSite) -> Changed | None:
    """Multiplies the logits by {0:.6g}; it should divide them by it."""
    if logits.scaling == 1:
        return None
    return replace(logits, scaling=1 / logits.scaling), logits.scaling


@mistake(Logits, "logits not scaled")
def _(logits: Logits, at: FailingSite) -> Changed | None:
    """Leaves the logits as they are; it should divide them by {0:.6g}."""
    return None if logits.scaling == 1 else (replace(logits, scaling=1.0), logits.scaling)


@mistake(Logits, "cap of logits missing")
def _(logits: Logits, at: FailingSite) -> Changed | None:
    """Does not cap the logits; it should cap logits y as {0:g} tanh(y / {0:g})."""
    return None if logits.cap is None else (replace(logits, cap=None), logits.cap)


@mistake(Logits, "another cap of logits")
def _(logits: Logits, at: FailingSite) -> Iterator[Changed]:
    """Caps logits y {0}; it should cap them as {1:g} tanh(y / {1:g})."""
    if (cap := logits.cap) is None:
        return
    for wrong in {30.0, 50.0, 20.0, 15.0} - {cap}:
        yield replace(logits, cap=wrong), f"as {wrong:g} tanh(y / {wrong:g})", cap
    scaled = replace(logits, cap=None)
    yield evaluated(scaled, lambda n: (Logits.formula(n) / cap).apply(np.tanh)), "at 1", cap
    clipped = evaluated(scaled, lambda n: Logits.formula(n).apply(lambda y: np.clip(y, -cap, cap)))
    yield clipped, "by clipping", cap


@mistake(Attention | Scores, "cap of scores missing", common=1)
def _(attention: Attention | Scores, at: FailingSite) -> Changed | None:
    """Does not cap the scores; it should cap scores a as {0:g} tanh(a / {0:g})."""
    return None if attention.cap is None else (replace(attention, cap=None), attention.cap)


@mistake(Attention | Scores, "cap of scores before the scale")
def _(attention: Attention | Scores, at: FailingSite) -> Changed | None:
    """Caps the scores before it scales them; it should scale them first."""
    if (cap := attention.cap) is None:
        return None
    return replace(attention, cap=cap * attention.scale)
