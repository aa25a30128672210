"""``llama-layers generate``: continue a text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llama_layers.cli.options import add_backend, add_dtype, resolve_backend


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, token by token, until the model ends it. Greedy, unless a "
        "temperature is given.",
    )
    parser.add_argument("text", help="the text to continue; with --chat, what the user says")
    parser.add_argument(
        "--model", required=True, help="a directory, file or known model, such as smollm2-135m"
    )
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="(default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest, to a sum of P"
    )
    parser.add_argument("--min-p", type=float, metavar="P", help="from those P times the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--seed", type=int, help="of the random numbers")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text"
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help="print speeds on stderr; that of prefill includes reading the weights",
    )
    add_backend(parser)
    add_dtype(parser, "the weights")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stream the continuation to stdout."""
    import numpy as np

    from llama_layers.backends.placement import placement
    from llama_layers.checkpoint import load
    from llama_layers.generation import generate

    if "" in args.stop:
        raise ValueError("--stop: expected a text, got an empty one")
    if args.temperature == 0:
        for option in ("top_k", "top_p", "min_p", "seed"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name}: needs a --temperature above 0; at 0 nothing is drawn")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed: expected zero or more, got {args.seed}")
    backend = resolve_backend(args.backend)
    model = load(args.model, backend=backend, dtype=args.dtype)
    tokenizer = model.tokenizer
    if args.chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.text}])
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    else:
        ids = tokenizer.encode(args.text)
    if not ids:
        raise ValueError("text: expected at least one token, got none")
    start = time.perf_counter()
    steps = generate(
        model,
        placement(backend)(np.asarray([ids])),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        rng=args.seed,
    )
    prefilled = time.perf_counter()
    times: list[float] = []
    for piece in until_stop(tokenizer.stream(_timed(steps, times)), args.stop):
        print(piece, end="", flush=True)
    print()
    if args.stats:
        _print_stats(len(ids), prefilled - start, times)
    return 0


def _timed(steps: Iterator[Any], times: list[float]) -> Iterator[int]:
    for step in steps:
        times.append(time.perf_counter())
        yield int(step[0])


def until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first stop; what may be the start of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _print_stats(prompt: int, prefill: float, times: Sequence[float]) -> None:
    lines = [("prefill", prompt, prefill)]
    if len(times) > 1:
        lines.append(("decode", len(times) - 1, times[-1] - times[0]))
    for name, count, seconds in lines:
        tokens = "token" if count == 1 else "tokens"
        speed = f"{count / seconds:.1f} tokens/s"
        print(f"{name:<8}{count} {tokens}, {seconds:.3f} s, {speed}", file=sys.stderr)
