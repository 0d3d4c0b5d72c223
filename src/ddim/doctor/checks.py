"""All questions of the doctor, each a small function that looks at a
:class:`ddim.doctor.findings.Case` and returns a :class:`ddim.doctor.findings.Finding` or None; its
figures come from :mod:`ddim.doctor.symptoms`. A new question comes with a test that plants it."""

from ddim.doctor.findings import Check
from ddim.doctor.level_checks import LEVEL_CHECKS
from ddim.doctor.option_checks import OPTION_CHECKS

__all__ = ["CHECKS"]

CHECKS: dict[str, Check] = dict(sorted({**LEVEL_CHECKS, **OPTION_CHECKS}.items()))
"""All checks by code."""
