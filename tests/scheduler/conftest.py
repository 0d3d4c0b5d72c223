import pytest

import ddim.scheduling


@pytest.fixture
def said(monkeypatch):
    """The lines that the module logs, each at its first occurrence."""
    lines = []
    monkeypatch.setattr(ddim.scheduling, "_logged", set())
    monkeypatch.setattr(ddim.scheduling._logger, "warning", lines.append)
    return lines
