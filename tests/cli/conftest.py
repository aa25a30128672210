"""A small model, a trace of it, and a way to run commands on them."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers.cli import main
from tests.support import tiny
from tests.support.commands import IDS
from tests.support.random_models import GQA, random_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model in float32."""
    weights = random_weights(GQA, dtype=np.float32)
    return tiny.write_single(tmp_path_factory.mktemp("model"), weights, GQA)


@pytest.fixture
def run(checkpoint, capsys):
    """Run a command on the model: exit status, stdout and stderr."""

    def call(command, *arguments):
        model = [] if command == "compare" or "--model" in arguments else ["--model", checkpoint]
        status = main([command, *map(str, arguments), *map(str, model)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def port(run, tmp_path):
    """A right trace."""
    path = tmp_path / "port.safetensors"
    assert run("trace", "--ids", IDS, "-o", path)[0] == 0
    return path
