"""Tokens drawn on the GPU and fed back there, one always ahead of those that the CPU has seen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy import launch
from llama_layers.backends.cupy.decode import Replay, Step, fits
from llama_layers.backends.libraries import CupyArray, cupy
from llama_layers.backends.trust import takes
from llama_layers.layers.cache import KVCache
from llama_layers.layers.rope import rope_table
from llama_layers.layers.tap import untouched
from llama_layers.model.generate import Start
from llama_layers.model.llama import Llama


class Tokens(NamedTuple):
    """The tokens that a step draws."""

    ids: CupyArray
    """On the device [B]."""
    host: NDArray[np.int32]
    """In main memory, once the event has come."""
    event: Any


class TokenStep(Step):
    """From token ids to the next ones, which replace them.

    Logits are float32 here, and not rounded before a token is drawn from them.
    """

    def __init__(self, model: Llama, cache: KVCache, uniforms: np.ndarray, temperature: float):
        xp = cupy()
        super().__init__(model, cache)
        self.weights = model.weights
        self.temperature = np.float32(temperature)
        self.stream = xp.cuda.get_current_stream()
        sequences = self.x.shape[0]
        self.ids = xp.empty((sequences,), dtype=xp.int32)
        self.logits = xp.empty((sequences, self.weights.lm_head.shape[0]), dtype=xp.float32)
        self.shares = launch.draw_scratch(*self.logits.shape)
        self.uniforms, self.drawn = xp.asarray(uniforms), xp.zeros((1,), dtype=xp.int32)
        memory = xp.cuda.alloc_pinned_memory(2 * 4 * sequences)
        self.host = np.frombuffer(memory, np.int32, 2 * sequences).reshape(2, sequences)
        self.started = 0

        self.length.fill(cache.length)
        first = np.full(sequences, cache.length)
        if cache.counts is not None:
            first = to_numpy(cache.counts)
        positions = np.arange(first.min(), first.max() + len(uniforms))
        self.cos, self.sin = rope_table(positions, model.config, like=self.x)
        self.rows = xp.asarray((first - first.min()).astype(np.int32))
        if cache.keep is not None:  # later tokens are never padding
            cache.keep[:, cache.length :] = True
        self.replay = Replay(self._launch)

    def _launch(self) -> None:
        launch.embed(self.ids, self.weights.embed_tokens, self.x)
        self.launch_layers(self.cos, self.sin)
        launch.norm(self.x, self.weights.norm, self.normed, self.config.rms_norm_eps)
        launch.gemv(self.normed, self.weights.lm_head, self.logits)
        if self.temperature == 0:
            launch.argmax(self.logits, self.ids, self.shares)
        else:
            launch.sample(
                self.logits, self.uniforms, self.drawn, self.temperature, self.ids, self.shares
            )
        launch.advance(self.length, self.rows, self.drawn)

    def start(self) -> Tokens:
        """Ask for the next tokens, and do not wait for them."""
        host = self.host[self.started % 2]
        self.started += 1
        with self.stream:
            self.replay()
            ids = self.ids.astype(np.int64)
            self.ids.get(out=host, blocking=False)
            return Tokens(ids, host, self.stream.record())


@takes(lambda xp, start: start.used is None and _offered(start))
def decode_loop(xp: Namespace, start: Start) -> Iterator[tuple[CupyArray, CupyArray, None]]:
    """The definition's tokens, those after the first from a graph for all of a step.

    They are drawn with the numbers that the definition would draw them with; a copy of the
    generator gives them beforehand.
    """
    ids = start.sampling.draw(start.logits)
    yield ids, to_numpy(ids), None
    if start.max_new_tokens == 1:
        return
    rng, temperature = start.sampling.rng, float(start.sampling.temperature)
    uniforms = copy.deepcopy(rng).random((start.max_new_tokens - 1, ids.shape[0]))
    step = TokenStep(start.model, start.cache, uniforms, temperature)
    step.ids[...] = ids
    tokens = step.start()
    try:
        for left in reversed(range(start.max_new_tokens - 1)):
            ahead = step.start() if left else tokens
            tokens.event.synchronize()
            if (tokens.host < 0).any():
                raise ValueError("logits: expected numbers, got NaN or, to sample, an infinity")
            if temperature != 0:
                rng.random(ids.shape)
            yield tokens.ids, tokens.host.copy(), None
            tokens = ahead
    finally:
        step.stream.synchronize()  # before the memory of a step that still runs goes


def _offered(start: Start) -> bool:
    """Whether the kernels can draw like this from this model."""
    model, cache, sampling = start.model, start.cache, start.sampling
    if start.tap is not untouched or start.processor is not None or start.logprobs:
        return False
    if any(option is not None for option in (sampling.top_k, sampling.top_p, sampling.min_p)):
        return False
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.depends_on_length:  # each length has its own table
        return False
    if cache.keep is not None and cache.window is not None:  # a ring forgets padding step by step
        return False
    weights = model.weights
    others: tuple[CupyArray, ...] = (weights.embed_tokens, weights.norm, weights.lm_head)
    same = all(a.dtype == cache.keys[0].dtype and a.flags.c_contiguous for a in others)
    return same and fits(model, cache)
