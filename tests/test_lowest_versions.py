"""The lowest versions that pyproject.toml allows are those that .ci/run tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = ("fast", "hub", "models", "plot", "test", "testing")


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source distribution has no .ci")
def test_each_lower_bound_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(one for name in EXTRAS for one in extras[name])]
    bounds = {one.replace(">=", "==") for one in required if not one.startswith("llama-layers[")}
    text = (ROOT / ".ci" / "lowest.txt").read_text()
    assert set(re.findall(r"^[^#\s].*$", text, re.M)) == bounds
