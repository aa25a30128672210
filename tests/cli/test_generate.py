"""`llama-layers generate`: text that streams out, stops and can be repeated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import forward, load
from llama_layers.cli import main
from llama_layers.cli.generate import until_stop

TEXT = "The capital of France is"


def run(capsys, model, *arguments):
    assert main(["generate", "--model", str(model), *arguments]) == 0
    return capsys.readouterr()


def test_greedy_text_is_that_of_full_forward_passes(smollm2, capsys):
    model = load(smollm2)
    ids = model.tokenizer.encode(TEXT)
    for _ in range(6):  # without a cache, and with nothing of generate's
        logits = forward(model, np.array([ids])).logits
        ids.append(int(np.argmax(logits[0, -1])))
    expected = model.tokenizer.decode(ids).removeprefix(TEXT)
    assert run(capsys, smollm2, TEXT, "--max-new-tokens", "6").out == expected + "\n"


def test_a_chat_ends_by_itself(smollm2, capsys):
    out = run(capsys, smollm2, "--chat", "What is the capital of France? One word.").out
    assert "Paris" in out
    assert "<|im_end|>" not in out


def test_a_seed_repeats_a_draw(smollm2, capsys):
    options = (TEXT, "--temperature", "1.5", "--top-k", "50", "--max-new-tokens", "4")
    texts = [run(capsys, smollm2, *options, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_it_ends_before_a_stop(smollm2, capsys):
    whole = run(capsys, smollm2, TEXT, "--max-new-tokens", "12").out
    stop = whole.strip()[6:9]
    short = run(capsys, smollm2, TEXT, "--max-new-tokens", "12", "--stop", stop).out
    assert short == whole[: whole.find(stop)] + "\n"


def test_stats_go_to_stderr(smollm2, capsys):
    captured = run(capsys, smollm2, TEXT, "--max-new-tokens", "3", "--stats")
    assert captured.err.splitlines()[0].startswith("prefill 5 tokens")
    assert captured.err.splitlines()[1].startswith("decode  2 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop", ""], "--stop: expected a text, got an empty one"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected a positive integer, got 0"),
        (["--temperature", "-1"], "temperature: expected a finite number, zero or more, got -1.0"),
        (["--top-p", "2"], "--top-p: needs a --temperature above 0; at 0 nothing is drawn"),
        (
            ["--top-p", "2", "--temperature", "1"],
            "top_p: expected more than 0 and at most 1, got 2.0",
        ),
        (["--seed", "-1", "--temperature", "1"], "--seed: expected zero or more, got -1"),
    ],
)
def test_refusals(smollm2, capsys, arguments, message):
    assert main(["generate", "--model", str(smollm2), TEXT, *arguments]) == 2
    assert capsys.readouterr().err == f"llama-layers generate: {message}\n"


def test_an_empty_text(smollm2, capsys):
    assert main(["generate", "--model", str(smollm2), ""]) == 2
    assert "text: expected at least one token" in capsys.readouterr().err


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_until_stop_is_a_cut_of_the_whole_text(pieces, stops):
    text = "".join(pieces)
    ends = [end for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    if not ends:
        expected = {text}
    else:  # the text is cut when a stop is first whole; before the earliest that is whole then
        pieces_ends = np.cumsum([len(piece) for piece in pieces])
        seen = text[: next(int(end) for end in pieces_ends if end >= min(ends))]
        expected = {seen[: min(seen.find(stop) for stop in stops if stop in seen)]}
    assert "".join(until_stop(iter(pieces), stops)) in expected
