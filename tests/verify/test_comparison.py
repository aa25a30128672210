"""Comparisons of traces: how they are told as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np

from llama_layers.verify import Comparison, SiteDifference, compare
from tests.support.compared_traces import F32, LAYER, by_name, made, traced


def paragraphs(comparison, **options):
    return comparison.text(width=1000, **options).split("\n\n")


def test_as_text():
    differences = {
        "model.layers.0": 0.0,
        f"{LAYER}.mlp.act": 0.5,
        f"{LAYER}.mlp.down_proj": 1.0,
        "lm_head": 0.25,
    }
    comparison = compare(*made(differences, np.float64))
    parts = paragraphs(comparison)
    assert parts[0].startswith(f"DIVERGE: first at {LAYER}.mlp.act: difference 0.5, ")
    assert "times what it inherits from model.layers.0 (0) and may round (" in parts[0]
    assert parts[1] == "No other site is suspect."
    rows = [line.split() for line in parts[2].splitlines()]
    assert rows[0] == ["site", "sites", "suspect", "difference", "layer", "factor", "layer"]
    assert rows[1] == ["layer", "output", "1", "0", "0", "0", "0"]
    assert rows[2][:5] == ["mlp.act", "1", "1", "0.5", "1"]
    assert rows[3] == ["mlp.down_proj", "1", "1", "1", "2", "1"]
    assert rows[4][:3] == ["lm_head", "1", "0.25"]
    assert parts[3].startswith("Computed in float64.\n")
    listed = paragraphs(comparison, every=True)[3].splitlines()
    assert listed[3].split() == [f"{LAYER}.mlp.down_proj", "1", "0.5", "0.5", "2"]
    assert "yes" in listed[2]


def test_agreement_as_text():
    differences = {"model.layers.0": 2.0**-20, "model.layers.1": 2.0**-19}
    comparison = compare(*made(differences))
    # The embedding and the 15 sites of a layer come before the first.
    factors = [2**-20 / (F32 * math.sqrt(16)), 2**-19 / (2**-20 + F32 * math.sqrt(15))]
    assert paragraphs(comparison)[0] == (
        "AGREE: 2 sites; the largest difference is 1.9e-06, at model.layers.1; none differs by "
        f"more than {max(factors):.2g} times what it inherits and may round"
    )
    wide = traced()
    assert max(map(len, compare(wide, traced(dtype=np.float64)).text().splitlines())) <= 80


def test_identical_traces():
    trace = traced()
    assert compare(trace, trace).text().startswith("AGREE: 33 sites, bitwise equal\n")
    zero = {name: np.array(array) for name, array in trace.arrays.items()}
    zero["lm_head"][0, 0, 0] = 0.0
    minus = zero | {"lm_head": np.where(zero["lm_head"] == 0, -0.0, zero["lm_head"])}
    minus["lm_head"] = minus["lm_head"].astype(np.float32)
    comparison = compare(*(replace(trace, arrays=arrays) for arrays in (zero, minus)))
    assert by_name(comparison)["lm_head"].difference == 0
    assert [r.site.name for r in comparison.results if not r.identical] == ["lm_head"]
    assert "bitwise" not in str(comparison)
    wide = zero | {"lm_head": zero["lm_head"].astype(float)}
    assert not by_name(compare(trace, replace(trace, arrays=wide)))["lm_head"].identical


def test_nan_is_told():
    trace = traced(sites=["layer", "model.norm", "scores"])
    spoilt = {name: np.array(array) for name, array in trace.arrays.items()}
    spoilt["model.layers.1"][0, 1, 2:4] = np.nan, np.inf
    spoilt["model.layers.1.self_attn.scores"][..., 0, 1] = -np.inf  # hidden
    spoilt = replace(trace, arrays=spoilt)
    both = compare(spoilt, spoilt)
    assert both.agrees
    assert by_name(both)["model.layers.1"].odd == 2
    assert (
        "NaN or Inf at 1 site, alike in both or inherited: layer output in layer 1."
        in both.text(width=1000)
    )
    one = compare(trace, spoilt)
    assert one.text(width=1000).startswith(
        "DIVERGE: first at model.layers.1: NaN or Inf in one trace and not in the other; inputs: "
        "model.layers.0\n"
    )
    assert "alike in both" not in str(one)
    assert "NaN" not in str(compare(trace, trace))


def test_as_json():
    a, b = made({f"{LAYER}.mlp.act": 0.5, f"{LAYER}.mlp.down_proj": math.nan})
    comparison = compare(a, replace(b, metadata={"engine": "mine"}))
    content = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert list(content)[:5] == ["verdict", "agrees", "exit_status", "headline", "first"]
    assert {field.name for field in fields(Comparison)} <= content.keys()
    derived = {"added", "factor", "suspect"}
    for found in content["results"]:
        assert found.keys() == {field.name for field in fields(SiteDifference)} | derived
    assert content["first"] == content["results"][0]
    assert content["first"]["site"]["role"] == "mlp.act"
    assert {content["results"][1][name] for name in ("difference", "factor")} == {None}
    assert (content["verdict"], content["exit_status"]) == ("DIVERGE", 1)
    assert content["metadata_b"] == {"engine": "mine"}
