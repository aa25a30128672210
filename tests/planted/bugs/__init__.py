"""The bugs, a subject in each file."""

from tests.planted.bugs import (  # noqa: F401
    arguments,
    attention,
    attention_by_numpy,
    cache,
    cache_changes,
    causes,
    compiled,
    configs,
    generate,
    gguf,
    hooks,
    jobs,
    join,
    layer,
    linear,
    logprobs,
    mask,
    mlp,
    model,
    names,
    norm,
    parallel,
    past,
    place,
    reduce,
    rope,
    sampling,
    scalars,
)
from tests.planted.planting import BUGS

__all__ = ["BUGS"]
