"""The place of a failing site, in a report's text, page and JSON."""

from __future__ import annotations

import numpy as np

from llama_layers.verify import Extent, Place, Trace, check, record, to_html
from tests.support.made_reports import INTERLEAVED, K_ROPE, Q_ROPE, report, result
from tests.support.random_models import GQA, model_of, random_weights


def test_a_check_finds_the_places_of_what_fails_only():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    trace = record(model, np.array([[1, 2, 3, 4]]))
    spoilt = {name: np.array(array) for name, array in trace.arrays.items()}
    spoilt["model.norm"][0, 2, 7] += 0.5
    for name in ("model.layers.0.input_layernorm", "model.layers.0.mlp.act"):
        del spoilt[name]  # so that what follows has no recorded inputs
    spoilt["model.layers.0.mlp.down_proj"][:, 1:3] *= 2
    made = check(Trace(spoilt, trace.input_ids), model, explain=False)
    found = {r.site.name: r.place.words for r in made.results if r.place is not None}
    assert found.keys() == {r.site.name for r in made.failures}
    assert found["model.norm"] == "token 2, channel 7 only"
    assert found["model.layers.0.mlp.down_proj"] == "tokens 1 and 2 only"
    down = next(r for r in made.results if r.site.name == "model.layers.0.mlp.down_proj")
    assert (down.verdict, down.place.local) == ("DIFFERS", True)


def test_padding_is_no_place_where_something_differs():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    mask = np.array([[0, 1, 1, 1, 1, 1]])
    trace = record(model, np.array([[0, 1, 2, 3, 4, 5]]), attention_mask=mask)
    name = "model.layers.0.mlp.down_proj"
    spoilt = np.array(trace.arrays[name])
    spoilt[:, [0, 2]] *= 2
    made = check(Trace({name: spoilt}, trace.input_ids, attention_mask=mask), model, explain=False)
    assert made.first.verdict == "DIFFERS"
    assert made.first.place.words == "token 2 only"


def paragraphs(made):
    return made.text(width=1000).split("\n\n")


def placed(said, *, local=True):
    return Place(32, 96, (Extent("channel", 16, 2, 4, 5, 1, True),), local, said)


def test_where_it_is_wrong_comes_before_the_cause():
    place = placed("channels 4 and 5 only: a pair?")
    made = report(result(Q_ROPE[0], "FAIL", explanations=(INTERLEAVED,), place=place))
    said = "Wrong: 32 of 96 elements, channels 4 and 5 only: a pair?"
    assert paragraphs(made)[1:3] == [
        said,
        "Likely cause: RoPE layout interleaved\n"
        "  It pairs 2i and 2i + 1.\n"
        "  So computed, the largest error is 0.41 times what rounding allows.",
    ]
    page = to_html(made)
    assert page.index(said) < page.index("Likely cause")
    assert 'x="60.0" width="30.0"' in page  # of 240 for 16 channels
    assert f"at [0, 5, 3]; wrong: {place}" in page
    (row,) = (r for r in made.to_json()["results"] if r["place"])
    assert row["place"]["words"] == place.words
    assert row["place"]["extents"] == [
        {"axis": "channel", "size": 16, "count": 2, "first": 4, "last": 5, "step": 1, "few": True}
    ]
    (line,) = (x for x in made.text(every=True).splitlines() if x.startswith(f"{Q_ROPE[0]} "))
    assert line.endswith(str(place))


def test_every_failing_site_is_told_its_place():
    alike, other = placed("token 1 only"), placed("head 2 only")
    made = report(
        *(result(name, "FAIL", place=alike) for name in Q_ROPE[:3]),
        result(K_ROPE[1], "FAIL", place=other),
    )
    assert (
        "FAIL self_attn.q_rope in layers 0-2: token 1 only.\n"
        "FAIL self_attn.k_rope in layer 1: head 2 only."
    ) in paragraphs(made)
    made = report(*(result(name, "FAIL", place=alike) for name in Q_ROPE))
    assert "4 sites fail, in the same places: self_attn.q_rope in layers 0-3." in str(made)
    many = (result(r.site.name, "FAIL", place=placed(str(i))) for i, r in enumerate(made.results))
    assert "55 more sites at other places." in str(report(*many))
