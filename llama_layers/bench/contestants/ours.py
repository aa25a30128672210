"""Ourselves, through the public functions: whatever bodies are active are measured."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.contestants.contestant import Call, Contestant, model_contestant
from llama_layers.bench.job import Job, ModelJob, QKVJob
from llama_layers.cache import KVCache
from llama_layers.model import forward
from llama_layers.projection import QKV, qkv_projection

NAME = "llama_layers"


def contestant(job: Job, threads: int, closing: ExitStack) -> Contestant:
    """The job in llama_layers on NumPy; threads are set for the whole process."""
    numbers = f"{job.dtype} weights, float32 activations and sums"
    if isinstance(job, ModelJob):
        return model_contestant(_Model(job, numbers), job)
    return _projection(job, numbers)


def _projection(job: QKVJob, numbers: str) -> Contestant:
    def prepare(size: int) -> Call:
        x = job.x(size)
        qkv_projection(x, job.weights[-1])

        def call() -> QKV:
            for w in job.weights:
                qkv = qkv_projection(x, w)
            return qkv

        return call

    def to_numpy(qkv: QKV) -> NDArray[Any]:
        return np.concatenate([a.reshape(*a.shape[:2], -1) for a in qkv], axis=2)

    return Contestant(NAME, numbers, prepare, to_numpy)


class _Model:
    """The forward pass."""

    name = NAME

    def __init__(self, job: ModelJob, numbers: str) -> None:
        self.model = job.model
        self.numbers = numbers

    def start(self, length: int) -> KVCache:
        return KVCache.create(self.model, 1, length)

    def copy(self, state: KVCache) -> KVCache:
        return state.copy()

    def feed(self, state: KVCache, ids: NDArray[np.int64]) -> tuple[Any, KVCache]:
        logits, cache = forward(self.model, ids, cache=state, last_only=True)
        assert cache is not None  # since one was given
        return logits, cache

    def to_numpy(self, logits: Any) -> NDArray[Any]:
        return np.asarray(logits)
