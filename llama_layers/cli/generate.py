"""``llama-layers generate``: continue a text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_layers.arrays.types import Array
from llama_layers.cli.options import Commands, add_backend, add_dtype, add_model, resolve_backend
from llama_layers.cli.ranks import world
from llama_layers.cli.suggested import SETTINGS, suggested_options


def add_parser(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, token by token, until the model ends it. Greedy, unless a "
        "temperature is given.",
    )
    parser.add_argument("text", help="the text to continue; with --chat, what the user says")
    add_model(parser)
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="apply the chat template of this name, where the model has several",
    )
    parser.add_argument(
        "--use-generation-config",
        action="store_true",
        help="take the defaults of the next six options from the model's generation_config.json: "
        "max_new_tokens and repetition_penalty; if it says do_sample, also temperature (or 1), "
        "top_k, top_p and min_p. Its eos_token_id applies without this option. Settings that are "
        "not applied are named on stderr",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="(default: 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens, to a sum of P"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens at least P times as likely as the first",
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="(default: 1)")
    parser.add_argument("--seed", type=int, help="seed of the random numbers")
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
    from llama_layers.checkpoint import load, open_checkpoint
    from llama_layers.cli.prompt import prompt_ids
    from llama_layers.model.generate import generate

    if "" in args.stop:
        raise ValueError("--stop: expected a text, got an empty one")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed: expected zero or more, got {args.seed}")
    backend = resolve_backend(args.backend)
    suggested = {}
    if args.use_generation_config:
        suggested = suggested_options(open_checkpoint(args.model).generation_config)
    options = _options(args, suggested)
    model = load(args.model, backend=backend, dtype=args.dtype, parallel=world())
    tokenizer = model.tokenizer
    if args.chat or args.chat_template is not None:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": args.text}], chat_template=args.chat_template
        )
        ids = prompt_ids(model, prompt, add_special_tokens=False)
    else:
        ids = prompt_ids(model, args.text)
    start = time.perf_counter()
    steps = generate(
        model,
        placement(backend)(np.asarray([ids])),
        rng=args.seed,
        **options,
    )
    prefilled = time.perf_counter()
    times: list[float] = []
    room = model.config.max_position_embeddings - len(ids)
    for piece in until_stop(tokenizer.stream(_within(room, _timed(steps, times))), args.stop):
        print(piece, end="", flush=True)
    print()
    if args.stats:
        _print_stats(len(ids), prefilled - start, times)
    return 0


def _options(args: argparse.Namespace, suggested: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate`: those given, then those suggested, then our own defaults."""
    given = {name: getattr(args, name) for name in SETTINGS}
    options = {"max_new_tokens": 256, "temperature": 0.0} | dict(suggested)
    options |= {name: value for name, value in given.items() if value is not None}
    if options["temperature"] == 0:
        for name in ("top_k", "top_p", "min_p", "seed"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option}: needs a --temperature above 0; at 0 nothing is drawn"
                )
    return options


def _within(room: int, steps: Iterator[int]) -> Iterator[int]:
    """The tokens, with a warning once there are more than the model was trained for."""
    for count, token in enumerate(steps, 1):
        if count == max(room, 0) + 1:
            print(
                "llama-layers generate: warning: the text is longer than the context that the "
                "model was trained for",
                file=sys.stderr,
            )
        yield token


def _timed(steps: Iterator[Array], times: list[float]) -> Iterator[int]:
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
