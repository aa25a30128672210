"""Traces and reports in a notebook: a piece of HTML that needs nothing and disturbs nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from llama_layers.verify import Comparison, Trace
from llama_layers.verify.report.template import _heights as heights
from tests.support.made_reports import interleaved, report
from tests.verify.test_html import APART, EVIL, Page

TRACE = Trace(
    {f"model.layers.{i}.mlp.up_proj": np.ones((1, 3, 20), "f2") for i in (0, 1, 2, 5)}
    | {"model.layers.7.mlp.up_proj": np.ones((1, 3, 20), "f4"), "lm_head": np.ones((3, 11), "f4")},
    np.array([[1, 2, 3]]),
    metadata={"engine": EVIL, "config": "x" * 10_000},
)
THINGS = {
    "trace": TRACE,
    "fails": interleaved(metadata={"engine": EVIL}),
    "passes": report(),
    "comparison": Comparison((APART,), only_a=(EVIL,)),
}


@pytest.mark.parametrize("name", THINGS)
def test_a_piece_of_html(name):
    said = THINGS[name]._repr_html_()
    page = Page(said)
    assert said.strip().startswith('<div class="report">')
    assert not page.tags.keys() & {"html", "head", "body", "script", "link", "img", "iframe"}
    assert not page.values("src")
    assert all(target.startswith("#site-") for target in page.values("href"))
    assert "url(" not in said
    assert not [attribute for _, attribute, _ in page.attributes if attribute.startswith("on")]
    if name != "passes":
        assert EVIL in page.text


@pytest.mark.parametrize("name", THINGS)
def test_its_style_is_for_nothing_else(name):
    style = re.search("<style>(.*)</style>", THINGS[name]._repr_html_(), re.S)[1]
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
    rules = re.findall(r"([^{}]+)\{", style)
    assert len(rules) > 40
    for rule in rules:
        for selector in re.sub(r"\([^)]*\)", "", rule).split(","):
            assert re.match(r"\s*(@media|(body)?\.report\b)", selector), selector
    # The colours of text and page are set together, whatever the notebook's own are.
    main = re.search(r"\.report \{[^}]*max-width[^}]*\}", style)[0]
    assert "background: var(--page)" in main
    assert "color: var(--text)" in main
    # A notebook paints these with colours of its own.
    assert ".report :is(h1, h2, h3, p, summary, table, code) { color: inherit; }" in style
    assert ".report :is(tr, .lines td, .lines th, code) { background: none !important; }" in style


def test_the_table_of_a_trace():
    page = Page(TRACE._repr_html_())
    rows = re.findall(r"<tr>(.*?)</tr>", TRACE._repr_html_(), re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [
        ["site", "layers", "shape", "dtype"],
        ["input_ids", "", "[1, 3]", "int64"],
        ["mlp.up_proj", "0-2 and 5", "[1, 3, 20]", "float16"],
        ["mlp.up_proj", "7", "[1, 3, 20]", "float32"],
        ["lm_head", "", "[3, 11]", "float32"],
    ]
    assert "Trace of 6 arrays" in page.text
    assert "x" * 197 + "..." in page.text
    assert "x" * 198 not in page.text


def test_no_array_is_read(tmp_path):
    TRACE.save(tmp_path / "trace.safetensors")
    found = Trace.load(tmp_path / "trace.safetensors")

    def refuse():
        raise AssertionError("an array was read")

    stored = found.arrays.stored
    for name in stored:
        stored[name] = stored[name]._replace(read=refuse)
    assert len(Page(found._repr_html_()).values("class", "table")) == 1


def test_an_empty_trace():
    assert "Trace of 0 arrays" in Page(Trace({})._repr_html_()).text


@pytest.mark.parametrize(("count", "shown"), [(200, "x" * 200), (201, "x" * 197 + "...")])
def test_long_words_of_a_trace_are_cut(count, shown):
    trace = Trace({}, metadata={"prompt": "x" * count})
    assert re.search(r"x+(?:\.\.\.)?", Page(trace._repr_html_()).text)[0] == shown


def test_a_histogram_of_nothing_is_flat():
    assert heights([0, 0]) == [0.0, 0.0]
    assert heights([0, 3]) == [0.0, 1.0]
