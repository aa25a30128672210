"""What the files of a checkpoint are called."""

from __future__ import annotations

import re

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[^/]+-\d+-of-\d+\.safetensors")  # of any name: the index has it

_PART = re.compile(r"(.*)-\d{5}-of-(?!00000)(\d{5})\.gguf")


def gguf_parts(name: str) -> list[str]:
    """All parts of a split GGUF file, given one of them; the file itself if it is whole."""
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    start, count = found.groups()
    return [f"{start}-{part:05}-of-{count}.gguf" for part in range(1, int(count) + 1)]
