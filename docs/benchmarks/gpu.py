"""Measure on a GPU all that docs/gpu_tables.md shows: ``python docs/benchmarks/gpu.py DIR``.

Needs CuPy, torch and transformers for the GPU, and no network. Each part has a time limit, and all
together have four minutes (``--minutes N``); what failed or found no time is listed as such. DIR
gets a file for each part as soon as it is done, and what is there already is not measured again.
In the end DIR/results.json has all of it, and docs/gpu_tables.md is written.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from gpu_page import PAGE, page
from gpu_questions import DTYPE, QUESTIONS
from gpu_sizes import Sizes

from llama_layers import LlamaConfig
from llama_layers.backends.cupy.detect import gpu_problem
from llama_layers.bench.cost import model_cost
from llama_layers.bench.engines import check_engines
from llama_layers.bench.gpu import Gpu
from llama_layers.bench.job import Job, ModelJob, QKVJob
from llama_layers.bench.measure import measure
from llama_layers.bench.models import RandomWeights, available_on_gpu

PACKAGES = "cupy-cuda12x cupy-cuda13x nvidia-cublas numpy torch transformers triton".split()
SPARE = 16 << 30


class Part(NamedTuple):
    """Something to measure, within a number of seconds."""

    seconds: float
    measure: Callable[[Sizes], dict[str, Any]]


def environment(sizes: Sizes) -> dict[str, Any]:
    """The device, and what computes on it."""
    found = Gpu("qkv", DTYPE).describe()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def benched(job: Job, engines: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure a job against those of the engines that are installed and find the GPU."""
    able, missing = [], {}
    for engine in engines:
        try:
            check_engines([engine], job.kind, "cupy")
        except (ValueError, ImportError) as error:
            missing[engine] = str(error)
        else:
            able.append(engine)
    try:
        result = measure(job, able, machine=Gpu(job.kind, job.dtype), rounds=rounds)
    except Exception as error:  # of another engine, or its memory: then ours alone
        if not able:
            raise
        missing |= dict.fromkeys(able, f"{type(error).__name__}: {error}")
    else:
        return {**result.to_json(), "left_out": missing}
    free_memory()
    result = measure(job, [], machine=Gpu(job.kind, job.dtype), rounds=rounds)
    return {**result.to_json(), "left_out": missing}


def qkv(rows: Sequence[int], sizes: Sizes) -> dict[str, Any]:
    """Queries, keys and values of the 7B model."""
    numbers = RandomWeights(DTYPE, "cupy")
    weights = [numbers.qkv(sizes.large) for _ in range(sizes.copies)]
    return benched(QKVJob(weights, rows), ["torch"], 2 * sizes.rounds)


def decode(
    which: str, batch: int, contexts: slice, engines: Sequence[str], sizes: Sizes
) -> dict[str, Any]:
    """Tokens one after the other; with transformers where its caches fit beside ours."""
    config: LlamaConfig = getattr(sizes, which)
    job = ModelJob(
        RandomWeights(DTYPE, "cupy").model(config),
        "decode",
        sizes.contexts[contexts],
        steps=sizes.tokens,
        batch=batch,
    )
    # The caches: ours, the other engine's for the tokens before, and the one that it grows for
    # those that are timed; and what a prompt leaves in the pools of both.
    cached = sum(model_cost(config, 1, size, 0, 2, batch).nbytes for size in job.sizes)
    if 3 * cached + SPARE > available_on_gpu():
        return {**benched(job, [], sizes.rounds), "left_out": dict.fromkeys(engines, "no memory")}
    return benched(job, engines, sizes.rounds)


def prefill(which: str, sizes: Sizes) -> dict[str, Any]:
    """A prompt at once."""
    model = RandomWeights(DTYPE, "cupy").model(getattr(sizes, which))
    return benched(ModelJob(model, "prefill", [sizes.prompt]), ["transformers"], sizes.rounds)


ALL, SHORT, LONG = slice(None), slice(1), slice(1, None)
EAGER, COMPILED = ["transformers"], ["transformers-compiled"]
PARTS = {
    "environment": Part(40, environment),
    "qkv_few_rows": Part(40, partial(qkv, (1, 2, 4, 8))),
    "qkv_many_rows": Part(20, partial(qkv, (512, 2048))),
    "decode_small": Part(40, partial(decode, "small", 1, SHORT, EAGER)),
    "decode_large": Part(40, partial(decode, "large", 1, ALL, EAGER)),
    "decode_grouped": Part(40, partial(decode, "grouped", 1, ALL, EAGER)),
    "prefill_large": Part(30, partial(prefill, "large")),
    "prefill_grouped": Part(30, partial(prefill, "grouped")),
    **{name: Part(20, question) for name, question in QUESTIONS.items()},
    "decode_grouped_batch": Part(40, partial(decode, "grouped", 8, ALL, EAGER)),
    "decode_large_batch": Part(40, partial(decode, "large", 8, SHORT, EAGER)),
    "decode_large_batch_long": Part(40, partial(decode, "large", 8, LONG, EAGER)),
    "decode_grouped_compiled": Part(90, partial(decode, "grouped", 1, SHORT, COMPILED)),
    "decode_large_compiled": Part(90, partial(decode, "large", 1, SHORT, COMPILED)),
    "decode_small_compiled": Part(90, partial(decode, "small", 1, SHORT, COMPILED)),
}


def run(
    parts: Mapping[str, Part], sizes: Sizes, folder: Path, seconds: float
) -> dict[str, dict[str, Any]]:
    """What each part found, or the error that it ended with.

    They run in processes of their own, one after the other: what fails on a GPU can leave it of no
    use to the process, and what is stuck can be ended. A process goes on to the next part as long
    as nothing fails, since it takes seconds to begin.
    """
    end = time.monotonic() + seconds
    left = [name for name in parts if not (folder / f"{name}.json").exists()]
    errors: dict[str, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    while left and time.monotonic() < end:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(left, parts, sizes, folder, theirs))
        process.start()
        theirs.close()
        while left:
            name = left.pop(0)
            print(f"{name} ...", flush=True)
            limit = min(parts[name].seconds, end - time.monotonic())
            problem = answer(ours, limit)
            if problem is not None:
                errors[name] = {"error": problem}
                print(f"{name}: {problem}", flush=True)
                break
        process.kill()
        process.join()
    errors |= {name: {"error": "no time was left"} for name in left}
    done = {n: folder / f"{n}.json" for n in parts if (folder / f"{n}.json").exists()}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in done.items()}
    return {name: found.get(name, errors.get(name, {})) for name in parts}


def answer(process: Connection, seconds: float) -> str | None:
    """What went wrong with a part; None if nothing did."""
    if not process.poll(max(0.0, seconds)):
        return f"not done within {max(0.0, seconds):.0f} s"
    try:
        problem: str | None = process.recv()
    except EOFError:
        return "its process died"
    return problem


def work(
    names: Sequence[str], parts: Mapping[str, Part], sizes: Sizes, folder: Path, parent: Connection
) -> None:
    """Measure parts until one fails, and say after each what went wrong, or None."""
    for name in names:
        try:
            found = parts[name].measure(sizes)
            free_memory()
            text = json.dumps(found, indent=2)
        except Exception as error:  # it is recorded, and the next process goes on
            parent.send(f"{type(error).__name__}: {error}")
            return
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        parent.send(None)


def free_memory() -> None:
    """Give back what CuPy and torch keep for themselves, so that the other may have it."""
    gc.collect()
    if (cupy := sys.modules.get("cupy")) is not None:
        cupy.get_default_memory_pool().free_all_blocks()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results and the page."""
    parser = argparse.ArgumentParser(description="Measure llama_layers on a GPU.")
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--minutes", type=float, default=4.0, help="at the most (default: 4)")
    args = parser.parse_args(arguments)
    if (problem := gpu_problem()) is not None:
        parser.error(problem)
    args.folder.mkdir(parents=True, exist_ok=True)
    found = run(PARTS, Sizes(), args.folder, 60 * args.minutes)
    text = json.dumps(found, indent=2) + "\n"
    (args.folder / "results.json").write_text(text, encoding="utf-8")
    (args.folder / PAGE.name).write_text(page(found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written {args.folder / 'results.json'} and {PAGE}")


if __name__ == "__main__":
    main()
