from .checkpoint import load
from .config import LlamaConfig
from .errors import CheckpointError, ConfigError
from .model import Llama, embed
from .norm import rms_norm
from .projection import QKV, linear, qkv_projection
from .rope_scaling import RopeScaling
from .weights import (
    AttentionWeights,
    LayerWeights,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
)

__all__ = [
    "QKV",
    "AttentionWeights",
    "CheckpointError",
    "ConfigError",
    "LayerWeights",
    "Llama",
    "LlamaConfig",
    "LlamaWeights",
    "MLPWeights",
    "QKVWeights",
    "RopeScaling",
    "embed",
    "linear",
    "load",
    "qkv_projection",
    "rms_norm",
]
