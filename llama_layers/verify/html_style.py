"""The looks of a report's page.

Errors within the limit are blue, those beyond it orange, which people who tell few colours apart
still tell from each other; the verdict of a site is written in its cell besides. In the light
scheme larger is darker, in the dark one lighter.
"""

from __future__ import annotations

# Background and text for each bin of the histograms: five up to the limit, five beyond it.
LIGHT = (
    "#eef3f9/#1c1f24 #d6e5f3/#1c1f24 #b3d0ea/#1c1f24 #8ab7de/#1c1f24 #6aa1d1/#1c1f24 "
    "#fbcb8b/#1c1f24 #f2a254/#1c1f24 #de7a2c/#1c1f24 #a9470c/#ffffff #742a05/#ffffff"
)
DARK = (
    "#1a2431/#e8eaed #1f344b/#e8eaed #25476a/#e8eaed #2d5a87/#e8eaed #3a6ea3/#ffffff "
    "#6e4310/#ffffff #94580f/#ffffff #d98324/#15181c #f4a950/#15181c #ffd9a3/#15181c"
)
# What the other colours of a scheme are: page, panels, lines, text, and less important text.
LIGHT_PAGE = "#ffffff #f5f6f8 #d5d9df #1c1f24 #565d68"
DARK_PAGE = "#15181c #1f242b #3a414b #e8eaed #a8b0bb"


def _variables(bins: str, page: str) -> str:
    names = ("page", "panel", "line", "text", "dim")
    colours = dict(zip(names, page.split(), strict=True))
    for i, pair in enumerate(bins.split()):
        colours[f"b{i}"], colours[f"t{i}"] = pair.split("/")
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_BINS = "\n".join(
    f".b{i} {{ background: var(--b{i}); color: var(--t{i}); fill: var(--b{i}); }}"
    for i in range(len(LIGHT.split()))
)

STYLE = f"""
:root {{ color-scheme: light; {_variables(LIGHT, LIGHT_PAGE)} }}
@media screen and (prefers-color-scheme: dark) {{
:root {{ color-scheme: dark; {_variables(DARK, DARK_PAGE)} }}
}}
* {{ box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
body {{ margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 0.95rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.35rem; line-height: 1.4; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 0.6rem; }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 0.4rem; overflow-wrap: anywhere; }}
p {{ margin: 0.4rem 0; max-width: 48rem; }}
code, .num {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: 0.88em; }}
.dim, th {{ color: var(--dim); }}
.panel {{ background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.8rem 1rem; margin: 0.8rem 0; }}
.panel > :first-child {{ margin-top: 0; }}
.badge {{ display: inline-block; padding: 0 0.5em; border: 2px solid currentColor;
  border-radius: 4px; font-weight: 700; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; text-align: left; }}
th, td {{ padding: 0.18rem 0.7rem 0.18rem 0; vertical-align: middle; }}
.lines td, .lines th {{ border-bottom: 1px solid var(--line); }}
.num {{ white-space: nowrap; }}
.right {{ text-align: right; }}
.map {{ border-collapse: separate; border-spacing: 1px; font-size: 0.8rem; line-height: 1; }}
.map th {{ padding: 0 0.6rem 0 0; white-space: nowrap; font-weight: 400; color: var(--text);
  position: sticky; left: 0; background: var(--page); }}
.map thead th {{ padding: 0 0 0.2rem; text-align: center; color: var(--dim); position: static; }}
.map td {{ min-width: 1.35rem; height: 1.35rem; padding: 0; text-align: center;
  font-weight: 700; }}
.map td.none {{ border: 1px dashed var(--line); }}
.map .b0 {{ outline: 1px solid var(--line); outline-offset: -1px; }}
.map a {{ color: inherit; text-decoration: none; display: block; }}
.unjudged {{ background: var(--panel); color: var(--text); outline: 1px solid var(--line);
  outline-offset: -1px; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; font-size: 0.85rem;
  align-items: center; margin: 0.6rem 0; }}
.legend span.b {{ display: inline-block; padding: 0.1rem 0.45rem; }}
svg text {{ fill: var(--dim); font-size: 9px; }}
svg .limit {{ stroke: var(--text); stroke-dasharray: 2 2; }}
svg .bar {{ stroke: var(--dim); stroke-width: 0.5; }}
details {{ margin: 0.3rem 0; }}
summary {{ cursor: pointer; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0; }}
dt {{ color: var(--dim); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
h2, h3, summary {{ break-after: avoid; }}
tr, svg {{ break-inside: avoid; }}
{_BINS}
""".strip()
