"""The layers under jax.jit with sharded weights, as in docs/scale.md: two sums in each layer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import decoder_oracle
from tests.support.random_models import GQA, random_weights

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import jax, numpy as np
from llama_layers import Llama, forward
from tests.support.random_models import GQA as config, random_weights
jax.config.update("jax_enable_x64", True)
{recipe}
weights = random_weights(config)
sharded = {{name: jax.device_put(array, place(name)) for name, array in weights.items()}}
ids = np.array([[1, 2, 3, 4]])
print(json.dumps([logits(sharded, ids).tolist(), logits.lower(sharded, ids).compile().as_text()]))
"""


def recipe():
    """The block of the page that defines `place` and `logits`."""
    page = (ROOT / "docs/scale.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "NamedSharding" in b)
    return block


def test_two_sums_in_each_layer():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(recipe=recipe())],
        env=os.environ | flags, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, compiled = json.loads(run.stdout)
    expected = decoder_oracle.logits(random_weights(GQA), GQA, np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-9)
    assert len(re.findall(r" all-reduce(?:-start)?\(", compiled)) == 2 * GQA.num_hidden_layers
