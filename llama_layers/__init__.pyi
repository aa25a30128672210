from .attend import attention
from .cache import KVCache
from .checkpoint import load
from .config import LlamaConfig
from .embedding import embed
from .errors import BackendError, CheckpointError, ConfigError, TraceError
from .feed_forward import mlp, swiglu
from .generation import generate
from .layer import decoder_layer
from .layer_cache import LayerCache
from .llama import Llama
from .mask import Mask
from .model import Output, forward
from .norm import rms_norm
from .projection import QKV, linear, qkv_projection
from .rope import apply_rope, inv_freq, rope_table
from .rope_scaling import RopeScaling
from .sampling import sample
from .verify import Report, Trace, check, compare, record
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
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "KVCache",
    "LayerCache",
    "LayerWeights",
    "Llama",
    "LlamaConfig",
    "LlamaWeights",
    "MLPWeights",
    "Mask",
    "Output",
    "QKVWeights",
    "Report",
    "RopeScaling",
    "Trace",
    "TraceError",
    "apply_rope",
    "attention",
    "check",
    "compare",
    "decoder_layer",
    "embed",
    "forward",
    "generate",
    "inv_freq",
    "linear",
    "load",
    "mlp",
    "qkv_projection",
    "record",
    "rms_norm",
    "rope_table",
    "sample",
    "swiglu",
]
