"""A copy of the package to plant a bug in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(ROOT / "llama_layers", tmp_path / "llama_layers", ignore=ignored))
