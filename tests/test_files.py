"""Files that commands write: whole or not at all, and never over what is not a regular file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_layers.checkpoint import convert, load
from llama_layers.files.output import check_output, write_atomically
from llama_layers.files.tensors import write_tensors
from tests.support import tiny


@pytest.mark.parametrize("force", [False, True])
def test_only_regular_files_are_replaced(tmp_path, force):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path, got in (
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "link", "a FIFO"),
        (tmp_path / os.devnull, "a device"),
    ):
        with pytest.raises(OSError, match=f"{path}: expected a regular file, got {got}"):
            check_output(path, force)
    with pytest.raises(IsADirectoryError, match="expected a file, got a directory"):
        check_output(tmp_path, force)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_written_through(tmp_path, dangling):
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    target, link = directory / "target.txt", tmp_path / "link.txt"
    if not dangling:
        target.write_text("old")
        target.chmod(0o640)
    link.symlink_to(target)
    check_output(link, force=True)
    write_atomically(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [file.name for file in directory.iterdir()] == ["target.txt"]
    if not dangling:
        assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_link_to_a_directory_that_is_missing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError, match="expected a link into an existing"):
        check_output(tmp_path / "link", force=True)


def test_a_link_needs_force_as_its_target_does(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(FileExistsError, match="link exists"):
        check_output(tmp_path / "link", force=False)


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("mine")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "mine")]


def test_tensors(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "t.safetensors", {"a": array}, {"k": "v"})
    assert np.array_equal(load_file(tmp_path / "t.safetensors")["a"], array)
    (tmp_path / "link").symlink_to(tmp_path / "t.safetensors")
    write_tensors(tmp_path / "link", {"a": array + 1}, None)
    assert (tmp_path / "link").is_symlink()
    assert np.array_equal(load_file(tmp_path / "t.safetensors")["a"], array + 1)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from llama_layers.checkpoint import convert
from llama_layers.files.output import write_atomically
from llama_layers.files.tensors import write_tensors
from llama_layers.verify import Trace

directory = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
big = np.ones((1, 9, 99), np.float32)
for write in (
    lambda: write_tensors(directory / "tensors", {"a": big}, None),
    lambda: Trace({"model.norm": big}).save(directory / "trace", force=True),
    lambda: write_atomically(directory / "text", lambda path: path.write_text("x" * 9999) and None),
    lambda: convert(directory / "source", directory / "converted"),
):
    try:
        write()
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_is_said_of_the_file(tmp_path):
    tiny.write_single(tmp_path / "source", tiny.arrays())
    for name in ("tensors", "trace", "text"):
        (tmp_path / name).write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ("tensors", "trace", "text", "converted"), strict=True):
        assert "File too large" in line, line
        assert str(tmp_path / name) in line, line
        assert line.count(str(tmp_path)) == 1, line
    files = {entry.name: entry.read_text() for entry in tmp_path.iterdir() if entry.is_file()}
    assert files == {"tensors": "mine", "trace": "mine", "text": "mine"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["source"]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from importlib import import_module

from llama_layers.checkpoint import convert

source, destination, when = sys.argv[1:]
kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
if when == "while weights are written":
    import_module("llama_layers.checkpoint.convert").write_safetensors = kill
elif when == "before the new one has the name":
    rename = Path.rename
    Path.rename = lambda self, target: rename(self, target) if ".old" in str(target) else kill()
else:
    shutil.rmtree = kill
convert(source, destination, overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "when",
    [
        "while weights are written",
        "before the new one has the name",
        "before the old one is removed",
    ],
)
def test_a_killed_conversion_leaves_nothing_after_the_next(tmp_path, when, there):
    old, new = tiny.arrays(seed=1), tiny.arrays(seed=2)
    source = tiny.write_single(tmp_path / "source", new)
    if there:
        convert(tiny.write_single(tmp_path / "other", old), tmp_path / "model")
    mine = tmp_path / ".model.old"  # a name of the same kind, which is nobody's but the user's
    mine.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "model"), when], check=False
    )
    assert done.returncode == -9
    before = {entry.name for entry in tmp_path.iterdir()}
    assert any(name.endswith(".llama-layers") for name in before)
    convert(source, tmp_path / "model", overwrite=True)
    tiny.assert_holds(load(tmp_path / "model"), new)
    after = {entry.name for entry in tmp_path.iterdir()}
    assert after == {"source", "model", ".model.old"} | ({"other"} if there else set())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks")
def test_what_was_replaced_when_the_process_was_killed_comes_back(tmp_path):
    old = tiny.arrays(seed=1)
    source = tiny.write_single(tmp_path / "source", tiny.arrays(seed=2))
    convert(tiny.write_single(tmp_path / "other", old), tmp_path / "model")
    when = "before the new one has the name"
    arguments = [str(source), str(tmp_path / "model"), when]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="model exists"):
        convert(source, tmp_path / "model")
    tiny.assert_holds(load(tmp_path / "model"), old)


def test_two_conversions_at_once(tmp_path):
    """The second one does not take the first one's directory for abandoned."""
    source = tiny.write_single(tmp_path / "source", tiny.arrays())
    from llama_layers.checkpoint.convert import new_checkpoint_directory

    with new_checkpoint_directory(tmp_path / "model", overwrite=False) as directory:
        (directory / "config.json").write_text("{}")
        code = "import sys; from llama_layers.checkpoint import convert; convert(*sys.argv[1:])"
        arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "model")]
        subprocess.run(arguments, check=True)
        assert (directory / "config.json").exists()
        for file in (tmp_path / "model").iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
    tiny.assert_holds(load(tmp_path / "model"), tiny.arrays())
