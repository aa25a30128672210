"""The roundings of an engine in a model family."""

from __future__ import annotations

from dataclasses import replace

from llama_layers.config.families import FAMILIES
from llama_layers.verify.profiles import RoundingProfile


def rounding_in_family(profile: RoundingProfile, model_type: str) -> RoundingProfile:
    """What an engine rounds in a family: in transformers the class of its norms has its own way."""
    own = profile.name.startswith("transformers") and not FAMILIES[model_type].rounds_before_weight
    return replace(profile, norm_before_weight=False) if own else profile
