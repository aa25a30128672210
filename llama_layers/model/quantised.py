"""Which tensors do not belong to a plain model: quantised weights, and adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llama_layers.config.refusals import quantised

# The names that each method gives its tensors; the first that matches counts.
_METHODS = {
    "bitsandbytes": r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\S+)|\.SCB",
    "GPTQ": r"\.g_idx",
    "AWQ or GPTQ": r"\.(qweight|qzeros)",
    "compressed-tensors": r"\.weight_(packed|shape|zero_point|global_scale)",
    "fp8 with a scale for each block": r"\.weight_scale_inv",
    "NVIDIA ModelOpt": r"\.weight_scale_2",
    "8-bit weights with scales": r"\.(weight_scale|input_scale|activation_scale)",
    "HQQ": r"\.W_q",
    "EXL2 or EXL3": r"\.(q_weight|q_scale|trellis)",
    "AQLM": r"\.codebooks",
    "MLX": r"\.scales",
}
_QUANTISED_DTYPE = re.compile(r"(f|float|i|int|u|uint)[468](_?e\d.*)?|(i|int|u|uint)(16|32)", re.I)
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")

ADAPTER = (
    "a LoRA adapter, which is not a whole model: merge it into its base model with peft's "
    "merge_and_unload and save_pretrained, and load that"
)


def why_not_plain(dtypes: Mapping[str, str]) -> str | None:
    """Say which tensors are quantised, or belong to an adapter; None if all are plain.

    The dtypes are named as in safetensors or in an array library.
    """
    for name in dtypes:
        if _ADAPTER.search(name):
            return f"{name}: {ADAPTER}"
    for method, pattern in _METHODS.items():
        ending = re.compile(f"({pattern})$")
        for name in dtypes:
            if ending.search(name):
                return f"{name}: {quantised(method)}"
    for name, dtype in dtypes.items():
        if _QUANTISED_DTYPE.fullmatch(dtype):
            return f"{name}: {quantised(dtype)}"
    return None
