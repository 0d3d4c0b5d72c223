"""The lists of versions agree: the floors, what the oldest run installs, and what the tests use."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DEVELOPMENT = [Requirement(text) for text in PROJECT["dependency-groups"]["dev"]]
REQUIREMENTS = [
    *map(Requirement, PROJECT["project"]["dependencies"]),
    *(Requirement(text) for extra in EXTRAS.values() for text in extra),
    *DEVELOPMENT,
]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    lines = (line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    return {normal(name): Version(version) for name, version in lines}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_oldest_run_installs_the_floors_and_the_other_runs_something_allowed(requirement):
    (floor,) = requirement.specifier
    assert floor.operator == ">="
    assert pins("constraints-oldest.txt")[normal(requirement.name)] == Version(floor.version)
    assert pins("constraints.txt")[normal(requirement.name)] in requirement.specifier


def test_both_lists_of_development_tools_are_the_same():
    named = set((ROOT / "requirements-dev.txt").read_text().split())
    assert named == {"hatchling", *(requirement.name for requirement in DEVELOPMENT)}
