"""Processes that a command starts, and files of ranks that it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_layers.cli import main
from llama_layers.cli.workers import workers


def test_workers_leave_interrupts_to_the_command():
    """A terminal sends Ctrl-C to all of them: only one is to say so."""
    usual = signal.getsignal(signal.SIGINT)  # which a shell may have told to ignore it
    with workers(2, "signal") as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is usual


COMMAND = """
import os, time
from llama_layers.cli.workers import workers

if __name__ == "__main__":
    with workers(2, "signal") as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60)
        time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends processes there")
def test_workers_end_with_a_command_that_is_killed(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    run = [sys.executable, str(tmp_path / "command.py")]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as command:
        worker = int(command.stdout.readline())
        command.kill()
    until = time.monotonic() + 20
    while is_alive(worker):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_file_of_a_rank_twice(capsys, tmp_path):
    names = [str(tmp_path / "rank0"), str(tmp_path / "." / "rank0")]
    assert main(["check", *names, "--model", "a", "--tensor-parallel"]) == 2
    assert "trace: expected one of each rank, got one of them twice" in capsys.readouterr().err
