"""Tensor parallelism: each rank computes some heads and some channels of the MLP of every layer."""

from llama_layers.parallel.plan import Shard
from llama_layers.parallel.threads import ThreadGroup, run_ranks
from llama_layers.parallel.weights import sharded

__all__ = ["Shard", "ThreadGroup", "run_ranks", "sharded"]
