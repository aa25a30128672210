"""Rounding bounds, and results held against them."""

from llama_layers.verify.bounds import Bound, linear_bound, rms_norm_bound

__all__ = ["Bound", "linear_bound", "rms_norm_bound"]
