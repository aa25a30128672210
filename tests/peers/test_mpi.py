"""A model split among processes: the same tokens, parts of the memory, and no rank left waiting."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import generate, load
from llama_layers.checkpoint import expected_tensors, open_checkpoint
from llama_layers.parallel.plan import Shard
from tests.support import mpi_ranks, tiny
from tests.support.mpi_ranks import mpiexec
from tests.support.random_models import random_weights

pytest.importorskip("mpi4py")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not mpi_ranks.MPIEXEC.exists(), reason="the wheel mpich is not installed"),
]

TOKENS = 64
IDS = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PAGE = 4 << 10
SLACK = 8 << 20  # of Python itself, for some arrays that come and go


def floats(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.fixture(scope="module")
def tokens(smollm2):
    options = {"max_new_tokens": TOKENS, "eos_token_id": ()}
    return [int(step[0]) for step in generate(load(smollm2), np.array([IDS]), **options)]


@pytest.mark.parametrize("size", [2, 4])
def test_smollm2(smollm2, tokens, size):
    arguments = json.dumps([str(smollm2), TOKENS, *IDS])
    run = mpiexec([size, sys.executable, "-m", "mpi4py", "-c", mpi_ranks.MEASURE, arguments])
    assert run.returncode == 0, run.stderr
    ranks = json.loads(run.stdout)
    config = open_checkpoint(smollm2).config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    shapes = expected_tensors(config)
    of_layers = {name: shape for name, shape in shapes.items() if ".layers." in name}
    split = floats(shape for shape in of_layers.values() if len(shape) == 2)
    replicated = floats(shapes.values()) - split
    for rank, found in enumerate(ranks):
        assert found["tokens"] == tokens
        passes = [len(IDS)] + [1] * (TOKENS - 1)
        assert found["reduced"] == [4 * hidden * n for n in passes for _ in range(2 * layers)]
        # Heads that another rank has, too, or that are zeros; and fewer than an even share.
        part = Shard(config, rank, size).config
        width = 2 * config.head_dim * hidden  # in o_proj and q_proj, in k_proj and v_proj
        more = (part.num_attention_heads - config.num_attention_heads / size) * width + (
            part.num_key_value_heads - config.num_key_value_heads / size
        ) * width
        limit = 4 * (split / size + max(0, more) * layers + replicated)
        anonymous, read = found["held"]
        print(f"rank {rank} of {size}: {anonymous / 1e6:.1f} MB, {read / 1e6:.1f} MB in the file, "
              f"limit {limit / 1e6:.1f} MB")  # fmt: skip
        edges = 2 * PAGE * len(of_layers)  # of pieces of the file
        assert anonymous + read <= limit + edges + SLACK
        assert anonymous <= limit - 4 * replicated + SLACK  # which stays in the file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of models: one, the same with other weights, the same with another config, none."""
    paths = [tmp_path_factory.mktemp(name) for name in ("model", "weights", "config", "missing")]
    weights = [random_weights(tiny.CONFIG, seed, np.float32) for seed in (0, 1)]
    tiny.write_single(paths[0], weights[0], tiny.CONFIG)
    tiny.write_single(paths[1], weights[1], tiny.CONFIG)
    tiny.write_single(paths[2], weights[0], replace(tiny.CONFIG, rope_theta=5e5))
    return dict(zip(("model", "weights", "config", "missing"), map(str, paths), strict=True))


def failed(*parts):
    """What is said when a run ends in an error, within ten seconds after something went wrong."""
    run = mpiexec(*parts)
    ended = time.time()
    assert run.returncode != 0
    if (found := re.search(r"failed at ([\d.]+)", run.stdout)) is not None:
        assert ended - float(found[1]) < 10
    return run.stderr


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("fail", r"rank 1 of 3 failed: ValueError: bad luck\\nwith two lines"),
        ("interrupt", "rank 1 of 3 failed: KeyboardInterrupt"),
        ("end", r"rank [02] of 3 waits for rank 1, which has ended"),
        ("leave", r"rank [02] of 3 waits for rank 1, which has ended"),
        ("die", ""),  # mpiexec says it, on stdout
    ],
)
def test_a_rank_that_ends_ends_all(models, how, says):
    program = [sys.executable, "-c", mpi_ranks.FAIL, how, models["model"]]
    assert re.search(says, failed([3, *program]))


@pytest.mark.parametrize(("how", "says"), [("fail", "bad luck"), ("end", "which has ended|Abort")])
def test_as_mpi4py_runs_it(models, how, says):
    program = [sys.executable, "-m", "mpi4py", "-c", mpi_ranks.FAIL, how, models["model"]]
    assert re.search(says, failed([2, *program]))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("missing", r"rank 1 of 2 failed: CheckpointError: .*got nothing"),
        ("weights", r"rank 1: expected the model of rank 0, got another: model\.\S+ is \S+ in \["),
        ("config", "rank 1: expected the model of rank 0, got another: rope_theta is 500000.0"),
    ],
)
def test_ranks_with_different_files(models, other, says):
    program = [sys.executable, "-c", mpi_ranks.FAIL, "fail", models["model"], models[other]]
    assert re.search(says, failed([2, *program]))


COMMAND = [sys.executable, "-m", "llama_layers"]


def test_the_command_names_the_rank(models):
    generate, *model = "generate", "--model", models["model"]
    missing = ["--model", models["missing"]]
    said = failed([1, *COMMAND, generate, "a", *model], [1, *COMMAND, generate, "a", *missing])
    assert re.search(r"^llama-layers generate: rank 1 of 2: .*got nothing", said, re.M)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("generate --wrong a --model b", "unrecognized arguments: --wrong"),
        ("info smollm2-135m", "rank 0 of 2: 2 ranks were started: expected one"),
        ("bench qkv", "rank [01] of 2: bench qkv: expected one process, got 2 ranks"),
        ("bench decode --against torch", "rank [01] of 2: --against: expected one process"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, says):
    run = mpiexec([2, *COMMAND, *arguments.split()])
    assert run.returncode == 2
    assert re.search(says, run.stderr)


def test_an_error_of_all_ranks_is_said_once(models):
    said = failed([3, *COMMAND, "generate", "a", "--model", models["missing"]])
    lines = [line for line in said.splitlines() if "got nothing" in line]
    assert len(lines) == 1
    assert lines[0].startswith("llama-layers generate: rank 0 of 3: ")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("info {}", "generate, got info"),
        ("trace a --model {} -o {}/trace.safetensors", "generate, got trace"),
        ("generate --wrong", "generate, got one with wrong arguments"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_another_command_on_one_rank(models, other, said, rank):
    usual = [1, *COMMAND, "generate", "a", "--model", models["model"]]
    parts = [usual, [1, *COMMAND, *other.format(*[models["model"]] * 2).split()]]
    if rank == 0:
        parts, said = parts[::-1], ", got ".join(reversed(said.split(", got ")))
    assert f"rank 1: expected the command of rank 0, {said}" in failed(*parts)


def test_no_communicator(models):
    program = "import sys, llama_layers; from mpi4py import MPI; "
    program += "llama_layers.load(sys.argv[1], parallel=MPI.COMM_NULL)"
    assert "is in, got MPI.COMM_NULL" in failed([1, sys.executable, "-c", program, models["model"]])


def test_several_models_and_communicators(models):
    run = mpiexec([4, sys.executable, "-c", mpi_ranks.SEVERAL, models["model"]])
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("cannot be pickled") == 8
    assert run.stdout.endswith("the last one\n")


def test_bench_of_two_ranks(models, tmp_path):
    file = tmp_path / "bench.json"
    arguments = f"bench decode --model {models['model']} --rounds 2 --tokens 2 --json {file}"
    run = mpiexec([2, *COMMAND, *arguments.split()])
    assert run.returncode == 0, run.stderr
    assert "2 query and 1 key/value heads" in " ".join(run.stdout.split())
    result = json.loads(file.read_text())
    assert result["title"].endswith("split among 2 ranks")
    assert len(result["cases"][0]["seconds"]["llama_layers"]) == 2
