"""The place of wrong elements, found where they were put."""

from __future__ import annotations

from types import EllipsisType

import numpy as np
import pytest

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import Site, sites
from llama_layers.verify.bound import Bound
from llama_layers.verify.place import Place, place_of

Index = int | slice | list[int] | EllipsisType
CONFIG = LlamaConfig.smollm2_135m()  # 9 heads of 64, 3 for keys and values
READ, HALF = (
    "heads 3 to 5 only: those that read key and value head 1?",
    "the first half of each head?",
)
ALL, TOKENS = slice(None), 40
DOWN, QUERIES = "mlp.down_proj", "self_attn.q_proj"
Q_ROPE, PROBABILITIES = "self_attn.q_rope", "self_attn.probabilities"


def site_of(role: str) -> Site:
    return next(site for site in sites(CONFIG) if site.role == role)


def with_errors(
    role: str, wrong: tuple[Index, ...], size: float, *, tokens: int = TOKENS, batch: int = 1
) -> Place | None:
    """The place of normal errors: 0.2 times what is usual, and `size` times that where wrong.

    The limit is 3 times what is usual.
    """
    rng, site = np.random.default_rng(0), site_of(role)
    extent = {"B": batch, "S": tokens}
    shape = tuple(extent[axis] if isinstance(axis, str) else axis for axis in site.shape)
    exact, error = rng.standard_normal(shape), 2e-7 * rng.standard_normal(shape)
    error[wrong] *= size
    limit, usual = np.full(shape, 3e-6), np.full(shape, 1e-6)
    if site.pairwise:
        hidden = np.triu(np.ones((tokens, tokens), bool), 1)
        limit[..., hidden], usual[..., hidden], error[..., hidden] = np.inf, np.inf, 1.0
    return place_of(site, exact + error, Bound(exact, limit, usual), CONFIG)


LOCAL: list[tuple[str, tuple[Index, ...], int, str]] = [
    (DOWN, (ALL, ALL, 500), 40, "output channel 500 only"),
    (DOWN, (ALL, ALL, [3, 77]), 40, "output channels 3 and 77 only"),
    (DOWN, (ALL, 7), 40, "token 7 only"),
    (DOWN, (ALL, slice(32, 35)), 35, "tokens 32 and above only: past a multiple of 32?"),
    (DOWN, (ALL, slice(16, 32)), 40, "tokens 16 to 31 only: a tile of 16?"),
    (DOWN, (ALL, slice(1, None, 3)), 40, "every 3rd token from 1 only"),
    (DOWN, (ALL, [3, 13, 20, 27, 36]), 40, "5 of 40 tokens (3, 13, 20 and 27 ...) only"),
    (DOWN, (ALL, slice(1, None, 13)), 60, "every 13th token from 1 only"),
    (DOWN, (ALL, ALL, slice(544, None)), 40, "output channels 544 and above only: a tile of 32?"),
    (DOWN, (0, 5, 500), 40, "token 5, output channel 500 only"),
    (DOWN, (0, [5, 9], [7, 500]), 40, "elements [0, 5, 7], [0, 9, 500] only"),
    (QUERIES, (ALL, ALL, 500), 40, "output channel 500 only"),
    (QUERIES, (ALL, ALL, slice(512, 576)), 40, "head 8 only"),
    (QUERIES, (ALL, ALL, slice(100, 131)), 40, "output channels 100 to 130 only"),
    (Q_ROPE, (ALL, ALL, 8), 40, "head 8 only"),
    (Q_ROPE, (ALL, ALL, slice(3, 6)), 40, READ),
    (Q_ROPE, (..., [5, 37]), 40, "channels 5 and 37 of each head only: a pair that RoPE rotates?"),
    (Q_ROPE, (..., slice(32)), 40, f"channels 0 to 31 of each head only: {HALF}"),
    (PROBABILITIES, (..., slice(32, None)), 40, "keys 32 and above only: past a multiple of 32?"),
    (PROBABILITIES, (ALL, 2), 40, "head 2 only"),
    (PROBABILITIES, (..., np.arange(40), np.arange(40)), 40, "each token's own key only"),  # type: ignore[list-item]
]  # fmt: skip


@pytest.mark.parametrize(("role", "wrong", "tokens", "said"), LOCAL)
def test_a_local_fault_is_told_by_its_place(
    role: str, wrong: tuple[Index, ...], tokens: int, said: str
) -> None:
    place = with_errors(role, wrong, 500.0, tokens=tokens)
    assert place is not None
    assert (place.words, place.local) == (said, True)


@pytest.mark.parametrize(
    ("role", "said"), [(DOWN, "every token but 0"), (Q_ROPE, "every token but 0")]
)
def test_a_fault_nearly_everywhere_is_not_local(role: str, said: str) -> None:
    place = with_errors(role, (ALL, slice(1, None)), 500.0)
    assert place is not None
    assert (place.words, place.local) == (said, False)


@pytest.mark.parametrize("size", [3.5, 3.7, 4.0, 5.0, 20.0])
def test_chance_does_not_hide_that_a_fault_is_everywhere(size: float) -> None:
    # A few elements exceed the limit at the least size, half of them at the largest.
    place = with_errors("mlp.act", (), size)
    assert place is not None
    assert not place.local
    few = "; errors elsewhere are not much smaller"
    assert place.words.endswith(few if size < 4 else "all over the array")


def test_errors_that_fade_from_place_to_place_are_not_local() -> None:
    site, shape = site_of(Q_ROPE), (1, TOKENS, 9, 64)
    fading = 1e-6 * 30.0 * 1.33 ** -np.arange(64.0)  # as those of float32 phases over channels
    error = fading * np.random.default_rng(0).standard_normal(shape)
    bound = Bound(np.zeros(shape), np.full(shape, 3e-6), np.full(shape, 3e-6))
    place = place_of(site, error, bound, CONFIG)
    assert place is not None
    assert place.extents[-1].few
    assert not place.local


def test_the_first_token_could_not_be_wrong_after_rope() -> None:
    # Of two tokens the other one is the only that could be.
    place = with_errors(Q_ROPE, (ALL, 1), 500.0, tokens=2)
    assert place is not None
    assert not place.local
    linear = with_errors(DOWN, (ALL, 1), 500.0, tokens=2)
    assert linear is not None
    assert linear.local


def test_elements_are_counted_where_they_have_a_limit() -> None:
    place = with_errors(PROBABILITIES, (0, 2, 7, [1, 3]), 1e6)
    assert place is not None
    assert (place.wrong, place.of) == (2, 9 * TOKENS * (TOKENS + 1) // 2)
    token = next(extent for extent in place.extents if extent.axis == "token")
    assert (token.size, token.count, token.first, token.last, token.step) == (40, 1, 7, 7, 1)
    key = next(extent for extent in place.extents if extent.axis == "key")
    assert (key.count, key.first, key.last, key.step) == (2, 1, 3, 0)


def test_a_right_array_has_no_place() -> None:
    assert with_errors(DOWN, (), 1.0) is None


def test_nan_are_wrong() -> None:
    site, exact = site_of(DOWN), np.ones((1, 5, 576))
    computed = exact.copy()
    computed[0, :, 9] = np.nan
    place = place_of(site, computed, Bound(exact, exact * 1e-6, exact * 1e-6), CONFIG)
    assert place is not None
    assert (place.wrong, place.words, place.local) == (5, "output channel 9 only", True)
