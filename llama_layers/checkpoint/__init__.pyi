from .conversion import convert
from .known_models import KnownModel, cache_directory, cached_path, known_models
from .loading import load
from .names import expected_tensors
from .opened import Checkpoint, TensorInfo
from .opening import load_tokenizer, open_checkpoint
from .pulling import pull
from .tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "KnownModel",
    "TensorInfo",
    "Tokenizer",
    "cache_directory",
    "cached_path",
    "convert",
    "expected_tensors",
    "known_models",
    "load",
    "load_tokenizer",
    "open_checkpoint",
    "pull",
]
