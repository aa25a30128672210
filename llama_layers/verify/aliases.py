"""What other projects call the sites, and arrays under their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def canonical_arrays(arrays: Mapping[str, Any], /) -> Mapping[str, Any]:
    """The arrays under the names of `sites`."""
    return arrays
