"""What README and documentation say of model families and switches."""

from __future__ import annotations

import runpy
from pathlib import Path

from llama_layers.config.families import FAMILIES, SWITCHES

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
SCRIPT = runpy.run_path(str(IMAGES / "block.py"))


def test_the_picture_has_every_switch():
    placed = {field for fields in SCRIPT["AT"].values() for field in fields}
    assert placed == set(SWITCHES), "place each in AT, and run docs/images/block.py"
    shown = (IMAGES / "block_light.svg").read_text()
    assert all(field in shown for field in SWITCHES)


def test_the_picture_is_that_of_the_table_of_sites():
    for name, colours in SCRIPT["SCHEMES"].items():
        drawn = SCRIPT["drawn"](colours)
        assert (IMAGES / f"block_{name}.svg").read_text() == drawn, "run docs/images/block.py"


def test_the_readme_counts_the_families():
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"Llama and {len(FAMILIES) - 1} families like it" in text
