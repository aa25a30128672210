"""What attention asks of the device: which keys, from where, and how often."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import KVCache, LlamaConfig, Mask, attention
from llama_layers.backends.cupy import attention as cupy_attention
from tests.support.installed import stand_in_alone

DTYPES = ["bfloat16", "float16", "float32"]

pytestmark = stand_in_alone


def tokens(cupy, count, first=0):
    return cupy.asarray(np.arange(first, first + count, dtype=np.int32))


def drawn(cupy, dtype, queries, keys, heads=4, kv_heads=2, width=8, batch=1):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, width), *[(batch, keys, kv_heads, width)] * 2]
    return [cupy.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def products(library):
    """Rows, columns and inner size of each product in the order of the calls, and what it read."""
    for call in library.named("cublasGemmStridedBatchedEx"):
        columns, rows, inner = call[3:6]
        yield (rows, columns, inner), call[7], call[11]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "past", "seen"),
    [
        (None, 0, [(0, 2), (0, 4), (0, 6), (0, 7)]),
        (None, 3, [(0, 5), (0, 7), (0, 9), (0, 10)]),
        (3, 0, [(0, 2), (0, 4), (2, 6), (4, 7)]),
        (1, 2, [(2, 4), (4, 6), (6, 8), (8, 9)]),
    ],
)
def test_keys_outside_a_block_are_left_out(cupy, library, monkeypatch, dtype, window, past, seen):
    """Seven queries in blocks of two; both products read keys and values where they lie."""
    q, k, v = drawn(cupy, dtype, 7, past + 7)
    monkeypatch.setattr(cupy_attention, "SCORES", 2 * 4 * (past + 7))
    attention(q, k, v, mask=Mask(tokens(cupy, 7, past), tokens(cupy, past + 7), window))
    found = list(products(library))
    each = 4 if dtype == "bfloat16" else 2  # one with the keys, and one for each part
    assert len(found) == each * len(seen)
    size = k.dtype.itemsize * 2 * 8
    for i, (first, last) in enumerate(seen):
        rows = 2 * min(2, 7 - 2 * i)
        with_keys, *with_values = found[each * i : each * (i + 1)]
        assert with_keys[:2] == ((rows, last - first, 8), k.data.ptr + first * size)
        for sizes, address, _ in with_values:
            assert sizes == (rows, 8, last - first)
            if dtype != "float16":  # whose values are widened
                assert address == v.data.ptr + first * size


def test_keys_of_a_cache_are_not_copied(cupy, library):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=16,
        vocab_size=8,
    )
    q, k, v = drawn(cupy, "bfloat16", 3, 3, batch=2)
    cache = KVCache.create(config, 2, 16, like=q).extend(3).append(0, k, v)
    keys, values = (cache.visible(buffers[0]) for buffers in (cache.keys, cache.values))
    attention(q, keys, values, mask=Mask(tokens(cupy, 3), tokens(cupy, 3)))
    read = [address for _, address, _ in products(library)]
    assert read == [array[b].data.ptr for b in range(2) for array in (keys, values, values, values)]


def test_a_mask_is_looked_at_once(cupy, monkeypatch, library):
    """Copies to main memory wait for the device: the layers of a model share what one found."""
    q, k, v = drawn(cupy, "bfloat16", 4, 4)
    copied = []
    get = cupy.ndarray.get
    monkeypatch.setattr(cupy.ndarray, "get", lambda self, **o: copied.append(1) or get(self, **o))
    masks = [Mask(tokens(cupy, 4), tokens(cupy, 4)) for _ in range(2)]
    for mask in (masks[0], masks[0], masks[1], masks[0], masks[1]):
        attention(q, k, v, mask=mask)
    assert len(copied) == 4  # queries and keys of each mask


def test_what_is_known_of_a_mask_goes_with_it(cupy, library):
    q, k, v = drawn(cupy, "bfloat16", 4, 4)
    mask = Mask(tokens(cupy, 4), tokens(cupy, 4))
    attention(q, k, v, mask=mask)
    assert mask in cupy_attention._spans
    count = len(cupy_attention._spans)
    del mask
    assert len(cupy_attention._spans) == count - 1
