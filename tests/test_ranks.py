"""What is said of ranks: how much memory each needs, and where a file that they read is wrong."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import pytest

from llama_layers import CheckpointError, LlamaConfig, load
from llama_layers.checkpoint import expected_tensors
from llama_layers.parallel.ending import _outside
from llama_layers.parallel.plan import Shard


def test_a_traceback_ends_at_the_call(tmp_path):
    """Where a file is wrong, the message says so; the lines of this package do not."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "none")
    whole = [frame.filename for frame in traceback.extract_tb(caught.tb)]
    assert whole[0] == __file__
    assert len(whole) > 1
    found = traceback.extract_tb(_outside(caught.tb))
    assert [frame.filename for frame in found] == [__file__]


def test_the_memory_of_a_rank_in_the_documentation():
    """The table of docs/scale.md, and the shapes that a rank's config asks for, by hand."""
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text("utf-8")
    models = {"Llama 2 70B": LlamaConfig.llama2_70b(), "Llama 3 70B": LlamaConfig.llama3_70b()}
    for name, config in models.items():
        cells = []
        for size in (1, 2, 4, 8, 16):
            heads, keys = 64 // size, max(1, 8 // size)
            matrices = 8192 * 128 * (2 * heads + 2 * keys) + 3 * 8192 * 28672 // size
            weights = 80 * (matrices + 2 * 8192) + 8192 + 2 * config.vocab_size * 8192
            part = expected_tensors(Shard(config, 0, size).config)
            assert sum(map(math.prod, part.values())) == weights
            cache = 2 * 8192 * 80 * keys * 128
            cells.append(f"{2 * weights / 2**30:.0f} + {2 * cache / 2**30:.1f}")
        assert f"| {name}, bfloat16 | {' | '.join(cells)} |" in page
