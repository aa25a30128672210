"""What commands do where a launcher of MPI started several, without MPI."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from llama_layers.cli import main, ranks
from llama_layers.parallel import launcher, run_ranks
from llama_layers.parallel.launcher import SIZES_AND_RANKS, launched


@pytest.fixture
def start(monkeypatch):
    """Pretend that a launcher started this process, as one of two ranks."""
    opened = []

    def as_rank(rank, size="PMI_SIZE"):
        ranks.world.cache_clear()
        monkeypatch.setitem(sys.modules, "mpi4py", None)  # there is no launcher to connect to
        monkeypatch.setattr(launcher, "SAYS", 0)
        monkeypatch.setenv(size, "2")
        monkeypatch.setenv(SIZES_AND_RANKS[size], str(rank))

    def open_(*args):
        opened.append(open(*args))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr(ranks, "open", open_, raising=False)
    for stream in ("stdout", "stderr"):  # rank 1 puts others in their place
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    yield as_rank
    for file in opened:
        file.close()
    ranks.world.cache_clear()


@pytest.mark.parametrize("size", SIZES_AND_RANKS)
def test_launchers(start, size):
    assert launched() == (0, 1)
    start(1, size)
    assert launched() == (1, 2)


def test_a_number_of_processes_alone_says_nothing(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")  # as a batch script of Slurm may see it
    assert launched() == (0, 1)


def test_what_is_not_split_is_refused_once(capfd, start):
    start(0)
    assert main(["info", "somewhere"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("llama-layers info: rank 0 of 2: 2 ranks were started: expected one, or")
    start(1)
    with pytest.raises(SystemExit) as ended:
        main(["info", "somewhere"])
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "")


def test_a_wrong_option_is_named_once(capfd, start):
    for rank, lines in ((0, True), (1, False)):
        start(rank)
        with pytest.raises(SystemExit):
            main(["generate", "--wrong"])
        assert bool(capfd.readouterr().err) == lines


def test_mpi4py_is_missing(capfd, start):
    start(0)
    assert main(["generate", "a", "--model", "somewhere"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("llama-layers generate: rank 0 of 2: 2 ranks were started, and mpi4py")
    assert said.endswith("pip install 'llama-layers[mpi]'\n")


def test_other_options_on_a_rank_are_named():
    def run(group, **other):
        options = {"model": f"/{group.rank}", "max_new_tokens": 3, "text": "a"}
        ranks._check_commands(group, "generate", options | (other if group.rank == 2 else {}))

    assert run_ranks(3, run) == [None] * 3
    said = "^rank 2: max-new-tokens: expected that of rank 0, 3, got 5"
    with pytest.raises(ValueError, match=said):
        run_ranks(3, partial(run, max_new_tokens=5))


def test_an_error_of_the_system_is_said_without_its_number(capsys, tmp_path):
    def fail(args):
        raise FileNotFoundError(2, "No such file or directory", "/proc/x.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "connect", lambda *_: None)
        patch.setattr("llama_layers.cli.info.run", fail)
        assert main(["info", "somewhere"]) == 2
    said = capsys.readouterr().err
    assert said == "llama-layers info: /proc/x.safetensors: No such file or directory\n"
