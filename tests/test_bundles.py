"""The package from a zip archive, and in a program that PyInstaller made of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llama_layers
from tests.support import tiny

PACKAGE = Path(llama_layers.__file__).parent
# What a program may do with a model; a line for each result.
PROGRAM = """
import sys
import numpy as np
import llama_layers as ll
from llama_layers.backends.cupy.compile import text
from llama_layers.cli import main

print(ll.__file__)
print(ll.__version__)
model = ll.load(sys.argv[1])
ids = np.array([[3, 1, 39, 12]])
report = ll.check(ll.record(model, ids), model)
print(report.verdict, len(report.results), report._repr_html_().count("<h1>"))
print(*(int(step[0]) for step in ll.generate(model, ids, max_new_tokens=3, temperature=0)))
print(*model.tokenizer.encode("ab 12"))
print(text("norm").count("#line"))
print(main(["info", sys.argv[1]]))
"""


def results(*command, path=""):
    """The lines that the program prints in a process that finds no other copy of the package."""
    environment = os.environ | {"PYTHONPATH": path, "LLAMA_LAYERS_FAST": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def model(tmp_path):
    return tiny.write_gguf(tmp_path / "tiny.gguf", tiny.arrays(), metadata=tiny.TOKENIZER)


def assert_whole(lines, tmp_path):
    file, version, checked, drawn, encoded, shared, *info = lines
    assert version == llama_layers.__version__
    loaded = llama_layers.load(model(tmp_path))
    assert checked.split()[0] == "PASS"
    assert checked.split()[1:] == ["33", "1"]
    assert len(drawn.split()) == 3
    assert [int(i) for i in encoded.split()] == loaded.tokenizer.encode("ab 12")
    assert shared == "2"
    assert info[-1] == "0"
    assert any("GGUF file" in line for line in info)
    return file


@pytest.mark.slow
def test_from_a_zip_archive(tmp_path):
    archive = tmp_path / "llama_layers.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in PACKAGE.rglob("*"):
            if "__pycache__" not in path.parts:
                packed.write(path, path.relative_to(PACKAGE.parent))
    lines = results(sys.executable, "-c", PROGRAM, model(tmp_path), path=str(archive))
    assert assert_whole(lines, tmp_path).startswith(str(archive))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("PyInstaller") is None, reason="needs PyInstaller; takes minutes"
)
def test_in_a_program_of_pyinstaller(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--log-level=ERROR", tmp_path / "program.py"],
        cwd=tmp_path,
        check=True,
    )
    program = tmp_path / "dist" / "program" / "program"
    file = assert_whole(results(program, model(tmp_path)), tmp_path)
    assert Path(file).is_relative_to(tmp_path)
