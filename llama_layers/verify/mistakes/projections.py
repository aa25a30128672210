"""Mistakes in products with a matrix: which matrix, in which order, of what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.fit import FLAT
from llama_layers.verify.mistakes.registry import Changed, mistake, moved
from llama_layers.verify.operations import Linear

_WORDS = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "values",
    "self_attn.o_proj": "the output of attention",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
}


def _with(linear: Linear, at: FailingSite, role: str, layer: int | None = None) -> Linear:
    """The product with another projection of the same layer, or of another."""
    weight, bias = at.matrix(role, layer)
    return replace(linear, weight=weight, bias=bias)


@mistake(Linear, "weight transposed")
def _(linear: Linear, at: FailingSite) -> Linear:
    """Reads the matrix as if it were stored [in, out]; it should read it as [out, in]."""
    rows, columns = linear.weight.shape
    return replace(linear, weight=linear.weight.reshape(columns, rows).T)


def _swapped(name: str, one: str, other: str, *, common: int = 0) -> None:
    @mistake(
        Linear,
        name,
        roles=(one, other),
        common=common,
        says=f"Swaps the matrices of {_WORDS[one]} and {_WORDS[other]}.",
    )
    def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
        found = _with(linear, at, other if at.site.role == one else one)
        if found.weight.shape == linear.weight.shape:
            yield found
            if found.bias is not None or linear.bias is not None:
                yield replace(found, bias=linear.bias)


_swapped("keys and values swapped", "self_attn.k_proj", "self_attn.v_proj", common=1)
_swapped("gate and up swapped", "mlp.gate_proj", "mlp.up_proj")
_swapped("queries and keys swapped", "self_attn.q_proj", "self_attn.k_proj")
_swapped("queries and values swapped", "self_attn.q_proj", "self_attn.v_proj")
_swapped("queries and the output of attention swapped", "self_attn.q_proj", "self_attn.o_proj")


@mistake(Linear, "embedding used as the head", roles=("lm_head",))
def _(linear: Linear, at: FailingSite) -> Linear:
    """Multiplies by the embedding; it should multiply by the head, which is a matrix of its own."""
    return replace(linear, weight=to_numpy(at.model.weights.embed_tokens))


@mistake(Linear, "bias missing", common=1)
def _(linear: Linear, at: FailingSite) -> Linear | None:
    """Adds no bias; it should add one."""
    return None if linear.bias is None else replace(linear, bias=None)


@mistake(Linear, "bias added twice")
def _(linear: Linear, at: FailingSite) -> Linear | None:
    """Adds the bias twice; it should add it once."""
    bias = linear.bias
    return None if bias is None else replace(linear, bias=2 * bias.astype(np.float64))


@mistake(Linear, "another projection's bias", roles=FLAT)
def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
    """Adds the biases of queries, keys and values in another order than their matrices."""
    biases = [b for role in FLAT if (b := _with(linear, at, role).bias) is not None]
    if linear.bias is not None:
        rows = _rows(at, biases)
        for order in permutations(biases):
            yield replace(linear, bias=np.concatenate(order)[rows])


def _rows(at: FailingSite, parts: list[np.ndarray]) -> slice:
    """Where the rows of a projection are in the joined matrix."""
    index = FLAT.index(at.site.role)
    start = sum(len(part) for part in parts[:index])
    return slice(start, start + len(parts[index]))


def _rope_rows(rows: int, heads: int) -> NDArray[np.intp] | None:
    """Channels of heads from halves to pairs, as Meta's and llama.cpp's checkpoints have them."""
    if rows % (2 * heads):
        return None
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _reordered(
    linear: Linear, at: FailingSite, rows: NDArray[np.intp] | None
) -> Iterator[Computable]:
    """Rows of the matrix in another order, and those of the bias with it or not."""
    if rows is not None:
        yield moved(at, lambda y: y[..., rows])
        if linear.bias is not None:
            yield replace(linear, weight=linear.weight[rows])


def _heads(at: FailingSite) -> int:
    queries = at.site.role == "self_attn.q_proj"
    return at.config.num_attention_heads if queries else at.config.num_key_value_heads


@mistake(Linear, "RoPE permutation left in", roles=FLAT[:2], common=1)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Uses rows whose channels are in pairs 2i and 2i + 1, as in a file of Meta or llama.cpp; it
    should put them back to i and i + D / 2."""
    return _reordered(linear, at, _rope_rows(len(linear.weight), _heads(at)))


@mistake(Linear, "values permuted as for RoPE", roles=FLAT[2:])
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Puts the rows of values in pairs 2i and 2i + 1, as for RoPE; it should leave them as they
    are."""
    return _reordered(linear, at, _rope_rows(len(linear.weight), _heads(at)))


@mistake(Linear, "RoPE permutation undone twice", roles=FLAT)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Moves the rows of each head from pairs 2i and 2i + 1 to i and i + D / 2; it should leave
    them, since they are so already."""
    rows = _rope_rows(len(linear.weight), _heads(at))
    return _reordered(linear, at, None if rows is None else np.argsort(rows))


@mistake(Linear, "RoPE permutation with the wrong head count", roles=FLAT[:2])
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Permutes the rows of {0} for RoPE as if there were {1} heads; it should count {2}."""
    right, count = _heads(at), len(linear.weight)
    there = _rope_rows(count, right)
    for heads in {at.config.num_attention_heads, at.config.num_key_value_heads, 1} - {right}:
        back = _rope_rows(count, heads)
        if there is not None and back is not None:
            for rows in (there[np.argsort(back)], np.argsort(there)[back]):
                for operation in _reordered(linear, at, rows):
                    yield operation, _WORDS[at.site.role], heads, right


@mistake(Linear, "channels before heads", roles=FLAT)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Splits rows as [D, heads]; it should split them as [heads, D]."""
    rows = np.arange(len(linear.weight)).reshape(_heads(at), -1).T.ravel()
    yield from _reordered(linear, at, rows)
    yield from _reordered(linear, at, np.argsort(rows))


@mistake(Linear, "heads in reverse order", roles=FLAT)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Takes the heads in reverse order."""
    rows = np.arange(len(linear.weight)).reshape(_heads(at), -1)
    return _reordered(linear, at, rows[::-1].ravel())


@mistake(Linear, "joined matrix split in another order", roles=FLAT)
def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
    """Splits the joined matrix in another order than it was joined in."""
    parts = [_with(linear, at, role).weight for role in FLAT]
    rows = _rows(at, parts)
    for order in list(permutations(parts))[1:]:
        yield replace(linear, weight=np.concatenate(order)[rows])


@mistake(Linear, "joined matrix split in another order", roles=("mlp.gate_proj", "mlp.up_proj"))
def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
    """Splits the joined matrix in another order than it was joined in."""
    gate, up = (_with(linear, at, f"mlp.{name}_proj").weight for name in ("gate", "up"))
    second = at.site.role == "mlp.up_proj"
    woven = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    yield replace(linear, weight=woven[len(gate) :] if second else woven[: len(gate)])
    yield replace(linear, weight=np.concatenate([gate, up])[int(second) :: 2])


def _before_norm(at: FailingSite) -> str | None:
    """The site that this projection's input is the norm of; None if it is not a norm."""
    norm = at.input_site(0)
    return norm.routes[0][0] if norm is not None and norm.operation == "norm" else None


@mistake(Linear, "input not normalised")
def _(linear: Linear, at: FailingSite) -> Linear | None:
    """Multiplies the residual stream itself; it should normalise it first."""
    name = _before_norm(at)
    x = None if name is None else at.array(name)
    return None if x is None else replace(linear, x=x)


@mistake(Linear, "heads side by side in another order", roles=("self_attn.o_proj",))
def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
    """Lays the heads of attention side by side in another order than the columns of o_proj."""
    heads, groups = at.config.num_attention_heads, at.config.num_key_value_heads
    x = linear.x.reshape(*linear.x.shape[:2], heads, -1)
    channels = np.arange(linear.x.shape[-1])
    by_head = channels.reshape(heads, -1)
    for columns in (
        by_head.T,
        channels.reshape(-1, heads).T,
        by_head[::-1],
        by_head.reshape(groups, heads // groups, -1).swapaxes(0, 1),
        by_head.reshape(heads // groups, groups, -1).swapaxes(0, 1),
    ):
        yield replace(linear, x=linear.x[..., columns.ravel()])
    yield replace(linear, x=x.swapaxes(1, 2).reshape(linear.x.shape))


@mistake(Linear, "another layer's weights")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has the weights of layer {0}; it should have those of layer {1}."""
    for layer in range(at.config.num_hidden_layers):
        if at.site.layer not in (None, layer):
            found = _with(linear, at, at.site.role, layer)
            yield found, layer, at.site.layer
            if found.bias is not None:
                yield replace(found, bias=linear.bias), layer, at.site.layer


@mistake(Linear, "input from the wrong place")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies the array of {0}; it should multiply that of {1}."""
    for name, x in at.streams(linear.x.shape):
        if name != _before_norm(at):
            yield replace(linear, x=x), name, at.site.routes[0][0]


@mistake(Linear, "an input channel left out")
def _(linear: Linear, at: FailingSite) -> Iterator[Linear]:
    """Leaves the first or the last input channel out of its sums."""
    for left_out in (-1, 0):
        x = linear.x.copy()
        x[..., left_out] = 0
        yield replace(linear, x=x)
