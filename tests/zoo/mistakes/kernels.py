"""Matrix products: tiles, tails, threads, ranks, and formats of sums."""

from __future__ import annotations

import numpy as np

from tests.zoo.numbers import bfloat16, float16, tf32
from tests.zoo.registry import edit, step


def only(ending, x, site, change):
    """Change an array in place at one kind of site."""
    if site.endswith(ending):
        change(x)
    return x


@step("multiply", "0.down_proj")
def tail_of_inputs_dropped(port, right, x, w, site):
    whole = x.shape[-1] // 32 * 32
    return right(x[..., :whole], w[:, :whole], site)


@step("multiply", "0.gate_proj")
def tail_of_outputs_zero(port, right, x, w, site):
    found = right(x, w, site)
    found[..., len(w) // 32 * 32 :] = 0
    return found


@step("multiply", "0.o_proj")
def tail_of_tokens_repeated(port, right, x, w, site):
    def change(y):
        y[:, 16:] = y[:, 8:16]

    return only("o_proj", right(x, w, site), site, change)


@edit("0.q_proj")
def tile_transposed(port):
    for name in port.w:
        if name.endswith("q_proj.weight"):
            port.w[name][16:32, 32:48] = port.w[name][16:32, 32:48].T.copy()


@step("multiply", "0.up_proj")
def tile_written_twice(port, right, x, w, site):
    def change(y):
        y[..., 32:48] = y[..., 16:32]

    return only("up_proj", right(x, w, site), site, change)


@step("multiply", "0.o_proj")
def slab_before_barrier(port, right, x, w, site):
    def change(y):
        y[:, 8:12] = x[:, 8:12, :48] @ w[:, :48].T

    return only("o_proj", right(x, w, site), site, change)


@step("multiply", "0.down_proj")
def slab_added_twice(port, right, x, w, site):
    extra = x[..., 42:84] @ w[:, 42:84].T if site.endswith("down_proj") else 0
    return right(x, w, site) + extra


@step("multiply", "0.down_proj")
def slab_lost_at_random(port, right, x, w, site):
    def change(y):
        lost = np.random.default_rng(4).random(y.shape) < 0.02
        y[lost] -= (x[..., 42:84] @ w[:, 42:84].T)[lost]

    return only("down_proj", right(x, w, site), site, change)


@step("multiply", "0.gate_proj")
def lane_dead(port, right, x, w, site):
    def change(y):
        y[..., 31::32] = y[..., 30::32]

    return only("gate_proj", right(x, w, site), site, change)


@step("multiply", "0.o_proj")
def reduce_missing(port, right, x, w, site):
    if site.endswith("o_proj"):
        x, w = x[..., :32], w[:, :32]
    return right(x, w, site)


@step("multiply", "0.down_proj")
def reduce_twice(port, right, x, w, site):
    return right(x, w, site) * (2 if site.endswith("down_proj") else 1)


@step("multiply", "0.down_proj")
def rank_weights_equal(port, right, x, w, site):
    if site.endswith("down_proj"):
        w = np.concatenate([w[:, :84], w[:, :84]], 1)
    return right(x, w, site)


@step("multiply", "0.q_proj")
def sums_float16(port, right, x, w, site):
    total = np.zeros((*x.shape[:-1], len(w)), np.float32)
    for k in range(x.shape[-1]):
        total = float16(total + x[..., k : k + 1] * w[:, k])
    return total


@step("multiply", "0.q_proj")
def inputs_bfloat16(port, right, x, w, site):
    return right(bfloat16(x), bfloat16(w), site)


@step("multiply", "0.q_proj")
def inputs_tf32(port, right, x, w, site):
    return right(tf32(x), tf32(w), site)


@step("linear", "1.down_proj")
def stale_buffer_row(port, right, x, site):
    found = right(x, site)
    if site.endswith("down_proj") and ".0." not in site:
        before = site.replace(site.split(".")[2], str(int(site.split(".")[2]) - 1))
        found[:, -1] = port.recorded[before][-1][:, -1]
    return found


@step("multiply", "0.o_proj")
def view_without_copy(port, right, x, w, site):
    if site.endswith("o_proj"):
        x = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape)
    return right(x, w, site)


@step("linear", "1.down_proj")
def one_element_flipped(port, right, x, site):
    found = right(x, site)
    if site == "model.layers.1.mlp.down_proj":
        found[1, 6, 20] *= 16
    return found


@step("linear", "1.o_proj")
def output_tile_uninitialised(port, right, x, site):
    found = right(x, site)
    if site == "model.layers.1.self_attn.o_proj":
        found[0, 20:, 48:] = np.nan
    return found


@step("linear", "0.up_proj")
def constant_added(port, right, x, site):
    found = right(x, site)
    return port.round(found + port.work(0.01)) if site.endswith("up_proj") else found


@step("multiply", "0.v_proj")
def alpha_in_epilogue(port, right, x, w, site):
    return right(x, w, site) * port.work(0.99 if site.endswith("v_proj") else 1)
