"""Speculative decoding and beam search, as the documentation has them, against recomputation."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from llama_layers import forward
from tests.support.random_models import CONFIGS, model_of, random_weights

DOCS = Path(__file__).parents[1] / "docs"


def page(name):
    """What the first cell of a page defines."""
    (cell, *_) = re.findall(r"^```{code-cell}\n(.*?)^```", (DOCS / name).read_text(), re.S | re.M)
    found = {}
    exec(cell, found)
    return found


def made(kind, seed, vocab_size=13):
    config = replace(CONFIGS[kind], vocab_size=vocab_size, max_position_embeddings=64)
    return model_of(config, random_weights(config, seed))


def log_probabilities(model, text):
    """Of every next token after each one of a list, from a pass without a cache."""
    logits = forward(model, np.array([text])).logits[0]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", ["gqa", "window", "qwen2"])
@pytest.mark.parametrize("draft", ["another", "the model", "nearly the model"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_greedy_speculation_gives_the_greedy_text(kind, draft, ahead):
    model = made(kind, 0)
    config = model.config
    share = {"the model": 0, "nearly the model": 0.4, "another": 1}[draft]
    own, others = random_weights(config), random_weights(config, 1)
    weights = {name: (1 - share) * own[name] + share * others[name] for name in own}
    text = [3, 1, 4]
    found, passes = page("speculative.md")["speculative"](
        model, model_of(config, weights), text, max_new_tokens=16, ahead=ahead
    )
    for _ in range(16):
        text = [*text, int(log_probabilities(model, text)[-1].argmax())]
    assert found == text
    if draft == "the model":
        assert passes == 16 / (ahead + 1)
    elif draft == "another":
        assert passes > 16 / (ahead + 1)


def test_speculation_keeps_the_distribution():
    """A chi-square test of all texts of two tokens, of which the draft prefers others."""
    model, draft = made("gqa", 0, vocab_size=4), made("gqa", 1, vocab_size=4)
    speculative, rng = page("speculative.md")["speculative"], np.random.default_rng(8)
    prompt, runs = [1, 2], 250
    counts = dict.fromkeys(product(range(4), repeat=2), 0)
    for _ in range(runs):
        text, _ = speculative(
            model, draft, prompt, max_new_tokens=2, ahead=2, temperature=2, rng=rng
        )
        counts[tuple(text[2:])] += 1

    def expected(of, first, second):
        logits = forward(of, np.array([[*prompt, first]])).logits[0] / 2
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        return runs * p[-2, first] * p[-1, second]

    def distance(of):
        return sum((n - (e := expected(of, *pair))) ** 2 / e for pair, n in counts.items())

    assert min(expected(model, *pair) for pair in counts) > 5
    assert distance(model) < 37.7  # which 0.1 % of such sums exceed, with 15 degrees of freedom
    assert distance(draft) > 100


def naive_beams(model, prompt, width, count, end):
    """Texts and scores, each text computed again from its first token."""
    beams = [((), 0.0)]
    for _ in range(count):
        longer = []
        for text, score in beams:
            if text and text[-1] == end:
                longer.append(((*text, end), score))
                continue
            following = log_probabilities(model, [*prompt, *text])[-1]
            longer += [((*text, token), score + p) for token, p in enumerate(following)]
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    return beams


@pytest.mark.parametrize("kind", ["gqa", "window", "qwen2"])
@pytest.mark.parametrize("end", [None, 5])
@pytest.mark.parametrize("width", [1, 2, 4, 16])
def test_beams_are_those_of_a_search_that_recomputes_everything(kind, end, width):
    model, prompt = made(kind, 0), [3, 1, 4]
    beams, scores = page("beam_search.md")["beam_search"](
        model, np.array([prompt]), width=width, max_new_tokens=6, end=end
    )
    expected = naive_beams(model, prompt, width, 6, end)
    assert [tuple(beam) for beam in beams] == [text for text, _ in expected]
    np.testing.assert_allclose(scores, [score for _, score in expected], rtol=0, atol=1e-10)


def test_a_wide_beam_finds_what_trying_everything_finds():
    model, prompt = made("gqa", 0, vocab_size=4), [3, 1]

    def score(text):
        rows = log_probabilities(model, [*prompt, *text])[1:-1]
        return sum(row[token] for row, token in zip(rows, text, strict=True))

    every = sorted(product(range(4), repeat=3), key=lambda text: -score(text))
    beams, scores = page("beam_search.md")["beam_search"](
        model, np.array([prompt]), width=16, max_new_tokens=3
    )
    assert [tuple(beam) for beam in beams] == every[:16]
    np.testing.assert_allclose(scores, [score(text) for text in every[:16]], rtol=0, atol=1e-10)
