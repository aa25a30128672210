"""The machine that bodies run on: its processor or GPU, and the versions of their compilers."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from llama_layers.backends.libraries import cupy

# Environment variables by which libraries choose other instructions.
CHOICES = (
    "CUPY_TF32", "NPY_DISABLE_CPU_FEATURES", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME",
    "NUMBA_ENABLE_AVX", "NUMBA_OPT", "OPENBLAS_CORETYPE",
)  # fmt: skip
PACKAGES = ("llvmlite", "numba", "numpy")
# Rooms whose sources results of trials depend on.
ROOMS = ("arrays", "config", "layers", "model", "backends", "verify", "trial")


def describe(library: str) -> dict[str, str]:
    """Everything that results of trials for a library's arrays depend on."""
    found = {
        "processor": processor(),
        "instructions": _cpu_info("flags") or _cpu_info("Features") or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        **{name: os.environ[name] for name in CHOICES if name in os.environ},
        "sources": _digest(),
    }
    return found if library != "cupy" else _gpu() | found


def summary(library: str) -> str:
    """The machine in a few words, for messages."""
    if library == "cupy":
        gpu = _gpu()
        return f"{gpu['GPU']} (CuPy {gpu['CuPy']}, CUDA driver {gpu['driver']})"
    names = [name for name in ("numba", "numpy") if _version(name)]
    return f"{processor()} ({', '.join(f'{name} {_version(name)}' for name in names)})"


def processor() -> str:
    """The name of the processor."""
    arm = " ".join(_cpu_info(name) for name in ("CPU implementer", "CPU part")).strip()
    return _cpu_info("model name") or arm or platform.processor() or platform.machine()


def _cpu_info(name: str) -> str:
    """An entry of the first processor in Linux's file, which has a part for every core."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
                if not line.strip():
                    break
    except OSError:
        pass
    return ""


def _version(package: str) -> str:
    """The version of a package, "" if there is none, or its age if it was not installed as usual.

    From the name of a folder, since importlib.metadata takes longer to load than all else here.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    prefix, suffix = f"{package}-", ".dist-info"
    folders = (name for name in os.listdir(origin.parents[1]) if name.startswith(prefix))
    found = [name[len(prefix) : -len(suffix)] for name in folders if name.endswith(suffix)]
    return ", ".join(sorted(found)) or f"changed at {_age(origin)}"


def _digest() -> str:
    """A digest of the sources that results depend on: definitions, bodies and their trials.

    Our own version number stays the same while they change.
    """
    package = Path(__file__).parents[1]
    if not package.is_dir() or getattr(sys, "frozen", False):
        return f"in a bundle, changed at {_age(package)}"
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((package / room).rglob("*.*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _age(path: Path) -> int:
    """When a file changed, or the archive or the program that it is in."""
    if getattr(sys, "frozen", False):
        path = Path(sys.executable)
    there = next(place for place in (path, *path.parents) if place.exists())
    return there.stat().st_mtime_ns


def _gpu() -> dict[str, str]:
    runtime = cupy().cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return {
        "GPU": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "driver": str(runtime.driverGetVersion()),
        "CUDA": str(runtime.runtimeGetVersion()),
        "CuPy": cupy().__version__,
    }
