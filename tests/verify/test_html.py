"""A report's page: whole, safe to open, and readable in light and dark."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from llama_layers.verify import (
    Comparison,
    Explanation,
    Report,
    SiteDifference,
    to_html,
    write_html,
)
from llama_layers.verify.report import EDGES
from tests.support.made_reports import (
    INTERLEAVED,
    K_ROPE,
    Q_ROPE,
    SITES,
    interleaved,
    report,
    result,
    unjudged,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "<script>alert('1')</script>\"&'<img src=x>"


class Page(HTMLParser):
    """What is in a page; an AssertionError where a tag is not closed as it was opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = Counter(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def values(self, name, tag=None):
        return [v for t, n, v in self.attributes if n == name and tag in (None, t)]


APART = SiteDifference(
    SITES[Q_ROPE[1]], ("float32", "float32"), 0.5, ("model.layers.1.self_attn.q_proj",), 1e-7, 6e-8
)
REPORTS = {
    "fails": interleaved(metadata={"engine": "mine", "config": '{"vocab_size": 13}'}),
    "warns": report(result("lm_head", "WARN", 1.5, note="rounds as A does")),
    "passes": report(seconds=1.5, weights="bfloat16"),
    "differs": report(unjudged("model.norm"), unjudged("lm_head", "DIFFERS", 0.5)),
    "infinite": report(result(Q_ROPE[1], "FAIL", float("inf"))),
    "unknown": Report((unjudged("lm_head", difference=float("nan")),)),
    "empty": Report(()),
    "diverges": Comparison((APART, replace(APART, site=SITES[K_ROPE[1]]))),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_well_formed(kind):
    text = to_html(REPORTS[kind])
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.tags["html"] == page.tags["head"] == page.tags["body"] == page.tags["h1"] == 1
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.values("href")} <= set(ids)


@pytest.mark.parametrize("kind", REPORTS)
def test_nothing_is_loaded_or_run(kind):
    text = to_html(REPORTS[kind])
    page = Page(text)
    assert "//" not in re.sub(r"<dd>.*?</dd>", "", text)
    assert not re.search(r"url\(|@import|javascript:", text)
    assert not {"script", "link", "img", "iframe", "object"} & page.tags.keys()
    assert not page.values("src")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in page.values("content", "meta")[-1]


def test_strings_are_escaped():
    evil = Explanation(EVIL, EVIL, 0.5)
    made = report(
        result(Q_ROPE[0], "FAIL", explanations=(evil,)),
        result("lm_head", "WARN", note=EVIL, dtype=EVIL),
        metadata={EVIL: EVIL, "config": f'{{"a": "{EVIL}"'},
        missing=(EVIL,),
        weights=EVIL,
        profile=EVIL,
    )
    page = Page(to_html(made))
    assert not {"script", "img"} & page.tags.keys()
    assert page.text.count(EVIL) >= 8


def test_control_characters_of_metadata_are_written_out():
    odd = "a\x1b[31m\u202eb\x00"
    page = to_html(report(metadata={odd: odd, "config": "{" + odd}))
    found = Page(page)
    assert found.texts.count("a\\x1b[31m\\u202eb\\x00") == 2
    assert "".join(page.split("\n")).isprintable()


def test_the_verdict_and_the_cause_come_first():
    text = Page(to_html(REPORTS["fails"])).text
    places = [
        text.index(said)
        for said in (
            "FAIL",
            "first at model.layers.0.self_attn.q_rope: error 3e+02 times what rounding allows",
            "Likely cause: RoPE layout interleaved",
            INTERLEAVED.detail,
            "self_attn.q_rope in layers 0-3, self_attn.k_rope in layers 0-3",
            "Its worst elements",
            "Error over limit, by site and layer",
            "How errors are spread",
            "All sites",
            "vocab_size",
        )
    ]
    assert places == sorted(places)


def test_a_comparison_is_a_page_too():
    text = Page(to_html(REPORTS["diverges"])).text
    assert "first at model.layers.1.self_attn.q_rope: difference 0.5, 3.1e+06 times" in text
    assert "2 sites are suspect: self_attn.q_rope in layer 1, self_attn.k_rope in layer 1." in text
    assert "Computed in float32." in text


def cells(made):
    """The cells of the map by site: class, and the mark that can be seen."""
    text = to_html(made)
    table = text[text.index('<table class="map">') :]
    found = re.findall(
        r'<td class="(\w+)" title="([\w.]+): ([^"]+)"[^>]*>(?:<a href="[^"]*">)?(.?)<',
        table[: table.index("</table>")],
    )
    return {site: (shade, said, mark) for shade, site, said, mark in found}


def test_the_map_shows_every_site():
    made = report(
        result(Q_ROPE[2], "FAIL", 300.0),
        result(K_ROPE[1], "WARN", 0.5),
        unjudged("model.norm"),
        unjudged("lm_head", "DIFFERS", 0.5),
    )
    found = cells(made)
    assert found.keys() == SITES.keys()
    assert found[Q_ROPE[1]] == ("b4", "PASS, error/limit 0.25 at [0, 5, 3]", "")
    assert found[Q_ROPE[2]] == ("b7", "FAIL, error/limit 3e+02 at [0, 5, 3]", "\u00d7")
    assert found[K_ROPE[1]] == ("b4", "WARN, error/limit 0.5 at [0, 5, 3]", "!")
    assert found["model.norm"] == ("unjudged", "SEEN, difference 2e-07", "\u25cb")
    assert found["lm_head"] == ("unjudged", "DIFFERS, difference 0.5", "\u2260")


def test_the_map_leaves_room_for_what_was_not_recorded():
    made = report()
    made = replace(made, results=tuple(r for r in made.results if r.site.name != Q_ROPE[2]))
    rows = re.findall(r"<tr><th scope=\"row\">self_attn.q_rope</th>(.*?)</tr>", to_html(made), re.S)
    assert [c == "none" for c in re.findall(r'<td class="(\w+)"', rows[0])] == [
        *(False, False, True, False)
    ]


def test_histograms_are_of_all_layers():
    made = report(result(Q_ROPE[2], "FAIL", histogram=(0, 0, 0, 0, 90, 0, 0, 6, 0, 0)))
    labels = Page(to_html(made)).values("aria-label", "svg")
    assert labels.count("12, 0, 0, 40, 332, 0, 0, 0, 0, 0 elements") == 14
    assert labels.count("9, 0, 0, 30, 339, 0, 0, 6, 0, 0 elements") == 1


def test_bars_are_as_high_as_the_logarithms_of_their_counts():
    bars = re.search(r'elements">(<rect.*?)<line', to_html(report()), re.S)
    heights = re.findall(r'height="(.*?)"', bars[1])
    logs = [math.log1p(count) for count in (3, 0, 0, 10, 83, 0, 0, 0, 0, 0)]
    assert heights == [f"{34 * log / max(logs):.1f}" for log in logs]


def test_bins_are_labelled_with_their_upper_edges():
    legend = re.search(r'<div class="legend"><span>(.*?)</span></div>', to_html(report()), re.S)
    labels = re.findall(r'<span class="b b\d">(.*?)</span>', legend[1])
    edges = ["0.001", "0.01", "0.1", "1", "10", "100", "1000", "10000"]
    assert labels == ["0", *(f"\u2264 {edge}" for edge in edges), "&gt; 10000"]


def contrast(first, second):
    """The contrast ratio of WCAG 2.2 between two colours such as #1c1f24."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def colours():
    """The colours of the light and of the dark scheme, by the name of their variable."""
    style = re.search("<style>(.*?)</style>", to_html(Report(())), re.S)[1]
    light, dark = style.split("prefers-color-scheme: dark")
    return {
        name: dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part))
        for name, part in (("light", light), ("dark", dark))
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    found = colours()[scheme]
    assert len(found) == 5 + 2 * (len(EDGES) + 1)
    for i in range(len(EDGES) + 1):
        assert contrast(found[f"b{i}"], found[f"t{i}"]) >= 4.5, i
    for colour in ("text", "dim"):
        assert contrast(found[colour], found["page"]) >= 4.5
        assert contrast(found[colour], found["panel"]) >= 4.5


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{path} exists"):
        write_html(REPORTS["fails"], path)
    assert path.read_text() == "mine"
    write_html(REPORTS["fails"], path, force=True)
    assert path.read_text(encoding="utf-8") == to_html(REPORTS["fails"])
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="to be an existing directory"):
        write_html(REPORTS["fails"], tmp_path / "none" / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Run headless Chromium on a page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs chromium")
    home = tmp_path_factory.mktemp("chromium")
    path = home / "report.html"
    write_html(REPORTS["fails"], path)

    def run(*options):
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={home / 'profile'}", *options, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    return run


def test_a_browser_keeps_every_part(browser):
    shown = Page(browser("--dump-dom").stdout)
    written = Page(to_html(REPORTS["fails"]))
    assert shown.tags == written.tags


@pytest.mark.parametrize(("scheme", "setting"), [("light", "1"), ("dark", "0")])
def test_a_browser_paints_the_scheme(browser, tmp_path, scheme, setting):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    picture = tmp_path / "picture.png"
    browser(
        f"--blink-settings=preferredColorScheme={setting}",
        *("--window-size=900,1400", f"--screenshot={picture}"),
    )
    pixels = np.round(image.imread(picture)[..., :3] * 255).astype(int).reshape(-1, 3)
    painted = Counter(map(tuple, pixels[::7].tolist()))
    expected = colours()[scheme]

    def share(name):
        return painted[tuple(int(expected[name][i : i + 2], 16) for i in (1, 3, 5))]

    assert share("page") > 0.4 * painted.total()
    assert share("panel") > 0.1 * painted.total()
    assert share("b7") > 0.001 * painted.total()  # the cells of q_rope and k_rope, which fail
