"""The exact result of each operation, and the bound on the error of a computed one.

One function for each operation, for arrays at hand. All take what is stated of the engine's formats
and roundings as keywords: those of `Rounding.of`.
"""

from llama_layers.verify.bound import Bound
from llama_layers.verify.bounds.attention import (
    attention_bound,
    probabilities_bound,
    scores_bound,
    softmax_bound,
    weighted_sum_bound,
)
from llama_layers.verify.bounds.layer import (
    embedding_bound,
    linear_bound,
    residual_bound,
    rms_norm_bound,
    rope_bound,
    swiglu_bound,
)

__all__ = [
    "Bound",
    "attention_bound",
    "embedding_bound",
    "linear_bound",
    "probabilities_bound",
    "residual_bound",
    "rms_norm_bound",
    "rope_bound",
    "scores_bound",
    "softmax_bound",
    "swiglu_bound",
    "weighted_sum_bound",
]
