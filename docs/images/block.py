"""Draw the block with all its switches for the tour: python docs/images/block.py

Boxes and lines are the sites and what they are computed from, as `llama_layers.verify.sites` has
them. A dashed box is a site that Llama does not have. Beside a box stand the fields of
`LlamaConfig` that change what is computed there. There is one picture for light pages and one for
dark ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from llama_layers import LlamaConfig
from llama_layers.layers.sites import Site
from llama_layers.verify import sites

# The switches, by what a site is or by what computes it.
AT = {
    "model.embed_tokens": ["embedding_multiplier", "embedding_multiplier_rounded"],
    "input_layernorm": ["norm_placement"],
    "self_attn.q_norm": ["qk_norm", "qk_norm_weight", "qk_norm_after_rope"],
    "self_attn.q_rope": [
        *("layer_rope_theta", "partial_rotary_factor"),
        *("sliding_rope_scaling", "llama_4_scaling_beta"),
    ],
    "self_attn.scores": ["attention_multiplier", "attn_logit_softcapping"],
    "self_attn.probabilities": ["attention_sinks"],
    "post_self_attn_layernorm": ["norm_placement"],
    "post_attention_layernorm": ["norm_placement"],
    "post_mlp_layernorm": ["norm_placement"],
    "residual": ["residual_multiplier"],
    "gate": ["hidden_act"],
    "norm": ["norm_weight_offset"],
    "logits": ["logits_scaling", "final_logit_softcapping"],
}
LLAMA = LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=8,
)
EVERYTHING = {"norm_placement": "both", "qk_norm": "head", "final_logit_softcapping": 1.0}
# From left to right, by how a name begins; the rest is in the middle.
LANES = {"q_": -1.0, "k_": 0.0, "v_": 1.0, "scores": -0.5, "probabilities": -0.5}
LANES |= {"gate_": -0.5, "up_": 0.5}
MIDDLE, LANE, ROW, HEIGHT, SKIP, WORDS, WIDTH = 270, 118, 42, 26, 62, 470, 800
# Page, text, boxes, their edges, and the names of switches.
SCHEMES = {
    "light": "#ffffff #1c1f24 #eef3f8 #5b7fa6 #a8430a",
    "dark": "#15181c #e8eaed #1f2b3a #6d95c2 #f4a950",
}


def main() -> None:
    """Draw the block for both kinds of pages."""
    for name, colours in SCHEMES.items():
        path = Path(__file__).with_name(f"block_{name}.svg")
        path.write_text(drawn(colours), encoding="utf-8")


def drawn(colours: str) -> str:
    """The block from top to bottom, as SVG."""
    ours = {site.role for site in sites(LLAMA)}
    found = {
        site.name: site for site in sites(replace(LLAMA, **EVERYTHING)) if site.role != "logprobs"
    }
    rows: dict[str, int] = {}
    for name, site in found.items():  # in the order of a forward pass
        rows[name] = 1 + max((rows[each] for each in site.routes[0]), default=-1)
    inside = [rows[name] for name, site in found.items() if site.layer is not None]
    parts = [_frame(min(inside), max(inside))]
    for name, site in found.items():
        for source in site.routes[0]:
            parts.append(_line(found[source], rows[source], site, rows[name]))
    fields: dict[int, dict[str, None]] = {}
    for name, site in found.items():
        parts.append(_box(site, rows[name], "" if site.role in ours else " switched"))
        told = [*AT.get(site.role, []), *AT.get(site.operation, [])]
        fields.setdefault(rows[name], {}).update(dict.fromkeys(told))
    for row, names in fields.items():
        parts += _words(names, row)
    height = _y(1 + max(rows.values()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12">'
        f"<style>{_style(colours)}</style>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="tip" d="M0 1 8 4 0 7z"/></marker></defs>'
        f"{''.join(parts)}</svg>\n"
    )


def _label(site: Site) -> str:
    label = site.role if site.layer is None else site.role.rpartition(".")[2]
    return f"+ {label}" if site.operation == "residual" else label


def _x(site: Site) -> int:
    label = _label(site)
    return MIDDLE + round(LANE * next((at for n, at in LANES.items() if label.startswith(n)), 0))


def _y(row: int) -> int:
    """The top of a row."""
    return 14 + ROW * row


def _half(site: Site) -> int:
    """Half the width of a box."""
    return 11 + round(3.65 * len(_label(site)))


def _box(site: Site, row: int, kind: str) -> str:
    half, top = _half(site), _y(row)
    corner = HEIGHT // 2 if site.operation == "residual" else 4
    return (
        f'<rect class="box{kind}" x="{_x(site) - half}" y="{top}" width="{2 * half}" '
        f'height="{HEIGHT}" rx="{corner}"/>'
        f'<text class="mid" x="{_x(site)}" y="{top + 17}">{_label(site)}</text>'
    )


def _line(source: Site, row: int, target: Site, to: int) -> str:
    """From a site to one that is computed from it: down, or around the sites between them."""
    start, end, bottom, top = _x(source), _x(target), _y(row) + HEIGHT, _y(to)
    side = top + HEIGHT // 2
    if to - row == 1:
        path = f"M{start} {bottom}V{(bottom + top) // 2}H{end}V{top}"
    elif start == end:
        left = end - _half(target)
        path = f"M{start} {bottom + 6}H{SKIP}V{side}H{left}"
    else:
        path = f"M{start} {bottom}V{side}H{end + _half(target)}"
    return f'<path class="line" marker-end="url(#tip)" d="{path}"/>'


def _words(fields: Iterable[str], row: int) -> Iterator[str]:
    """The names of switches, beside a row."""
    lines = wrap(", ".join(fields), width=46)
    top = _y(row) + 17 - 7 * (len(lines) - 1)
    for number, line in enumerate(lines):
        yield f'<text class="field" x="{WORDS}" y="{top + 14 * number}">{line}</text>'


def _frame(first: int, last: int) -> str:
    """A frame around the sites of a layer."""
    top, bottom = _y(first) - 12, _y(last) + HEIGHT + 5
    return (
        f'<rect class="frame" x="20" y="{top}" width="{WORDS - 32}" height="{bottom - top}" '
        f'rx="8"/><text class="dim end" x="{WORDS - 22}" y="{bottom - 10}">each layer</text>'
    )


def _style(colours: str) -> str:
    """The rules of a scheme."""
    page, text, box, edge, field = colours.split()
    return (
        f"svg {{ background: {page} }} text {{ fill: {text} }} .mid {{ text-anchor: middle }} "
        f".end {{ text-anchor: end }} "
        f".box {{ fill: {box}; stroke: {edge} }} .switched {{ stroke-dasharray: 4 3 }} "
        f".line {{ fill: none; stroke: {edge} }} .tip {{ fill: {edge} }} .dim {{ opacity: .75 }} "
        f".frame {{ fill: none; stroke: {edge}; opacity: .5 }} .field {{ fill: {field} }}"
    )


if __name__ == "__main__":
    main()
