"""A copy of the package to plant a bug in."""

from __future__ import annotations

import compileall
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The package as it is, compiled: what a bug does not touch need not be compiled for each."""
    directory = tmp_path_factory.mktemp("compiled") / "llama_layers"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llama_layers", directory, ignore=ignored)
    assert compileall.compile_dir(directory, quiet=1)
    return directory


@pytest.fixture
def package(compiled, tmp_path):
    return Path(shutil.copytree(compiled, tmp_path / "llama_layers"))
