"""Whether CuPy can compute on a GPU here, and if not, what is missing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from llama_layers.arrays.types import Namespace
from llama_layers.backends.libraries import CupyArray, cupy

OLDEST = 14
"""The first major version of CuPy that knows bfloat16."""
PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
EITHER = "cupy-cuda12x or cupy-cuda13x, whichever CUDA the driver supports (nvidia-smi names it)"
# Compiled without a header; a kernel of ours needs nothing that this one does not.
KERNEL = 'extern "C" __global__ void nothing() {}'


@cache
def gpu_problem() -> str | None:
    """The reason why CuPy cannot compute here, and what to install; None if it can.

    It is found out once in a process. A GPU with a driver is not enough: CuPy loads NVRTC, CUDA's
    headers and cuBLAS when it first needs them, so one tiny kernel, array and product are made.
    """
    importlib.import_module("ml_dtypes")  # CuPy learns bfloat16 from it, at import
    installed = [package for package in PACKAGES if _version(package)]
    if len(installed) > 1:
        return (
            f"{' and '.join(installed)} are both installed, and overwrite each other's files: "
            f"pip uninstall {' '.join(installed)}, then pip install {EITHER}"
        )
    try:
        module = cupy()
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return f"CuPy cannot be imported ({error}): pip install {error.name}"
        return f"CuPy is not installed: pip install {EITHER}"
    except ImportError as error:
        return f"CuPy cannot be imported ({_reason(error)}): pip install --force-reinstall {EITHER}"
    return _of_version(module) or _of_driver(module) or _of_device(module) or _of_libraries(module)


def device_name() -> str:
    """Name the current device, its multiprocessors and its memory."""
    cuda = cupy().cuda
    of = cuda.runtime.getDeviceProperties(cuda.Device().id)
    return (
        f"{of['name'].decode()}, {of['multiProcessorCount']} multiprocessors, compute capability "
        f"{of['major']}.{of['minor']}, {of['totalGlobalMem'] / 2**30:.0f} GiB"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_version(module: Namespace) -> str | None:
    if module.cuda.runtime.is_hip:
        return (
            f"this CuPy is built for AMD's ROCm, and the kernels are CUDA's: pip install {EITHER}"
        )
    if int(module.__version__.partition(".")[0]) < OLDEST:
        return (
            f"CuPy {module.__version__} knows no bfloat16: "
            f"pip install --upgrade '{_package(module)}>={OLDEST}'"
        )
    return None


def _of_driver(module: Namespace) -> str | None:
    driver, needed = module.cuda.runtime.driverGetVersion(), module.cuda.runtime.runtimeGetVersion()
    if driver == 0:
        return "there is no NVIDIA driver: install it (and see that nvidia-smi lists the GPU)"
    if driver // 1000 < needed // 1000:
        return (
            f"the NVIDIA driver is too old, it supports CUDA {dotted(driver)} and this CuPy needs "
            f"{needed // 1000}.0: update the driver, or pip uninstall {_package(module)} and "
            f"pip install cupy-cuda{driver // 1000}x"
        )
    return None


def _of_device(module: Namespace) -> str | None:
    try:
        count = module.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        if "cudaErrorNoDevice" not in str(error):
            return f"the NVIDIA driver does not work ({_reason(error)}): see what nvidia-smi says"
        count = 0
    if count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f", of those that CUDA_VISIBLE_DEVICES={visible!r} leaves"
    return f"the NVIDIA driver finds no GPU{hidden}: see what nvidia-smi lists"


def _of_libraries(module: Namespace) -> str | None:
    array: CupyArray = None

    def compile_kernel() -> None:
        module.RawModule(code=KERNEL).get_function("nothing")

    def make_array() -> None:
        nonlocal array
        array = module.full((2, 2), 2.0, dtype=module.float32)

    def multiply() -> None:
        nonlocal array
        array = array @ array

    steps: tuple[tuple[Callable[[], None], str], ...] = (
        (compile_kernel, "compile a kernel; NVRTC is missing, or does not suit this GPU"),
        (make_array, "compile a kernel of its own; the CUDA headers are missing"),
        (multiply, "multiply matrices; cuBLAS is missing, or does not work"),
    )
    for step, failure in steps:
        try:
            step()
        except (RuntimeError, ImportError, OSError, module.cuda.compiler.CompileException) as error:
            return (
                f"CuPy cannot {failure} ({type(error).__name__}: {_reason(error)}): "
                f"pip install '{_package(module)}[ctk]'"
            )
    if not bool((array == 8.0).all()):
        return "CuPy computes a wrong product on this GPU: update its driver"
    return None


def _package(module: Namespace) -> str:
    return f"cupy-cuda{module.cuda.runtime.runtimeGetVersion() // 1000}x"


def dotted(cuda: int) -> str:
    """12040 is CUDA 12.4."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _reason(error: Exception) -> str:
    """The reason that an error gives, on one line: CuPy's run over many, with the reason last."""
    said = str(error).rpartition("Original error:")[2]
    lines = [line.strip() for line in said.splitlines()]
    return next((line for line in lines if line.strip("= ")), type(error).__name__)
