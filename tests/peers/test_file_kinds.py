"""Files that torch.save writes are told from weights."""

from __future__ import annotations

import pytest
import torch

from llama_layers import CheckpointError, load

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model"])
@pytest.mark.parametrize(("new", "kind"), [(True, "a zip archive"), (False, "a pickle")])
def test_what_torch_saves(tmp_path, name, new, kind):
    file = tmp_path / name
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=f"got {kind}, as PyTorch writes them.*save_pretr"):
        load(file)
