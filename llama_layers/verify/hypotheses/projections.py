"""Mistakes in products with a matrix: which matrix, in which order, of what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.build import layer_matrix
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import Change, Hypothesis, Moved
from llama_layers.verify.operations import Linear

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_WORDS = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "values",
    "self_attn.o_proj": "the output of attention",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
}


def _parameters(
    failing: FailingSite, role: str, layer: int | None = None
) -> tuple[Any, Any | None]:
    """The matrix and bias of a projection in the same layer, or in another."""
    number = failing.site.layer if layer is None else layer
    assert number is not None  # a role is inside a layer
    weight, bias = layer_matrix(failing.model.weights.layers[number], role)
    return to_numpy(weight), None if bias is None else to_numpy(bias)


def _other_layout(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    rows, columns = linear.weight.shape
    yield replace(linear, weight=linear.weight.reshape(columns, rows).T)


def _swapped(one: str, other: str) -> Callable[[Linear, FailingSite], Iterator[Linear]]:
    def changes(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
        if failing.site.role in (one, other):
            weight, bias = _parameters(failing, other if failing.site.role == one else one)
            if weight.shape == linear.weight.shape:
                yield replace(linear, weight=weight, bias=bias)
                if bias is not None:
                    yield replace(linear, weight=weight)

    return changes


def _another_layer(linear: Linear, failing: FailingSite) -> Iterator[Change]:
    if failing.site.layer is None:
        return
    for layer in range(failing.recorded.config.num_hidden_layers):
        if layer != failing.site.layer:
            weight, bias = _parameters(failing, failing.site.role, layer)
            yield Change(
                replace(linear, weight=weight, bias=bias),
                f"The port seems to multiply with the matrix of layer {layer}; this is layer "
                f"{failing.site.layer}.",
            )


def _embedding(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    if failing.site.role == "lm_head":
        yield replace(linear, weight=to_numpy(failing.model.weights.embed_tokens))


def _no_bias(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    if linear.bias is not None:
        yield replace(linear, bias=None)


def _bias_twice(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    if linear.bias is not None:
        yield replace(linear, bias=2 * linear.bias.astype(np.float64))


def _another_bias(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    """Biases that were joined in another order than their matrices, or are another layer's."""
    if linear.bias is None or failing.site.role not in _QKV:
        return
    biases = [_parameters(failing, role)[1] for role in _QKV]
    start = sum(len(b) for b in biases[: _QKV.index(failing.site.role)] if b is not None)
    rows = slice(start, start + len(linear.bias))
    for order in permutations(b for b in biases if b is not None):
        yield replace(linear, bias=np.concatenate(order)[rows])


def _rope_rows(rows: int, heads: int) -> NDArray[np.intp] | None:
    """Channels of heads from halves to pairs, as Meta's and llama.cpp's checkpoints have them."""
    if rows % (2 * heads):
        return None
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _moved(linear: Linear, failing: FailingSite, rows: NDArray[np.intp]) -> Iterator[Computable]:
    yield Moved(failing, lambda y: y[..., rows])
    if linear.bias is not None:
        yield replace(linear, weight=linear.weight[rows])


def _heads(failing: FailingSite) -> int:
    config = failing.recorded.config
    queries = failing.site.role == "self_attn.q_proj"
    return config.num_attention_heads if queries else config.num_key_value_heads


def _left_permuted(linear: Linear, failing: FailingSite) -> Iterator[Computable]:
    if failing.site.role in _QKV[:2]:
        rows = _rope_rows(len(linear.weight), _heads(failing))
        if rows is not None:
            yield from _moved(linear, failing, rows)


def _unpermuted_twice(linear: Linear, failing: FailingSite) -> Iterator[Computable]:
    if failing.site.role in _QKV:
        rows = _rope_rows(len(linear.weight), _heads(failing))
        if rows is not None:
            yield from _moved(linear, failing, np.argsort(rows))


def _permuted_with_other_heads(linear: Linear, failing: FailingSite) -> Iterator[Change]:
    config = failing.recorded.config
    if failing.site.role not in _QKV[:2]:
        return
    right = _heads(failing)
    there = _rope_rows(len(linear.weight), right)
    for heads in {config.num_attention_heads, config.num_key_value_heads, 1} - {right}:
        back = _rope_rows(len(linear.weight), heads)
        if there is None or back is None:
            continue
        for rows in (there[np.argsort(back)], np.argsort(there)[back]):
            for operation in _moved(linear, failing, rows):
                yield Change(
                    operation,
                    f"The port seems to permute the rows of {_WORDS[failing.site.role]} for RoPE "
                    f"as if there were {heads} heads; there are {right}.",
                )


def _channels_before_heads(linear: Linear, failing: FailingSite) -> Iterator[Computable]:
    if failing.site.role in _QKV:
        rows = np.arange(len(linear.weight)).reshape(_heads(failing), -1).T.ravel()
        yield from _moved(linear, failing, rows)
        yield from _moved(linear, failing, np.argsort(rows))


def _heads_reversed(linear: Linear, failing: FailingSite) -> Iterator[Computable]:
    if failing.site.role in _QKV:
        rows = np.arange(len(linear.weight)).reshape(_heads(failing), -1)
        yield from _moved(linear, failing, rows[::-1].ravel())


def _joined_in_another_order(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    """Rows of the joined matrix, taken where they would be if it were joined otherwise."""
    role = failing.site.role
    if role in _QKV:
        config = failing.recorded.config
        parts = [_parameters(failing, name) for name in _QKV]
        groups = config.num_key_value_heads
        by_group = [
            np.concatenate([w.reshape(groups, -1, w.shape[1]) for w, _ in parts], axis=1).reshape(
                -1, linear.weight.shape[1]
            )
        ]
        joined = [np.concatenate([parts[i][0] for i in order]) for order in permutations(range(3))]
        start = sum(len(w) for w, _ in parts[: _QKV.index(role)])
        for matrix in joined[1:] + by_group:
            yield replace(linear, weight=matrix[start : start + len(linear.weight)])
    elif role in ("mlp.gate_proj", "mlp.up_proj"):
        gate, up = (_parameters(failing, name)[0] for name in ("mlp.gate_proj", "mlp.up_proj"))
        woven = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
        half = woven[: len(gate)] if role == "mlp.gate_proj" else woven[len(gate) :]
        yield replace(linear, weight=half)
        both = np.concatenate([gate, up])
        yield replace(linear, weight=both[0::2] if role == "mlp.gate_proj" else both[1::2])


def _before_norm(failing: FailingSite) -> str | None:
    """The site that this projection's input is the norm of; None if it is no norm's."""
    role, layer, config = failing.site.role, failing.site.layer, failing.recorded.config
    if role in _QKV:
        return f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
    return {
        "lm_head": f"model.layers.{config.num_hidden_layers - 1}",
        "mlp.gate_proj": f"model.layers.{layer}.attention_residual",
        "mlp.up_proj": f"model.layers.{layer}.attention_residual",
    }.get(role)


def _not_normalised(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    name = _before_norm(failing)
    x = None if name is None else failing.array(name)
    if x is not None:
        yield replace(linear, x=x)


def _another_input(linear: Linear, failing: FailingSite) -> Iterator[Change]:
    for name, x in failing.streams(linear.x.shape):
        if name != _before_norm(failing):
            yield Change(
                replace(linear, x=x),
                f"The port seems to multiply the array of {name}; its input is "
                f"{failing.site.routes[0][0]}.",
            )


def _inputs_in_another_order(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    if failing.site.role != "self_attn.o_proj":
        return
    config = failing.recorded.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    channels = np.arange(linear.x.shape[-1])
    by_head = channels.reshape(heads, -1)
    for columns in (
        by_head.T.ravel(),
        channels.reshape(-1, heads).T.ravel(),
        by_head[::-1].ravel(),
        by_head.reshape(groups, heads // groups, -1).swapaxes(0, 1).ravel(),
        by_head.reshape(heads // groups, groups, -1).swapaxes(0, 1).ravel(),
    ):
        yield replace(linear, x=linear.x[..., columns])
    mixed = linear.x.reshape(*linear.x.shape[:2], heads, -1).swapaxes(1, 2).reshape(linear.x.shape)
    yield replace(linear, x=mixed)


def _last_input_left_out(linear: Linear, failing: FailingSite) -> Iterator[Linear]:
    for left_out in (slice(-1, None), slice(0, 1)):
        x = linear.x.copy()
        x[..., left_out] = 0
        yield replace(linear, x=x)


HYPOTHESES = (
    Hypothesis(
        "weight transposed",
        Linear,
        _other_layout,
        "The port seems to read the matrix as if it were stored [in, out]; it is [out, in].",
    ),
    *(
        Hypothesis(
            f"{_WORDS[one]} and {_WORDS[other]} swapped",
            Linear,
            _swapped(one, other),
            f"The port seems to swap the matrices of {_WORDS[one]} and {_WORDS[other]}.",
        )
        for one, other in (
            ("self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("self_attn.q_proj", "self_attn.k_proj"),
            ("self_attn.q_proj", "self_attn.v_proj"),
            ("self_attn.q_proj", "self_attn.o_proj"),
        )
    ),
    Hypothesis(
        "embedding used as the head",
        Linear,
        _embedding,
        "The port seems to take the embedding for the head; this model has a head of its own.",
    ),
    Hypothesis(
        "bias missing",
        Linear,
        _no_bias,
        "The port seems to add no bias; this projection has one.",
    ),
    Hypothesis(
        "bias added twice",
        Linear,
        _bias_twice,
        "The port seems to add the bias twice.",
    ),
    Hypothesis(
        "another projection's bias",
        Linear,
        _another_bias,
        "The port seems to add the biases of queries, keys and values in another order than their "
        "matrices.",
    ),
    Hypothesis(
        "RoPE permutation left in",
        Linear,
        _left_permuted,
        "The port seems to use rows whose channels stand in pairs 2i and 2i + 1, as in a file of "
        "Meta or llama.cpp; they should be put back to i and i + D / 2.",
    ),
    Hypothesis(
        "RoPE permutation undone twice",
        Linear,
        _unpermuted_twice,
        "The port seems to move the rows of each head from pairs 2i and 2i + 1 to i and i + D / 2; "
        "they stood so already.",
    ),
    Hypothesis("RoPE permutation with the wrong head count", Linear, _permuted_with_other_heads),
    Hypothesis(
        "channels before heads",
        Linear,
        _channels_before_heads,
        "The port seems to split rows as [D, heads]; they are [heads, D].",
    ),
    Hypothesis(
        "heads in reverse order",
        Linear,
        _heads_reversed,
        "The port seems to take the heads in reverse order.",
    ),
    Hypothesis(
        "joined matrix split in another order",
        Linear,
        _joined_in_another_order,
        "The port seems to join the matrices in one order and to split them in another.",
    ),
    Hypothesis(
        "input not normalised",
        Linear,
        _not_normalised,
        "The port seems to multiply the residual stream itself; it should be normalised first.",
    ),
    Hypothesis(
        "heads side by side in another order",
        Linear,
        _inputs_in_another_order,
        "The port seems to lay the heads of attention side by side in another order than the "
        "columns of o_proj have.",
    ),
    Hypothesis("another layer's weights", Linear, _another_layer),
    Hypothesis("input from the wrong place", Linear, _another_input),
    Hypothesis(
        "an input channel left out",
        Linear,
        _last_input_left_out,
        "The port seems to leave the first or the last input channel out of its sums.",
    ),
)
