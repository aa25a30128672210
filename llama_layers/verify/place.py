"""Where the wrong elements of a site are: how many, in which box, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import Site
from llama_layers.verify.bound import Bound
from llama_layers.verify.extent import LISTED, Extent, Marginal, marginal
from llama_layers.verify.fit import FLAT, HEADED, OF_VOCABULARY
from llama_layers.verify.place_words import words

# Positions stand out if their least error is this many times the largest elsewhere, over what is
# usual. Errors that fade from one position to the next, as those of float32 phases, do not.
_STANDS_OUT = 2.0
# A run of output channels that covers less of the heads that it touches is told as channels.
_WHOLE = 0.9
# Operations that give the first token what it had, whatever is wrong: it can show no mistake.
_SPARES_FIRST = ("rope", "scores", "softmax", "attention")
# Where heads share keys and values.
_GROUPED = ("self_attn.q_proj", "self_attn.q_rope", "self_attn.attention")


@dataclass(frozen=True)
class Place:
    """Where the wrong elements of a site are.

    Attributes
    ----------
    wrong : int
        How many elements err by more than the limit.
    of : int
        How many have a limit.
    extents : tuple of Extent
        The positions along each axis that have wrong elements. Heads that lie side by side are told
        both ways, as heads and as output channels.
    local : bool
        Whether the wrong elements are few along an axis and stand out: all errors outside their box
        are within what is usual, and far below those inside. A cause that would touch every element
        does not fit then.
    words : str
        The same in a few words: "head 8 only".
    """

    wrong: int
    of: int
    extents: tuple[Extent, ...]
    local: bool
    words: str

    def __str__(self) -> str:
        return f"{self.wrong} of {self.of} elements, {self.words}"


@np.errstate(invalid="ignore", over="ignore")  # the port may have NaN
def place_of(
    site: Site, computed: np.ndarray, bound: Bound, config: LlamaConfig, /
) -> Place | None:
    """Find the elements of a site that err by more than the limit.

    Chance is allowed for. A mistake in every element of a site, of about the size of the limit,
    shows in some elements only; so an axis counts as restricted only if as many elements, thrown
    at random, would not have fallen into as few positions. And the place is local only if the
    errors outside it are those of rounding: a gap lies between them and those inside.

    Parameters
    ----------
    site : Site
        The site.
    computed : ndarray, of the site's shape
        The port's array.
    bound : Bound
        The exact array, the limit of each element, and what is usual; a limit is infinite where
        nothing is judged.
    config : LlamaConfig
        The model's, which says how many heads lie side by side.

    Returns
    -------
    Place or None
        None if no element is wrong.
    """
    ratio = bound.ratio(computed)
    wrong, judged = ratio > 1, ~np.isinf(bound.limit)
    count = int(np.count_nonzero(wrong))
    if not count:
        return None
    usual = np.where(judged, bound.usual_ratio(computed), 0.0)
    heads = config.head_dim if site.role in FLAT else None
    wrong, judged, usual = (_with_heads(array, heads) for array in (wrong, judged, usual))
    marginals = tuple(_marginals(site, wrong, judged, flat=heads is not None))
    told = _told(marginals)
    elements = _elements(wrong, count, computed.shape)
    few = [m for m in told if (m.others.size if count <= LISTED else m.few)]
    group = config.num_attention_heads // config.num_key_value_heads
    shared = group if site.role in _GROUPED or site.pairwise else 1
    local = bool(few) and _stands_out(few, usual)
    return Place(
        count,
        int(np.count_nonzero(judged)),
        tuple(m.extent for m in marginals),
        local,
        words(told, few, elements, shared, config.head_dim, local=local),
    )


def _with_heads(array: np.ndarray, width: int | None) -> np.ndarray:
    return array if width is None else array.reshape(*array.shape[:2], -1, width)


def _marginals(
    site: Site,
    wrong: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    *,
    flat: bool,
) -> Iterator[Marginal]:
    """Count along each axis that has more than one position."""
    last = "output channel" if site.operation == "linear" else "channel"
    last = "logit" if site.name in OF_VOCABULARY else "channel" if site.role in HEADED else last
    names = ["sequence", "token", "head", last] if wrong.ndim == 4 else ["sequence", "token", last]
    if site.pairwise:
        names = ["sequence", "head", "token", "key"]
    for i, name in enumerate(names):
        if wrong.shape[i] > 1:
            spared = name == "token" and site.operation in _SPARES_FIRST
            positions = np.arange(wrong.shape[i])
            yield marginal(name, (i,), positions, wrong, judged, spares_first=spared)
    if flat:
        channels = np.arange(math.prod(wrong.shape[2:])).reshape(wrong.shape[2:])
        yield marginal("output channel", (2, 3), channels, wrong, judged)
    if site.pairwise and wrong.shape[2] > 1:
        tokens, keys = wrong.shape[2:]
        before = np.arange(tokens)[:, None] - np.arange(keys) + keys - tokens
        offset = tokens - 1  # of the key after all for the first token
        yield marginal("distance", (2, 3), before + offset, wrong, judged, offset=offset)


def _told(marginals: Sequence[Marginal]) -> list[Marginal]:
    """Of axes that tell the same in different words, those that tell it in few."""
    by = {m.extent.axis: m for m in marginals}
    if "key" in by and "token" in by:  # a token has no later keys
        token, key = by["token"].extent, by["key"].extent
        if by["key"].few and token.first == key.first:
            del by["token"]
        elif by["token"].few and key.first == 0 and key.last == token.last:
            del by["key"]
    if "distance" in by and (
        not by["distance"].few or any(by[n].few for n in ("token", "key") if n in by)
    ):
        del by["distance"]
    if "output channel" in by and {"head", "channel"} & set(by):
        flat, heads = by["output channel"].extent, by.get("head")
        width = flat.size if heads is None else heads.extent.count * flat.size // heads.extent.size
        part = flat.last - flat.first + 1 < _WHOLE * width
        if flat.count == 1 or (flat.few and flat.step == 1 and part):
            by = {name: m for name, m in by.items() if name not in ("head", "channel")}
        else:
            del by["output channel"]
    return list(by.values())


def _stands_out(few: Sequence[Marginal], usual: NDArray[np.float64]) -> bool:
    """Whether a gap lies between the errors at some positions and those elsewhere."""
    box = np.ones((1,) * usual.ndim, bool)
    for m in few:
        box = box & m.box(usual.ndim)
    elsewhere = float(np.max(usual, initial=0.0, where=~np.broadcast_to(box, usual.shape)))
    least = min(float(m.largest(usual).min()) for m in few)
    return elsewhere <= 1 and least >= _STANDS_OUT * elsewhere


def _elements(wrong: NDArray[np.bool_], count: int, shape: tuple[int, ...]) -> list[list[int]]:
    """The wrong elements, if they are few and do not fill a box."""
    if not 1 < count <= LISTED:
        return []
    found = np.argwhere(wrong)
    box = math.prod(len(set(column)) for column in found.T.tolist())
    return np.argwhere(wrong.reshape(shape)).tolist() if box != count else []
