"""The documentation site: it builds without a warning, asks no other host, and leaves out nothing
that is public."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ddim
from ddim.cli import COMMANDS

ROOT = Path(__file__).parent.parent


WITHOUT_NETWORK = """
import socket, sys
def refuse(*_, **__):
    raise OSError("the build asks a host")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""
"""Builds the site where every host is out of reach: a page that is asked for is a warning."""


class Page(HTMLParser):
    """What a page loads, links to and can be linked at."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.anchors, self.text = [], [], set(), ""
        self.feed(path.read_text())

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(given["href"])
        elif tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", WITHOUT_NETWORK, "-W", "--keep-going", "-q", "-b", "html"]
    ran = subprocess.run(
        [*command, "-d", out / "doctrees", ROOT / "docs", out / "html"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_no_page_asks_another_host(site, pages):
    asked = {url for page in pages.values() for url in page.loaded if urlsplit(url).netloc}
    assert not asked
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?https?:", " ".join(styles))


def test_every_link_within_the_site_leads_somewhere(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            there = target.resolve().relative_to(site.resolve()).as_posix()
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in pages[there].anchors):
                dead.append(f"{name} -> {link}")
    assert not dead


def test_no_page_shows_why_the_tests_leave_out_a_block(pages):
    assert not [name for name, page in pages.items() if "not run:" in page.text]


def test_every_public_name_is_in_the_reference(pages):
    anchors = set().union(*(page.anchors for name, page in pages.items() if "/api/" in name))
    assert not [name for name in ddim.__all__ if f"ddim.{name}" not in anchors]
    for name in ("TextToImagePipeline.__call__", "TextToImagePipeline.encode"):
        assert f"ddim.{name}" in anchors
    assert {"ddim.UnconditionalPipeline.route", "ddim.DDIMScheduler.set_timesteps"} <= anchors


def test_values_have_their_own_words_and_none_is_taken_for_a_type(pages):
    """A value's words are else its type's, and what stands before a colon is taken for a type."""
    core, doctor = (pages[f"reference/api/{name}.html"].text for name in ("core", "doctor"))
    assert "The level of clean data" in core
    assert "Built-in immutable sequence" not in core
    assert "One sentence for a person whose pictures are dark: is it the sampler" in doctor


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("core", "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor"),
        ("core", "https://docs.python.org/3/library/functions.html#float"),
        ("pipelines", "https://docs.python.org/3/library/pathlib.html#pathlib.Path"),
        ("scheduler", "https://huggingface.co/docs/diffusers/api/schedulers/ddim"),
        (
            "pipelines",
            "https://huggingface.co/docs/diffusers/api/pipelines/stable_diffusion/text2img",
        ),
        ("pipelines", "https://docs.pytorch.org/docs/stable/generated/torch.Generator.html"),
    ],
)
def test_types_of_others_lead_to_their_pages(page, link, pages):
    assert link in pages[f"reference/api/{page}.html"].links


def test_every_command_is_in_the_reference(site, pages):
    assert {f"ddim-{name}" for name in COMMANDS} <= pages["reference/commands.html"].anchors
    assert "--guidance-rescale" in (site / "reference" / "commands.html").read_text()


def test_mathematics_comes_from_the_site_itself(site, pages):
    script = next(url for url in pages["explanation/eta.html"].loaded if "tex-svg" in url)
    assert (site / "explanation" / script.partition("?")[0]).resolve().is_file()
