"""How far a correct result can lie from the exact one, operation by operation."""

from llama_layers.verify.bounds.attention import attention_bound, weighted_sum_bound
from llama_layers.verify.bounds.bound import Bound, gamma, usual_growth
from llama_layers.verify.bounds.linear import linear_bound
from llama_layers.verify.bounds.norm import rms_norm_bound
from llama_layers.verify.bounds.pointwise import embedding_bound, residual_bound, swiglu_bound
from llama_layers.verify.bounds.rope import rope_bound
from llama_layers.verify.bounds.scores import scores_bound
from llama_layers.verify.bounds.softmax import probabilities_bound, softmax_bound

__all__ = [
    "Bound",
    "attention_bound",
    "embedding_bound",
    "gamma",
    "linear_bound",
    "probabilities_bound",
    "residual_bound",
    "rms_norm_bound",
    "rope_bound",
    "scores_bound",
    "softmax_bound",
    "swiglu_bound",
    "usual_growth",
    "weighted_sum_bound",
]
