"""Whole models through the bodies that take all layers, or all of a step, at once.

No derived bound exists for a whole model: layer by layer its worst case grows beyond all use. So
the allowed error is a multiple of the definition's own in the same formats, against the same pass
in float64: 4 times its largest, since another order of summation moves an error by no more than a
few times its size, and 8 roundings of the largest number, for where it is near zero by chance.
Wrong masks, positions or weights are off by many times that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dispatch import Function, definitions, only
from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.cache import KVCache
from llama_layers.model.forward import forward
from llama_layers.model.generate import generate
from llama_layers.model.llama import Llama
from llama_layers.trial.models import EVEN, ODD, Move, TinyModel
from llama_layers.trial.place import Outcome, Place

ALLOWED, ROUNDINGS = 4, 8


@dataclass(frozen=True)
class Feed:
    """Tokens, and where each part of them ends."""

    ids: np.ndarray
    cuts: tuple[int, ...]
    keep: NDArray[np.bool_] | None = None


def _feed(batch: int, count: int, cuts: tuple[int, ...], padded: bool) -> Feed:
    ids = np.random.default_rng(0).integers(0, EVEN.vocab_size, (batch, count))
    starts = 3 * np.arange(batch)[:, None]
    return Feed(ids, (*cuts, count), np.arange(count) >= starts if padded else None)


STEPS = (5, 8, 9, 10, 11)
SHORT, PADDED = _feed(3, 12, STEPS, False), _feed(2, 12, STEPS, True)
# More keys than a piece of attention holds, of any body.
LONG = _feed(1, 261, (256, 257, 258, 260), False)


def decoder_layers(body: Function, place: Place) -> Iterator[Outcome]:
    """A few tokens at a time after others, in every format of the weights."""
    cases = (
        ("float32", EVEN, PADDED),
        ("bfloat16", EVEN, PADDED),
        ("float16", EVEN, PADDED),
        ("float32", ODD, SHORT),
        ("float32", EVEN, LONG),
    )
    for name, config, feed in cases:
        if name == "float32" and not place.single_products:
            continue
        label = f"{name}, {feed.ids.shape[0]} sequences of {feed.ids.shape[1]} tokens"
        found = _layers_outcome(body, TinyModel(config, name, place), feed, label)
        if found is not None:
            yield found
    found = _layers_outcome(
        body, TinyModel(EVEN, "float32", place, 1e25), SHORT, "scores that overflow"
    )
    if found is not None:
        yield found


def _layers_outcome(body: Function, model: TinyModel, feed: Feed, label: str) -> Outcome | None:
    computed = _run(model.there, feed, model.place.array, body)
    if not computed.served:
        return None
    kept = np.ones(feed.ids.shape, bool) if feed.keep is None else feed.keep
    runs = (computed, _run(model.plain, feed, _same), _run(model.exact, feed, _same))
    found, alone, exact = (run.states[kept] for run in runs)
    if not np.array_equal(np.isfinite(found), np.isfinite(alone)):
        return Outcome(label, math.inf, f"NaN or infinity is not where it should be ({label})")
    finite = np.isfinite(alone) & np.isfinite(exact)
    if not finite.any():
        return Outcome(label, 0.0)
    off = abs(found[finite].astype(np.float64) - exact[finite])
    return Outcome(label, float(off.max() / _allowed(alone[finite], exact[finite])))


def _allowed(alone: np.ndarray, exact: np.ndarray) -> float:
    u = FLOATS[dtype_name(alone.dtype)].unit_roundoff
    own = abs(alone.astype(np.float64) - exact).max()
    return float(ALLOWED * own + ROUNDINGS * u * abs(exact).max())


def decode_loop(body: Function, place: Place) -> Iterator[Outcome]:
    """Tokens that follow a prompt, the likeliest and drawn ones.

    Each has to be the token that exact logits after those before it give, or one that allowed
    errors of the logits could turn it into.
    """
    count = 6
    for name in ("float32", "bfloat16", "float16"):
        if name == "float32" and not place.single_products:
            continue
        model = TinyModel(EVEN, name, place)
        for temperature in (0.0, 0.8):
            prompts = SHORT.ids[:, :4]
            with only({"decode_loop": body}):
                steps = generate(
                    model.there, place.array(prompts), max_new_tokens=count,
                    temperature=temperature, rng=7, eos_token_id=(),
                )  # fmt: skip
                drawn = np.stack([to_numpy(step) for step in steps], axis=1)
            label = f"{name}, temperature {temperature:g}"
            if not ((drawn >= 0) & (drawn < EVEN.vocab_size)).all():
                yield Outcome(label, math.inf, f"it draws an id that is not a token ({label})")
                continue
            feed = Feed(
                np.concatenate([prompts, drawn[:, :-1]], axis=1), (prompts.shape[1] + count - 1,)
            )
            alone, exact = (_run(one, feed, _same).logits for one in (model.plain, model.exact))
            off = _allowed(alone, exact)
            exact = exact[:, prompts.shape[1] - 1 :]
            if temperature == 0:
                chosen = np.take_along_axis(exact, drawn[..., None], axis=-1)[..., 0]
                ratio = (exact.max(axis=-1) - chosen).max() / (2 * off)
            else:
                ratio = _beyond_share(exact / temperature, drawn, 2 * off / temperature)
            yield Outcome(label, float(ratio))


def _beyond_share(scaled: np.ndarray, drawn: np.ndarray, off: float) -> float:
    """How far uniform numbers are outside their tokens' shares, over what moves the shares."""
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    ends = np.cumsum(weights, axis=-1) / weights.sum(axis=-1, keepdims=True)
    uniforms = np.random.default_rng(7).random(drawn.shape[::-1]).T
    end = np.take_along_axis(ends, drawn[..., None], axis=-1)[..., 0]
    shares = weights / weights.sum(axis=-1, keepdims=True)
    begin = end - np.take_along_axis(shares, drawn[..., None], axis=-1)[..., 0]
    outside = np.maximum(begin - uniforms, uniforms - end)
    return float(max(0.0, outside.max()) / math.expm1(off))


class Run(NamedTuple):
    """The results for all tokens."""

    states: np.ndarray
    """After the layers [B, S, hidden_size]."""
    logits: np.ndarray
    served: bool
    """Whether the body served at all."""


def _run(model: Llama, feed: Feed, move: Move, body: Function | None = None) -> Run:
    """All tokens by the definitions, and all layers at once by a body where it takes them."""
    states, logits, served = [], [], False

    def recorded(*arguments: Any) -> Any:
        nonlocal served
        result = NotImplemented if body is None else body(*arguments)
        if result is NotImplemented:
            result = definitions["decoder_layers"](*arguments)
        else:
            served = True
        states.append(to_numpy(result[0]).copy())
        return result

    cache = KVCache.create(model, *feed.ids.shape, like=model.weights.embed_tokens)
    start = 0
    with only({"decoder_layers": recorded}):
        for stop in feed.cuts:
            keep = None if feed.keep is None else move(feed.keep[:, start:stop])
            output = forward(model, move(feed.ids[:, start:stop]), cache=cache, attention_mask=keep)
            assert output.cache is not None  # since one was given
            cache, start = output.cache, stop
            logits.append(to_numpy(output.logits))
    return Run(np.concatenate(states, axis=1), np.concatenate(logits, axis=1), served)


def _same(array: np.ndarray) -> np.ndarray:
    return array
