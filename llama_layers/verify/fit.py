"""Arrays in the shapes and the order that the sites have, whichever of the usual ones they came in.

Only a config tells heads from other axes, so this is done when a trace meets a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import HEAD, LOGITS, Site
from llama_layers.model.padding import padding
from llama_layers.verify.stored import StoredArray, StoredArrays, stored

# Sites of which an engine may have kept the last token only.
OF_LAST_TOKEN = ("model.norm", HEAD, LOGITS)
# Sites of which an axis holds the vocabulary.
OF_VOCABULARY = (HEAD, LOGITS)
# Sites of which an axis holds heads side by side.
FLAT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Sites that hold heads, side by side or not.
_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
HEADED = (*FLAT, *_NORMS, "self_attn.q_rope", "self_attn.k_rope", "self_attn.attention")
# Sites that a cache keeps, and the names of what it has kept of earlier tokens.
OF_CACHE = {
    "self_attn.k_rope": "self_attn.past_key",
    "self_attn.v_proj": "self_attn.past_value",
}
# The site of keys that a cache keeps where their norm comes after RoPE.
NORMED_KEYS = "self_attn.k_norm"
# Sites whose heads hold pairs that RoPE rotates.
ROTATED = (*FLAT[:2], *_NORMS, "self_attn.q_rope", "self_attn.k_rope")


def fitted(
    arrays: Mapping[str, Array],
    known: Mapping[str, Site],
    config: LlamaConfig,
    extent: tuple[int, int],
    layout: str,
    keys: Mapping[int, int],
) -> StoredArrays:
    """Return a trace's arrays as NumPy's, each brought into its site's shape when it is used.

    Heads may be an axis of their own or side by side, and a batch of one may be no axis. Where the
    metadata's "rope_layout" is "interleaved", the two numbers of a pair that RoPE rotates come next
    to each other, and are put half a head apart. Logits of no token, from a head with rows of
    padding, are left out. Queries of a layer may see more keys than there are tokens, `keys`.

    Raise TraceError unless each array has the shape of its site and holds floats.
    """
    found = {}
    for name in arrays:
        site, array = known[name], stored(arrays, name)
        if name in OF_VOCABULARY:
            array = without_padding(array, config.vocab_size)
        given = array.info()
        seen = extent[1] if site.layer is None else keys[site.layer]
        shape = _shape(site, given.shape, extent, config.head_dim, seen)
        if given.dtype not in FLOATS:
            raise TraceError(
                f"{name}: expected one of the dtypes {', '.join(FLOATS)}, got {given.dtype}"
            )
        pairs = config if layout == "interleaved" and site.role in ROTATED else None
        found[name] = array.changed(shape, partial(_fit, shape, pairs))
    return StoredArrays(found)


def check_layout(layout: str) -> None:
    """Raise TraceError unless it is the name of a RoPE layout."""
    if layout not in ("half", "interleaved"):
        raise TraceError(f"metadata rope_layout: expected 'half' or 'interleaved', got {layout!r}")


def without_padding(logits: StoredArray, tokens: int) -> StoredArray:
    """Leave out what a head with rows of padding gives beyond the vocabulary."""
    *others, width = logits.info().shape or (0,)
    if not padding(width, tokens):
        return logits
    return logits.changed((*others, tokens), partial(_first_of, tokens))


def _first_of(tokens: int, logits: Array) -> Array:
    return logits[..., :tokens]


def _fit(shape: tuple[int, ...], interleaved: LlamaConfig | None, given: Array) -> np.ndarray:
    """Bring an array into a shape, and put pairs half a head apart where they are interleaved."""
    array = to_numpy(given).reshape(shape)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array if interleaved is None else in_halves(array, interleaved)


def _shape(
    site: Site, found: tuple[int, ...], extent: tuple[int, int], width: int, keys: int
) -> tuple[int, ...]:
    """Return the shape of its site that an array has, but for how it is written."""
    sizes = dict(zip("BS", extent, strict=True))
    whole = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in site.shape)
    if site.pairwise:
        whole = (*whole[:-1], keys)
    last = (whole[0], 1, *whole[2:])
    shapes = [whole, last] if site.name in OF_LAST_TOKEN else [whole]
    for shape in shapes:
        if found in _spellings(site, shape, width):
            return shape
    axes = ", ".join(map(str, site.shape))
    or_last = f" or, of the last token, {list(last)}" if len(shapes) > 1 else ""
    raise TraceError(
        f"{site.name}: expected shape {list(whole)} ([{axes}]){or_last}, "
        f"got {list(found)}{_hint(site, found, extent, width)}"
    )


def _hint(site: Site, shape: tuple[int, ...], extent: tuple[int, int], width: int) -> str:
    """Say what to do about heads that come before tokens, and about keys of the past."""
    batch, count = extent
    heads = math.prod(size for size in site.shape if isinstance(size, int)) // width
    if site.role in OF_CACHE and (past := math.prod(shape) // (batch * heads * width) - count) > 0:
        return f": write the first {past} tokens, of the past, as {OF_CACHE[site.role]}"
    if site.role in HEADED and shape[-3:] == (heads, count, width):
        if len(shape) == 3 and batch == 1:
            return ": transpose axes 0 and 1, heads and tokens"
        if shape[:-3] == (batch,):
            return ": transpose axes 1 and 2, heads and tokens"
    return ""


def _spellings(site: Site, shape: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """Return the shapes in which a site's numbers may come, in the same order."""
    found = [shape]
    if site.role in HEADED and len(shape) == 3:
        found.append((*shape[:-1], shape[-1] // width, width))
    elif len(shape) == 4 and not site.pairwise:
        found.append((*shape[:2], shape[2] * shape[3]))
    if shape[0] == 1:
        found += [spelling[1:] for spelling in found]
    return found


def in_pairs(array: np.ndarray, *, config: LlamaConfig) -> np.ndarray:
    """Undo `in_halves`, in an array of which heads, or their channels, are the last axis or two."""
    width = config.rotary_dim
    heads = array.reshape(-1, config.head_dim).copy()
    halves = heads[:, :width].reshape(len(heads), 2, width // 2)
    heads[:, :width] = np.swapaxes(halves, -1, -2).reshape(len(heads), width)
    return heads.reshape(array.shape)


def in_halves(array: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Put pairs that are next to each other half a head, or half of what is rotated, apart."""
    width = config.rotary_dim
    heads = array.reshape(*array.shape[:2], -1, config.head_dim).copy()
    pairs = heads[..., :width].reshape(*heads.shape[:-1], width // 2, 2)
    heads[..., :width] = np.swapaxes(pairs, -1, -2).reshape(*heads.shape[:-1], width)
    return heads.reshape(array.shape)
