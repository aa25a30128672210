"""What is said where CuPy cannot compute: what is missing, and what to install."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llama_layers import load
from llama_layers.backends.cupy import detect
from llama_layers.cli import main
from tests.support import tiny


class CUDARuntimeError(RuntimeError):
    """As CuPy has it."""


class DynamicLibNotFoundError(RuntimeError):
    """As cuda-pathfinder has it."""


class CompileException(Exception):  # noqa: N818
    """As CuPy has it: of no narrower kind."""


NO_DEVICE = "cudaErrorNoDevice: no CUDA-capable device is detected"
NO_NVRTC = (
    'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.12\n'
    "listdir('/usr/lib'):\n"
)
NO_HEADER = (
    "/tmp/a.cu(3): catastrophic error: cannot open source file\n"
    '  #include "vector_types.h"\n'
    "1 catastrophic error detected\n"
)
NO_CUBLAS = 'Failure finding "libcublas.so.12": No such file: libcublas.so.12'


def cupy(
    *, driver=12080, runtime=12090, devices=1, kernel=None, array=None, product=None,
    version="14.2.0", hip=False, right=True,
):  # fmt: skip
    """What the detection uses of CuPy, and what fails of it."""

    def count():
        if isinstance(devices, Exception):
            raise devices
        return devices

    class Array:
        def __matmul__(self, other):
            if product:
                raise product
            return np.full((2, 2), 8.0 if right else 0.0)

    def full(*_, **__):
        if array:
            raise array
        return Array()

    class RawModule:
        def __init__(self, *, code):
            assert "extern" in code

        def get_function(self, name):
            if kernel:
                raise kernel

    return SimpleNamespace(
        __version__=version,
        float32=np.float32,
        full=full,
        RawModule=RawModule,
        cuda=SimpleNamespace(
            compiler=SimpleNamespace(CompileException=CompileException),
            runtime=SimpleNamespace(
                is_hip=hip,
                driverGetVersion=lambda: driver,
                runtimeGetVersion=lambda: runtime,
                getDeviceCount=count,
            ),
        ),
    )


def problem(monkeypatch, module, installed=("cupy-cuda12x",)):
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(detect, "_version", lambda package: package in installed or None)
    return detect.gpu_problem.__wrapped__()


EITHER = "cupy-cuda12x or cupy-cuda13x, whichever CUDA the driver supports (nvidia-smi names it)"
CASES = {
    "no CuPy": (None, f"CuPy is not installed: pip install {EITHER}"),
    "ROCm": (
        cupy(hip=True),
        f"this CuPy is built for AMD's ROCm, and the kernels are CUDA's: pip install {EITHER}",
    ),
    "old CuPy": (
        cupy(version="13.6.0"),
        "CuPy 13.6.0 knows no bfloat16: pip install --upgrade 'cupy-cuda12x>=14'",
    ),
    "no driver": (
        cupy(driver=0),
        "there is no NVIDIA driver: install it (and see that nvidia-smi lists the GPU)",
    ),
    "old driver": (
        cupy(driver=12040, runtime=13000),
        "the NVIDIA driver is too old, it supports CUDA 12.4 and this CuPy needs 13.0: update the "
        "driver, or pip uninstall cupy-cuda13x and pip install cupy-cuda12x",
    ),
    "no GPU": (
        cupy(devices=CUDARuntimeError(NO_DEVICE)),
        "the NVIDIA driver finds no GPU: see what nvidia-smi lists",
    ),
    "a driver that fails": (
        cupy(devices=CUDARuntimeError("cudaErrorSystemDriverMismatch: system has unsupported")),
        "the NVIDIA driver does not work (cudaErrorSystemDriverMismatch: system has unsupported): "
        "see what nvidia-smi says",
    ),
    "no NVRTC": (
        cupy(kernel=DynamicLibNotFoundError(NO_NVRTC)),
        "CuPy cannot compile a kernel; NVRTC is missing, or does not suit this GPU "
        '(DynamicLibNotFoundError: Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such '
        "file: libnvrtc.so.12): pip install 'cupy-cuda12x[ctk]'",
    ),
    "no headers": (
        cupy(runtime=13000, driver=13000, array=CompileException(NO_HEADER)),
        "CuPy cannot compile a kernel of its own; the CUDA headers are missing (CompileException: "
        "/tmp/a.cu(3): catastrophic error: cannot open source file): "
        "pip install 'cupy-cuda13x[ctk]'",
    ),
    "no cuBLAS": (
        cupy(product=ImportError(NO_CUBLAS)),
        "CuPy cannot multiply matrices; cuBLAS is missing, or does not work (ImportError: Failure "
        'finding "libcublas.so.12": No such file: libcublas.so.12): pip install '
        "'cupy-cuda12x[ctk]'",
    ),
    "wrong numbers": (
        cupy(right=False),
        "CuPy computes a wrong product on this GPU: update its driver",
    ),
    "none": (cupy(), None),
    "a newer driver": (cupy(driver=13000), None),
    "a driver of an earlier minor version": (cupy(driver=12020), None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_problem_and_what_to_install(monkeypatch, case):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module, expected = CASES[case]
    assert problem(monkeypatch, module) == expected


def test_hidden_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = problem(monkeypatch, cupy(devices=CUDARuntimeError(NO_DEVICE)))
    assert said == (
        "the NVIDIA driver finds no GPU, of those that CUDA_VISIBLE_DEVICES='' leaves: "
        "see what nvidia-smi lists"
    )


def test_two_cupys(monkeypatch):
    said = problem(monkeypatch, cupy(), installed=("cupy-cuda12x", "cupy-cuda13x"))
    assert said == (
        "cupy-cuda12x and cupy-cuda13x are both installed, and overwrite each other's files: "
        f"pip uninstall cupy-cuda12x cupy-cuda13x, then pip install {EITHER}"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
            "CuPy cannot be imported (No module named 'fastrlock'): pip install fastrlock",
        ),
        (
            ImportError(
                "\n=====\nFailed to import CuPy.\n\nSee the guide.\n\n"
                "Original error:\n  ImportError: libcudart.so.12: cannot open\n=====\n"
            ),
            "CuPy cannot be imported (ImportError: libcudart.so.12: cannot open): "
            f"pip install --force-reinstall {EITHER}",
        ),
    ],
    ids=["what it needs", "a library"],
)
def test_a_cupy_that_cannot_be_imported(monkeypatch, error, expected):
    real = importlib.import_module

    def failing(name):
        if name == "cupy":
            raise error
        return real(name)

    monkeypatch.setattr(detect.importlib, "import_module", failing)
    monkeypatch.setattr(detect, "_version", lambda package: None)
    assert detect.gpu_problem.__wrapped__() == expected


@pytest.fixture
def without_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy(driver=0))
    monkeypatch.setattr(detect, "_version", lambda package: None)
    detect.gpu_problem.cache_clear()
    yield CASES["no driver"][1]
    detect.gpu_problem.cache_clear()


def test_load_says_it(without_driver, tmp_path):
    path = tiny.write_single(tmp_path, tiny.arrays())
    with pytest.raises(RuntimeError) as raised:
        load(path, backend="cupy")
    assert str(raised.value) == f"backend 'cupy': {without_driver}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "--model"),
        ("qkv", "a", "--model"),
        ("trace", "a", "-o", "a.safetensors", "--model"),
        ("bench", "qkv", "--model"),
        ("bench", "layer", "--model"),
        ("bench", "decode", "--model"),
        ("bench", "prefill", "--model"),
    ],
    ids=" ".join,
)
def test_commands_say_it_in_one_sentence(without_driver, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    path = tiny.write_single(tmp_path / "m", tiny.arrays())
    assert main([*arguments, str(path), "--backend", "cupy"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"llama-layers {arguments[0]}: backend 'cupy': {without_driver}\n"


def test_info_says_it(without_driver, capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computing"]["GPU"] == without_driver


def test_the_real_cupy_without_a_driver():
    """CuPy as it is installed, where nothing else of CUDA is."""
    module = pytest.importorskip("cupy")
    if module.cuda.runtime.driverGetVersion():
        pytest.skip("there is a driver")
    assert detect.gpu_problem.__wrapped__() == CASES["no driver"][1]


def test_errors_are_of_the_kinds_that_cupy_raises():
    module = pytest.importorskip("cupy")
    if module.cuda.runtime.driverGetVersion():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
        module.cuda.runtime.getDeviceCount()
    assert module.cuda.compiler.CompileException.__base__ is Exception
    assert isinstance(module.RawModule(code=detect.KERNEL), module.RawModule)
    found = importlib.import_module("cuda.pathfinder").DynamicLibNotFoundError
    assert issubclass(found, RuntimeError)
