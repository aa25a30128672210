"""Bugs in what a config makes of its family and its file, and in names of a family's modules."""

from __future__ import annotations

from llama_layers.config.config_file import OWN_KEY
from llama_layers.config.rope_layers import RopeKind
from tests.planted.planting import wrong

FAMILIES = "llama_layers.config.families"
ROPE = "llama_layers.config.rope_layers:RopeOfLayers"
LAYERS = "test_rope_layers.py::"


@wrong(f"{FAMILIES}:module_name", "test_families.py::test_names_of_norms[gemma2]")
def modules_of_a_family_called_as_those_of_Llama(right, model_type, role):
    return role


@wrong(f"{FAMILIES}:family_switches", "test_families.py::test_the_factor_of_the_embedding[gemma]")
def the_embedding_of_Gemma_not_scaled(right, model_type, hidden_size):
    return right(model_type, 1)


@wrong(
    f"{FAMILIES}:unread_fields",
    "test_config.py::test_fields_that_a_family_does_not_read_are_kept_apart",
)
def fields_written_that_a_family_does_not_read(right, model_type):
    return frozenset()


@wrong(f"{ROPE}._kind_of", f"{LAYERS}test_parameters_for_types_of_layers")
def layers_with_a_window_scaled_too(right, self, layer):
    kind = right(self, layer)
    return kind and RopeKind(kind.theta, self.rope_scaling is not None)


@wrong(f"{ROPE}.with_rope", "test_forward.py::test_like_naive_loops[RoPE by layer-whole]")
def rope_of_the_config_in_every_layer(right, self, kind):
    return self


@wrong(f"{ROPE}.rotary_dim", f"{LAYERS}test_files_that_are_refused")
def all_channels_rotated(right, self):
    return self.head_dim


@wrong(
    "llama_layers.config.file_content:file_content",
    f"{LAYERS}test_what_a_family_has_no_words_for_is_written[llama]",
)
def what_a_family_has_no_words_for_left_out(right, config):
    return {key: value for key, value in right(config).items() if key != OWN_KEY}


@wrong("llama_layers.config.fields:Fields._check_together", "test_config_refusals.py::test_refuses")
def fields_not_held_against_each_other(right, self):
    return None


@wrong(
    "llama_layers.config.unsupported:_says",
    "test_unsupported.py::test_an_unknown_family_has_no_reason",
)
def no_experts_taken_for_some(right, value):
    return value is not None
