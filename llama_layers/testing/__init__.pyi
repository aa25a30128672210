from .assertions import UnusualErrorWarning, assert_same_bits, assert_within_bound
from .reference import assert_matches_reference
from .strategies import arrays, configs, hidden_states, input_ids, qkv_weights

__all__ = [
    "UnusualErrorWarning",
    "arrays",
    "assert_matches_reference",
    "assert_same_bits",
    "assert_within_bound",
    "configs",
    "hidden_states",
    "input_ids",
    "qkv_weights",
]
