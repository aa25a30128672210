"""Why a model of another family is not supported: what it has that the block of Llama does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EXPERTS = "experts, of which a router chooses some for each token (MoE)"
LATENT = "keys and values that are made from a compressed vector (MLA)"
RECURRENT = "layers with linear attention, a state space or a convolution"
CROSS = "cross-attention to an encoder"
TOWER = "a tower for images or sound"
PARALLEL = "attention and MLP side by side, on the same input"
MEAN = "norms that subtract the mean"
UNGATED = "an MLP without a gate"

# Keys of config.json and, without the architecture in front, of GGUF files that say so, unless they
# are null, false, 0 or 1.
SIGNS = {
    RECURRENT: """
        linear_num_key_heads linear_attn_config ssm_state_size state_size mamba_d_state
        mamba_expand conv_L_cache attn_layer_period lru_width ssm.state_size ssm.conv_kernel
        shortconv.l_cache wkv.head_size
    """,
    LATENT: "kv_lora_rank qk_nope_head_dim attention.kv_lora_rank",
    EXPERTS: """
        num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts
        moe_intermediate_size num_experts_per_tok expert_count
    """,
    CROSS: "cross_attention_layers encoder_layers",
    TOWER: """
        vision_config audio_config vision_tower mm_vision_tower vision_tower_cfg vision_encoder
        image_token_id image_token_index img_id
    """,
    MEAN: """
        layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon
        attention.layer_norm_epsilon
    """,
}
# Keys that say so if they are true.
FLAGS = {
    CROSS: "is_encoder_decoder add_cross_attention",
    PARALLEL: "parallel_attn use_parallel_residual parallel_residual",
}
# Families whose configs do not tell: model types and architectures of GGUF.
NAMED = {
    RECURRENT: "mamba mamba2 falcon_mamba rwkv rwkv6 rwkv7 arwkv7 rwkv6qwen2 xlstm",
    EXPERTS: "mixtral grok dbrx arctic hunyuan_v1_moe hunyuan_moe gpt_oss smallthinker",
    CROSS: "t5 t5encoder trocr mllama",
    TOWER: "emu3 fuyu chameleon cogvlm clip moshi qwen2vl qwen3vl llava_llama minicpmv",
    f"{MEAN} and {PARALLEL}": "cohere cohere2 command_r phi phi2 gptj codegen falcon",
    f"{MEAN} and {UNGATED}": "nemotron opt gpt2 gpt_neo mpt bloom starcoder starcoder2 xglm jais",
    MEAN: "olmo stablelm modernbert_decoder persimmon plamo orion refact",
    f"{UNGATED}": "arcee apertus apertus1p5_text nanochat",
    "norms inside attention and MLP, and weights of three values": "bitnet",
    "attention that is the difference of two": "diffllama",
    "inputs of their own for each layer": "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified "
    "gemma4_unified_text gemma4_assistant gemma4_unified_assistant",
    "layers that run several times": "hrm_text",
    "bytes in patches, instead of tokens": "blt",
    "ALiBi in its larger sizes, and one matrix for queries, keys and values": "baichuan",
    "its own order of heads in one matrix for queries, keys and values": "internlm2",
    "RoPE on half of each head, and code of its own": "chatglm",
    "logarithmic scaling of attention, and code of its own": "qwen",
    "biases by the distance of tokens, instead of RoPE": "cpmant",
    "layers that predict further tokens, and code of its own": "mimo",
    "layers of several shapes": "nemotron_nas deci openelm",
}
_OF_NAME = {name: reason for reason, names in NAMED.items() for name in names.split()}


def but_it_has(name: str, content: Mapping[str, Any]) -> str:
    """Say after the name of a family what it has that is not supported; nothing if unknown.

    `content` is its config.json, or the keys of its GGUF file without the architecture in front.
    """
    nested = content.get("text_config")
    content = {**content, **nested} if isinstance(nested, Mapping) else content
    named = _OF_NAME.get(name.replace("-", "_"))
    found = [named] if named else list(dict.fromkeys(_signs(content)))[:2]
    return f", which has {' and '.join(found)}: not supported" if found else ""


def _signs(content: Mapping[str, Any]) -> Iterator[str]:
    for reason, keys in SIGNS.items():
        if any(_says(content.get(key)) for key in keys.split()):
            yield reason
    for reason, keys in FLAGS.items():
        if any(content.get(key) is True for key in keys.split()):
            yield reason
    types = content.get("layer_types")
    known = ("full_attention", "sliding_attention")
    for kind in types if isinstance(types, list) else ():
        if isinstance(kind, str) and kind not in known:
            yield f"layers of the type {kind[:40]}"


def _says(value: object) -> bool:
    """Whether the value of a key says that there is something."""
    return bool(value) and value != 1 if isinstance(value, int | float) else value is not None
