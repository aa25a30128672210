"""Formulas as SVG pictures: no script, no font and no network is needed to read them."""

import html

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ziamath.config.svg2 = False  # whole paths: shared symbols would repeat their ids on a page
PIXELS = 17


def picture(latex: str, *, inline: bool) -> str:
    """A formula in the colour of the text around it, with its source for screen readers."""
    formula = ziamath.Latex(latex, size=PIXELS, color="currentColor", inline=inline)
    label = html.escape(" ".join(latex.split()), quote=True)
    attributes = f'role="img" aria-label="{label}" style="vertical-align: {formula.getyofst()}px"'
    return str(formula.svg()).replace("<svg ", f"<svg {attributes} ", 1)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula inside a line."""
    self.body.append(picture(node.astext(), inline=True))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    self.body.append(self.starttag(node, "div", CLASS="formula"))
    self.body.append(picture(node.astext(), inline=False) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("svg", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
