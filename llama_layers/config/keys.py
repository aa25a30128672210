"""The keys of a config.json, with a note of those that were read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Keys:
    """The keys of a file, with a note of those that were read."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._read = {"architectures", "auto_map"}  # which `refusals` reads

    def get(self, key: str, default: Any = None) -> Any:
        """Read a key; the default is for one that is not there, not for null."""
        self._read.add(key)
        return self._content.get(key, default)

    def unread(self) -> dict[str, Any]:
        """The keys that nothing has read."""
        return {key: value for key, value in self._content.items() if key not in self._read}
