from .arrays.transfer import to_namespace
from .checkpoint import load
from .config.llama_config import LlamaConfig
from .config.rope_scaling import RopeScaling
from .errors import BackendError, CheckpointError, ConfigError, TraceError
from .layers.attention import attention
from .layers.cache import KVCache
from .layers.decoder import decoder_layer
from .layers.layer_cache import LayerCache
from .layers.linear import QKV, linear, qkv_projection
from .layers.mask import Mask
from .layers.mlp import geglu, mlp, swiglu
from .layers.norm import rms_norm
from .layers.rope import apply_rope, inv_freq, rope_table
from .layers.temperature import query_temperature
from .layers.weights import (
    AttentionWeights,
    LayerWeights,
    MLPWeights,
    QKVWeights,
)
from .model.embedding import embed
from .model.forward import Output, forward
from .model.generate import Step, generate
from .model.llama import Llama
from .model.logprobs import logprobs
from .model.sampling import sample
from .model.weights import LlamaWeights
from .verify import Report, Trace, check, compare, record

__version__: str

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
    "Step",
    "Trace",
    "TraceError",
    "apply_rope",
    "attention",
    "check",
    "compare",
    "decoder_layer",
    "embed",
    "forward",
    "geglu",
    "generate",
    "inv_freq",
    "linear",
    "load",
    "logprobs",
    "mlp",
    "qkv_projection",
    "query_temperature",
    "record",
    "rms_norm",
    "rope_table",
    "sample",
    "swiglu",
    "to_namespace",
]
