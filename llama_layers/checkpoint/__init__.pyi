from .checkpoint import Checkpoint, TensorInfo
from .convert import convert
from .known_models import KnownModel, cache_directory, cached_path, known_models
from .load import load
from .names import expected_tensors
from .open import load_tokenizer, open_checkpoint
from .pull import pull
from .tokenizer.tokenizer import Tokenizer

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
