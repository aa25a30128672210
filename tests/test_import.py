"""What importing the package costs, and what it offers."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import llama_layers
from llama_layers import testing

HEAVY = "numpy cupy torch jax array_api_compat ml_dtypes safetensors hypothesis rich".split()


def modules_after(statement):
    """The modules of a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(finished.stdout.split())


def test_import_loads_no_array_library():
    loaded = modules_after("import llama_layers")
    assert "llama_layers" in loaded
    assert not loaded & set(HEAVY)


def test_using_numpy_loads_no_other_library():
    loaded = modules_after("import llama_layers\nllama_layers.rms_norm, llama_layers.linear")
    assert "numpy" in loaded
    assert not loaded & {"cupy", "torch", "jax", "hypothesis"}


def test_assertions_need_no_hypothesis():
    statement = "import llama_layers.testing as t\nt.assert_within_bound, t.assert_same_bits"
    assert "hypothesis" not in modules_after(statement)
    assert "hypothesis" in modules_after("import llama_layers.testing as t\nt.arrays")


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (llama_layers, testing) for name in package.__all__],
)
def test_public_names_are_documented(package, name):
    assert name in dir(package)
    assert inspect.getdoc(getattr(package, name))


def test_unknown_names():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llama_layers.no_such_name
