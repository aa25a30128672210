"""Bugs of the decoder layer: what goes where between its norms, attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from llama_layers import apply_rope, rms_norm
from tests.planted.planting import wrong

LAYER = "llama_layers.layers.decoder:decoder_layer"
LOOPS = "test_layer.py::test_like_naive_loops"
IDENTITY = "test_layer.py::test_identity_with_zero_output_projections"


def tampered(tap, site, change, *, after=False):
    """A tap that changes the array of a site by ``change(array, earlier sites)``.

    By default the tap is given the changed array, as if it had been computed so. With `after` it is
    given the right one, and what comes later gets the changed one.
    """
    earlier = {}

    def call(name, array):
        if name == site and not after:
            array = change(array, earlier)
        array = array if tap is None else tap(name, array)
        if name == site and after:
            array = change(array, earlier)
        earlier[name] = array
        return array

    return call


def in_heads(array, config):
    return array.reshape(*array.shape[:2], -1, config.head_dim)


@wrong(LAYER, "test_layer.py::test_values_are_not_turned", "values rotated by RoPE")
def values_rotated_too(right, x, w, *, config, rope, tap=None, **rest):
    def change(v, _):
        return apply_rope(in_heads(v, config), *rope).reshape(v.shape)

    tap = tampered(tap, "self_attn.v_proj", change, after=True)
    return right(x, w, config=config, rope=rope, tap=tap, **rest)


@wrong(
    LAYER,
    "test_forward.py::test_only_distances_between_positions_count",
    "RoPE not applied",
)
def queries_not_rotated(right, x, w, *, config, tap=None, **rest):
    tap = tampered(tap, "self_attn.q_rope", lambda q, at: in_heads(at["self_attn.q_proj"], config))
    return right(x, w, config=config, tap=tap, **rest)


@wrong(LAYER, LOOPS, "RoPE not applied")
def keys_not_rotated(right, x, w, *, config, tap=None, **rest):
    tap = tampered(tap, "self_attn.k_rope", lambda k, at: in_heads(at["self_attn.k_proj"], config))
    return right(x, w, config=config, tap=tap, **rest)


@wrong(LAYER, LOOPS, "RoPE layout interleaved")
def keys_rotated_in_another_layout_than_queries(right, x, w, *, config, rope, tap=None, **rest):
    def change(_, at):
        k = in_heads(at["self_attn.k_proj"], config)
        return apply_rope(k, *rope[:2], layout="interleaved", rotary_dim=config.rotary_dim)

    tap = tampered(tap, "self_attn.k_rope", change)
    return right(x, w, config=config, rope=rope, tap=tap, **rest)


@wrong(LAYER, "test_forward.py::test_like_naive_loops", "keys rotated twice")
def keys_rotated_again_on_their_way_to_the_cache(right, x, w, *, config, rope, tap=None, **rest):
    def change(k, _):
        return apply_rope(k, *rope[:2], rotary_dim=config.rotary_dim)

    tap = tampered(tap, "self_attn.k_rope", change, after=True)
    return right(x, w, config=config, rope=rope, tap=tap, **rest)


@wrong(LAYER, "test_forward.py::test_causal", "no causal mask")
def the_mask_not_passed_on(right, x, w, *, mask, **rest):
    return right(x, w, mask=None, **rest)


@wrong(LAYER, LOOPS, "bias missing")
def bias_of_the_output_projection_dropped(right, x, w, **rest):
    return right(x, replace(w, self_attn=replace(w.self_attn, o_bias=None)), **rest)


@wrong(LAYER, IDENTITY, "residual from the wrong place")
def residual_taken_after_the_norm(right, x, w, *, tap=None, **rest):
    def change(_, at):
        return at["input_layernorm"] + at["self_attn.o_proj"]

    return right(x, w, tap=tampered(tap, "attention_residual", change), **rest)


@wrong(LAYER, LOOPS, "block not added")
def attention_not_added(right, x, w, *, tap=None, **rest):
    return right(x, w, tap=tampered(tap, "attention_residual", lambda *_: x), **rest)


@wrong(LAYER, IDENTITY, "residual missing")
def residual_of_the_MLP_dropped(right, x, w, *, tap=None, **rest):
    added = {}

    def remember(array, _):
        added["mlp"] = array
        return array

    right(x, w, tap=tampered(tap, "mlp.down_proj", remember, after=True), **rest)
    return added["mlp"]


@wrong(LAYER, LOOPS, "input from the wrong place")
def the_MLP_beside_attention_and_not_after_it(right, x, w, *, config, tap=None, **rest):
    def change(_, at):
        weight, eps = w.post_attention_layernorm, config.rms_norm_eps
        return rms_norm(at["input_layernorm"], weight, eps=eps)

    tap = tampered(tap, "post_attention_layernorm", change)
    return right(x, w, config=config, tap=tap, **rest)


@wrong(LAYER, LOOPS, "input not normalised")
def second_norm_skipped(right, x, w, *, tap=None, **rest):
    def change(_, at):
        return at["attention_residual"]

    tap = tampered(tap, "post_attention_layernorm", change, after=True)
    return right(x, w, tap=tap, **rest)


@wrong(LAYER, LOOPS, "another norm's weight")
def weight_of_the_first_norm_used_twice(right, x, w, **rest):
    return right(x, replace(w, post_attention_layernorm=w.input_layernorm), **rest)


@wrong(LAYER, "test_layer.py::test_eps_of_the_config_in_both_norms", "another eps")
def another_eps_in_a_layer(right, x, w, *, config, **rest):
    return right(x, w, config=replace(config, rms_norm_eps=1e-6), **rest)


@wrong(LAYER, "test_tap.py::test_patch_takes_the_place_of_the_array")
def a_tap_called_and_not_obeyed(right, x, w, *, tap=None, **rest):
    def call(name, array):
        if tap is not None and name == "self_attn.attention":
            tap(name, array)
            return array
        return array if tap is None else tap(name, array)

    return right(x, w, tap=call, **rest)


@wrong(LAYER, "test_tap.py::test_every_site_in_order_with_its_numbers")
def a_site_named_for_another(right, x, w, *, tap=None, **rest):
    def call(name, array):
        return array if tap is None else tap(name.replace("q_rope", "k_rope"), array)

    return right(x, w, tap=call, **rest)


@wrong("llama_layers.layers.tap:check_like", "test_tap.py::test_what_a_tap_must_give")
def arrays_from_a_tap_are_not_checked(right, name, array, like):
    return None


@wrong(
    "llama_layers.layers.decoder:_check",
    "test_layer.py::test_refuses_arguments_of_another_type",
)
def arguments_of_a_layer_of_any_type(right, *arguments):
    return None
