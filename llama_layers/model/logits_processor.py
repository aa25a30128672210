"""A caller's function between the logits and the token that is drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from llama_layers.arrays.checks import check_like
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array

LogitsProcessor: TypeAlias = Callable[[Any, Any], Any]
"""Takes the ids [B, n] so far and logits [B, vocab_size], and returns other logits."""


class Processing:
    """A logits processor, and the ids that it is called with."""

    def __init__(self, processor: LogitsProcessor, input_ids: Array) -> None:
        if not callable(processor):
            raise TypeError(
                f"logits_processor: expected a callable or None, got {type(processor).__name__}"
            )
        xp = namespace(input_ids=input_ids)
        self._processor = processor
        # In the dtype of drawn ids: a narrow one may not hold them.
        self._ids = xp.astype(input_ids, xp.asarray(0).dtype, copy=True)

    def __call__(self, logits: Array) -> Array:
        """Return what the processor makes of the logits that follow the ids."""
        processed = self._processor(self._ids, logits)
        check_like("logits_processor", processed, logits)
        xp = namespace(logits=processed)
        if bool(xp.any(xp.all(processed == -math.inf, axis=-1))):
            raise ValueError("logits_processor: expected a token for each sequence, got all -inf")
        return processed

    def add(self, ids: Array) -> None:
        """Take the next id of each sequence."""
        xp = namespace(ids=ids)
        column = xp.expand_dims(xp.astype(ids, self._ids.dtype, copy=False), axis=1)
        self._ids = xp.concat([self._ids, column], axis=1)
