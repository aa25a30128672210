"""`llama-layers generate`: text that streams out, stops and can be repeated."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

import llama_layers.model.generate
from llama_layers import forward, load
from llama_layers.cli import main
from llama_layers.cli.generate import until_stop
from tests.support import tiny

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


# A tokenizer with a token for each byte, whose id is the byte, and words.
WORDS = ["▁Hello", "▁world", "<end>", "<s>", "x"]
HELLO, WORLD, END, START, X = range(256, 261)


def chain(path, *ids, **files):
    """A model that says those ids after ``<s>``: it maps each id to the next, and adds nothing."""
    texts = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {text: i for i, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    replaced = decoders.Replace("▁", " ")
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<s>", "<end>"])
    size = len(texts) + 1
    config = replace(
        tiny.CONFIG, vocab_size=size, hidden_size=size + size % 2, eos_token_id=END, head_dim=8
    )
    weights = {name: 0 * array for name, array in tiny.arrays(config).items()}
    weights["model.norm.weight"] += 1
    for i in range(size):
        weights["model.embed_tokens.weight"][i, i] = 1
    for before, after in zip([START, *ids], ids, strict=False):
        weights["lm_head.weight"][after, before] = 1
    tiny.write_single(path, weights, config)
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


EMOJI = list("🙂".encode())


@pytest.mark.parametrize(
    ("ids", "encoding", "written"),
    [
        ([HELLO, *EMOJI, WORLD, END], "utf-8", "Hello🙂 world\n".encode()),
        ([HELLO, *EMOJI, WORLD, END], "cp1252", b"Hello? world\n"),
        ([HELLO, *EMOJI, WORLD, END], "ascii", b"Hello? world\n"),
        ([HELLO, *EMOJI[:3], END], "utf-8", "Hello\ufffd\ufffd\ufffd\n".encode()),
        ([10, *EMOJI[:2], WORLD, END], "utf-8", "\ufffd\ufffd\ufffd world\n".encode()),
    ],
)
def test_any_text_on_any_terminal(tmp_path, monkeypatch, ids, encoding, written):
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, newline="")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["generate", "--model", str(chain(tmp_path, *ids)), "<s>"]) == 0
    assert raw.getvalue() == written


def test_a_text_longer_than_the_context_is_said_once(tmp_path, capsys):
    """The model's context is of 64 tokens, one of which is the prompt."""
    model = chain(tmp_path, *[HELLO, WORLD] * 40)  # each follows the other, with no end
    assert main(["generate", "--model", str(model), "<s>", "--max-new-tokens", "63"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", "--model", str(model), "<s>", "--max-new-tokens", "66"]) == 0
    assert capsys.readouterr().err.count("longer than the context") == 1


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    model = chain(tmp_path, HELLO, END)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_tokens(["one", "more"])
    backend.save(str(model / "tokenizer.json"))
    for command in (["generate", "more"], ["trace", "-o", str(tmp_path / "t"), "more"]):
        assert main([*command, "--model", str(model)]) == 2
        assert "its tokenizer gives the id 262, and the model has 262" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        (END, "Hello world"),
        ([END, HELLO], "Hello"),
        (None, "Hello world"),
    ],
)
def test_it_stops_at_every_end(tmp_path, capsys, ends, text):
    model = chain(
        tmp_path, HELLO, WORLD, END, X, generation_config={"eos_token_id": ends, "top_k": 3}
    )
    captured = run(capsys, model, "<s>", "--max-new-tokens", "5")
    assert captured.out == text + "\n"
    assert captured.err == ""


def test_a_named_template(tmp_path, capsys):
    templates = [{"name": "default", "template": "x"}, {"name": "rag", "template": "<s>"}]
    model = chain(tmp_path, HELLO, END, tokenizer_config={"chat_template": templates})
    assert run(capsys, model, "hi", "--chat-template", "rag").out == "Hello\n"
    assert run(capsys, model, "hi", "--chat", "--chat-template", "rag").out == "Hello\n"
    assert main(["generate", "--model", str(model), "hi", "--chat-template", "a"]) == 2
    assert "chat_template: expected one of default, rag, got 'a'" in capsys.readouterr().err


SETTINGS = {
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "max_new_tokens": 3,
}
DRAWING = ("temperature", "top_k", "top_p", "min_p")
GREEDY = {"max_new_tokens": 256, "temperature": 0.0}


@pytest.mark.parametrize(
    ("suggested", "arguments", "options"),
    [
        (SETTINGS, [], GREEDY),  # nothing unless asked for
        (
            SETTINGS,
            ["--use-generation-config"],
            {k: SETTINGS[k] for k in SETTINGS if k != "do_sample"},
        ),
        (
            SETTINGS,
            "--use-generation-config --top-k 2 --temperature 2 --max-new-tokens 4".split(),
            {k: SETTINGS[k] for k in ("top_p", "min_p", "repetition_penalty")}
            | {"top_k": 2, "temperature": 2.0, "max_new_tokens": 4},
        ),
        ({"do_sample": True}, ["--use-generation-config"], GREEDY | {"temperature": 1.0}),
        (
            {"do_sample": True, "top_k": 0},
            ["--use-generation-config"],
            GREEDY | {"temperature": 1.0},
        ),
        ({"top_p": 0.5}, ["--use-generation-config"], GREEDY),
        ({}, ["--use-generation-config"], GREEDY),
    ],
)
def test_the_settings_of_the_authors(tmp_path, capsys, monkeypatch, suggested, arguments, options):
    seen = {}
    generate = llama_layers.model.generate.generate

    def spy(model, ids, **given):
        seen.update(given)
        return generate(model, ids, **given)

    monkeypatch.setattr("llama_layers.model.generate.generate", spy)
    model = chain(tmp_path, HELLO, END, generation_config=suggested)
    run(capsys, model, "<s>", *arguments)
    assert seen == options | {"rng": None}


@pytest.mark.parametrize(
    ("suggested", "said"),
    [
        ({"num_beams": 4, "typical_p": 0.9}, "not applied: num_beams, typical_p"),
        ({"no_repeat_ngram_size": 2}, "not applied: no_repeat_ngram_size"),
        ({"temperature": 0.5}, "not applied, since do_sample is not true: temperature"),
        ({"num_beams": 1, "typical_p": 1.0, "max_length": 20, "do_sample": False}, None),
        ({"bos_token_id": 1, "transformers_version": "4", "_from_model_config": True}, None),
    ],
)
def test_settings_that_are_not_applied_are_named(tmp_path, capsys, suggested, said):
    model = chain(tmp_path, HELLO, END, generation_config=suggested)
    captured = run(capsys, model, "<s>", "--use-generation-config")
    assert captured.out == "Hello\n"
    assert captured.err == ("" if said is None else f"generation_config.json: {said}\n")
    assert run(capsys, model, "<s>").err == ""


@pytest.mark.parametrize("value", ["hot", [1], {}, True, -1])
def test_settings_of_a_wrong_type(tmp_path, capsys, value):
    for name in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens"):
        settings = {"do_sample": True, name: value}
        model = chain(tmp_path, HELLO, END, generation_config=settings)
        assert main(["generate", "--model", str(model), "<s>", "--use-generation-config"]) == 2
        assert f"{name}: expected" in capsys.readouterr().err


def test_the_help_says_which_settings_apply(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in (*DRAWING, "max_new_tokens", "repetition_penalty", "do_sample", "eos_token_id"):
        assert name in text
