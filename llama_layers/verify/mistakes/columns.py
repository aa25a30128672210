"""Input channels in another order than their matrix has, or seen through a wrong view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.near import explains_outputs, other_weight, worst_of_product
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake
from llama_layers.verify.operations import Linear

# Numbers that quantised matrices are packed in.
_BLOCKS = (4, 8, 16, 32, 64, 128, 256)
# Channels that are quantised together and keep their order inside, the largest first.
_GROUPS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
# Outputs from which an order is read, and input channels up to which.
_OUTPUTS, _CHANNELS = 256, 8192


@mistake(Linear, "input channels in another order", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies input channels {0}; it should multiply them in their order."""
    _, outputs = worst_of_product(at)
    bias = None if linear.bias is None else linear.bias[outputs]
    width = linear.weight.shape[1]
    for block in _BLOCKS:
        if block >= width or (at.site.role == "self_attn.o_proj" and block >= at.config.head_dim):
            break
        for said, order in _inside(block).items():
            places = np.arange(width)
            whole = width // block * block
            places[:whole] = places[:whole].reshape(-1, block)[:, order].ravel()
            few = replace(linear, weight=linear.weight[np.ix_(outputs, places)], bias=bias)
            if explains_outputs(few, at, outputs):
                yield (
                    replace(linear, weight=linear.weight[:, places]),
                    f"in blocks of {block} {said}",
                )


def _inside(block: int) -> dict[str, NDArray[np.intp]]:
    """Orders inside a block."""
    places = np.arange(block)
    found = {
        "whose halves are swapped": np.roll(places, block // 2),
        "whose pairs are swapped": places.reshape(-1, 2)[:, ::-1].ravel(),
        "of which even and odd ones are apart": places.reshape(-1, 2).T.ravel(),
        "whose halves alternate": places.reshape(2, -1).T.ravel(),
    }
    if block > 8:  # which has an entry of its own
        found["in reverse order"] = places[::-1]
    return found


@mistake(Linear, "input channels in another order", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Multiplies input channels {0}; it should multiply them in their order."""
    # Which input goes with which column shows in their correlation over all tokens and outputs.
    x = wide(linear.x).reshape(-1, linear.x.shape[-1])
    theirs = wide(at.computed).reshape(len(x), -1)[:, :_OUTPUTS]
    weight = wide(linear.weight[:_OUTPUTS])
    width = x.shape[1]
    if not np.isfinite(theirs).all() or width > _CHANNELS or len(weight) < 2:
        return None
    if linear.bias is not None:
        theirs = theirs - wide(linear.bias[:_OUTPUTS])
    pairs = np.asarray(x.T @ theirs @ weight)
    energies = np.sum(x * x, axis=0)[:, None] * np.sum(weight * weight, axis=0)
    for group in _GROUPS:
        if width % group or width // group < 2:
            continue
        order = _order(pairs, energies, group)
        if order is None or (order == np.arange(width)).all():
            continue
        changed = replace(linear, x=linear.x[..., order])
        if other_weight(changed, at):
            moved = order[::group] // group
            said = ", ".join(str(int(i)) for i in moved[:6]) + (", ..." if len(moved) > 6 else "")
            return changed, f"in groups of {group}, in the order {said}"
    return None


def _order(pairs: np.ndarray, energies: np.ndarray, group: int) -> NDArray[np.intp] | None:
    """For each column the input channel that goes with it; None if some go with several."""
    count = len(pairs) // group
    split = (count, group, count, group)
    shared, size = (np.einsum("aibi->ab", y.reshape(split)) for y in (pairs, energies))
    best = np.argmax(shared / np.sqrt(np.maximum(size, 1e-300)), axis=0)
    if len({*best.tolist()}) < count:
        return None
    return np.asarray((best[:, None] * group + np.arange(group)).ravel())


@mistake(Linear, "input seen through a wrong view")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Reads the numbers of its input in the order {0}, as a view of a transposed array has them;
    it should copy the array first."""
    batch, tokens, width = linear.x.shape
    for x, said in (
        (linear.x.swapaxes(1, 2).reshape(linear.x.shape), "[batch, channels, tokens]"),
        (linear.x.reshape(batch, width, tokens).swapaxes(1, 2), "[batch, tokens, channels]"),
        (linear.x.swapaxes(0, 1).reshape(linear.x.shape), "[tokens, batch, channels]"),
    ):
        changed = replace(linear, x=np.ascontiguousarray(x))
        if not np.array_equal(x, linear.x) and other_weight(changed, at):
            yield changed, said
