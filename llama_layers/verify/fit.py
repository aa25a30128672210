"""Arrays in the shapes and the order that the sites have, whichever of the usual ones they came in.

Only a config tells heads from other axes, so this is done when a trace meets a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.verify.sites import Site
from llama_layers.verify.stored import ArrayInfo, StoredArrays, info_of

# Sites of which an engine may have kept the last token only.
OF_LAST_TOKEN = ("model.norm", "lm_head")
# Sites of which an axis holds heads side by side.
_FLAT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Sites that hold heads, side by side or not.
HEADED = (*_FLAT, "self_attn.q_rope", "self_attn.k_rope", "self_attn.attention")
# Sites whose heads hold pairs that RoPE turns.
TURNED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_rope", "self_attn.k_rope")


class Fitted(StoredArrays):
    """A trace's arrays as NumPy's, each brought into its site's shape when it is used.

    Heads may be an axis of their own or side by side, and a batch of one may be no axis. Where the
    metadata's "rope_layout" is "interleaved", the two numbers of a pair that RoPE turns come next
    to each other, and are put half a head apart.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        known: Mapping[str, Site],
        config: LlamaConfig,
        extent: tuple[int, int],
        layout: str,
    ) -> None:
        if layout not in ("half", "interleaved"):
            raise TraceError(
                f"metadata rope_layout: expected 'half' or 'interleaved', got {layout!r}"
            )
        self._arrays = arrays
        self._known = known
        self._width = config.head_dim
        self._extent = extent
        self._interleaved = layout == "interleaved"

    def check(self, name: str) -> None:
        """Raise TraceError unless an array has the shape of its site and holds floats."""
        self._shape(name)
        found = info_of(self._arrays, name).dtype
        if found not in FLOATS:
            raise TraceError(f"{name}: expected one of the dtypes {', '.join(FLOATS)}, got {found}")

    def info(self, name: str) -> ArrayInfo:
        """The shape that an array will have, and its dtype; it is not read."""
        return ArrayInfo(self._shape(name), info_of(self._arrays, name).dtype)

    def __getitem__(self, name: str) -> NDArray[Any]:
        shape = self._shape(name)
        array = to_numpy(self._arrays[name]).reshape(shape)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        turned = self._interleaved and self._known[name].role in TURNED
        return in_halves(array, self._width) if turned else array

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of its site that an array has, but for how it is spelt."""
        site, found = self._known[name], info_of(self._arrays, name).shape
        for shape in self._shapes(site):
            if found in _spellings(site, shape, self._width):
                return shape
        axes = ", ".join(map(str, site.shape))
        whole, *last = map(list, self._shapes(site))
        or_last = f" or, of the last token, {last[0]}" if last else ""
        raise TraceError(
            f"{name}: expected shape {whole} ([{axes}]){or_last}, "
            f"got {list(found)}{self._transposed(site, found)}"
        )

    def _transposed(self, site: Site, shape: tuple[int, ...]) -> str:
        """What to do about heads that come before tokens."""
        batch, count = self._extent
        heads = math.prod(size for size in site.shape if isinstance(size, int)) // self._width
        if site.role in HEADED and shape[-3:] == (heads, count, self._width):
            if len(shape) == 3 and batch == 1:
                return ": transpose axes 0 and 1, heads and tokens"
            if shape[:-3] == (batch,):
                return ": transpose axes 1 and 2, heads and tokens"
        return ""

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def _shapes(self, site: Site) -> list[tuple[int, ...]]:
        sizes = dict(zip("BS", self._extent, strict=True))
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in site.shape)
        last = (shape[0], 1, *shape[2:])
        return [shape, last] if site.name in OF_LAST_TOKEN else [shape]


def _spellings(site: Site, shape: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """The shapes in which a site's numbers may come, in the same order."""
    found = [shape]
    if site.role in _FLAT:
        found.append((*shape[:-1], shape[-1] // width, width))
    elif len(shape) == 4 and not site.pairwise:
        found.append((*shape[:2], shape[2] * shape[3]))
    if shape[0] == 1:
        found += [spelling[1:] for spelling in found]
    return found


def in_halves(array: NDArray[Any], width: int) -> NDArray[Any]:
    """Pairs next to each other put half a head apart."""
    pairs = array.reshape(*array.shape[:2], -1, width // 2, 2)
    return np.ascontiguousarray(np.swapaxes(pairs, -1, -2)).reshape(array.shape)
