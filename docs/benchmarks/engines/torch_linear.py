"""The linear map of torch: ``torch.nn.functional.linear``, all in one dtype."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

from llama_layers.bench.engine import Call, Engine
from llama_layers.bench.job import QKVJob

from .torch_arrays import tensor, to_numpy


def engine(job: QKVJob, threads: int, closing: ExitStack) -> Engine:
    """The fused projection."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    linear = torch.nn.functional.linear
    matrices = [tensor(w.fused) for w in job.weights]

    def prepare(size: int) -> Call:
        x = tensor(job.x(size)).to(matrices[0].dtype)
        with torch.inference_mode():
            linear(x, matrices[-1])

        def call() -> Any:
            with torch.inference_mode():
                for matrix in matrices:
                    y = linear(x, matrix)
            return y

        return call

    return Engine("torch", f"{job.dtype} throughout", prepare, to_numpy)
