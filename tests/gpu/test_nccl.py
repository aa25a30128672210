"""Sums over GPUs, on what stands in for CuPy and NCCL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama_layers import forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.errors import BackendError
from llama_layers.parallel import run_ranks, sharded
from llama_layers.parallel.mpi import MPIGroup
from llama_layers.parallel.nccl import NCCLGroup
from tests.support import decoder_oracle
from tests.support import nccl_stand_in as nccl
from tests.support.emulator import needs_compiler
from tests.support.installed import on_device, stand_in_alone
from tests.support.random_models import CONFIGS, random_weights

pytestmark = [needs_compiler, stand_in_alone]


@pytest.fixture
def connected(cupy, monkeypatch):
    """A function that gives a rank of a world its group, without MPI."""

    def start(group: NCCLGroup, comm: Any) -> None:
        group.rank, group.size, group.calls = *comm, 0

    for name, instead in {
        "__init__": start,
        "here": lambda group: (group.rank, group.size),
        "gather": lambda group, value: [value] * group.size,
        "broadcast": lambda group, value: tuple(range(128)),  # what rank 0 of the stand-in sends
    }.items():
        monkeypatch.setattr(MPIGroup, name, instead)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2, raising=False)
    monkeypatch.setattr("llama_layers.parallel.nccl.cupy_device", lambda device: cupy.cuda.Device())

    def connect(world: nccl.World, rank: int) -> NCCLGroup:
        comm: Any = rank, world.size
        return NCCLGroup(comm)

    return connect


def with_world(cupy, monkeypatch, world):
    monkeypatch.setattr(cupy.cuda, "nccl", world.module(), raising=False)
    return world


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_in_order_on_the_stream_of_the_layers(cupy, connected, monkeypatch, dtype):
    """Each rank writes on a stream of its own, sums there, and doubles the sum."""
    world = with_world(cupy, monkeypatch, nccl.World(3))
    groups = [connected(world, rank) for rank in range(3)]
    parts = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(dtype)
    streams, sums = [cupy.cuda.Stream(non_blocking=True) for _ in groups], []
    for group, stream, part in zip(groups, streams, parts, strict=True):
        with stream:
            x = cupy.empty((5, 2), dtype)
            x.set(part)
            sums.append(group.all_reduce(x))
            del x  # its memory may go to later work of the stream, and to none of another
    for stream, summed in zip(streams, sums, strict=True):
        with stream:
            np.testing.assert_allclose((summed * 2).get(), 2 * parts.sum(0), rtol=1e-6)
            assert summed.dtype == dtype


def test_strided_arrays(cupy, connected, monkeypatch):
    world = with_world(cupy, monkeypatch, nccl.World(2))
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    streams, sums = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)], []
    for rank, stream in enumerate(streams):
        with stream:
            sums.append(connected(world, rank).all_reduce(on_device(numbers).T))
    with streams[0]:
        np.testing.assert_array_equal(sums[0].get(), 2 * numbers.T)


@pytest.mark.parametrize("kind", ["gqa", "biases"])
def test_a_model_on_two_gpus(cupy, connected, monkeypatch, kind):
    config = CONFIGS[kind]
    weights = random_weights(config, dtype=np.float32)
    ids = np.array([[1, 2, 3]])
    baton = nccl.Baton(2)
    world = with_world(cupy, monkeypatch, nccl.World(2, baton.meet))
    monkeypatch.setattr(cupy.Stream, "eager", True)

    def logits(group):
        with baton:
            on_gpu = {name: on_device(array) for name, array in weights.items()}
            model = sharded(on_gpu, config, connected(world, group.rank))
            return to_numpy(forward(model, on_device(ids)).logits[0])

    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for found in run_ranks(2, logits):
        expected = decoder_oracle.logits(wide, config, ids[0])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert world.summed == 2 * config.num_hidden_layers


def test_ranks_take_the_gpus_of_their_computer_in_turn(cupy, connected, monkeypatch):
    world = with_world(cupy, monkeypatch, nccl.World(4))
    assert [connected(world, rank).device for rank in range(4)] == [0, 1, 0, 1]


def test_a_shared_gpu_is_named(cupy, connected, monkeypatch):
    def refuse(*_):
        raise RuntimeError("NCCL_ERROR_INVALID_USAGE: invalid usage")

    world = with_world(cupy, monkeypatch, nccl.World(3))
    monkeypatch.setattr(cupy.cuda.nccl, "NcclCommunicator", refuse)
    with pytest.raises(BackendError, match=r"ranks of this computer: 3, GPUs .*: 2; .*usage"):
        connected(world, 0)


def test_no_nccl(cupy, connected, monkeypatch):
    world = with_world(cupy, monkeypatch, nccl.World(1))
    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    with pytest.raises(BackendError, match="CuPy finds no NCCL: pip install nvidia-nccl-cu12"):
        connected(world, 0)
