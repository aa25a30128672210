"""Residuals, the order of layers, and the head."""

from __future__ import annotations

import numpy as np

from tests.zoo.models import Setting
from tests.zoo.numbers import bfloat16, by_rows
from tests.zoo.registry import edit, step


def before(port, site):
    """The input of the layer of a site."""
    layer = int(site.split(".")[2])
    return port.recorded[f"model.layers.{layer - 1}" if layer else "model.embed_tokens"][-1]


@step("add", "0.attention_residual")
def residual_of_normed(port, right, x, added, site):
    if site.endswith("attention_residual"):
        x = port.recorded[site.replace("attention_residual", "input_layernorm")][-1]
    return right(x, added, site)


@step("add", "0")
def residual_overwritten(port, right, x, added, site):
    if not site.endswith("residual"):
        x = port.recorded[f"{site}.post_attention_layernorm"][-1]
    return right(x, added, site)


@step("add", "0")
def residual_stale(port, right, x, added, site):
    return right(x if site.endswith("residual") else before(port, site), added, site)


@step("add", "1.attention_residual")
def residual_of_embedding(port, right, x, added, site):
    if site.startswith("model.layers.1.") and site.endswith("residual"):
        x = port.recorded["model.embed_tokens"][-1]
    return right(x, added, site)


@step("add", "0")
def residual_missing(port, right, x, added, site):
    return right(x if site.endswith("residual") else 0 * x, added, site)


@step("add", "0")
def residual_twice(port, right, x, added, site):
    return right(x if site.endswith("residual") else 2 * x, added, site)


@step("add", "0.attention_residual")
def residual_scaled(port, right, x, added, site):
    scale = port.work(0.9 if site.endswith("residual") else 1)
    return right(x, added * scale, site)


@step("add", "0.attention_residual")
def residual_bfloat16(port, right, x, added, site):
    return bfloat16(right(x, added, site))


@step("add", "1")
def residual_float16_clamped(port, right, x, added, site):
    top = np.float32(0.7)
    found = right(x, added, site)
    late = site in ("model.layers.1", "model.layers.2")
    return port.round(np.clip(found, -top, top)) if late else found


@edit("2.input_layernorm")
def layer_skipped(port):
    run = port.block

    def block(x, layer, past):
        if layer != 1:
            return run(x, layer, past)
        run(x, layer, past)  # it is recorded, and its output is lost
        return x

    port.block = block


@edit("2.input_layernorm")
def layer_run_twice(port):
    run = port.block

    def block(x, layer, past):
        x = run(x, layer, past)
        if layer != 1:
            return x
        kept = {name: list(parts) for name, parts in port.recorded.items()}
        x = run(x, layer, past)
        port.recorded.clear()
        port.recorded.update(kept)
        return x

    port.block = block


def _reordered(port, order):
    """Layers run in another order and are recorded in the order in which they run."""
    before = dict(port.w)
    for name in before:
        if name.startswith("model.layers."):
            _, _, layer, *rest = name.split(".")
            port.w[name] = before[".".join(["model.layers", str(order[int(layer)]), *rest])]


@edit("0.input_layernorm")
def layers_reversed(port):
    _reordered(port, [2, 1, 0])


@edit("0.input_layernorm")
def layers_exchanged(port):
    _reordered(port, [1, 0, 2])


@step("head", "lm_head")
def logits_shifted(port, right, x):
    return np.roll(right(x), 1, 1)


@step("head", "lm_head")
def logits_soft_capped(port, right, x):
    return port.round(5 * np.tanh(right(x) / 5))


@step("head", "lm_head")
def logits_scaled(port, right, x):
    return port.round(right(x) / 8)


@step("head", "lm_head")
def logits_temperature(port, right, x):
    return port.round(right(x) / port.work(0.7))


@step("head", "lm_head")
def logits_normalised(port, right, x):
    logits = right(x)
    shifted = logits - logits.max(-1, keepdims=True)
    return port.round(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@step("head", "lm_head")
def logits_penalised(port, right, x):
    logits = right(x)
    for row, ids in enumerate(port.ids):
        for token in set(ids.tolist()):
            column = logits[row, :, token]
            logits[row, :, token] = np.where(column > 0, column / 1.2, column * 1.2)
    return port.round(logits)


@step("head", "lm_head")
def logits_banned(port, right, x):
    logits = right(x)
    logits[..., 2] = -np.inf
    return logits


@edit("lm_head")
def head_int8(port):
    port.w["lm_head.weight"] = port.round(by_rows(port.w["lm_head.weight"], 127))


@edit("lm_head")
def head_shards_swapped(port):
    port.w["lm_head.weight"] = np.roll(port.w["lm_head.weight"], 48, 0)


@step("head", "lm_head", Setting(padding=5))
def head_reads_other_token(port, right, x):
    x = x.copy()
    x[1, -1] = x[1, 5]
    return right(x)


@step("head", "lm_head")
def head_bfloat16(port, right, x):
    return port.round(bfloat16(x) @ bfloat16(port.w["lm_head.weight"]).T)


@step("head", "lm_head")
def vocabulary_off_by_one(port, right, x):
    return np.roll(right(x), -1, -1)
