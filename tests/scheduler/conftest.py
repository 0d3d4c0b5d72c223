import pytest

import ddim.scheduler_base


@pytest.fixture
def said(monkeypatch):
    """The lines that the module logs, each at its first occurrence."""
    lines = []
    monkeypatch.setattr(ddim.scheduler_base, "_logged", set())
    monkeypatch.setattr(ddim.scheduler_base._logger, "warning", lines.append)
    return lines
