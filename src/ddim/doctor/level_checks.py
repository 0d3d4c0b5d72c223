"""The doctor's questions about the levels: how the schedule ends, and which of them are visited."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddim.core.schedule import CLEAN
from ddim.core.timesteps import check_timesteps, select_timesteps, step_pairs
from ddim.doctor.findings import (
    ASKS,
    DATA,
    DATA_NAME,
    GREY_LEVEL,
    LIN,
    NEIGHBOURS,
    SONG,
    Case,
    Check,
    Finding,
    ModelFacts,
    grade,
    made_of_data,
    register,
)
from ddim.doctor.symptoms import MOST_COUNTS, stock_flaws, stock_pairs, stock_timesteps
from ddim.errors import DDIMError

__all__ = ["LEVEL_CHECKS"]

LEVEL_CHECKS: dict[str, Check] = {}
check = register(LEVEL_CHECKS)


@check("DDIM001", f"{LIN}, Sec. 3.1")
def _terminal_snr(case: Case) -> Finding | None:
    """The last level keeps signal: its SNR is above zero."""
    if case.terminal == 0:
        return None
    severity, numbers = case.leak(case.last)
    message = (
        f"The terminal SNR is {numbers['snr']:.4g}, not 0: level {case.last} keeps "
        f"{numbers['sqrt_alpha_bar']:.4g} of the image (sqrt of alpha-bar)."
    )
    effect = (
        "The network reads the noise's mean colour as the image's: brightness is off by "
        f"{numbers['brightness_bias']:+.3f}, and its spread between images is "
        f"{numbers['brightness_spread']:.3f} of what it should be."
    )
    trained = case.training_schedule
    if trained is not None and float(trained.alpha_bar(len(trained) - 1)) == 0:
        effect = "The network was trained on pure noise there, and knows these levels as others."
        return Finding(severity, message, effect, numbers, advice="DDIM019 says what mends it.")
    fix: dict[str, Any] = {"rescale_betas_zero_snr": True}
    if case.config["prediction_type"] == "epsilon":
        fix["prediction_type"] = "v_prediction"
    if severity == "info":
        advice, fix = "This is too little to be seen.", {}
    else:
        numbers["unknown_training"] = unknown = _unknown_training(case)
        advice = _against_a_leak(case.model, fix)
        if unknown:
            keys = ", ".join(f"{key}={value!r}" for key, value in fix.items())
            advice += (
                " No record says how the weights were trained: if with zero terminal SNR, set "
                f"{keys} and train nothing"
            )
            advice += f"; {ASKS}." if unknown == "unasked" else "."
    return Finding(severity, message, effect, numbers, fix, retrain=True, advice=advice)


def _unknown_training(case: Case) -> str | None:
    """``unasked`` or ``undecided`` where the weights may have been trained with zero terminal SNR,
    for all that is known."""
    if case.training is not None:
        return None
    if case.probe is None:
        return "unasked"
    is_told = case.probe.zero_terminal_snr is not None or case.probed == "epsilon"
    return None if is_told else "undecided"


def _against_a_leak(model: ModelFacts, fix: Mapping[str, Any]) -> str:
    """Advice: train a model of text or latents; start any other from a prior of pixels."""
    if model.latent or model.guided:
        kind = " --prediction-type v_prediction" if "prediction_type" in fix else ""
        command = f"ddim train --base MODEL --data CAPTIONED{kind} --rescale-betas-zero-snr"
        return f"In Stable Diffusion's format: {command}."
    where = "" if model.guided is False else ", for a model of pixels and without text"
    what = "ddim sample --prior data, which starts from noise that holds the data's mean colour"
    return f"Without training{where}: {what}."


@check("DDIM002", f"{LIN}, Sec. 3.3")
def _first_level(case: Case) -> Finding | None:
    """The first visited level is not T-1."""
    first = case.levels[0]
    if first == case.last:
        return None
    severity, numbers = case.leak(first)
    message = (
        f"{case.steps} steps start at level {first}, not at {case.last}: SNR {numbers['snr']:.4g} "
        f"instead of {float(case.schedule.snr(case.last)):.4g}."
    )
    evidence = {"steps": case.steps, **numbers}
    fix, advice = _trailing(case, numbers)
    if case.custom:
        fix, advice = {}, f"Begin the list with {case.last}."
    effect = (
        f"The network takes pure noise for level {first}: brightness is off by "
        f"{numbers['brightness_bias']:+.3f}, and its spread is "
        f"{numbers['brightness_spread']:.3f} of what it should be."
    )
    if severity == "error":
        effect = (
            "The network is given noise as an image and returns most of it: the images are noise."
        )
    return Finding(severity, message, effect, evidence, fix, advice=advice)


def _trailing(case: Case, numbers: Mapping[str, float]) -> tuple[dict[str, Any], str]:
    """Trailing as the fix of a start below T-1, and what it leaves; no fix if that is as much."""
    bias, spread = (case.leak(case.last)[1][f"brightness_{name}"] for name in ("bias", "spread"))
    gains = (
        abs(numbers["brightness_bias"]) - abs(bias),
        abs(numbers["brightness_spread"] - 1) - abs(spread - 1),
    )
    if numbers["snr"] > 1 or max(gains) >= GREY_LEVEL:
        left = f"From level {case.last}, brightness is off by {bias:+.3f}."
        return {"timestep_spacing": "trailing"}, left if abs(bias) >= GREY_LEVEL else ""
    return {}, f"Trailing starts at {case.last}, and changes nothing that can be seen."


@check("DDIM003", f"{SONG}, App. D.2")
def _bad_list(case: Case) -> Finding | None:
    """Levels are repeated, missing, out of order or outside [0, T)."""
    if case.custom is not None:
        return _bad_custom_list(case, case.custom)
    outside = [t for t in case.stock or [] if t > case.last]
    if not outside:
        return None
    return Finding(
        "error",
        f"In plain diffusers, {case.steps} steps visit level {outside[0]}, which does not exist: "
        f"it adds steps_offset to the last level, {case.last}.",
        "It stops with an IndexError there.",
        {"steps": case.steps, "outside": outside},
        {"timestep_spacing": "trailing"},
        advice="ddim.DDIMScheduler leaves the offset out there.",
        diffusers_only=True,
    )


def _bad_custom_list(case: Case, custom: Sequence[int]) -> Finding | None:
    try:
        check_timesteps(custom, len(case.schedule))
    except DDIMError as error:
        message = f"The list of timesteps cannot be sampled: {error}"
        return Finding("error", message, "Sampling is refused.", {"timesteps": list(custom)})
    if case.asked in (None, len(custom)):
        return None
    return Finding(
        "error",
        f"{case.asked} steps were asked for, but the list of timesteps has {len(custom)}.",
        "Sampling visits fewer or more levels than were asked for.",
        {"steps": case.asked, "timesteps": len(custom)},
        advice="Give the list alone.",
    )


@check("DDIM004", NEIGHBOURS)
def _off_the_grid(case: Case) -> Finding | None:
    """Plain diffusers steps off its own list of levels."""
    ours, theirs = step_pairs(case.levels), case.stock_pairs
    off = len(set(theirs) - set(ours))
    if case.custom is not None or case.stock is None or not off:
        return None
    (their_mean, their_std), (mean, std) = (made_of_data(case, pairs) for pairs in (theirs, ours))
    error, total = math.hypot(their_mean - mean, their_std - std), len(case.schedule)
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below = max((n for n in divisors if n <= case.steps), default=1)
    above = min((n for n in divisors if n >= case.steps), default=total)
    return Finding(
        grade(error),
        f"In plain diffusers, {off} of {len(theirs)} steps leave the grid: they go to t - "
        f"{total // case.steps}, not to the next level.",
        f"Of images of {DATA_NAME} a perfect network then makes {their_mean:.3f} +- "
        f"{their_std:.3f}, and by steps to the next level {mean:.3f} +- {std:.3f}: off by "
        f"{error:.3f}.",
        {
            **{"steps": case.steps, "off": off, "diffusers": [their_mean, their_std]},
            **{"ddim": [mean, std], "data": list(DATA), "error": error},
        },
        {"timestep_spacing": "trailing"} if _trailing_mends_strides(case, error) else {},
        advice="ddim.DDIMScheduler goes to the next level for every number of steps; in plain "
        f"diffusers take trailing with {below} or {above} steps.",
        diffusers_only=True,
    )


def _trailing_mends_strides(case: Case, error: float) -> bool:
    """Whether plain diffusers errs less with trailing, by what can be seen."""
    if case.config["timestep_spacing"] == "trailing":
        return False
    total = len(case.schedule)
    levels = select_timesteps(total, case.steps, "trailing")
    stock = stock_pairs(stock_timesteps(total, case.steps, "trailing"), total, case.steps)
    (there, spread), (mean, std) = (
        made_of_data(case, pairs) for pairs in (stock, step_pairs(levels))
    )
    left = math.hypot(there - mean, spread - std)
    return grade(left) == "info" and error - left >= GREY_LEVEL


@check("DDIM005", NEIGHBOURS)
def _minus_one(case: Case) -> Finding | None:
    """Plain diffusers visits a timestep of -1."""
    if case.stock is None or CLEAN not in case.stock:
        return None
    return Finding(
        "error",
        f"In plain diffusers, {case.steps} steps have {len(case.stock)} timesteps, the last being "
        "-1, which reads the noisiest level.",
        "The finished image is taken for pure noise and predicted once more: the images collapse "
        "to their mean.",
        {"steps": case.steps, "timesteps": len(case.stock), "last": CLEAN},
        advice=f"Use ddim.DDIMScheduler, which keeps the first {case.steps}, or another number of "
        "steps.",
        diffusers_only=True,
    )


@check("DDIM007", f"{LIN}, Sec. 3.3")
def _leading_at_zero_snr(case: Case) -> Finding | None:
    """A zero-SNR schedule whose last level is never visited (leading)."""
    is_leading = case.custom is None and case.config["timestep_spacing"] == "leading"
    if case.terminal > 0 or not is_leading or case.levels[0] == case.last:
        return None
    severity, numbers = case.leak(case.levels[0])
    fix, advice = _trailing(case, numbers)
    return Finding(
        severity,
        f"The schedule ends at SNR 0, but leading never visits level {case.last}: sampling starts "
        f"at {case.levels[0]}, SNR {numbers['snr']:.4g}.",
        "The rescaled schedule has no effect: the one level whose input is pure noise is skipped.",
        numbers,
        fix,
        advice=advice,
    )


@check("DDIM016", f"{SONG}, Sec. 4.2")
def _too_many_steps(case: Case) -> Finding | None:
    """More steps than levels."""
    total = len(case.schedule)
    if case.asked is None or case.asked <= total:
        return None
    return Finding(
        "error",
        f"{case.asked} steps were asked for, and there are {total} levels.",
        "Sampling is refused; the other findings are for all levels.",
        {"steps": case.asked, "levels": total},
        advice=f"Use at most {total} steps.",
    )


@check("DDIM020", NEIGHBOURS)
def _steps_not_given(case: Case) -> Finding | None:
    """The number of steps was not given."""
    if case.asked is not None or case.custom is not None:
        return None
    total, spacing = len(case.schedule), case.config["timestep_spacing"]
    offset = case.config["steps_offset"]
    off, minus_one = stock_flaws(total, spacing, steps_offset=offset) if case.stock else ([], [])
    return Finding(
        "info",
        f"The number of steps is not given; {case.steps} are assumed.",
        f"In plain diffusers, {spacing} leaves its grid for {len(off)} of "
        f"{min(total, MOST_COUNTS)} possible numbers, and visits -1 for {len(minus_one)}.",
        {"assumed": case.steps, "off_the_grid": len(off), "minus_one": minus_one[:10]},
        advice="Give the number that you sample with.",
    )
