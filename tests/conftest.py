"""Backends to run the tests on, and Hypothesis profiles."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest
from array_api_compat import device as device_of
from hypothesis import Phase, settings

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy
from llama_layers.backends import numpy as numpy_backend
from llama_layers.backends.numba.detect import compiled_problem
from tests.support.installed import GPUS, gpu
from tests.support.watched_bodies import watched  # noqa: F401  # a fixture

# Causes are looked for however long it takes, so that a busy machine finds what others find.
import_module("llama_layers.verify.check").SECONDS = 600.0  # type: ignore[attr-defined]
# Bodies are trusted unseen, so that tests find what is wrong with them and no other body serves.
os.environ["LLAMA_LAYERS_VERIFY"] = "0"

settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=500)
# A planted bug has to be found, not made small.
settings.register_profile(
    "planted",
    deadline=None,
    max_examples=100,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


MOST_WORKERS = 8  # each takes half a gigabyte


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on all cores; what a path chooses, or ``-n0``, runs in one process."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker starts no workers of its own
        return
    options = config.option
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and getattr(options, "numprocesses", 0) is None:
        options.numprocesses, options.dist = "auto", "worksteal"
        options.maxprocesses = options.maxprocesses or MOST_WORKERS
    if getattr(options, "numprocesses", None):
        for library in ("OPENBLAS", "OMP"):  # threads of one process would wait for the other's
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Look for no doctests in the tests, which would take seconds."""
    found = yield
    return [collector for collector in found if type(collector) is pytest.Module]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Directories of published files, which are no part of the project."""
    parser.addoption("--corpus", type=Path, help="published configs, templates and metadata")
    parser.addoption("--vocab", type=Path, help="llama.cpp's vocabularies with expected tokens")


@pytest.fixture(scope="session")
def corpus(request: pytest.FixtureRequest) -> Path:
    """The directory of published files."""
    directory: Path | None = request.config.getoption("--corpus")
    if directory is None:
        pytest.skip("no --corpus was given")
    return directory


@pytest.fixture(scope="session")
def vocab(request: pytest.FixtureRequest) -> Path:
    """The directory of llama.cpp's vocabularies."""
    directory: Path | None = request.config.getoption("--vocab")
    if directory is None:
        pytest.skip("no --vocab was given")
    return directory


@dataclass(frozen=True)
class Backend:
    """An array library on a device."""

    xp: Any
    device: Any = None

    def array(self, values: Any) -> Any:
        """A NumPy array's numbers on this backend."""
        return from_numpy(values, self.xp, self.device)

    def holds(self, array: Any) -> bool:
        """Whether an array lies on this backend's device."""
        return self.device is None or device_of(array) == self.device


def backend_on(cupy: Any) -> Backend:
    """The backend of CuPy, or of what stands in for it."""
    return Backend(namespace(x=cupy.empty(0)), cupy.cuda.Device())


_CPUS = {
    "numpy": Backend(np),
    "strict-device1": Backend(array_api_strict, array_api_strict.Device("device1")),
    "strict-no_float64": Backend(array_api_strict, array_api_strict.Device("no_float64")),
}


@pytest.fixture(scope="module", params=[*_CPUS, *GPUS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each library and device that can be had, for tests that need float32 and nothing else."""
    if request.param in _CPUS:
        yield _CPUS[request.param]
        return
    with gpu(request.param) as cupy:
        yield backend_on(cupy)


@pytest.fixture(scope="module")
def xp(backend: Backend) -> Any:
    """The namespace of `backend`."""
    return backend.xp


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop NumPy's bodies for other libraries, mark tests of SmolLM2, and put the stand-in last.

    The stand-in replaces CuPy until the next file, and other tests should not meet it there.
    """
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):  # which is downloaded
            item.add_marker(pytest.mark.slow)

    def chosen(item: pytest.Item, fixture: str) -> Any:
        return getattr(item, "callspec", None) and item.callspec.params.get(fixture)

    def needless(item: pytest.Item) -> bool:
        own = chosen(item, "backend") in (None, "numpy")
        return not own and chosen(item, "bodies") not in (None, "definition")

    config.hook.pytest_deselected(items=[item for item in items if needless(item)])
    kept = [item for item in items if not needless(item)]
    items.clear()
    for _, of_file in groupby(kept, key=lambda item: item.path):
        items.extend(sorted(of_file, key=lambda item: chosen(item, "backend") == "stand-in"))


@pytest.fixture(scope="module", params=["definition", "body", "compiled"])
def bodies(request: pytest.FixtureRequest) -> Iterator[None]:
    """NumPy arrays go through the definition, and then through bodies that are faster for them.

    The compiled ones leave to NumPy what is small; here they do not.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "definition":
            for bodies in numpy_backend.ROUTES.values():
                for name in ("attend", "gate_with_silu", "normalise", "rotate"):
                    patch.delitem(bodies, name)
        elif request.param == "compiled":
            if (problem := compiled_problem()) is not None:
                pytest.skip(problem)
            for module in ("attention", "pointwise"):
                patch.setattr(f"llama_layers.backends.numba.{module}.SMALL", 0)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240501)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Path]:
    """SmolLM2-135M as a Hugging Face directory: in the cache that the environment names, or else
    pulled into one that goes away with the session, since it takes 630 MB."""
    from llama_layers.checkpoint import pull

    if "LLAMA_LAYERS_CACHE" in os.environ:
        yield pull("smollm2-135m")
        return
    with tempfile.TemporaryDirectory() as cache:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAMA_LAYERS_CACHE", cache)
            path = pull("smollm2-135m")
        yield path
