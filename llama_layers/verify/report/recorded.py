"""What a trace holds, as the blocks of a report."""

from __future__ import annotations

from collections.abc import Mapping

from llama_layers.verify.report.blocks import Block, Facts, Heading, Table
from llama_layers.verify.report.tables import site_and_layer
from llama_layers.verify.report.wording import counted, grouped, layer_ranges, role_name
from llama_layers.verify.stored import ArrayInfo


def recorded_blocks(
    arrays: Mapping[str, ArrayInfo], tokens: Mapping[str, ArrayInfo], metadata: Mapping[str, str]
) -> list[Block]:
    """Return a table of sites, shapes and dtypes, and what the trace says of itself.

    A line is for a site in all layers where its arrays have the same shape and dtype.
    """
    rows = [["site", "layers", "shape", "dtype"]]
    for name, info in tokens.items():
        rows.append([name, "", str(list(info.shape)), info.dtype])
    alike = grouped(arrays, lambda name: (site_and_layer(name)[1], arrays[name]))
    for (role, info), names in alike.items():
        layers = [layer for name in names if (layer := site_and_layer(name)[0]) is not None]
        numbers = layer_ranges(layers).split(" ", 1)[1] if layers else ""
        rows.append([role_name(role), numbers, str(list(info.shape)), info.dtype])
    about = [Facts({key: _shortened(value) for key, value in metadata.items()})] if metadata else []
    return [Heading(f"Trace of {counted(len(arrays), 'array')}"), Table(rows, (0, 1, 2, 3)), *about]


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
