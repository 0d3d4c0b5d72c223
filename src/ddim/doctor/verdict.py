"""The verdict in one sentence, and the findings that are no answer to a question of the doctor."""

from collections.abc import Mapping, Sequence
from typing import Any

from ddim.doctor.findings import ASKS, FAINT, GREY_LEVEL, Finding

__all__ = ["foreign_finding", "give_verdict", "refusal_finding"]


def foreign_finding(kind: str, reason: str) -> Finding:
    """The finding about a scheduler that no check applies to; ``reason`` ends a sentence."""
    return Finding(
        "warning",
        f"This is {reason}",
        "No other check applies to it.",
        {"scheduler": kind},
        code="DDIM018",
        reference="Lipman et al. 2023, arXiv 2210.02747; Karras et al. 2022, arXiv 2206.00364",
    )


def refusal_finding(reason: str) -> Finding:
    """The finding that this package refuses to sample, for a reason that no check tells."""
    return Finding(
        "error",
        f"ddim.DDIMScheduler refuses these steps: {reason}",
        "Sampling is refused.",
        {"refusal": reason},
        code="DDIM024",
        reference="`python -m pydoc ddim.scheduler`",
    )


def give_verdict(
    findings: Sequence[Finding],
    summary: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    changes: bool,
    other_spacing: bool = False,
) -> str:
    """One sentence for a person whose pictures are dark or grey.

    Args:
        findings: Of the configuration as it is.
        summary: Its figures; empty for a scheduler of another family.
        after: The figures with all fixes that need no training.
        changes: Whether there are such fixes, so that a line to paste follows.
        other_spacing: Whether the spacing is not the configuration's, and the fixes go back to it.
    """
    if not summary:
        return "The doctor cannot tell: this scheduler is not of DDIM's family (DDIM018)."
    line = "the line below" if changes else "the configuration's own spacing"
    mends = changes or other_spacing
    helps = f"{line} mends it" if mends else "see below what helps"
    errors = [f.code for f in findings if f.severity == "error"]
    ours = [f.code for f in findings if f.severity == "error" and not f.diffusers_only]
    if {"DDIM002", "DDIM007"} & set(ours):
        return f"Your pictures are noise, since sampling starts at a level without it; {helps}."
    if ours:
        return f"Your pictures are spoilt by a wrong configuration ({', '.join(ours)}); {helps}."
    bias, left = summary["brightness_bias"], after["brightness_bias"]
    if abs(bias) >= FAINT and any(f.code == "DDIM019" and f.fix for f in findings):
        return f"The weights were trained with another noise schedule (DDIM019); {helps}."
    if abs(bias) >= FAINT:
        return f"{_grey(bias)}; {_remedy(findings, bias, left, line if mends else None)}."
    if errors:
        what = f"Plain diffusers spoils your pictures ({', '.join(errors)})"
        return f"{what}, and ddim.DDIMScheduler does not; {helps}."
    warnings = [f.code for f in findings if f.severity == "warning"]
    fine = "The noise schedule and the sampler do not make your pictures dark or grey"
    if warnings:
        return f"{fine}, but something else costs quality ({', '.join(warnings)}); {helps}."
    return f"{fine}; look for the cause elsewhere, such as the prompt, the guidance or the VAE."


def _grey(bias: float) -> str:
    way = "dark comes out too bright" if bias > 0 else "bright comes out too dark"
    levels = round(abs(bias) * 127.5)
    return (
        f"What should be {way}, by about {levels} of 255 grey levels, and all pictures come out "
        "too grey and alike"
    )


def _remedy(findings: Sequence[Finding], bias: float, left: float, line: str | None) -> str:
    """What helps; ``line`` says what mends, or None where nothing does without training."""
    leak = next((f for f in findings if f.code == "DDIM001" and f.fix and f.retrain), None)
    training = "training with zero terminal SNR mends it (DDIM001)" if leak else ""
    if leak is not None and (unknown := leak.evidence["unknown_training"]):
        training += ", unless the weights were trained otherwise than the configuration says"
        training += f" ({ASKS})" if unknown == "unasked" else ""
    if line is not None and abs(left) < FAINT:
        return f"{line} mends it"
    if line is not None and abs(bias) - abs(left) >= GREY_LEVEL:
        rest = f"; {training.replace('mends it', 'mends the rest')}" if leak else ""
        return f"{line} brings that down to about {round(abs(left) * 127.5)}{rest}"
    return training or "no key of the configuration mends it"
