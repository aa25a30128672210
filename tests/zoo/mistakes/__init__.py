"""The mistakes: each is named as in LIST.md, which says what it is."""

from tests.zoo.mistakes import (  # noqa: F401
    attention,
    caches,
    kernels,
    layers,
    mixed,
    mlp,
    norms,
    quantised,
    rope,
    softmax,
    tokens,
    weights,
)
