"""Text to token ids and back, with the tokenizer that came with a checkpoint."""

from llama_layers.checkpoint.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
