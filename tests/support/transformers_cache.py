"""How a model of transformers is given a cache."""

from __future__ import annotations

import inspect


def cached(model, cache):
    """The argument by its name: ``past_key_values`` before transformers 5.24."""
    named = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if named else "past_key_values": cache}
