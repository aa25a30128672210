"""Print the Markdown of benchmarks: ``python docs/benchmarks/bench_tables.py a.json b.json``.

The files are those that ``llama-layers bench ... --json FILE`` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama_layers.bench.result import Result
from llama_layers.bench.table import markdown

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(markdown(Result.from_json(json.loads(Path(name).read_text(encoding="utf-8")))))
