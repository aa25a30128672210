"""GGUF files of each architecture that is read."""

from __future__ import annotations

import pytest

from llama_layers import load
from llama_layers.checkpoint.gguf.config import ARCHITECTURES
from tests.support import gguf_families, tiny
from tests.support.gguf_families import CASES


def test_every_architecture_has_a_case():
    assert {gguf_families.architecture_of(case) for case in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config(tmp_path, case):
    config = gguf_families.config_of(case)
    model = load(gguf_families.write(tmp_path / "m.gguf", case))
    assert model.config == config
    tiny.assert_holds(model, gguf_families.weights_of(config))
