"""Any part of a right trace: what can be judged is, and nothing is wrong."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.verify import Trace, check, record, sites
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MODEL = model_of(GQA, random_weights(GQA, 0, np.float32))
TRACES = {
    padded: record(MODEL, IDS, sites=["*"], attention_mask=MASK if padded else None)
    for padded in (False, True)
}
SITES = {site.name: site for site in sites(GQA) if site.name != "logprobs"}
NAMES = tuple(SITES)


def checked(names, padded=False, **tokens):
    arrays = TRACES[padded].arrays
    return check(Trace({name: arrays[name] for name in names}, **tokens), MODEL)


def depends_on_ids(name, recorded):
    """Whether a way to a site from the ids meets no recorded array."""
    routes = SITES[name].routes[-1]
    return not routes or any(
        before not in recorded and depends_on_ids(before, recorded) for before in routes
    )


@pytest.mark.parametrize("first", NAMES)
def test_two_sites_without_ids(first):
    for names in [(first,), *(pair for pair in combinations(NAMES, 2) if pair[0] == first)]:
        for result in checked(names).results:
            site = result.site
            assert result.verdict in ("PASS", "SEEN")
            if any(route and set(route) <= set(names) for route in site.routes):
                assert result.verdict == "PASS"
            else:
                unknown = depends_on_ids(site.name, set(names))
                assert np.isnan(result.difference) == unknown
                assert ("input_ids were not recorded" in result.note) == unknown


@given(
    names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3),
    padded=st.booleans(),
    tokens=st.sets(st.sampled_from(("input_ids", "positions"))),
)
def test_three_sites(names, padded, tokens):
    given_tokens = {name: getattr(TRACES[padded], name) for name in tokens}
    if padded:
        given_tokens["attention_mask"] = MASK
    report = checked(names, padded, **given_tokens)
    assert {result.site.name for result in report.results} == names
    assert {result.verdict for result in report.results} <= {"PASS", "SEEN"}
    assert report.text()
    assert report.to_json()


@pytest.mark.parametrize("rows", [slice(None), slice(-1, None)])
def test_the_last_two_sites_alone(rows):
    """Logits can be judged from the rows before them, however many were kept."""
    arrays = {name: TRACES[False].arrays[name][:, rows] for name in ("model.norm", "lm_head")}
    norm, logits = check(Trace(arrays), MODEL).results
    assert (norm.verdict, logits.verdict) == ("SEEN", "PASS")
    assert logits.shape == arrays["lm_head"].shape


def test_positions_count_the_tokens_of_the_last():
    last = {"lm_head": TRACES[False].arrays["lm_head"][:, -1:]}
    (result,) = check(Trace(last, positions=np.arange(5)), MODEL).results
    assert result.verdict == "SEEN"


def test_a_mistake_between_is_still_found():
    name = "model.layers.0.attention_residual"
    arrays = {n: TRACES[False].arrays[n] for n in (name, "model.layers.0.mlp.gate_proj")}
    arrays[name] = 2 * arrays[name]
    weights = arrays["model.layers.0.mlp.gate_proj"]
    arrays["model.layers.0.mlp.gate_proj"] = weights + np.float32(0.5)
    assert check(Trace(arrays), MODEL).first.site.name == "model.layers.0.mlp.gate_proj"
