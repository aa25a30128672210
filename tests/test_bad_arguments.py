"""Arguments of every kind that do not fit: an error that names one, on one line."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import (
    KVCache,
    LayerCache,
    Llama,
    LlamaConfig,
    Mask,
    QKVWeights,
    apply_rope,
    attention,
    decoder_layer,
    embed,
    forward,
    generate,
    linear,
    load,
    mlp,
    qkv_projection,
    query_temperature,
    rms_norm,
    rope_table,
    sample,
    swiglu,
)
from llama_layers.arrays.checks import check_choice, check_count, check_finite
from llama_layers.arrays.dtypes import check_bools, check_integers
from llama_layers.errors import shown
from llama_layers.verify import check, record
from tests.support.random_models import GQA, layer_weights, model_of, random_weights

HUGE = 10**400  # no float is as large
ENORMOUS = 10**5000  # Python does not write it out
WEIGHTS = random_weights(GQA, dtype=np.float32)
MODEL = model_of(GQA, WEIGHTS)
LAYER = layer_weights(WEIGHTS, GQA, 0)
IDS = np.array([[1, 2]])
X = np.ones((1, 2, 2, 4), np.float32)
A = np.ones((2, 2), np.float32)
ROWS = np.ones((2, 10), np.float32)
S = np.arange(2)
TABLE = rope_table(S, GQA, like=X)
NOPE = replace(GQA, layer_rope_theta=(0.0,) * GQA.num_hidden_layers)
MASKED = np.ma.ones((2, 2))
TRACE = record(MODEL, IDS)


def generated(**options):
    return list(generate(MODEL, IDS, **{"max_new_tokens": 1} | options))


def layer(x=ROWS[None], w=LAYER, **options):
    return decoder_layer(x, w, **{"config": GQA, "rope": TABLE, "mask": None} | options)


CALLS = {
    "generate cache": (lambda: generated(cache=5), TypeError, "cache"),
    "generate temperature": (lambda: generated(temperature=HUGE), ValueError, "temperature"),
    "generate top_k": (lambda: generated(top_k=np.ones((2, 2))), ValueError, "top_k"),
    "generate top_p": (lambda: generated(top_p=HUGE), ValueError, "top_p"),
    "generate min_p": (lambda: generated(min_p="1"), TypeError, "min_p"),
    "generate rng": (lambda: generated(rng=np.ones((3, 3))), TypeError, "rng"),
    "generate penalty": (lambda: generated(repetition_penalty=HUGE), ValueError, "repetition_pe"),
    "generate penalty inf": (
        lambda: generated(repetition_penalty=np.inf),
        ValueError,
        "repetition_penalty",
    ),
    "generate count": (lambda: generated(max_new_tokens=10**30), ValueError, "max_new_tokens"),
    "generate eos": (lambda: generated(eos_token_id=[[1]]), ValueError, "eos_token_id"),
    "generate ids": (lambda: generate(MODEL, None, max_new_tokens=1), TypeError, "input_ids"),
    "generate floats": (lambda: generate(MODEL, 1.0 * IDS, max_new_tokens=1), TypeError, "input_"),
    "generate model": (lambda: generate("llama", IDS, max_new_tokens=1), TypeError, "model"),
    "attention scale": (lambda: attention(X, X, X, scale=HUGE), ValueError, "scale"),
    "attention scale nan": (lambda: attention(X, X, X, scale=np.nan), ValueError, "scale"),
    "attention scale text": (lambda: attention(X, X, X, scale="1"), TypeError, "scale"),
    "attention k": (lambda: attention(X, None, X), TypeError, "k"),
    "attention mask": (lambda: attention(X, X, X, mask="causal"), TypeError, "mask"),
    "attention mask of text": (
        lambda: attention(X, X, X, mask=np.full((2, 2), "x")),
        TypeError,
        "mask",
    ),
    "rms_norm eps": (lambda: rms_norm(np.ones(4), np.ones(4), eps=HUGE), ValueError, "eps"),
    "rms_norm eps 5000": (lambda: rms_norm(S * 1.0, A[0], eps=ENORMOUS), ValueError, "eps"),
    "rms_norm x": (lambda: rms_norm(None, np.ones(4), eps=1.0), TypeError, "x"),
    "Mask queries": (lambda: Mask(np.array(1), S).rows(0, 1), ValueError, "queries"),
    "Mask rows": (lambda: Mask(S, S).rows(0.0, 1), TypeError, "start"),
    "Mask window": (lambda: Mask(S, S, "3\n4"), ValueError, "window"),
    "forward ids": (lambda: forward(MODEL, None), TypeError, "input_ids"),
    "forward model": (lambda: forward(None, IDS), TypeError, "model"),
    "forward tap": (lambda: forward(MODEL, IDS, tap=5), TypeError, "tap"),
    "forward last": (lambda: forward(MODEL, IDS, last_only=A), TypeError, "last_only"),
    "forward no token": (lambda: forward(MODEL, IDS[:, :0], last_only=True), ValueError, "last_on"),
    "forward positions": (lambda: forward(MODEL, IDS, positions=[0, 1]), TypeError, "positions"),
    "forward cache": (lambda: forward(MODEL, IDS, cache="x"), TypeError, "cache"),
    "forward mask": (
        lambda: forward(MODEL, IDS, attention_mask=np.array([["a", "b"]])),
        TypeError,
        "attention_mask",
    ),
    "embed ids": (lambda: embed(None, A), TypeError, "input_ids"),
    "embed table": (lambda: embed(IDS, None), TypeError, "table"),
    "apply_rope x": (lambda: apply_rope(None, A, A), TypeError, "x"),
    "apply_rope cos": (lambda: apply_rope(X, None, A), TypeError, "cos"),
    "apply_rope sin": (lambda: apply_rope(X, A, None), TypeError, "sin"),
    "apply_rope layout": (lambda: apply_rope(X, A, A, layout=A), ValueError, "layout"),
    "qkv_projection x": (
        lambda: qkv_projection(None, LAYER.self_attn.qkv),
        TypeError,
        "x",
    ),
    "rope_table positions": (lambda: rope_table(None, GQA, like=X), TypeError, "positions"),
    "rope_table config": (lambda: rope_table(S, "x", like=X), TypeError, "config"),
    "rope_table like": (lambda: rope_table(S, GQA, like=None), TypeError, "like"),
    "mlp w": (lambda: mlp(ROWS, 3), TypeError, "w"),
    "mlp tap": (lambda: mlp(ROWS, LAYER.mlp, tap=3), TypeError, "tap"),
    "mlp tap gives": (lambda: mlp(ROWS, LAYER.mlp, tap=lambda n, a: None), ValueError, "tap at"),
    "linear weight": (lambda: linear(ROWS, None), TypeError, "weight"),
    "swiglu up": (lambda: swiglu(ROWS, None), TypeError, "up"),
    "decoder_layer tap": (lambda: layer(tap=lambda n, a: a[..., :1]), ValueError, "tap at"),
    "decoder_layer x": (lambda: layer(x=None), TypeError, "x"),
    "decoder_layer cache": (lambda: layer(cache=KVCache.create(GQA, 1, 2)), TypeError, "cache"),
    "decoder_layer cache without RoPE": (
        lambda: layer(config=NOPE, rope=None, cache="x"),
        TypeError,
        "cache",
    ),
    "query_temperature config": (
        lambda: query_temperature(S, None, like=X),
        TypeError,
        "config",
    ),
    "record cache": (lambda: record(MODEL, IDS, cache="x"), TypeError, "cache"),
    "check allow": (lambda: check(TRACE, MODEL, allow=3), TypeError, "allow"),
    "check profile": (lambda: check(TRACE, MODEL, profile=3), TypeError, "profile"),
    "check rope_layout": (
        lambda: check(TRACE, MODEL, rope_layout=MASKED),
        ValueError,
        "rope_layout",
    ),
    "check dtype": (lambda: check(TRACE, MODEL, dtype=MASKED), ValueError, "dtype"),
    "load backend": (lambda: load("x", backend=MASKED), TypeError, "backend"),
    "from_json nothing": (lambda: LlamaConfig.from_json(None), TypeError, "path_or_dict"),
    "from_json bytes": (lambda: LlamaConfig.from_json(b"x"), TypeError, "path_or_dict"),
    "from_state_dict config": (lambda: Llama.from_state_dict({}, None), TypeError, "config"),
    "sample temperature": (lambda: sample(A, temperature=HUGE), ValueError, "temperature"),
    "sample logits": (lambda: sample(None), TypeError, "logits"),
    "QKVWeights heads": (
        lambda: QKVWeights(np.ones((32, 8)), num_heads=np.int8(2), num_kv_heads=2**31),
        ValueError,
        "num_kv_heads",
    ),
    "from_separate layout": (
        lambda: QKVWeights.from_separate(A, A, A, num_heads=1, layout=A),
        ValueError,
        "layout",
    ),
    "from_separate biases": (
        lambda: QKVWeights.from_separate(A, A, A, num_heads=1, biases=5),
        ValueError,
        "biases",
    ),
    "create like": (lambda: KVCache.create(GQA, 1, 2, like=S), TypeError, "like"),
    "create max_len": (lambda: KVCache.create(GQA, 1, 10**30), ValueError, "max_len"),
    "create config": (lambda: KVCache.create(None, 1, 2), TypeError, "model"),
    "extend": (lambda: KVCache.create(GQA, 1, 2).extend(ENORMOUS), ValueError, "cache|count"),
    "append": (lambda: KVCache.create(GQA, 1, 2).append(0, None, None), TypeError, "k"),
    "LayerCache cache": (lambda: LayerCache(None, 0), TypeError, "cache"),
    "LayerCache layer": (lambda: LayerCache(KVCache.create(GQA, 1, 2), 2), ValueError, "layer"),
    "LayerWeights mlp": (lambda: replace(LAYER, mlp=LAYER), TypeError, "mlp"),
    "LayerWeights norm": (lambda: replace(LAYER, input_layernorm=5), TypeError, "input_layern"),
    "LlamaWeights layers": (lambda: replace(MODEL.weights, layers=None), TypeError, "layers"),
    "LlamaWeights layer": (lambda: replace(MODEL.weights, layers=[5]), TypeError, r"layers\[0\]"),
    "LlamaWeights norm": (lambda: replace(MODEL.weights, norm=S), TypeError, "norm"),
    "Llama tokenizer": (lambda: replace(MODEL, open_tokenizer=5), TypeError, "open_tokenizer"),
    "Llama suggestions": (lambda: replace(MODEL, generation_config=5), TypeError, "generation_con"),
}


@pytest.mark.parametrize("call", CALLS)
def test_refuses(call):
    run, error, name = CALLS[call]
    with pytest.raises(error, match=rf"^({name})\S*.*expected") as raised:
        run()
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\\nb'"),
        (np.ones((2, 2)), r"array\(\[\[1\., 1\.\],\\n"),
        (ENORMOUS, "an integer of 16610 bits"),
    ],
    ids=["text", "array", "integer"],
)
def test_values_are_shown_on_one_line(value, text):
    assert re.match(text, shown(value))
    assert len(shown(list(range(10000)))) < 2100


@pytest.mark.parametrize("value", [np.float16(0.5), 0.5, 1, np.int8(3)])
def test_finite_numbers_become_floats(value):
    assert type(check_finite("x", value)) is float
    assert check_finite("x", value) == value


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="x: expected a finite number, zero or more, got -1"):
        check_finite("x", -1, negative=False)
    assert check_finite("x", -1) == -1.0
    assert check_count("n", np.int8(100), 100) == 100
    with pytest.raises(ValueError, match="n: expected at most 100, got 101"):
        check_count("n", 101, 100)
    with pytest.raises(ValueError, match="x: expected 'a' or 'b', got 'c'"):
        check_choice("x", "c", "a", "b")


@pytest.mark.parametrize(
    "array", [None, [1], 1, "x", np.ones(2), np.ones(2, "O"), np.ones(2, "c8")]
)
def test_neither_integers_nor_bools(array):
    for checked in (check_integers, check_bools):
        with pytest.raises(TypeError, match="x: expected"):
            checked("x", array)


def test_rotations_of_no_channels():
    """Sizes of zero are sizes, too."""
    nothing = np.ones((1, 3, 2, 0), np.float32)
    assert attention(nothing, nothing, nothing).shape == nothing.shape
    assert apply_rope(nothing, *np.ones((2, 3, 0), np.float32)).shape == nothing.shape
