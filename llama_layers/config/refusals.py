"""Refusals of a config.json: other kinds of models, and keys that change the maths elsewhere.

The reference is transformers' class of the file's ``model_type``: a key that it does not read
changes no number. A key that another architecture reads to change the maths says that the file is
mislabelled, unless it has the value that changes nothing.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from llama_layers.config.families import FAMILIES
from llama_layers.config.family import Family
from llama_layers.errors import ConfigError, shown

# Switches and tables that change the maths unless they are off: false, 0 or empty. From the
# classes of transformers and the configs that models bring for code of their own.
_OFF = """
use_mrope mrope_section rope_interleaved rope_interleave interleaved_rope alibi use_alibi
use_dynamic_ntk use_logn_attn rope_local_base_freq local_rope_theta swa_rope_theta layer_rope_theta
no_rope_layer_interval nope_layer_interval
qk_norm use_qk_norm qk_layernorm use_qk_layernorm qk_layer_norms norm_after use_gemma_norm
use_post_norm sandwich_norm use_sandwich_norm norm_bias rms_norm_add_unit_offset
parallel_attn parallel_residual use_parallel_residual apply_residual_connection_post_layernorm
final_logit_softcapping attn_logit_softcapping attention_logit_softcapping output_logit_softcapping
output_logit_soft_cap logits_soft_cap clip_qkv swiglu_limit attn_temperature_tuning
attn_output_gate attention_output_gate use_attention_gate attention_k_eq_v rotary_value
scale_attn_by_inverse_layer_idx use_attention_sinks use_bidirectional_attention
add_cross_attention pruned_heads attention_chunk_size sliding_window_pattern use_sliding_window
kv_lora_rank q_lora_rank num_kv_shared_layers use_cla scale_embedding
block_configs per_layer_config hidden_size_per_layer_input mup_enabled attn_layer_period
o_bias o_proj_bias attention_out_bias attention_output_bias out_bias mlp_bias add_bias_linear
lm_head_bias head_bias
""".split()

# Biases of queries, keys and values.
_BIASES = "attention_bias bias use_bias qkv_bias use_qkv_bias add_qkv_bias".split()

_FACTORS = """
embedding_multiplier embedding_scale residual_multiplier logits_scaling logit_scale scale_emb
lm_head_multiplier key_multiplier attention_value_scale attention_in_multiplier
attention_out_multiplier output_multiplier_scale partial_rotary_factor rotary_pct rotary_percent
rope_pct rope_percent rope_ratio rope_condense_ratio
""".split()

_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(_OFF, (False, [], {}, "")),
    **dict.fromkeys(_BIASES, (False,)),
    **dict.fromkeys(_FACTORS, (1,)),
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts".split(),
        (0, 1),
    ),
    **dict.fromkeys("use_rope use_rotary_pos_emb no_bias".split(), (True,)),
    **dict.fromkeys("position_embedding_type pos_emb".split(), ("rope", "rotary")),
    **dict.fromkeys("norm_type layer_norm_type".split(), ("rms", "rmsnorm", "rms_norm", "RMSNorm")),
    **dict.fromkeys(
        "activation activation_function hidden_activation mlp_hidden_act".split(),
        ("silu", "swish", "swiglu"),
    ),
}

# Lists with an entry for each layer, whose entries must all be this.
_FOR_EACH_LAYER = {
    "no_rope_layers": 1,
    "attn_type_list": 1,
    "layer_types": "full_attention",
    "mlp_layer_types": "dense",
    "layers_block_type": "attention",
    "block_types": "attention",
    "mlp_multipliers": 1,
}

# Numbers whose neutral value follows from the fields of the config.
_OF_SIZES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "attention_multiplier": lambda fields: fields["head_dim"] ** -0.5,
    **dict.fromkeys(
        "query_pre_attn_scalar rotary_dim v_head_dim attention_head_dim".split(),
        itemgetter("head_dim"),
    ),
    "dim_model_base": itemgetter("hidden_size"),
    "scale_depth": lambda fields: fields["num_hidden_layers"] ** 0.5,
}

# Bookkeeping, training, output options and settings of generation that no model code reads. They
# are told apart from other keys only where a file brings code of its own, which may read anything.
_INERT = frozenset(
    """
    add_cross_attention architectures attention_dropout attn_implementation auto_map
    bad_words_ids badwordsids begin_suppress_tokens bos_token chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token
    exponential_decay_length_penalty
    finetuned finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length max_sequence_length min_length model_max_length move_model_to_device
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    selective_checkpoint_enabled sep_token_id sequence_parallel_enabled suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript transformers.js_config transformers_version typical_p unk_token unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn use_flash_attention_2
    """.split()
)

_DRAFT_NAME = re.compile("eagle|draft|medusa|hydra|speculat|mtp", re.IGNORECASE)
_DRAFT_KEYS = "draft_vocab_size eagle_config speculators_config medusa_num_heads".split()
_OTHER_HEAD = re.compile(
    "For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)|Reward|Score"
)


def refuse_draft_heads(content: Mapping[str, Any]) -> None:
    """Raise ConfigError for a draft head, which guesses tokens from another model's states."""
    found = [name for name in architectures(content) if _DRAFT_NAME.search(name)]
    found += [key for key in _DRAFT_KEYS if content.get(key) is not None]
    if found:
        raise ConfigError(
            f"config: expected a whole model, got a draft head for speculative decoding "
            f"({found[0]}), which computes nothing without the model it drafts for"
        )


def refuse_other_heads(content: Mapping[str, Any]) -> None:
    """Raise ConfigError for a model whose head gives scores instead of logits."""
    names = architectures(content)
    found = [name for name in names if _OTHER_HEAD.search(name)]
    if found and not any(name.endswith("ForCausalLM") for name in names):
        raise ConfigError(
            f"architectures: expected a causal language model (LlamaForCausalLM or the like), got "
            f"{found[0]}, whose head gives no logits over the vocabulary"
        )


def refuse_later_tokens(content: Mapping[str, Any]) -> None:
    """Raise ConfigError for attention to later tokens, which null means in transformers, too."""
    if not content.get("is_causal", True):
        raise ConfigError(
            f"is_causal: expected true or nothing, got {shown(content['is_causal'])}; attention to "
            f"later tokens is not supported"
        )


def refuse_quantised(content: Mapping[str, Any]) -> None:
    """Raise ConfigError where a config says that its weights are quantised."""
    for key in ("quantization_config", "quantization", "compression_config", "quantization_bit"):
        if said := content.get(key):
            details = said if isinstance(said, Mapping) else {}
            method = details.get("quant_method") or ("MLX" if key == "quantization" else None)
            if method == "bitsandbytes" or "bnb_4bit_quant_type" in details:
                method = "bitsandbytes"
            raise ConfigError(f"{key}: {quantised(method, _bits(details))}")


def quantised(method: object = None, bits: object = None) -> str:
    """A message: quantised weights are not supported, and what to use instead."""
    said = [str(method)] if method else []
    said += [f"{bits} bits"] if bits else []
    kind = f" ({', '.join(said)})" if said else ""
    return (
        f"quantised weights{kind} are not supported; use the unquantised model they were made from "
        f"or a GGUF file of it"
    )


def refuse_other_maths(
    unread: Mapping[str, Any], fields: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a key, not read, that changes the maths elsewhere.

    Model code that a file brings may read anything: then only keys that nothing reads are passed
    over. `fields` are those of the `LlamaConfig` that the file amounts to.
    """
    code = content.get("auto_map")
    custom_code = isinstance(code, Mapping) and any(
        str(name).startswith("AutoModel") for name in code
    )
    model_type = fields["model_type"]
    for key, value in unread.items():
        known = key in _NEUTRAL or key in _FOR_EACH_LAYER or key in _OF_SIZES
        if known and not _is_neutral(key, value, fields, FAMILIES[model_type]):
            raise ConfigError(
                f"config: {key} = {shown(value)} changes the maths in another architecture, and "
                f"{model_type} does not read it: the file is mislabelled"
            )
        word = key.removeprefix("rope_scaling.").removeprefix("rope_parameters.")
        if custom_code and not (known or value is None or word in _INERT or key.startswith("_")):
            raise ConfigError(
                f"config: unknown {key} = {shown(value)}, which the custom code that auto_map "
                f"names may read; if you know that it changes no number, remove it"
            )


def architectures(content: Mapping[str, Any]) -> list[str]:
    """The names of model classes that a config gives."""
    names = content.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _is_neutral(key: str, value: Any, fields: Mapping[str, Any], family: Family) -> bool:
    if value is None or key in family.ignores:
        return True
    if key in _BIASES and (fields["attention_bias"] or family.qkv_bias):  # the tensors say which
        return True
    if key in _OF_SIZES:
        number = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        return number and math.isclose(value, _OF_SIZES[key](fields), rel_tol=1e-6)
    if key in _FOR_EACH_LAYER:
        return isinstance(value, list) and all(entry == _FOR_EACH_LAYER[key] for entry in value)
    return value in _NEUTRAL[key]


def _bits(details: Mapping[str, Any]) -> object:
    """How many bits a quantised weight has, where the config says so in a way we know."""
    for key, loaded in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if details.get(key) or details.get(f"_{key}"):
            return loaded
    bits: Any = details.get("bits") or details.get("w_bit")
    for step in ("config_groups", "group_0", "weights"):  # of compressed-tensors
        details = found if isinstance(found := details.get(step), Mapping) else {}
    return bits or details.get("num_bits")
