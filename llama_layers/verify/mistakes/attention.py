"""Mistakes in attention: what it reads, what it scales by, and where it puts the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import UnionType

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import Computable, FailingSite, wide
from llama_layers.verify.mistakes.near import is_near, other_weight, weighed
from llama_layers.verify.mistakes.registry import Changed, Computed, evaluated, mistake, moved
from llama_layers.verify.operations import (
    Attention,
    Heads,
    Linear,
    Operation,
    Product,
    Rope,
    Scores,
    WeightedSum,
)
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

SUMMED = Attention | WeightedSum
KEYED = Attention | Scores
GROUPED = KEYED | WeightedSum
_FLOAT64 = Rounding("float64", "float64")
_ARRAYS = {"k": "keys", "v": "values"}
# What attention is gated with, where it is.
_GATES = {
    "self_attn.q_rope": "the queries",
    "self_attn.q_norm": "the normalised queries",
    "self_attn.q_proj": "the queries before RoPE",
    "input_layernorm": "the layer's normalised input",
}


def _reads(operations: UnionType, field: str, roles: str, name: str, says: str) -> None:
    @mistake(operations, name, says=says)
    def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
        for role in roles.split():
            if role.endswith("_norm") and at.config.qk_norm_after_rope is _BEFORE[name]:
                continue
            if (array := at.beside(f"self_attn.{role}")) is not None:
                yield replace(operation, **{field: array.reshape(getattr(operation, field).shape)})


# Whether norms of queries and keys come before RoPE in what a mistake reads, or after it.
_BEFORE = {
    "keys for values": False,
    "keys before RoPE for values": True,
    "queries before RoPE": True,
    "keys before RoPE": True,
}
for _keys, _roles in (("keys", "k_norm k_rope"), ("keys before RoPE", "k_norm k_proj")):
    _says = f"Weighs the {_keys}; it should weigh the values."
    _reads(SUMMED, "v", _roles, f"{_keys} for values", _says)
_says = "Scores the values; it should score the keys."
_reads(KEYED, "k", "v_proj", "values for keys", _says)
for _field, _what in (("q", "queries"), ("k", "keys")):
    _says = f"Scores {_what} that RoPE has not rotated."
    _reads(KEYED, _field, f"{_field}_norm {_field}_proj", f"{_what} before RoPE", _says)


@mistake(SUMMED, "values normalised")
def _(operation: SUMMED, at: FailingSite) -> Iterator[Changed]:
    """Normalises values{0}; it should normalise queries and keys only."""
    assert at.site.layer is not None  # attention is inside a layer
    weights: dict[str, np.ndarray] = {"": np.ones(at.config.head_dim)}
    weight = at.model.weights.layers[at.site.layer].self_attn.k_norm
    if weight is not None and weight.shape == (at.config.head_dim,):
        weights[", with the weight of keys"] = wide(weight) + at.config.norm_weight_offset

    def formula(heads: Heads, scale: np.ndarray) -> Tracked:
        assert heads.v is not None  # values are weighed
        normed = heads.v * ((heads.v * heads.v).mean() + at.config.rms_norm_eps).rsqrt()
        v = (normed * scale).to(heads.v.how.out)
        return type(operation).formula(replace(heads, v=v))

    for said, scale in weights.items():
        if (found := weighed(operation, at, formula, scale)) is not None:
            yield found, said


def _widened(operation: Operation) -> Computed:
    """Four times the limit, for roundings of inputs that nobody recorded."""

    def few(tokens: NDArray[np.intp]) -> Computed | None:
        some = operation.at_tokens(tokens)
        return None if some is None else _widened(some)

    def bound(how: Rounding) -> Bound:
        right = operation.bound(how)
        return Bound(right.exact, 4 * right.limit, 4 * right.usual)

    return Computed(bound, few)


def _rotates(operations: UnionType, field: str, name: str, says: str) -> None:
    @mistake(operations, name, says=says)
    def _(operation: Operation, at: FailingSite) -> Iterator[Computable]:
        x, recorded = getattr(operation, field), at.recorded
        for layout in ("half", "interleaved"):
            exact = Rope(x, recorded.positions, recorded.config, layout).bound(_FLOAT64).exact
            yield _widened(replace(operation, **{field: exact}))


_says = "Rotates the values, too; it should rotate queries and keys only."
_rotates(SUMMED, "v", "values rotated by RoPE", _says)
for _field, _what in (("k", "keys"), ("q", "queries")):
    _rotates(KEYED, _field, f"{_what} rotated twice", f"Rotates {_what} that are rotated already.")


@mistake(GROUPED, "another layer's keys and values")
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """Reads {0} of layer {1}; it should read those of layer {2}."""
    for layer in range(at.config.num_hidden_layers):
        if layer == at.site.layer:
            continue
        others = at.keys_and_values(layer)
        found = {
            field: array.reshape(getattr(operation, field).shape)
            for field, array in others.items()
            if array is not None and hasattr(operation, field)
        }
        each = [{field: array} for field, array in found.items()]
        for fields in [found, *each] if len(found) > 1 else each:
            said = " and ".join(_ARRAYS[field] for field in fields)
            yield replace(operation, **fields), said, layer, at.site.layer


@mistake(SUMMED, "output gated")
def _(operation: SUMMED, at: FailingSite) -> Iterator[Changed]:
    """Multiplies the result with the {0} of {1}, as models with gated attention do; it should leave
    it as it is."""
    exact = at.bound(at.formats).exact
    for role, said in _GATES.items():
        array = at.beside(role)
        if array is None or array.size != exact.size:
            continue
        x = wide(array).reshape(exact.shape)
        sigmoid = 1 / (1 + np.exp(-x))
        for gate, function in ((sigmoid, "sigmoid"), (x * sigmoid, "silu")):
            if is_near(at, exact * gate):
                yield moved(at, np.multiply, gate), function, said


@mistake(Linear, "output gated", roles=("self_attn.o_proj",))
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies its input with the {0} of {1}, as models with gated attention do; it should take
    attention as it is."""
    for role, said in _GATES.items():
        array = at.beside(role)
        if array is None or array.size != linear.x.size:
            continue
        x = wide(array).reshape(linear.x.shape)
        sigmoid = 1 / (1 + np.exp(-x))
        for gate, function in ((sigmoid, "sigmoid"), (x * sigmoid, "silu")):
            if other_weight(replace(linear, x=wide(linear.x) * gate), at):
                yield evaluated(linear, _of_gated, gate), function, said


def _of_gated(product: Product, gate: Float64Array) -> Tracked:
    """A product of what is multiplied and rounded first."""
    return Linear.formula(replace(product, x=(product.x * gate).to(product.x.how.out)))


@mistake(SUMMED, "heads mixed up")
def _(operation: SUMMED, at: FailingSite) -> Iterator[Computable]:
    """Puts the heads of the result in another order; it should give [B, S, heads, D]."""
    yield moved(at, lambda y: y.swapaxes(2, 3).reshape(y.shape))
    heads, groups = at.computed.shape[2], at.config.num_key_value_heads
    yield moved(at, lambda y: y[:, :, ::-1])
    for split in (groups, heads // groups):
        within = np.arange(heads).reshape(split, -1)
        for order in (within.T.ravel(), within[:, ::-1].ravel()):
            yield moved(at, lambda y, order: y[:, :, order], order)


def scale_words(config: LlamaConfig) -> str:
    """What scores should be scaled by."""
    multiplier = config.attention_multiplier
    return "1 / sqrt(D)" if multiplier is None else f"attention_multiplier, {multiplier:.6g}"


@mistake(KEYED, "another scale of scores", common=3)
def _(operation: KEYED, at: FailingSite) -> Iterator[Changed]:
    """Scales scores by {0}; it should scale them by {1}."""
    config = at.config
    heads, width = config.num_attention_heads, config.head_dim
    words: dict[float, list[str]] = {}
    should = scale_words(config)
    for scale, said in (
        (1.0, "1"),
        (1 / width, "1 / D"),
        (1 / math.sqrt(config.hidden_size), "1 / sqrt(hidden_size)"),
        (1 / math.sqrt(heads * width), "1 / sqrt(num_attention_heads D)"),
        (1 / math.sqrt(heads), "1 / sqrt(num_attention_heads)"),
        (1 / math.sqrt(config.num_key_value_heads), "1 / sqrt(num_key_value_heads)"),
        (1 / math.sqrt(width // 2), "1 / sqrt(D / 2)"),
        (math.sqrt(width), "sqrt(D)"),
        (1 / math.sqrt(width), "1 / sqrt(D)"),
        (operation.scale * math.log(2), f"{should}, and raises 2 to the scores instead of e,"),
    ):
        words.setdefault(scale, []).append(said)
    for scale, spellings in words.items():
        if not math.isclose(scale, operation.scale):
            yield replace(operation, scale=scale), " or ".join(spellings), should


def _other_heads(
    name: str, says: str, of: Callable[[int, int], list[int]], *, common: int = 0
) -> None:
    """Keys and values of other heads, or one of them: `of` gives a head for each query head."""

    @mistake(GROUPED, name, says=says, common=common)
    def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
        heads, groups = at.config.num_attention_heads, at.config.num_key_value_heads
        if groups == 1:
            return
        order = of(heads, groups)
        fields = {f: getattr(operation, f)[:, :, order] for f in "kv" if hasattr(operation, f)}
        yield replace(operation, **fields), " and ".join(_ARRAYS[field] for field in fields)
        if isinstance(operation, Attention):
            v = np.repeat(operation.v, heads // groups, axis=2)
            yield replace(operation, k=fields["k"], v=v), "keys"

    @mistake(Attention, name.replace("key", "value"), says=says)
    def _(attention: Attention, at: FailingSite) -> Changed | None:
        heads, groups = at.config.num_attention_heads, at.config.num_key_value_heads
        if groups == 1:
            return None
        k = np.repeat(attention.k, heads // groups, axis=2)
        return replace(attention, k=k, v=attention.v[:, :, of(heads, groups)]), "values"


_other_heads(
    "key heads tiled",
    "Gives query head h the {0} of head h mod kv_heads; it should give it those of head "
    "h // (heads / kv_heads): repeat, do not tile.",
    lambda heads, groups: [h % groups for h in range(heads)],
    common=1,
)
_other_heads(
    "first key head for all",
    "Gives the {0} of the first head to every query head.",
    lambda heads, groups: [0] * heads,
)
_other_heads(
    "key heads in reverse order",
    "Takes the heads of {0} in reverse order.",
    lambda heads, groups: [groups - 1 - h * groups // heads for h in range(heads)],
)
