"""Makes findings agree: no fix, alone or with others, may lead to a refusal or to another error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

from ddim.doctor.findings import Finding

__all__ = ["agree"]

Fix = Mapping[str, Any]
Look = Callable[[Fix], tuple[str | None, set[str]]]
"""A configuration with a fix: how sampling is refused, if it is, and the codes of its errors."""

_ORDER = ("error", "warning", "info")


def agree(findings: Sequence[Finding], look: Look, refusal: str | None) -> list[Finding]:
    """The findings, without what their fixes would break; ``refusal`` is how sampling without a fix
    is refused, if it is.

    The fix of a graver finding goes first. One that breaks something alone takes the keys of
    another along, if both together are right; else it is dropped, and the advice says why.
    """
    if not any(finding.fix for finding in findings):
        return list(findings)
    base = refusal, {finding.code for finding in findings if finding.severity == "error"}
    seen = dict[str, tuple[str | None, set[str]]]()

    def objection(fix: Fix) -> str:
        name = repr(sorted(fix.items()))
        if name not in seen:
            seen[name] = look(fix)
        refused, errors = seen[name]
        if refused not in (None, base[0]):
            return refused
        return f"it brings about {', '.join(sorted(errors - base[1]))}." if errors - base[1] else ""

    accepted: list[Fix] = []

    def objections(fix: Fix) -> str:
        subsets = chain.from_iterable(combinations(accepted, n) for n in range(len(accepted) + 1))
        together = (dict(chain(*(f.items() for f in (*subset, fix)))) for subset in subsets)
        return next(filter(None, map(objection, together)), "")

    result = {}
    for finding in sorted(findings, key=lambda finding: _ORDER.index(finding.severity)):
        result[finding.code] = finding
        if not finding.fix or finding.fix in accepted:
            continue
        if finding.retrain:  # of another network; what is known of this one does not count
            if look(finding.fix)[0] not in (None, base[0]):
                result[finding.code] = _without_fix(finding, "sampling would be refused.")
            continue
        reason = objections(finding.fix)
        for fix in (finding.fix, *({**other, **finding.fix} for other in accepted)):
            if not objections(fix):
                result[finding.code] = replace(finding, fix=dict(fix))
                accepted.append(fix)
                break
        else:
            result[finding.code] = _without_fix(finding, reason)
    return [result[finding.code] for finding in findings]


def _without_fix(finding: Finding, reason: str) -> Finding:
    keys = ", ".join(f"{key}={value!r}" for key, value in finding.fix.items())
    advice = f"{keys} is no fix here: {reason}"
    return replace(finding, fix={}, advice=f"{finding.advice} {advice}".strip())
