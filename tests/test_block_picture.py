"""The picture of the block in the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

from llama_layers.config.families import SWITCHES

IMAGES = Path(__file__).parents[1] / "docs/images"
SCRIPT = runpy.run_path(str(IMAGES / "block.py"))


def test_it_has_every_switch():
    placed = {field for fields in SCRIPT["AT"].values() for field in fields}
    assert placed == set(SWITCHES), "place each in AT, and run docs/images/block.py"
    shown = (IMAGES / "block_light.svg").read_text()
    assert all(field in shown for field in SWITCHES)


def test_it_is_that_of_the_table():
    for name, colours in SCRIPT["SCHEMES"].items():
        drawn = SCRIPT["drawn"](colours)
        assert (IMAGES / f"block_{name}.svg").read_text() == drawn, "run docs/images/block.py"
