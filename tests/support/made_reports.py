"""Reports put together by hand."""

from __future__ import annotations

from dataclasses import replace

from llama_layers.verify import Element, Explanation, Judgement, Report, SiteResult, sites
from tests.support.random_models import GQA

CONFIG = replace(GQA, num_hidden_layers=4)
SITES = {site.name: site for site in sites(CONFIG) if not site.optional}
Q_ROPE = [f"model.layers.{i}.self_attn.q_rope" for i in range(4)]
K_ROPE = [f"model.layers.{i}.self_attn.k_rope" for i in range(4)]
INTERLEAVED = Explanation("RoPE layout interleaved", "It pairs 2i and 2i + 1.", 0.41)


def result(name, verdict="PASS", ratio=None, *, usual=None, **fields):
    """What a check found at a site whose inputs were recorded."""
    if ratio is None:
        ratio = {"FAIL": 300.0}.get(verdict, 0.25)
    made = SiteResult(
        site=SITES[name],
        verdict=verdict,
        shape=(1, 6, 16),
        dtype="float32",
        accumulate="float32",
        inputs=SITES[name].routes[0],
        judgement=Judgement(ratio, ratio if usual is None else usual, (0, 5, 3), 0, 96),
        difference=ratio * 1e-7,
        histogram=(3, 0, 0, 10, 83, 0, 0, 0, 0, 0),
        worst=(Element((0, 5, 3), 0.5, 0.25, 0.25 / ratio if ratio else 1.0),),
    )
    return replace(made, **fields)


def unjudged(name, verdict="SEEN", difference=2e-7, yardstick=1e-7, **fields):
    """What a check found at a site whose inputs were not recorded."""
    made = SiteResult(
        site=SITES[name],
        verdict=verdict,
        shape=(1, 6, 16),
        dtype="float32",
        accumulate="float32",
        inputs=("input_ids",),
        judgement=None,
        difference=difference,
        yardstick=yardstick,
        note="inputs were not recorded",
    )
    return replace(made, **fields)


def report(*changes, **fields):
    """A report of every site, all of which pass but those given."""
    changed = {change.site.name: change for change in changes}
    return Report(tuple(changed.get(name) or result(name) for name in SITES), **fields)


def interleaved(**fields):
    """A report of a port with the wrong layout of RoPE."""
    wrong = (result(name, "FAIL", explanations=(INTERLEAVED,)) for name in Q_ROPE + K_ROPE)
    return report(*wrong, **fields)
