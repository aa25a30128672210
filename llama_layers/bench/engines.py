"""The engines of a benchmark: our own, and others that are installed.

The code that drives other engines is not part of the package. It is in ``docs/benchmarks/engines``
of a checkout: the one that the package is imported from, or the one that is the current directory.
Elsewhere ``LLAMA_LAYERS_ENGINES`` names that directory.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from llama_layers.bench import own_engine
from llama_layers.bench.engine import Engine
from llama_layers.bench.job import Job, Kind
from llama_layers.bench.models import Backend

VARIABLE = "LLAMA_LAYERS_ENGINES"
FOLDER = Path("docs", "benchmarks", "engines")
CHECKOUT = Path(__file__).parents[2]
_PACKAGE = "llama_layers_engines"


@dataclass(frozen=True)
class OtherEngine:
    """An engine to measure against."""

    kinds: tuple[Kind, ...]
    """The jobs that it can do on a CPU."""
    packages: dict[str, str]
    """The packages that it needs: the name to import, and the name to install."""
    module: str
    """Has a function ``engine(job, threads, closing)`` that returns an `Engine`."""
    on_gpu: tuple[Kind, ...] = ()
    """The jobs that it can do on a GPU, with torch."""

    def versions(self) -> dict[str, str]:
        """The versions of its packages."""
        return {package: version(package) for package in self.packages.values()}


def other_engines() -> dict[str, OtherEngine]:
    """Load the directory of other engines, and return them by name."""
    checkouts = [checkout / FOLDER for checkout in (CHECKOUT, Path.cwd())]
    folder = next((path for path in checkouts if path.is_dir()), checkouts[0])
    folder = Path(os.environ.get(VARIABLE, folder))
    file = folder / "__init__.py"
    if not file.is_file():
        raise ValueError(
            "--against: other engines are not part of the installed package; expected "
            f"{VARIABLE} to name docs/benchmarks/engines of a checkout, got {folder}"
        )
    module = sys.modules.get(_PACKAGE)
    if module is None or module.__file__ != str(file):
        spec = spec_from_file_location(_PACKAGE, file, submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[_PACKAGE] = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.ENGINES


def check_engines(names: Sequence[str], kind: Kind, backend: Backend = "numpy") -> None:
    """Raise unless all of these engines are known, installed and able to do a job."""
    if not names:
        return
    known = other_engines()
    on_gpu = backend == "cupy"
    able = [name for name, e in known.items() if kind in (e.on_gpu if on_gpu else e.kinds)]
    where = "on a GPU" if on_gpu else "here"
    for name in names:
        if name not in known:
            raise ValueError(f"--against: expected some of {', '.join(able)}, got {name!r}")
        if name not in able:
            raise ValueError(
                f"--against: {name} has no {kind} {where}; expected some of {', '.join(able)}"
            )
        packages = known[name].packages
        if missing := [package for module, package in packages.items() if not find_spec(module)]:
            raise ModuleNotFoundError(
                f"--against {name}: {' and '.join(missing)} not installed: "
                f"pip install {' '.join(missing)}"
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


def make_engines(
    names: Sequence[str], job: Job, threads: int, closing: ExitStack
) -> tuple[list[Engine], dict[str, str]]:
    """Make our own engine and the others of these names ready for a job.

    Each may use this number of threads; `closing` undoes in the end what they set up. Returns
    the engines, our own first, and the versions of the others' packages. Raises ValueError if an
    engine cannot compute in the dtype of the job, or its config.
    """
    engines = [own_engine.engine(job, threads, closing)]
    versions: dict[str, str] = {}
    for name in names:
        other = other_engines()[name]
        engines.append(importlib.import_module(other.module).engine(job, threads, closing))
        versions |= other.versions()
    return engines, versions
