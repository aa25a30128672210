"""Processes that a command starts, and files of ranks that it takes."""

from __future__ import annotations

import signal

from llama_layers.cli import main
from llama_layers.cli.workers import workers


def test_workers_leave_interrupts_to_the_command():
    """A terminal sends Ctrl-C to all of them: only one is to say so."""
    usual = signal.getsignal(signal.SIGINT)  # which a shell may have told to ignore it
    with workers(2, "signal") as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_file_of_a_rank_twice(capsys, tmp_path):
    names = [str(tmp_path / "rank0"), str(tmp_path / "." / "rank0")]
    assert main(["check", *names, "--model", "a", "--tensor-parallel"]) == 2
    assert "trace: expected one of each rank, got one of them twice" in capsys.readouterr().err
