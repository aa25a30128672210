"""Traces of what other engines compute."""

from llama_layers.verify.recorders.hugging_face import record_transformers

__all__ = ["record_transformers"]
