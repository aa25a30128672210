"""OpenVINO: a MatMul with constant weights, on its CPU plugin."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import numpy as np

from llama_layers.bench.engine import Call, Engine
from llama_layers.bench.job import QKVJob

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


def engine(job: QKVJob, threads: int, closing: ExitStack) -> Engine:
    """The fused projection: a compiled model for each copy of the weights."""
    openvino: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[job.dtype] not in able:
        raise ValueError(
            f"--against openvino: cannot compute in {job.dtype} on this processor "
            f"(it says {', '.join(able)})"
        )
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[job.dtype],
    }
    requests: list[Any] = []
    for w in job.weights:
        x = ops.parameter([-1, w.hidden_size], np.float32)
        matrix = ops.constant(w.fused.astype(np.float32))
        model = openvino.Model([ops.matmul(x, matrix, False, True)], [x])
        requests.append(core.compile_model(model, "CPU", config).create_infer_request())

    def prepare(size: int) -> Call:
        x = job.x(size)[0]
        requests[-1].infer([x], share_inputs=True, share_outputs=True)

        def call() -> Any:
            for request in requests:
                result = request.infer([x], share_inputs=True, share_outputs=True)
            return result[0]

        return call

    numbers = "float32 throughout"
    if job.dtype != "float32":
        numbers = f"{job.dtype} inside, float32 in and out"
    return Engine("openvino", numbers, prepare)
