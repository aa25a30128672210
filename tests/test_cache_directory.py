"""A cache directory that does not exist and cannot be made: the variable that moves it is named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_layers import load
from llama_layers.backends import trial_results
from llama_layers.backends.trial_results import TrialResult, TrialResults
from llama_layers.checkpoint import load_tokenizer, pull
from llama_layers.cli import main
from llama_layers.files.output import cache_directory

VARIABLES = ("LLAMA_LAYERS_CACHE", "XDG_CACHE_HOME", "HOME", "USERPROFILE")


@pytest.fixture
def homeless(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


@pytest.fixture
def unwritable(monkeypatch, tmp_path):
    """A cache directory below a file, which no user can make."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "file"


USES = [load, load_tokenizer, pull]


@pytest.mark.parametrize("use", USES)
def test_without_a_home(homeless, use):
    with pytest.raises(OSError, match="this user has none: set LLAMA_LAYERS_CACHE to a directory"):
        use("smollm2-135m")


def test_a_directory_that_cannot_be_made(unwritable):
    with pytest.raises(NotADirectoryError, match=r"; LLAMA_LAYERS_CACHE moves the cache: .*file"):
        pull("smollm2-135m")


@pytest.mark.parametrize("use", USES)
def test_a_directory_that_cannot_be_looked_into(monkeypatch, tmp_path, use):
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path))

    def refuse(path, **_):
        if path.is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, "no", str(path))
        raise FileNotFoundError(errno.ENOENT, "no", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(PermissionError, match="no; LLAMA_LAYERS_CACHE moves the cache: "):
        use("smollm2-135m")


def test_other_errors_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path))

    def fail(path, **_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}"):
        pull("smollm2-135m")


def test_commands_say_it_in_a_line(unwritable, capsys):
    assert main(["pull", "smollm2-135m"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "LLAMA_LAYERS_CACHE" in said


@pytest.mark.parametrize("lacking", ["homeless", "unwritable"])
def test_results_of_trials_are_kept_in_the_process(lacking, request, monkeypatch):
    request.getfixturevalue(lacking)
    said = []
    monkeypatch.setattr(trial_results, "_say_once", said.append)
    results = TrialResults("numpy")
    assert results.get("f by g") is None
    results.put("f by g", TrialResult(0.5))
    assert results.get("f by g") == TrialResult(0.5)
    assert TrialResults("numpy").get("f by g") is None
    (sentence,) = said
    assert sentence.startswith("each process tries faster code again, since results are not kept:")
    assert "LLAMA_LAYERS_CACHE" in sentence


def test_an_empty_variable_counts_as_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "llama_layers"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="users are another matter there")
def test_a_user_without_a_name_computes():
    """With all faster bodies, in a process of a user that the system does not know."""
    code = """
import pwd

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
import numpy as np, llama_layers as ll
x = np.ones((1, 2, 64), np.float32)
print(float(ll.rms_norm(x, x[0, 0], eps=1e-5)[0, 0, 0]), float(ll.linear(x, x[0])[0, 0, 0]))
try:
    ll.load("smollm2-135m")
except OSError as error:
    print(error)
"""
    environment = {n: v for n, v in os.environ.items() if n not in VARIABLES}
    environment |= {"LLAMA_LAYERS_VERIFY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    numbers, sentence = done.stdout.splitlines()
    assert [round(float(number), 4) for number in numbers.split()] == [1.0, 64.0]
    assert "LLAMA_LAYERS_CACHE" in sentence
