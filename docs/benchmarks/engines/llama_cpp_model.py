"""Whole models in llama.cpp, through llama-cpp-python, from a GGUF file that is written for it."""

from __future__ import annotations

import importlib
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.engine import Engine, model_engine
from llama_layers.bench.job import ModelJob

from .gguf_writer import write_gguf


def engine(job: ModelJob, threads: int, closing: ExitStack) -> Engine:
    """The model of the job."""
    if job.batch > 1:
        raise ValueError("--against llama.cpp: runs one sequence only here; leave out --batch")
    directory = closing.enter_context(tempfile.TemporaryDirectory())
    file = Path(directory) / "model.gguf"
    write_gguf(file, job.model)
    return model_engine(_Model(file, job, threads, closing), job)


class _State(NamedTuple):
    """A context, and how many tokens of its cache count."""

    context: Any
    length: int


class _Model:
    name = "llama.cpp"

    def __init__(self, file: Path, job: ModelJob, threads: int, closing: ExitStack) -> None:
        self.file = file
        self.threads = threads
        self.closing = closing
        self.numbers = f"{job.dtype} weights, float32 activations, float16 cache"
        # The last layer computes only tokens whose logits are asked for: of one layer, hardly any.
        self.all_logits = job.kind == "layer"

    def start(self, length: int) -> _State:
        context = importlib.import_module("llama_cpp").Llama(
            str(self.file),
            n_ctx=length,
            n_batch=length,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            logits_all=self.all_logits,
            verbose=False,
        )
        self.closing.callback(context.close)
        return _State(context, 0)

    def copy(self, state: _State) -> _State:
        return state  # `eval` drops what it finds beyond the tokens that count

    def feed(self, state: _State, ids: NDArray[np.int64]) -> tuple[Any, _State]:
        context, length = state
        context.n_tokens = length
        context.eval(ids[0].tolist())
        return context, _State(context, length + ids.shape[1])

    def to_numpy(self, logits: Any) -> NDArray[Any]:
        pointer = logits._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, (logits.n_vocab(),)).copy()
