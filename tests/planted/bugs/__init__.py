"""The bugs, a subject in each file."""

from tests.planted.bugs import (  # noqa: F401
    arguments,
    attention,
    attention_by_numpy,
    cache,
    cache_changes,
    compiled,
    generate,
    hooks,
    jobs,
    join,
    layer,
    linear,
    logprobs,
    mask,
    mlp,
    model,
    norm,
    parallel,
    past,
    reduce,
    rope,
    sampling,
    scalars,
)
from tests.planted.planting import BUGS

__all__ = ["BUGS"]
