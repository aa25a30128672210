"""Which part of each tensor a rank has.

Query heads and the channels of the MLP are split as evenly as possible. A rank has the key and
value heads that its query heads read; where ranks do not divide them, two ranks have the same one.
The output projections (``o_proj``, ``down_proj``) are split by columns, so that each rank gets a
partial sum of their results. The embedding, the head and norms are whole on every rank, but for
norms over all queries and all keys: their weights are split as the heads are.

M. Shoeybi et al., "Megatron-LM", section 3. `arXiv:1909.08053 <https://arxiv.org/abs/1909.08053>`_
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from llama_layers.arrays.checks import check_count, is_integer
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import shown
from llama_layers.layers.tensors import TENSORS, tensors_of


@dataclass(frozen=True)
class Piece:
    """Some of the rows, or columns, of a tensor; or zeros, which change no result."""

    start: int
    stop: int
    zeros: bool = False

    def times(self, width: int) -> Piece:
        """The same for items of `width` rows each."""
        return replace(self, start=self.start * width, stop=self.stop * width)


Pieces = tuple[Piece, ...]
# Which heads, channels or tokens of the whole a rank has; None for one of zeros.
Places = tuple[int | None, ...]


@dataclass(frozen=True)
class Shard:
    """The part of a model that one of several ranks has.

    Attributes
    ----------
    whole : LlamaConfig
        The numbers of the whole model.
    rank, size : int
        Which of how many ranks.

    Raises
    ------
    ValueError
        If `rank` is not one of `size` ranks.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.parallel.plan import Shard
    >>> shard = Shard(LlamaConfig.smollm2_135m(), rank=1, size=3)
    >>> shard.query_heads, shard.kv_heads, shard.config.intermediate_size
    ((3, 4, 5), range(1, 2), 512)
    """

    whole: LlamaConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        check_count("size", self.size)
        if not is_integer(self.rank) or not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank: expected an integer from 0 to {self.size - 1}, got {shown(self.rank)}"
            )

    @cached_property
    def query_heads(self) -> Places:
        """The query heads of this rank; None for a head of zeros.

        Each key and value head is read by the same number of query heads, as the layers expect.
        Where a rank has a few of the queries of one key head and all of another, heads of zeros
        make up for the difference.
        """
        group = self.whole.num_attention_heads // self.whole.num_key_value_heads
        heads = _share(self.whole.num_attention_heads, self.rank, self.size)
        runs = [list(run) for _, run in groupby(heads, lambda head: head // group)]
        longest = max(map(len, runs), default=1)
        padded = ((*run, *[None] * (longest - len(run))) for run in runs or [[]])
        return tuple(head for run in padded for head in run)

    @cached_property
    def kv_heads(self) -> range:
        """The key and value heads of this rank."""
        group = self.whole.num_attention_heads // self.whole.num_key_value_heads
        own = [head // group for head in self.query_heads if head is not None]
        return range(own[0], own[-1] + 1) if own else range(1)

    @cached_property
    def channels(self) -> range:
        """The channels of the MLP of this rank, which may be none."""
        return _share(self.whole.intermediate_size, self.rank, self.size)

    @cached_property
    def config(self) -> LlamaConfig:
        """The numbers of the part: those of a model with fewer heads and channels."""
        return replace(
            self.whole,
            num_attention_heads=len(self.query_heads),
            num_key_value_heads=len(self.kv_heads),
            intermediate_size=max(1, len(self.channels)),
        )

    @cached_property
    def pieces(self) -> Mapping[str, Pieces]:
        """For each axis that is split, by its name in the table of tensors, what this rank has."""
        width, kv = self.whole.head_dim, self.kv_heads
        channels = Piece(self.channels.start, self.channels.stop)
        found = {
            "q_size": tuple(piece.times(width) for piece in _pieces(self.query_heads)),
            "num_heads": _pieces(self.query_heads),
            "kv_size": (Piece(kv.start, kv.stop).times(width),),
            "intermediate_size": (channels if self.channels else Piece(0, 1, zeros=True),),
        }
        if self.whole.qk_norm == "full":
            self._check_even()
            found |= {"q_norm_size": found["q_size"], "k_norm_size": found["kv_size"]}
        return found

    def _check_even(self) -> None:
        """Raise ValueError unless each rank has equally many heads of its own."""
        if self.whole.num_key_value_heads % self.size:
            raise ValueError(
                f"size: expected a number of ranks that divides num_key_value_heads = "
                f"{self.whole.num_key_value_heads}, since norms go over all queries and all keys "
                f"(qk_norm = 'full'), got {self.size}"
            )

    def part(self, name: str, array: Array, /) -> Array:
        """The part of a tensor that this rank has.

        Parameters
        ----------
        name : str
            The name of the tensor in Hugging Face's model.
        array : Array
            The whole tensor.

        Returns
        -------
        Array
            A view of some rows, a copy of some columns, or the tensor itself where it is whole on
            every rank.

        Raises
        ------
        ValueError
            If norms go over all heads, and ranks do not divide the key heads.
        """
        tensor = tensors_of(self.whole).get(_below_layer(name))
        if tensor is None:
            return array
        for axis, size in enumerate(tensor.axes.split()):
            if size in self.pieces:
                array = _taken(array, axis, self.pieces[size])
        module, _, kind = tensor.name.rpartition(".")
        if self.rank and kind == "bias" and module in SUMMED:  # rank 0 adds it, once
            return namespace(array=array).zeros_like(array)
        return array


_SPLIT = ("q_size", "kv_size", "intermediate_size")
# Modules whose matrix is split by columns: each rank has a partial sum of what they give.
SUMMED = frozenset(
    tensor.name.removesuffix(".weight")
    for tensor in TENSORS
    if len(axes := tensor.axes.split()) == 2 and axes[1] in _SPLIT
)


def _below_layer(name: str) -> str:
    """``self_attn.q_proj.weight`` of ``model.layers.3.self_attn.q_proj.weight``."""
    return name.split(".", 3)[-1] if name.startswith("model.layers.") else name


def _share(count: int, rank: int, size: int) -> range:
    """The numbers below `count` that a rank has: as many as any other, or one less."""
    return range(count * rank // size, count * (rank + 1) // size)


def _pieces(heads: Places) -> Pieces:
    """Heads in as few pieces as they come in; None stands for zeros."""
    pieces: list[Piece] = []
    for head in heads:
        zeros = head is None
        start = 0 if head is None else head
        if pieces and pieces[-1].zeros == zeros and (zeros or pieces[-1].stop == start):
            pieces[-1] = replace(pieces[-1], stop=pieces[-1].stop + 1)
        else:
            pieces.append(Piece(start, start + 1, zeros))
    return tuple(pieces)


def _taken(array: Array, axis: int, pieces: Pieces) -> Array:
    """Pieces of an array along an axis, next to each other."""
    xp = namespace(array=array)
    parts = []
    for piece in pieces:
        if piece.zeros:
            shape = [*array.shape]
            shape[axis] = piece.stop - piece.start
            parts.append(xp.zeros(tuple(shape), dtype=array.dtype, device=device(array)))
        else:
            parts.append(array[(slice(None),) * axis + (slice(piece.start, piece.stop),)])
    if len(parts) == 1:
        return xp.asarray(parts[0], copy=True) if axis else parts[0]
    return xp.concat(parts, axis=axis)
