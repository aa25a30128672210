"""Public functions called with thousands of arguments, with the compiled bodies and without.

    python tests/fuzz/api.py --seed 0 --count 5000

Both ways give the same numbers, up to rounding, or raise an exception of the same type: a
ValueError, a TypeError, an OSError or a BackendError, with one line of text. Each way is a process
of its own, so that one that dies takes nothing with it.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
BATCH = 500  # calls of a process
SECONDS = 600  # for a batch, the compiling of kernels included

Outcome = tuple[str, Any]


def run(seed: int, count: int) -> list[str]:
    """The problems with `count` calls, each with the seed that makes the call again."""
    found = []
    for start in range(seed, seed + count, BATCH):
        stop = min(start + BATCH, seed + count)
        compiled, plain = (outcomes(start, stop, fast) for fast in ("1", "0"))
        for number, (one, other) in enumerate(zip(compiled, plain, strict=True), start):
            found += [f"seed {number}: {one[0]}: {problem}" for problem in problems(one, other)]
    return found


def outcomes(start: int, stop: int, fast: str) -> list[tuple[str, Outcome]]:
    """What comes of the calls of some seeds, in processes that go on where the last one died."""
    found: list[tuple[str, Outcome]] = []
    while start + len(found) < stop:
        with tempfile.TemporaryFile() as file:
            first = start + len(found)
            command = [sys.executable, __file__, "--worker", str(first), str(stop)]
            environment = os.environ | {"LLAMA_LAYERS_FAST": fast, "OPENBLAS_NUM_THREADS": "2"}
            environment["LLAMA_LAYERS_VERIFY"] = "0"  # wrong bodies are to be seen
            try:
                subprocess.run(
                    command, stdout=file, stderr=subprocess.PIPE, env=environment, timeout=SECONDS
                )
                how = "the process died"
            except subprocess.TimeoutExpired:
                how = f"took more than {SECONDS} s"
            file.seek(0)
            found += _read(file)
        if start + len(found) < stop:
            found.append(("a call", (f"LLAMA_LAYERS_FAST={fast}: {how}", None)))
    return found


def _read(file: Any) -> Iterator[tuple[str, Outcome]]:
    while True:
        try:
            yield pickle.load(file)
        except (EOFError, pickle.UnpicklingError):
            return


def outcome(call: Callable[[], Any]) -> Outcome:
    """The arrays and numbers that a call gives, or its exception's type and text."""
    from llama_layers import BackendError

    try:
        return "gives", list(parts(call()))
    except (ValueError, TypeError, OSError, BackendError) as error:
        # What is told apart by its class is one error to whoever calls.
        kind = TypeError if isinstance(error, TypeError) else type(error)
        return kind.__name__, str(error)
    except Exception as error:
        return f"wrong exception {type(error).__name__}", str(error)


def parts(result: Any) -> Iterator[Any]:
    """What a result is made of, as NumPy arrays and as text."""
    from llama_layers.arrays.transfer import to_numpy

    if is_dataclass(result) and not isinstance(result, type):
        for field in fields(result):
            yield from parts(getattr(result, field.name))
    elif isinstance(result, tuple | list):
        for part in result:
            yield from parts(part)
    elif hasattr(result, "dtype"):
        array = np.array(to_numpy(result))
        yield array if array.dtype.kind in "biufcV" and array.dtype.names is None else repr(array)
    else:
        yield repr(result)


def problems(one: tuple[str, Outcome], other: tuple[str, Outcome]) -> Iterator[str]:
    """What is wrong with the outcomes of a call with the compiled bodies and without."""
    (text, (how, what)), (_, (plain_how, plain)) = one, other
    for name, kind, message in (("with", how, what), ("without", plain_how, plain)):
        if kind.startswith(("wrong", "LLAMA")):
            yield f"{kind} {name} compiled bodies: {message}"
        elif isinstance(message, str) and ("\n" in message or len(message) > 2500):
            yield f"{kind} of several lines or too long: {message[:300]!r}"
    if how != plain_how:
        texts = " | ".join(str(message)[:300] for message in (what, plain))
        yield f"{how} with compiled bodies, {plain_how} without: {texts}"
    elif how == "gives" and (difference := different(what, plain, _free(text))) is not None:
        yield f"results differ: {difference}"


def _free(text: str) -> bool:
    """Whether a call's numbers may differ: they may overflow, or are drawn anew each time."""
    return "rare" in text or "rng is a NoneType" in text


def different(ours: list[Any], theirs: list[Any], free: bool) -> str | None:
    """How results differ by more than rounding; the values are not compared where they are free."""
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} parts"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
            if type(a) is not type(b) or a != b:
                return f"{a} and {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.shape} {a.dtype} and {b.shape} {b.dtype}"
        elif not free and not _close(a, b):
            return f"{a.reshape(-1)[:5]} and {b.reshape(-1)[:5]}, of shape {a.shape}"
    return None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind in "biuc":
        return bool((a == b).all())
    coarse = a.dtype.itemsize == 2
    with np.errstate(all="ignore"):
        a, b = a.astype(np.float64), b.astype(np.float64)
        largest = float(np.abs(b[np.isfinite(b)]).max(initial=1.0))
        bound = (3e-2 if coarse else 1e-3) * largest
        near = (np.abs(a - b) <= bound) | (a == b) | (np.isnan(a) & np.isnan(b))
    return bool(near.all())


def work(start: int, stop: int) -> None:
    """Write the outcomes of the calls of some seeds to stdout."""
    sys.path.insert(0, str(HERE.parents[1]))
    from llama_layers.backends.numba.sizes import of_any_size
    from tests.fuzz import api_calls

    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    with of_any_size():  # kernels for small arrays, too
        for seed in range(start, stop):
            text, call = api_calls.call(np.random.default_rng(seed))
            pickle.dump((text, outcome(call)), sys.stdout.buffer)
            sys.stdout.buffer.flush()


def main() -> int:
    """Fuzz as the command line says; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first call (default: 0)")
    parser.add_argument("--count", type=int, default=1000, help="calls (default: 1000)")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return 0
    found = run(args.seed, args.count)
    print("\n".join(found) or f"{args.count} calls and no problem")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
