"""Names in a trace that no site of the model has, and what they probably mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import Site, sites
from llama_layers.verify.not_sites import no_site
from llama_layers.verify.past import past_names
from llama_layers.verify.stored import StoredArrays, stored
from llama_layers.verify.trace import Trace

# How many names a message lists.
_LISTED = 5
# The names that others give to the inputs and outputs of a whole model, and ours.
_MEANINGS = {
    "attentions": "a layer's self_attn.probabilities",
    "hidden_state": "a layer's output, such as model.layers.0",
    "last_hidden_state": "model.norm",
    "final_hidden_state": "model.norm",
    "input_embeds": "model.embed_tokens",
    "inputs_embeds": "model.embed_tokens",
    "embedding": "model.embed_tokens",
    "embeddings": "model.embed_tokens",
    "logit": "lm_head",
    "logits": "lm_head",
    "lm_logits": "lm_head",
    "scores": "a layer's self_attn.scores; or lm_head",
    "id": "input_ids",
    "ids": "input_ids",
    "input_id": "input_ids",
    "input_tokens": "input_ids",
    "prompt_ids": "input_ids",
    "token_ids": "input_ids",
    "tokens": "input_ids",
    "mask": "attention_mask",
    "padding_mask": "attention_mask",
    "pos": "positions",
    "position": "positions",
    "pos_ids": "positions",
    "position_id": "positions",
    "position_ids": "positions",
    "cache_position": "positions",
}  # fmt: skip
_HIDDEN_STATE = re.compile(r"(?:all_)?hidden_states?(?:[._\[-]+(\d{1,9})\]?)?")


def check_names(arrays: Mapping[str, Array], config: LlamaConfig) -> None:
    """Raise TraceError for names that no site has, and say what they probably mean."""
    if unknown := unknown_names(arrays, config):
        raise TraceError(
            "trace: expected names of sites of this model (--ignore-unknown, in Python "
            f"ignore_unknown=True, leaves others out), got {told(unknown, config)}"
        )
    if not any(site.name in arrays for site in sites(config)):
        raise TraceError("trace: expected at least one site of the model, got none")


def without_unknown(trace: Trace, config: LlamaConfig) -> Trace:
    """Return a trace without the arrays whose names no site of a model has."""
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace, got {type(trace).__name__}")
    unknown = unknown_names(trace.arrays, config)
    if unknown and len(unknown) == len(trace.arrays):
        raise TraceError(
            f"trace: expected at least one site of the model, got {told(unknown, config)}"
        )
    return only_sites(trace, set(trace.arrays).difference(unknown))


def only_sites(trace: Trace, names: Collection[str]) -> Trace:
    """Return a trace with those of its arrays that have one of some names."""
    if isinstance(trace.arrays, dict):
        return replace(trace, arrays={n: a for n, a in trace.arrays.items() if n in names})
    kept = {name: stored(trace.arrays, name) for name in trace.arrays if name in names}
    return replace(trace, arrays=StoredArrays(kept))


def unknown_names(names: Iterable[str], config: LlamaConfig) -> list[str]:
    """Return the names that no site has, nor the past, in order."""
    known = {*(site.name for site in sites(config)), *past_names(config)}
    return sorted(name for name in names if name not in known)


def told(unknown: list[str], config: LlamaConfig) -> str:
    """List the first of some unknown names, with what they probably mean.

    What is the same in many layers is said once.
    """
    known = {site.name: site for site in sites(config)}
    alike: dict[str, list[str]] = {}
    for name in unknown:
        alike.setdefault(re.sub(r"(?<=[.-])\d+(?=\.|$)", "{}", name[:200], count=1), []).append(
            name
        )
    said = [_with_suggestion(names[0], known) for names in list(alike.values())[:_LISTED]]
    more = len(unknown) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more > 0 else "")


def _with_suggestion(name: str, known: Mapping[str, Site]) -> str:
    if (reason := no_site(name)) is not None:
        return f"{name!r} (no site: {reason})"
    count = 1 + max(site.layer for site in known.values() if site.layer is not None)
    layer = re.match(r"model\.layers\.(\d+)(?=\.|$)", name)
    if layer is not None and (len(layer[1]) > 9 or int(layer[1]) >= count):
        return f"{name!r} (layers are 0 to {count - 1})"
    meaning = _meaning(name, count)
    if meaning is not None:
        return f"{name!r} (did you mean {meaning}?)"
    close = difflib.get_close_matches(name[:200], known, n=1)
    return f"{name!r} (is it {close[0]!r}?)" if close else repr(name)


def _meaning(name: str, count: int) -> str | None:
    """Return what other projects mean by a name, in a model of `count` layers."""
    plain = name.lower().removeprefix("model.").removeprefix("outputs.")
    hidden = _HIDDEN_STATE.fullmatch(plain)
    if hidden is None or plain in _MEANINGS:
        return _MEANINGS.get(plain)
    if hidden[1] is None:
        return (
            f"model.embed_tokens for the first of them, model.layers.0 to model.layers.{count - 2} "
            "for the next, and model.norm for the last"
        )
    number = int(hidden[1])
    if number > count:
        return None
    return {0: "model.embed_tokens", count: "model.norm"}.get(number, f"model.layers.{number - 1}")
