"""Bugs in what is made of names and shapes in a trace."""

from __future__ import annotations

from tests.planted.planting import wrong

NAMES = "verify/test_unknown_names.py::"


@wrong(
    "llama_layers.verify.not_sites:split_number",
    f"{NAMES}test_no_site[ffn_silu-0-silu(gate) alone]",
)
def numbers_of_layers_left_in_names(right, name):
    return name, ""


@wrong("llama_layers.verify.unknown_names:no_site", f"{NAMES}test_no_site")
def arrays_that_are_no_sites_taken_for_others(right, name):
    return None


@wrong("llama_layers.verify.unknown_names:told", f"{NAMES}test_layers_are_told_once")
def every_layer_told(right, unknown, config):
    return "; ".join(right([name], config) for name in unknown)


@wrong("llama_layers.verify.unknown_names:_meaning", f"{NAMES}test_said")
def hidden_states_one_layer_late(right, name, count):
    found = right(name, count)
    return found and found.replace("model.layers.0", "model.layers.1")


@wrong(
    "llama_layers.verify.fit:_first_of",
    "test_padded_vocabulary.py::test_logits_of_padding_are_not_judged",
)
def the_last_logits_kept_and_the_first_left_out(right, tokens, logits):
    return logits[..., -tokens:]


@wrong(
    "llama_layers.verify.fit:in_halves", "verify/test_past.py::test_layout_of_the_past[interleaved]"
)
def pairs_left_next_to_each_other(right, array, config):
    return array


@wrong(
    "llama_layers.verify.fit:_hint", "verify/test_past.py::test_a_whole_cache_instead_of_new_keys"
)
def no_word_of_tokens_of_the_past(right, site, shape, extent, width):
    return ""
