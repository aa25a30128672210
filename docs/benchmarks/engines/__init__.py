"""Other engines for ``llama-layers bench --against``.

A module here has a function ``engine(job, threads, closing)``, which makes the engine ready for a
job. A checkout finds this directory by itself; an installed ``llama-layers`` is told of it by
``LLAMA_LAYERS_ENGINES``.
"""

from __future__ import annotations

from llama_layers.bench.engines import OtherEngine

_TRANSFORMERS = {"transformers": "transformers", "torch": "torch"}
ENGINES = {
    "torch": OtherEngine(("qkv",), {"torch": "torch"}, f"{__name__}.torch_linear", on_gpu=("qkv",)),
    "onnxruntime": OtherEngine(
        ("qkv",), {"onnxruntime": "onnxruntime", "onnx": "onnx"}, f"{__name__}.onnxruntime_linear"
    ),
    "openvino": OtherEngine(("qkv",), {"openvino": "openvino"}, f"{__name__}.openvino_linear"),
    "transformers": OtherEngine(
        ("layer", "decode", "prefill"),
        _TRANSFORMERS,
        f"{__name__}.transformers_model",
        on_gpu=("layer", "decode", "prefill"),
    ),
    "transformers-compiled": OtherEngine(
        (), _TRANSFORMERS, f"{__name__}.compiled_model", on_gpu=("decode",)
    ),
    "llama.cpp": OtherEngine(
        ("layer", "decode", "prefill"),
        {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
        f"{__name__}.llama_cpp_model",
    ),
}
