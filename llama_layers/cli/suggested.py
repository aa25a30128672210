"""The authors' settings for `generate`, from generation_config.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

# Settings that become options; the latter only where do_sample is true.
_ALWAYS = ("max_new_tokens", "repetition_penalty")
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
SETTINGS = (*_ALWAYS, *_DRAWING)

# Settings that would change the text and are not implemented, with the values that do nothing.
_NOT_APPLIED: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "custom_generate": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "sequence_bias": (),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def suggested_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a generation config sets; settings that are not applied go to stderr."""
    options = {name: config[name] for name in _ALWAYS if config.get(name) is not None}
    drawing = {name: config[name] for name in _DRAWING if config.get(name) is not None}
    ignored = [
        name
        for name, neutral in _NOT_APPLIED.items()
        if config.get(name) is not None and config[name] not in neutral
    ]
    if ignored:
        print(f"generation_config.json: not applied: {', '.join(ignored)}", file=sys.stderr)
    if config.get("do_sample") is not True:
        if drawing:
            names = ", ".join(drawing)
            print(
                f"generation_config.json: not applied, since do_sample is not true: {names}",
                file=sys.stderr,
            )
        return options
    if drawing.get("top_k") == 0:  # all tokens
        del drawing["top_k"]
    return options | {"temperature": 1.0} | drawing
