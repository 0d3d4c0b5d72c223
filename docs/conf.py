"""The documentation site: ``make docs`` builds it into ``docs/_build/html`` and asks no host."""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import ddim
from ddim.cli import COMMANDS, main

project = "ddim"
author = "the developers of ddim"
version = release = ddim.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True  # every name that a docstring leads to has its place
nitpick_ignore = [  # bases and types that have no page of their own
    ("py:class", "ddim.pipelines.coding.Coding"),
    ("py:class", "ddim.pipelines.text_codes.TextCodes"),
    ("py:class", "ddim.scheduler_base.GridScheduler"),
    ("py:class", "ddim.models.export._Converted"),
]

# The inventory lies in the repository, so that the build asks no host.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "inventories/python.inv")}

# The pages of those that offer no inventory to keep, by the name of the class or its module.
_TORCH = "https://docs.pytorch.org/docs/stable"
_HUB = "https://huggingface.co/docs"
_PAGES = {
    "torch.Tensor": f"{_TORCH}/tensors.html#torch.Tensor",
    "torch.device": f"{_TORCH}/tensor_attributes.html#torch.device",
    "torch.dtype": f"{_TORCH}/tensor_attributes.html#torch.dtype",
    "torch._C.Generator": f"{_TORCH}/generated/torch.Generator.html",
    "torch.nn.modules.module.Module": f"{_TORCH}/generated/torch.nn.Module.html",
    "diffusers.pipelines.pipeline_utils": f"{_HUB}/diffusers/api/pipelines/overview",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": (
        f"{_HUB}/diffusers/api/pipelines/stable_diffusion/text2img"
    ),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img": (
        f"{_HUB}/diffusers/api/pipelines/stable_diffusion/img2img"
    ),
    "diffusers.schedulers.scheduling_ddim": f"{_HUB}/diffusers/api/schedulers/ddim",
    "diffusers.schedulers.scheduling_ddim_inverse": f"{_HUB}/diffusers/api/schedulers/ddim_inverse",
    "transformers.models.clip.modeling_clip": f"{_HUB}/transformers/model_doc/clip",
    "transformers.models.clip.image_processing_pil_clip": f"{_HUB}/transformers/model_doc/clip",
}

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
    """Leads a name with its module, such as ``ddim.core.step.ddim_step``, to the public name, and
    the short name of a neighbour to it."""
    target, domain = str(node.get("reftarget", "")), env.get_domain("py")
    parts = target.split(".")
    if node.get("refdomain") != "py":
        return None
    if parts[0] == "ddim":
        first = next((i for i, part in enumerate(parts) if i and part in ddim.__all__), None)
        if first is None:
            return None
        name = ".".join(["ddim", *parts[first:]])
    else:  # a neighbour in the module, which is listed under the package
        ends = [known for known in domain.objects if known.endswith(f".{target}")]
        if len(ends) != 1:
            return None
        name = ends[0]
    document = node.get("refdoc", env.docname)
    found = domain.resolve_any_xref(env, document, app.builder, name, node, contnode)
    return found[0][1] if found else None


def _find_page(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Leads a class of torch, diffusers or transformers to its page there."""
    name = str(node.get("reftarget", ""))
    module = name.rpartition(".")[0]
    if (page := _PAGES.get(name) or _PAGES.get(module)) is None:
        return None
    link = nodes.reference("", "", internal=False, refuri=page, reftitle=name)
    link += contnode
    return link


_kept: dict[str, list[str]] = {}


def _keep_property(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """Keeps the docstring of a property or a value from napoleon, which takes what stands before
    its first colon for a type."""
    if what in ("attribute", "data", "property"):
        _kept[name] = list(lines)


def _give_property(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    lines[:] = _kept.pop(name, lines)
    if what == "data" and name.removeprefix("ddim.") in ddim.__all__:
        lines[:] = _value_lines(name.removeprefix("ddim."))


def _value_lines(name: str) -> list[str]:
    """What stands under a public value in its module, since a value has no docstring itself."""
    for home in [key for key in sys.modules if key.startswith("ddim.")]:
        if name in getattr(sys.modules[home], "__all__", ()):
            found = ModuleAnalyzer.for_module(home)
            found.analyze()
            return found.attr_docs["", name]
    raise LookupError(f"no module lists {name}")


def _skip_foreign(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out what a class has of diffusers, which has pages of its own."""
    home = getattr(getattr(obj, "fget", obj), "__module__", None)
    return True if isinstance(home, str) and home.split(".")[0] == "diffusers" else None


def setup(app: Sphinx) -> None:
    app.add_directive("commands", Commands)
    app.connect("autodoc-process-docstring", _keep_property, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", _give_property, priority=600)
    app.connect("autodoc-skip-member", _skip_foreign)
    app.connect("missing-reference", _find_public)
    app.connect("missing-reference", _find_page)
