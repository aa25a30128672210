"""Decoding in transformers with a static cache, and the pass of a token by ``torch.compile``."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.engine import Call, Engine, drawing_engine
from llama_layers.bench.job import ModelJob

from .transformers_model import Model

# Captured in CUDA graphs, as `generate` of transformers has it.
COMPILED = {"mode": "reduce-overhead", "fullgraph": True}


def engine(job: ModelJob, threads: int, closing: ExitStack) -> Engine:
    """The model of the job."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return drawing_engine(_Compiled(job, torch), job)


class _State(NamedTuple):
    """A cache, and how many of its tokens count."""

    cache: Any
    length: int


class _Compiled(Model):
    name = "transformers-compiled"

    def __init__(self, job: ModelJob, torch: Any) -> None:
        super().__init__(job, torch)
        self.numbers = f"{job.dtype} throughout, static cache, torch.compile"
        self.compiled = torch.compile(self.model, **COMPILED)

    def start(self, length: int) -> _State:
        cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=length)
        return _State(cache, 0)

    def copy(self, state: _State) -> _State:
        return state  # what comes after the tokens that count is overwritten

    def feed(self, state: _State, ids: NDArray[np.int64]) -> tuple[Any, _State]:
        cache, length = state
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        with self.torch.no_grad():  # compiled code changes the cache in place
            given = self.torch.from_numpy(ids).to(self.device)
            logits, cache = self.passed(self.model, cache, given)
        return logits, _State(cache, length + ids.shape[1])

    def draw(self, state: _State, ids: NDArray[np.int64], count: int) -> Call:
        logits, (cache, _) = self.feed(state, ids)

        def step() -> None:
            nonlocal logits
            with self.torch.no_grad():
                drawn = logits[:, -1].argmax(-1)[:, None]
                self.torch.compiler.cudagraph_mark_step_begin()
                logits, _ = self.passed(self.compiled, cache, drawn)

        return step
