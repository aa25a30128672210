"""Load the package and the tests that find bugs: once, before processes are forked."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path

import pytest

os.environ |= {
    "OPENBLAS_NUM_THREADS": "1",  # several processes run at once
    "LLAMA_LAYERS_FAST": "0",  # NumPy's own bodies serve unless a test says otherwise
    "HYPOTHESIS_PROFILE": "planted",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # loading plugins takes as long as most tests
}

if not sys.path[0]:  # the installed package goes before the one in this directory
    sys.path.append(sys.path.pop(0))

from tests import conftest  # noqa: F401
from tests.planted.bugs import BUGS

for file in sorted({bug.caught_by.partition("::")[0] for bug in BUGS}):
    if Path(file).parent == Path():  # other directories are not packages
        # A test that needs an optional library is skipped when it is collected.
        with contextlib.suppress(ImportError, pytest.skip.Exception):
            importlib.import_module(f"tests.{Path(file).stem}")

gc.freeze()  # forks collect garbage without looking at all of this
