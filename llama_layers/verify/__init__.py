"""Rounding bounds, and results held against them."""

from llama_layers.verify.bounds import Bound, linear_bound, rms_norm_bound
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.qkv import Difference, QKVReport, Summary, examine_qkv, summarise

__all__ = [
    "Bound",
    "Difference",
    "Judgement",
    "QKVReport",
    "Summary",
    "examine_qkv",
    "judge",
    "linear_bound",
    "rms_norm_bound",
    "summarise",
]
