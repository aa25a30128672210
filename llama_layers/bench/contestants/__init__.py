"""Those that compute the same job: ourselves, and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from llama_layers.bench.contestants.contestant import Contestant
from llama_layers.bench.job import Job, Kind
from llama_layers.bench.models import Backend

OURS = "llama_layers"


@dataclass(frozen=True)
class Peer:
    """Another engine.

    Attributes
    ----------
    kinds : tuple of str
        The jobs that it can do on a CPU.
    packages : dict of str to str
        What it needs: the name to import, and the one to install.
    module : str
        Here, with a function ``contestant(job, threads, closing)``.
    on_gpu : tuple of str
        The jobs that it can do on a GPU, with torch.
    """

    kinds: tuple[Kind, ...]
    packages: dict[str, str]
    module: str
    on_gpu: tuple[Kind, ...] = ()

    def versions(self) -> dict[str, str]:
        """Of what it needs."""
        return {package: version(package) for package in self.packages.values()}


_IN_EXTRA = {"onnxruntime", "onnx", "openvino"}  # which the extra ``bench`` brings
PEERS = {
    "torch": Peer(("qkv",), {"torch": "torch"}, "torch_linear", on_gpu=("qkv",)),
    "onnxruntime": Peer(
        ("qkv",), {"onnxruntime": "onnxruntime", "onnx": "onnx"}, "onnxruntime_linear"
    ),
    "openvino": Peer(("qkv",), {"openvino": "openvino"}, "openvino_linear"),
    "transformers": Peer(
        ("layer", "decode", "prefill"),
        {"transformers": "transformers", "torch": "torch"},
        "transformers_model",
        on_gpu=("layer", "decode", "prefill"),
    ),
    "transformers-compiled": Peer(
        (), {"transformers": "transformers", "torch": "torch"}, "compiled_model", on_gpu=("decode",)
    ),
    "llama.cpp": Peer(
        ("layer", "decode", "prefill"),
        {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
        "llama_cpp_model",
    ),
}


def check_peers(names: Sequence[str], kind: Kind, backend: Backend = "numpy") -> None:
    """Refuse peers that are not known, cannot do a job, or are not installed."""
    on_gpu = backend == "cupy"
    able = [name for name, p in PEERS.items() if kind in (p.on_gpu if on_gpu else p.kinds)]
    where = "on a GPU" if on_gpu else "here"
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--against: expected some of {', '.join(able)}, got {name!r}")
        if name not in able:
            raise ValueError(
                f"--against: {name} has no {kind} {where}; expected some of {', '.join(able)}"
            )
        packages = PEERS[name].packages
        if missing := [package for module, package in packages.items() if not find_spec(module)]:
            wanted = "'llama-layers[bench]'" if _IN_EXTRA.issuperset(missing) else " ".join(missing)
            raise ModuleNotFoundError(
                f"--against {name}: {' and '.join(missing)} not installed: pip install {wanted}"
            )
        if on_gpu and not torch_sees_a_gpu():
            raise ValueError(
                f"--against {name}: torch {version('torch')} finds no GPU; https://pytorch.org "
                "says which build to install for the CUDA of the driver"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"--against: expected each name once, got {', '.join(names)}")


def torch_sees_a_gpu() -> bool:
    """Whether torch was built for a GPU, and finds one."""
    return bool(importlib.import_module("torch").cuda.is_available())


def contestants(
    names: Sequence[str], job: Job, threads: int, closing: ExitStack
) -> list[Contestant]:
    """Ourselves, and the peers of these names, ready for the job.

    Parameters
    ----------
    names : sequence of str
        Of `PEERS`.
    job : QKVJob or ModelJob
        What to compute.
    threads : int
        How many each may use.
    closing : ExitStack
        Gets what must be undone in the end.

    Returns
    -------
    list of Contestant
        Ourselves first.

    Raises
    ------
    ValueError
        If a peer cannot compute in the dtype of the job, or its config.
    """
    modules = ["ours", *(PEERS[name].module for name in names)]
    return [
        importlib.import_module(f"{__name__}.{module}").contestant(job, threads, closing)
        for module in modules
    ]
