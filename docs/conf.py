"""The documentation site: ``make docs`` builds it into ``docs/_build/html`` and asks no host."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import ddim
from ddim.cli import COMMANDS, main

project = "ddim"
author = "the developers of ddim"
version = release = ddim.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = False  # the inventories of torch and diffusers lie on their hosts

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"ddim {release}"
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

# MathJax comes from a package of the registry, so that a page asks no other host. Its SVG output
# is one file, without fonts to fetch.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert _mathjax is not None
assert _mathjax.origin is not None
html_static_path = [str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js")]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


class Commands(SphinxDirective):
    """Inserts the help of every command, as the command prints it."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
        return [_section(name, f"{what[0].upper()}{what[1:]}.") for name, what in COMMANDS.items()]


def _section(name: str, sentence: str) -> nodes.Node:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([name, "--help"])
    title = nodes.title("", f"ddim {name}")
    block = nodes.literal_block(printed.getvalue(), printed.getvalue(), language="text")
    return nodes.section("", title, nodes.paragraph("", sentence), block, ids=[f"ddim-{name}"])


def _find_public(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Leads a name with its module, such as ``ddim.core.step.ddim_step``, to the public name."""
    parts = str(node.get("reftarget", "")).split(".")
    if node.get("refdomain") != "py" or parts[0] != "ddim":
        return None
    first = next((i for i, part in enumerate(parts) if i and part in ddim.__all__), None)
    if first is None:
        return None
    name = ".".join(["ddim", *parts[first:]])
    domain, document = env.get_domain("py"), node.get("refdoc", env.docname)
    found = domain.resolve_any_xref(env, document, app.builder, name, node, contnode)
    return found[0][1] if found else None


def setup(app: Sphinx) -> None:
    app.add_directive("commands", Commands)
    app.connect("missing-reference", _find_public)
