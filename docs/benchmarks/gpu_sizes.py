"""How large all is that gpu.py measures: as on a GPU, or as in a test."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_layers import LlamaConfig


@dataclass(frozen=True)
class Sizes:
    """Models and counts.

    Attributes
    ----------
    large, grouped, small : LlamaConfig
        A model of 7B without grouped heads, one of 8B with them, and one whose tokens take less
        time than a launch by Python.
    contexts : tuple of int
        Tokens before those that are decoded.
    prompt : int
        Tokens of a prompt.
    rounds, tokens : int
        Of a benchmark.
    rows : int
        Of x in a product.
    copies : int
        Of weights, which take turns.
    replays, repeats, endurance : int
        How often bits are compared, and tokens drawn in a row.
    uploaded, part : int
        Bytes to the GPU, and those that a thread reads at once.
    """

    large: LlamaConfig = field(default_factory=LlamaConfig.llama2_7b)
    grouped: LlamaConfig = field(default_factory=LlamaConfig.llama3_8b)
    small: LlamaConfig = field(default_factory=LlamaConfig.smollm2_135m)
    contexts: tuple[int, ...] = (512, 8192)
    prompt: int = 2048
    rounds: int = 5
    tokens: int = 16
    rows: int = 2048
    copies: int = 8
    replays: int = 1000
    repeats: int = 50
    endurance: int = 10_000
    uploaded: int = 2 << 30
    part: int = 4 << 20
