"""How Sphinx builds these pages."""

import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "llama_layers"
author = "The llama_layers developers"
copyright = "2026, The llama_layers developers"
version = release = metadata.version("llama-layers")

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "svg_math",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"

# Pages run at build time, from the top, and an error in one fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections carry shapes and dtypes, which hints cannot
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
# Public functions and classes are documented in full, or the build fails; pyproject.toml says what
# is not asked for.
_pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
numpydoc_validation_checks = set(_pyproject["tool"]["numpydoc_validation"]["checks"])
# The fields of dataclasses are their parameters; those of named tuples have their own docstrings.
numpydoc_validation_overrides = {"PR01": [r"Attributes\n---"]}
# Methods: `numpydoc lint`.
numpydoc_validation_exclude = {r"\.(QKV|Output|Step)$", r"\.[A-Z]\w*\.\w+$"}

# Formulas become SVG when the pages are built: reading them needs no script and no network.
html_math_renderer = "svg"
html_theme = "pydata_sphinx_theme"
html_title = "llama_layers"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_sidebars = {"*": []}  # pages at the top have no siblings to show
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

# Every public name is in the reference, or the build fails.
_listed = set(Path(__file__).with_name("reference").joinpath("index.md").read_text().split())
for _module in ("", ".checkpoint", ".verify", ".verify.recorders", ".testing"):
    _missing = set(import_module(f"llama_layers{_module}").__all__) - _listed
    if _missing:
        raise RuntimeError(f"docs/reference/index.md: add {', '.join(sorted(_missing))}")
