"""Draw the map of a report for the README, and print the report: python docs/images/map.py

The port is our own forward pass of SmolLM2 135M with one mistake: in layer 17 it rotates pairs of
neighbouring channels of the queries (RoPE layout interleaved). There is one picture for light pages
and one for dark ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_layers import Report, Trace, apply_rope, check, forward, load, rope_table

TEXT = "The capital of France is Paris, and its river is the"
WRONG = "model.layers.17.self_attn.q_"
CELL, LEFT, TOP = 20, 196, 30
# Error over limit, and the colours that a report has for it: up to 1 blue, beyond it orange.
BINS = ((0.01, "≤ 0.01"), (0.1, "≤ 0.1"), (1.0, "≤ 1"), (np.inf, "> 1: FAIL"))
# Page and text come first.
SCHEMES = {
    "light": "#ffffff #1c1f24 #d6e5f3 #b3d0ea #6aa1d1 #c2570f",
    "dark": "#15181c #e8eaed #1f344b #2d5a87 #4d86c0 #f4a950",
}


def main() -> None:
    """Check a port with one mistake, and draw what was found."""
    model = load("smollm2-135m")
    ids = np.array([model.tokenizer.encode(TEXT)])
    report = check(Trace(port(model, ids), input_ids=ids), model)
    for name, colours in SCHEMES.items():
        path = Path(__file__).with_name(f"map_{name}.svg")
        path.write_text(drawn(report, colours), encoding="utf-8")
    print(report)


def port(model: Any, ids: Any) -> dict[str, Any]:
    """The activations of a forward pass that is wrong in one place."""
    arrays: dict[str, Any] = {}
    cos, sin = rope_table(np.arange(ids.shape[1]), model.config, like=np.zeros(1, np.float32))

    def tap(name: str, array: Any) -> Any:
        if name == f"{WRONG}rope":
            q = arrays[f"{WRONG}proj"].reshape(array.shape)
            array = apply_rope(q, cos, sin, layout="interleaved")
        arrays[name] = np.array(array)
        return array

    forward(model, ids, tap=tap)
    return arrays


def drawn(report: Report, colours: str) -> str:
    """Layers across, sites down, the error over its limit as the colour, as SVG."""
    found = [result for result in report.results if result.site.layer is not None]
    roles = list(dict.fromkeys(result.site.role for result in found))
    layers = 1 + max(result.site.layer for result in found)
    parts = [
        f'<text class="dim end" x="{LEFT - 10}" y="{TOP - 8}">layer</text>',
        *(
            f'<text class="dim mid" x="{x(layer) + 9}" y="{TOP - 8}">{layer}</text>'
            for layer in range(layers)
        ),
        *(
            f'<text class="end" x="{LEFT - 10}" y="{TOP + CELL * row + 14}">{role}</text>'
            for row, role in enumerate(roles)
        ),
    ]
    for result in found:
        top = TOP + CELL * roles.index(result.site.role)
        ratio = result.judgement.ratio
        bin_ = next(i for i, (edge, _) in enumerate(BINS) if ratio <= edge)
        place = f'x="{x(result.site.layer)}" y="{top}"'
        parts.append(f'<rect class="b{bin_}" {place} width="{CELL - 1}" height="{CELL - 1}"/>')
        if result.verdict == "FAIL":
            at = f'x="{x(result.site.layer) + 9}" y="{top + 15}"'
            parts.append(f'<text class="mark mid" {at}>&#215;</text>')
    bottom = TOP + CELL * len(roles) + 14
    for i, (_, label) in enumerate(BINS):
        at = LEFT + 110 + 110 * i
        parts.append(f'<rect class="b{i}" x="{at}" y="{bottom}" width="19" height="19"/>')
        parts.append(f'<text x="{at + 26}" y="{bottom + 14}">{label}</text>')
    parts.append(f'<text class="dim" x="{LEFT}" y="{bottom + 14}">error / limit</text>')
    size = f"{LEFT + CELL * layers + 10} {bottom + 30}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12">'
        f"<style>{style(colours)}</style>{''.join(parts)}</svg>\n"
    )


def x(layer: int) -> int:
    """The left edge of a layer's cells."""
    return LEFT + CELL * layer


def style(colours: str) -> str:
    """The rules of a scheme."""
    page, text, *bins = colours.split()
    rules = [
        f"text {{ fill: {text} }} .dim {{ opacity: .7 }} .mid {{ text-anchor: middle }}",
        f".end {{ text-anchor: end }} .mark {{ fill: {page}; font: bold 16px sans-serif }}",
        *(f".b{i} {{ fill: {colour} }}" for i, colour in enumerate(bins)),
    ]
    return " ".join(rules)


if __name__ == "__main__":
    main()
