"""Rounding bounds, and results held against them."""

from llama_layers.verify.bounds import (
    Bound,
    attention_bound,
    embedding_bound,
    linear_bound,
    probabilities_bound,
    residual_bound,
    rms_norm_bound,
    rope_bound,
    scores_bound,
    softmax_bound,
    swiglu_bound,
    weighted_sum_bound,
)
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.qkv import Difference, QKVReport, Summary, examine_qkv, summarise

__all__ = [
    "Bound",
    "Difference",
    "Judgement",
    "QKVReport",
    "Summary",
    "attention_bound",
    "embedding_bound",
    "examine_qkv",
    "judge",
    "linear_bound",
    "probabilities_bound",
    "residual_bound",
    "rms_norm_bound",
    "rope_bound",
    "scores_bound",
    "softmax_bound",
    "summarise",
    "swiglu_bound",
    "weighted_sum_bound",
]
