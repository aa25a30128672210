"""ONNX Runtime: a MatMul with constant weights, on its CPU provider."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import numpy as np

from llama_layers.bench.engine import Call, Engine
from llama_layers.bench.job import QKVJob

# The opset that the graph is written in; any that has MatMul would do.
OPSET = 17


def engine(job: QKVJob, threads: int, closing: ExitStack) -> Engine:
    """The fused projection: one session, in which every copy of the weights is a node."""
    if job.dtype != "float32":
        raise ValueError(
            f"--against onnxruntime: multiplies float32 only on CPUs, and the weights are "
            f"{job.dtype}"
        )
    onnxruntime: Any = importlib.import_module("onnxruntime")
    outputs, inputs = job.weights[0].fused.shape
    names = [f"W{i}" for i in range(len(job.weights))]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    matrices = [np.ascontiguousarray(w.fused.T) for w in job.weights]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(matrix) for matrix in matrices]
    options.add_external_initializers(names, values)
    session = onnxruntime.InferenceSession(
        _graph(names, inputs, outputs).SerializeToString(), options, ["CPUExecutionProvider"]
    )

    def prepare(size: int) -> Call:
        feeds = {"x": job.x(size)[0]}
        session.run(None, feeds)
        return lambda: session.run(None, feeds)[-1]

    return Engine("onnxruntime", "float32 throughout", prepare)


def _graph(names: list[str], inputs: int, outputs: int) -> Any:
    """``y_i = x @ W_i``, with weights that are given to the session."""
    onnx: Any = importlib.import_module("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = []
    for name in names:
        weight = onnx.TensorProto(name=name, data_type=kind, dims=[inputs, outputs])
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="given to the session")
        weights.append(weight)
    nodes = [helper.make_node("MatMul", ["x", name], [f"y_{name}"]) for name in names]
    results = [helper.make_tensor_value_info(f"y_{name}", kind, ["S", outputs]) for name in names]
    x = helper.make_tensor_value_info("x", kind, ["S", inputs])
    graph = helper.make_graph(nodes, "copies", [x], results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
