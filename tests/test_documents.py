"""What the documents name is there: files, tests, modules, records of decisions."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
RECORDS = sorted(DECISIONS.glob("0*.md"))
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *DECISIONS.glob("*.md")]
HISTORY = "CHANGELOG.md"
"""Names what is no longer there."""

PATH = re.compile(
    r"(?<![\w/.-])((?:src|tests|docs|examples|recipes|studies|benchmarks)/[\w/.-]+\.\w+)"
    r"(?:::(\w+))?"
)
MODULE = re.compile(r"`(ddim\.[a-z_]+\.[\w.]+)`")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_tests_and_modules_that_a_document_names_exist(path):
    if path.name == HISTORY:
        pytest.skip("names what was there before")
    text = path.read_text()
    for file, test in PATH.findall(text):
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    for name in MODULE.findall(text):
        parts = name.split(".")
        found = importlib.import_module(".".join(parts[:2]))
        for part in parts[2:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_the_decisions_are_listed_with_their_titles():
    listed = " ".join((DECISIONS / "README.md").read_text().split())
    for path in RECORDS:
        title = path.read_text().splitlines()[0].removeprefix("# ")
        assert f"[{path.name[:4]}]({path.name}) {title}" in listed
    assert [path.name[:4] for path in RECORDS] == [f"{n + 1:04d}" for n in range(len(RECORDS))]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name[:4])
def test_a_decision_says_its_context_and_its_consequence(path):
    lines = path.read_text().splitlines()
    starts = [line.split(":")[0] for line in lines if re.match(r"[A-Z]\w+: ", line)]
    assert starts == ["Context", "Decision", "Consequence"]
    assert max(map(len, lines)) <= 100


def test_the_readme_is_a_page_that_a_person_reads():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
