"""Bugs of the bodies that NumPy has of its own: attention, norm, RoPE, the gate and embeddings."""

from __future__ import annotations

from catalogue import Mutant

_ATTENTION = "backends/numpy/attention.py"
_POINTWISE = "backends/numpy/pointwise.py"
_ROWS = "test_attention_tiles.py::test_tiles_like_one_row_at_a_time"
_MEMORY = "test_feed_forward.py::test_any_shape_and_memory_order_in_blocks"

MUTANTS = [
    Mutant(
        "the last visible key of a block cut off",
        _ATTENTION,
        "slice(columns[0], columns[-1] + 1)",
        "slice(columns[0], columns[-1])",
        _ROWS,
    ),
    Mutant(
        "values of a window from the first key on",
        _ATTENTION,
        "values[b, h, seen], hidden",
        "values[b, h, : seen.stop - seen.start], hidden",
        _ROWS,
    ),
    Mutant(
        "keys cut to what the first query of a block sees",
        _ATTENTION,
        "seen = _span(allowed)",
        "seen = _span(allowed[:, :1])",
        _ROWS,
    ),
    Mutant(
        "the padding of the first sequence for all",
        _ATTENTION,
        "rows if len(rows) == 1 else rows[b]",
        "rows[:1]",
        _ROWS,
    ),
    Mutant(
        "the rows of the first block for every block",
        _ATTENTION,
        "rows = _rows(mask, block.start, block.stop)",
        "rows = _rows(mask, 0, block.stop - block.start)",
        _ROWS,
    ),
    Mutant(
        "a block of queries that sees nothing left as an average",
        _ATTENTION,
        "        largest[largest == -math.inf] = 0",
        "        empty = largest == -math.inf\n        scores[empty[..., 0]] = largest[empty] = 0",
        _ROWS,
    ),
    Mutant(
        "key heads beyond the first of a tile left out",
        _ATTENTION,
        "for h in _parts(kv_heads, together):",
        "for h in _parts(kv_heads, together)[:1]:",
        _ROWS,
    ),
    Mutant(
        "the queries beyond whole blocks left out",
        _ATTENTION,
        "for start in range(0, queries, step):",
        "for start in range(0, queries - step + 1, step):",
        _ROWS,
    ),
    Mutant(
        "scaled before the product, which then does not overflow",
        _ATTENTION,
        """\
    scores = q.reshape(*q.shape[:-3], -1, q.shape[-1]) @ kt
    scores *= scale
""",
        """\
    scores = (scale * q).reshape(*q.shape[:-3], -1, q.shape[-1]) @ kt
""",
        "test_attention.py::test_scores_that_overflow",
    ),
    Mutant(
        "hidden scores of a tile lowered and not removed",
        _ATTENTION,
        "np.copyto(by_query[..., part], -math.inf, where",
        "np.copyto(by_query[..., part], -1e4, where",
        "test_attention.py::test_a_hidden_key_weighs_nothing_at_any_score",
    ),
    Mutant(
        "one maximum for all rows of a tile",
        _ATTENTION,
        "largest = scores.max(axis=-1, keepdims=True)",
        "largest = scores.max(axis=(-2, -1), keepdims=True) + 0 * scores[..., :1]",
        "test_attention.py::test_rows_of_very_different_scores",
    ),
    Mutant(
        "scores of a tile in 16 bits",
        _ATTENTION,
        "    scores *= scale\n",
        "    scores = (scores * scale).astype(np.float16).astype(scores.dtype)\n",
        "test_attention_tiles.py::test_tiles_are_within_the_bound[float32]",
    ),
    Mutant(
        "heads of a group scattered into the result of another",
        _ATTENTION,
        "out = y.reshape(by_group).transpose(0, 2, 3, 1, 4)",
        "out = y.reshape(batch, queries, group, kv_heads, width).transpose(0, 3, 2, 1, 4)",
        _ROWS,
    ),
    Mutant(
        "the last block of gates left out",
        _POINTWISE,
        "for start in range(0, gate.size, BLOCK):",
        "for start in range(0, gate.size - BLOCK + 1, BLOCK):",
        "test_feed_forward.py::test_pins[body-numpy]",
    ),
    Mutant(
        "up read in its own memory order",
        _POINTWISE,
        "gate, up = gate.transpose(axes), up.transpose(axes)",
        "gate, up = gate.transpose(axes), up.ravel('K').reshape(gate.transpose(axes).shape)",
        _MEMORY,
    ),
    Mutant(
        "gated numbers put back in another order of axes",
        _POINTWISE,
        "y.transpose([axes.index(axis) for axis in range(y.ndim)])",
        "y.transpose(axes)",
        _MEMORY,
    ),
    Mutant(
        "the gate's exponential with the sign that overflows",
        _POINTWISE,
        "        np.negative(d, out=d)\n",
        "        np.negative(g, out=d)\n",
        "test_feed_forward.py::test_error_at_every_exponent",
    ),
    Mutant(
        "the sigmoid of a negative gate as of a positive one",
        _POINTWISE,
        "np.maximum(n, d, out=n)",
        "n[:] = 1",
        "test_feed_forward.py::test_like_loops",
    ),
    Mutant(
        "gate changed in place",
        _POINTWISE,
        "d, n = decay[: g.size], numerator[: g.size]",
        "d, n = g, numerator[: g.size]",
        "test_feed_forward.py::test_on_every_library[body-numpy]",
    ),
    Mutant(
        "NumPy's mean of squares in 16 bits",
        _POINTWISE,
        "y = np.square(wide_x)",
        "y = np.square(x)",
        "test_norm.py::test_within_bound_in_every_format[body-float16-float16]",
    ),
    Mutant(
        "NumPy's eps outside the root",
        _POINTWISE,
        "    root += eps\n    np.sqrt(root, out=root)\n",
        "    np.sqrt(root, out=root)\n    root += eps\n",
        "test_norm.py::test_eps_stands_under_the_root[body-numpy]",
    ),
    Mutant(
        "NumPy's norm of the input changed in place",
        _POINTWISE,
        "y = np.square(wide_x)",
        "y = np.square(wide_x, out=wide_x)",
        "test_norm.py::test_within_bound_of_naive_loops[body-numpy]",
    ),
    Mutant(
        "NumPy's turn the other way",
        _POINTWISE,
        "turned_a -= b * sin",
        "turned_a += b * sin",
        "test_rope.py::test_basis_vectors[body-numpy]",
    ),
    Mutant(
        "NumPy's pairs always halves",
        _POINTWISE,
        'if layout == "half" else',
        "if layout else",
        "test_rope.py::test_half_is_interleaved_permuted",
    ),
    Mutant(
        "angles of tokens that stand side by side mixed up",
        _POINTWISE,
        'np.asarray(angles, order="F") for angles',
        'angles.ravel().reshape(angles.shape, order="F") for angles',
        "test_rope.py::test_memory_order_is_free",
    ),
    Mutant(
        "embeddings read across tokens",
        "backends/numpy/__init__.py",
        'order="F").reshape(x.shape)',
        'order="F").reshape(x.shape, order="F")',
        "test_forward.py::test_like_naive_loops",
    ),
]
