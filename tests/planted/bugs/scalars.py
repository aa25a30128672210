"""Bugs in multipliers, in norms with weights plus 1, in gelu and in soft caps."""

from __future__ import annotations

import numpy as np

from tests.planted.planting import wrong

SCALARS = "test_scalars.py::"


@wrong(
    "llama_layers.layers.scaling:added",
    f"{SCALARS}test_multipliers_round_once",
)
def residual_multiplier_ignored(right, x, y, multiplier):
    return right(x, y, 1)


@wrong(
    "llama_layers.layers.scaling:scaled_logits",
    "test_tap.py::test_every_site_in_order_with_its_numbers[multipliers]",
)
def logits_left_as_they_are(right, y, config):
    return y


@wrong(
    "llama_layers.model.embedding:embedding_factor",
    f"{SCALARS}test_the_factor_of_gemma_has_the_dtype_of_the_table",
)
def factor_not_rounded(right, config, table):
    return config.embedding_multiplier


@wrong("llama_layers.layers.attention:soft_capped", f"{SCALARS}test_capped_scores[2.0]")
def score_clipped(right, y, cap):
    return y.clip(-cap, cap)


@wrong("llama_layers.layers.mlp:gate_with_gelu", f"{SCALARS}test_geglu")
def gelu_with_a_sigmoid(right, xp, gate, up):
    return gate / (1 + xp.exp(-1.702 * gate)) * up


@wrong(
    "llama_layers.verify.pointwise:tanh",
    f"{SCALARS}test_every_form_of_gelu_is_within_its_bound[tanh]",
)
def slope_of_tanh_ignored(right, x):
    return x.apply(np.tanh)
