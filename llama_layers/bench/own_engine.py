"""Our own engine: the public functions, with whatever bodies are active."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from array_api_compat import is_cupy_array
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.bench.engine import Call, Engine, drawing_engine, model_engine
from llama_layers.bench.job import Job, ModelJob, QKVJob, placed
from llama_layers.layers.cache import KVCache
from llama_layers.layers.linear import QKV, qkv_projection
from llama_layers.model.forward import forward
from llama_layers.model.generate import generate

NAME = "llama_layers"


def engine(job: Job, threads: int, closing: ExitStack) -> Engine:
    """Make it ready for a job; threads are set for the whole process."""
    if isinstance(job, QKVJob):
        return _projection(job, _numbers(job.dtype, job.weights[0].fused))
    runner = _Model(job, _numbers(job.dtype, job.model.weights.embed_tokens))
    if job.draws:
        return drawing_engine(runner, job)
    return model_engine(runner, job)


def _numbers(dtype: str, weight: Array) -> str:
    if is_cupy_array(weight):
        return f"{dtype} weights and activations, float32 sums"
    return f"{dtype} weights, float32 activations and sums"


def _projection(job: QKVJob, numbers: str) -> Engine:
    def prepare(size: int) -> Call:
        x = job.x(size)
        qkv_projection(x, job.weights[-1])

        def call() -> QKV:
            for w in job.weights:
                qkv = qkv_projection(x, w)
            return qkv

        return call

    def joined(qkv: QKV) -> np.ndarray:
        return np.concatenate([to_numpy(a).reshape(*a.shape[:2], -1) for a in qkv], axis=2)

    return Engine(NAME, numbers, prepare, joined)


class _Model:
    """The forward pass."""

    name = NAME

    def __init__(self, job: ModelJob, numbers: str) -> None:
        self.model = job.model
        self.numbers = numbers
        self.batch = job.batch

    def start(self, length: int) -> KVCache:
        return KVCache.create(self.model, self.batch, length)

    def copy(self, state: KVCache) -> KVCache:
        # On a GPU, where memory is short and graphs know a cache by its address, the same memory is
        # used again: feeding overwrites what comes after the tokens that count.
        return state if is_cupy_array(state.keys[0]) else state.copy()

    def feed(self, state: KVCache, ids: NDArray[np.int64]) -> tuple[Array, KVCache]:
        logits, cache = forward(self.model, self._placed(ids), cache=state, last_only=True)
        assert cache is not None  # since one was given
        return logits, cache

    def draw(self, state: KVCache, ids: NDArray[np.int64], count: int) -> Call:
        # One more than asked for: as long as any is left, one is always asked for beforehand.
        steps = generate(
            self.model, self._placed(ids), max_new_tokens=count + 1, cache=state, eos_token_id=()
        )
        return lambda: next(steps)

    def to_numpy(self, logits: Array) -> np.ndarray:
        return to_numpy(logits)

    def _placed(self, ids: NDArray[np.int64]) -> Array:
        return placed(ids, self.model.weights.embed_tokens)
