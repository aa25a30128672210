"""Measure all that docs/evidence/cpu_tables.md shows, and write the page.

``python docs/benchmarks/cpu_tables.py DIR`` keeps every time measured in DIR, and what is there
already is not measured again. Two threads; torch, transformers, onnxruntime, openvino and
llama-cpp-python must be installed. A quarter of an hour, on a machine that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llama_layers.bench.own_engine import NAME
from llama_layers.bench.result import Result
from llama_layers.bench.table import markdown

PAGE = Path(__file__).parents[1] / "evidence" / "cpu_tables.md"
SMALL = "--model smollm2-135m --against llama.cpp,transformers"
LARGE = "--model llama2-7b --rounds 4 --against llama.cpp,transformers"
MANY = "--seq 1,2,4,8,32,128,512 --rounds 8"
NARROW = "--dtype bfloat16"
SERIES = {
    "decode_float32": f"decode {SMALL} --context 64,448 --tokens 16 --rounds 8",
    "decode_bfloat16": f"decode {SMALL} --context 64,448 --tokens 16 --rounds 8 {NARROW}",
    "prefill_float32": f"prefill {SMALL} --seq 512,2048 --rounds 4",
    "prefill_bfloat16": f"prefill {SMALL} --seq 512 --rounds 4 {NARROW}",
    "qkv_float32": f"qkv {MANY} --against torch,onnxruntime,openvino",
    "qkv_bfloat16": f"qkv {MANY} --against torch,openvino {NARROW}",
    "layer_float32": f"layer {LARGE} --seq 1,8,128",
    "layer_bfloat16": f"layer {LARGE} --seq 1,8,128 {NARROW}",
    "decode_7b_bfloat16": f"decode {LARGE} --layers 6 --context 64 --tokens 4 {NARROW}",
}
HEAD = """\
---
orphan: true
---

# Measured on a CPU

Written by `python docs/benchmarks/cpu_tables.py`, from runs of `llama-layers bench` as they came.
[](../bench.md) says how it measures and what the columns mean, [](../cpu.md) what makes it fast.
"""


def measure(name: str, arguments: str, folder: Path) -> Result:
    """The result of one benchmark, from its file if there is one."""
    file = folder / f"{name}.json"
    if not file.exists():
        command = [sys.executable, "-m", "llama_layers", "bench", *arguments.split()]
        command += ["--threads", "2", "--json", str(file)]
        if subprocess.run(command, check=False).returncode:
            # OpenVINO refuses bfloat16 where the processor has no instructions for it.
            fewer = [argument.replace(",openvino", "") for argument in command]
            subprocess.run(fewer, check=True)
    return Result.from_json(json.loads(file.read_text(encoding="utf-8")))


def behind(result: Result) -> Iterator[str]:
    """Where another engine took less time than ours, by its best or its median."""
    for case in result.cases:
        for engine in case.seconds:
            best, median = case.ratios(engine)
            if engine != NAME and min(best, median) < 1:
                yield f"- {result.title}, {case.name}: {engine} {best:.2f} / {median:.2f}.\n"


def page(results: list[Result]) -> str:
    """All tables, and before them where we are behind."""
    slower = "".join(line for result in results for line in behind(result))
    return "\n".join(
        [
            HEAD,
            "## Where we are behind\n\nAn engine's time over ours, best / median:\n",
            slower or "Nowhere in these tables.\n",
            "## All of it\n",
            *map(markdown, results),
        ]
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    results = [measure(name, arguments, folder) for name, arguments in SERIES.items()]
    PAGE.write_text(page(results), encoding="utf-8")
