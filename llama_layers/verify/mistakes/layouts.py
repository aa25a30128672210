"""Mistakes in where an array has its heads, and which rows of a joined matrix they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from llama_layers.layers.rope import attention_factor
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.fit import FLAT, HEADED
from llama_layers.verify.mistakes.near import FLOAT64, is_near, other_inputs, other_weight
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake, moved
from llama_layers.verify.mistakes.rope import by_phases, omega_of
from llama_layers.verify.operations import Attention, Linear, Rope, WeightedSum
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

_GATED = ("mlp.gate_proj", "mlp.up_proj")


def _heads_of(at: FailingSite, array: np.ndarray) -> int:
    return int(np.prod(array.shape[2:])) // at.config.head_dim


def _heads_first(array: np.ndarray, heads: int) -> np.ndarray:
    """Numbers in the order [B, heads, S, D], in the shape that they had."""
    split = array.reshape(*array.shape[:2], heads, -1)
    return split.swapaxes(1, 2).reshape(array.shape)


def _by_view(array: np.ndarray, heads: int) -> np.ndarray:
    """Heads where a view of [B, S, heads, D] as [B, heads, S, D] has them."""
    batch, count = array.shape[:2]
    return array.reshape(batch, heads, count, -1).swapaxes(1, 2).reshape(array.shape)


@mistake(Linear | Rope | Attention | WeightedSum, "heads before tokens", roles=HEADED)
def _(operation: Linear | Rope | Attention | WeightedSum, at: FailingSite) -> Changed | None:
    """Has the array in the order [batch, heads, tokens, D]; it should have [batch, tokens, heads,
    D]."""
    found = _heads_first(at.bound(at.formats).exact, heads := _heads_of(at, at.computed))
    return moved(at, _heads_first, heads) if is_near(at, found) else None


@mistake(Linear | Attention | WeightedSum, "heads by a view", roles=HEADED)
def _(operation: Linear | Attention | WeightedSum, at: FailingSite) -> Changed | None:
    """Views [tokens, heads D] as [heads, tokens, D]; it should view it as [tokens, heads, D] and
    transpose the first two axes."""
    found = _by_view(at.bound(at.formats).exact, heads := _heads_of(at, at.computed))
    return moved(at, _by_view, heads) if is_near(at, found) else None


@mistake(Rope, "heads by a view")
def _(rope: Rope, at: FailingSite) -> Rope:
    """Views [tokens, heads D] as [heads, tokens, D] before RoPE; it should view it as [tokens,
    heads, D] and transpose the first two axes."""
    return replace(rope, x=_by_view(rope.x, rope.x.shape[2]))


@mistake(Attention | WeightedSum, "heads by a view")
def _(operation: Attention | WeightedSum, at: FailingSite) -> Iterator[Changed]:
    """Views {0} [tokens, heads D] as [heads, tokens, D]; it should view them as [tokens, heads, D]
    and transpose the first two axes."""
    names = {"q": "queries", "k": "keys", "v": "values"}
    fields = [name for name in names if hasattr(operation, name)]
    for some in chain.from_iterable(combinations(fields, n) for n in range(1, len(fields) + 1)):
        arrays = {name: getattr(operation, name) for name in some}
        viewed = {name: _by_view(y, y.shape[2]) for name, y in arrays.items()}
        if changed := other_inputs(operation, at, **viewed):
            yield changed, " and ".join(names[name] for name in some)


@mistake(Rope, "RoPE over all heads at once")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Rotates pairs of the whole row of heads; it should rotate each head by itself."""
    x = rope.x.reshape(*rope.x.shape[:2], 1, -1)
    scaling = rope.config.rope_scaling
    by_pair = scaling is not None and scaling.short_factor is not None
    if rope.x.shape[2] > 1 and rope.config.rotary_dim == rope.config.head_dim and not by_pair:
        config = replace(rope.config, head_dim=x.shape[-1])
        for layout in ("half", "interleaved"):
            whole = Rope(x, rope.positions, config, layout)
            yield moved(whole, lambda y: y.reshape(rope.x.shape))


@mistake(Rope, "RoPE exponent by the hidden size")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Takes theta to the power of -2i / {0}; it should divide by what is rotated of a head,
    {1}."""
    config, dim = rope.config, rope.config.rotary_dim
    head = config.head_dim
    heads, hidden = config.num_attention_heads, config.hidden_size
    widths = (head, hidden // heads, hidden, heads * head, rope.x.shape[2] * head)
    pairs = np.arange(dim // 2)
    for width in dict.fromkeys(widths):
        if width != dim:
            omega = config.rope_theta ** (-2.0 * pairs / width)
            yield by_phases(rope, rope.positions[..., None, None] * omega), width, dim


@mistake(Rope, "RoPE missing on a head", kind=Kind.SOLVED)
def _(rope: Rope, at: FailingSite) -> Changed | None:
    """Leaves {0} as it is; it should rotate all heads."""
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    right, still = (np.nansum(np.square(theirs - y), axis=(0, 1, 3)) for y in (exact, wide(rope.x)))
    heads = still < right / 4
    if not heads.any() or heads.all():
        return None
    kept = heads[:, None]
    said = " and ".join(f"head {head}" for head in np.flatnonzero(heads))
    return evaluated(rope, lambda r: r.x.where(kept, Rope.formula(r))), said


def _normed(x: Tracked, weight: Float64Array, eps: float, heads: int) -> Tracked:
    rows = x.moved(lambda y: y.reshape(*y.shape[:2], heads, -1))
    rows = rows * ((rows * rows).mean() + eps).rsqrt() * weight
    return rows.moved(lambda y: y.reshape(x.shape))


@mistake(Linear | Rope, "heads normalised", kind=Kind.SOLVED, roles=HEADED)
def _(operation: Linear | Rope, at: FailingSite) -> Iterator[Changed]:
    """Normalises {0}{1}; it should leave them as the projection gives them."""
    # The weight is fitted to half of the tokens, and has to explain the others.
    eps = at.config.rms_norm_eps
    if isinstance(operation, Rope):
        x, theirs = wide(operation.x), _turned_back(operation, at.computed)
    else:
        x, theirs = at.bound(at.formats).exact, wide(at.computed)
    count = _heads_of(at, x)
    for heads, said in ((count, "each head"), (1, "the heads together")):
        rows, wanted = (y.reshape(*y.shape[:2], heads, -1) for y in (x, theirs))
        if rows.shape[1] < 2 or (heads == 1 and count == 1):
            continue
        rows = rows / np.sqrt(np.mean(np.square(rows), axis=-1, keepdims=True) + eps)
        fit = np.s_[:, ::2]
        size = np.sum(np.square(rows[fit]), axis=(0, 1, 2))
        weight = np.sum(rows[fit] * wanted[fit], axis=(0, 1, 2)) / np.where(size, size, 1.0)
        plain = bool(np.abs(weight - 1).max() < 1e-3)
        weight = np.ones_like(weight) if plain else weight
        if not _explains(rows[:, 1::2] * weight, wanted[:, 1::2]):
            continue
        more = "" if plain else " and scales them"
        if isinstance(operation, Rope):

            def turned(r, weight=weight, heads=heads):  # type: ignore[no-untyped-def]
                return Rope.formula(replace(r, x=_normed(r.x, weight, eps, heads)))

            yield evaluated(operation, turned), said, more
        else:

            def product(n, weight=weight, heads=heads):  # type: ignore[no-untyped-def]
                return _normed(Linear.formula(n), weight, eps, heads)

            yield evaluated(operation, product), said, more


def _explains(found: Float64Array, theirs: Float64Array) -> bool:
    return bool(np.sum(np.square(found - theirs)) < 1e-3 * np.sum(np.square(theirs)))


def _turned_back(rope: Rope, array: np.ndarray) -> Float64Array:
    """Rotated heads as they were before."""
    phases = -rope.positions[..., None, None] * omega_of(rope)
    back = by_phases(replace(rope, x=wide(array)), phases, 1 / attention_factor(rope.config))
    return back.bound(FLOAT64).exact


def _rows_of_joined(parts: list[int], groups: int) -> NDArray[np.intp]:
    """The rows of matrices [all of the first, all of the second ...] as they are by group."""
    starts = np.cumsum([0, *parts])
    each = [
        np.arange(start, start + size).reshape(groups, -1)
        for start, size in zip(starts, parts, strict=False)
    ]
    return np.concatenate(each, axis=1).ravel()


@mistake(Linear, "joined matrix split by group", roles=(*FLAT, *_GATED))
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Splits a joined matrix {0}; it should split it as it was joined."""
    roles = FLAT if at.site.role in FLAT else _GATED
    found = [at.matrix(role) for role in roles]
    parts = [weight.shape[0] for weight, _ in found]
    index = roles.index(at.site.role)
    rows = np.arange(sum(parts[:index]), sum(parts[: index + 1]))
    joined = np.concatenate([weight for weight, _ in found])
    biases = [bias for _, bias in found if bias is not None]
    kv_heads = at.config.num_key_value_heads
    for groups in dict.fromkeys((kv_heads if roles is FLAT else 2, 2, 4, 8, 16)):
        if any(size % groups for size in parts):
            continue
        order = _rows_of_joined(parts, groups)
        for places, said in (
            (order, f"that has {groups} groups, one after the other, as if it had none"),
            (np.argsort(order), f"as if it had {groups} groups, one after the other"),
        ):
            chosen = places[rows]
            changed = replace(linear, weight=joined[chosen])
            if not other_weight(changed, at):
                continue
            yield changed, said
            if len(biases) == len(roles):
                yield replace(changed, bias=np.concatenate(biases)[chosen]), said
