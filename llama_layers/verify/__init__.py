"""Rounding bounds, results held against them, and ports held against a model."""

from llama_layers.layers.sites import Site, sites
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
    geglu_bound,
    linear_bound,
    residual_bound,
    rms_norm_bound,
    rope_bound,
    swiglu_bound,
)
from llama_layers.verify.check import check
from llama_layers.verify.compare import compare
from llama_layers.verify.extent import Extent
from llama_layers.verify.join import JoinedTrace, join_ranks
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.place import Place
from llama_layers.verify.profiles import Rounding, RoundingProfile
from llama_layers.verify.qkv import examine_qkv
from llama_layers.verify.record import record
from llama_layers.verify.report import (
    Comparison,
    Element,
    Explanation,
    LogprobDifference,
    NormalDifference,
    Remedy,
    Report,
    SiteContribution,
    SiteDifference,
    SiteResult,
    TokenDifference,
    to_html,
    write_html,
)
from llama_layers.verify.trace import Trace

__all__ = [
    "Bound",
    "Comparison",
    "Element",
    "Explanation",
    "Extent",
    "JoinedTrace",
    "Judgement",
    "LogprobDifference",
    "NormalDifference",
    "Place",
    "Remedy",
    "Report",
    "Rounding",
    "RoundingProfile",
    "Site",
    "SiteContribution",
    "SiteDifference",
    "SiteResult",
    "TokenDifference",
    "Trace",
    "attention_bound",
    "check",
    "compare",
    "embedding_bound",
    "examine_qkv",
    "geglu_bound",
    "join_ranks",
    "judge",
    "linear_bound",
    "probabilities_bound",
    "record",
    "residual_bound",
    "rms_norm_bound",
    "rope_bound",
    "scores_bound",
    "sites",
    "softmax_bound",
    "swiglu_bound",
    "to_html",
    "weighted_sum_bound",
    "write_html",
]
