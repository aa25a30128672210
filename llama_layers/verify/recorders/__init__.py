"""Traces of what other engines compute."""

from llama_layers.verify.recorders.hugging_face import record_transformers
from llama_layers.verify.recorders.llama_cpp import record_llama_cpp
from llama_layers.verify.recorders.numpy_files import read_arrays

__all__ = ["read_arrays", "record_llama_cpp", "record_transformers"]
