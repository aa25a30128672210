"""What bodies run on: the processor or the GPU, and the versions of all that makes their code."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Environment variables by which libraries choose other instructions.
CHOICES = (
    "CUPY_TF32", "NPY_DISABLE_CPU_FEATURES", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME",
    "NUMBA_ENABLE_AVX", "NUMBA_OPT", "OPENBLAS_CORETYPE",
)  # fmt: skip
PACKAGES = ("llvmlite", "numba", "numpy")


def facts(library: str) -> dict[str, str]:
    """All that a verdict on the bodies for a library's arrays depends on."""
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


def short(library: str) -> str:
    """The machine, for people."""
    if library == "cupy":
        gpu = _gpu()
        return f"{gpu['GPU']} (CuPy {gpu['CuPy']}, CUDA driver {gpu['driver']})"
    names = [name for name in ("numba", "numpy") if _version(name)]
    return f"{processor()} ({', '.join(f'{name} {_version(name)}' for name in names)})"


def processor() -> str:
    """What the processor calls itself."""
    arm = " ".join(_cpu_info(name) for name in ("CPU implementer", "CPU part")).strip()
    return _cpu_info("model name") or arm or platform.processor() or platform.machine()


def _cpu_info(name: str) -> str:
    """What Linux says of the first processor; the file has as many parts as there are cores."""
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
    """From the name of a folder: importlib.metadata takes longer to load than all else here.

    Of a package that was not installed as usual, when it was last changed; "" if there is none.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    prefix, suffix = f"{package}-", ".dist-info"
    folders = (name for name in os.listdir(origin.parents[1]) if name.startswith(prefix))
    found = [name[len(prefix) : -len(suffix)] for name in folders if name.endswith(suffix)]
    return ", ".join(sorted(found)) or f"changed at {origin.stat().st_mtime_ns}"


def _digest() -> str:
    """Of the sources of all bodies and definitions, and of the checks that they passed.

    It stands for our own version, which stays the same while they change.
    """
    package = Path(__file__).parents[1]
    verify = package / "verify"
    digest = hashlib.sha256()
    parts = [package.glob("*.py"), verify.glob("*.py")]
    parts += [folder.rglob("*.*") for folder in (package / "backends", verify / "bodies")]
    for path in sorted(path for part in parts for path in part):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _gpu() -> dict[str, str]:
    cupy: Any = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return {
        "GPU": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "driver": str(runtime.driverGetVersion()),
        "CUDA": str(runtime.runtimeGetVersion()),
        "CuPy": cupy.__version__,
    }


def captures() -> bool:
    """Whether CuPy's current stream records what it is given and does not run it."""
    return bool(importlib.import_module("cupy").cuda.get_current_stream().is_capturing())
