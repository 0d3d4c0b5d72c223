"""The doctor's questions about the options, about keys, and about the network."""

import math
from typing import Any

import torch

from ddim.core.denoiser import ModelDenoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import prediction_row
from ddim.core.schedule import CLEAN
from ddim.core.timesteps import step_pairs
from ddim.doctor.findings import (
    DATA,
    DATA_NAME,
    GREY_LEVEL,
    LIN,
    SALIMANS,
    SONG,
    Case,
    Check,
    Finding,
    grade,
    mean_std,
    register,
)
from ddim.doctor.reading import OTHER_KEYS, is_inverse
from ddim.doctor.symptoms import stock_nan_levels

__all__ = ["OPTION_CHECKS"]

_SAHARIA = "Saharia et al. 2022, arXiv 2205.11487"
_HERE = "`python -m pydoc ddim.doctor.option_checks`"
_TRAINED_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type"),
)

OPTION_CHECKS: dict[str, Check] = {}
check = register(OPTION_CHECKS)


@check("DDIM006", f"{LIN}, Sec. 3.4")
def _epsilon_at_zero_snr(case: Case) -> Finding | None:
    """Epsilon prediction at zero terminal SNR."""
    if case.terminal > 0 or case.config["prediction_type"] != "epsilon":
        return None
    # If the network is known to predict something else, or was trained on these betas, then the
    # schedule is right.
    trained = case.training_schedule
    is_right = (
        case.probed != "epsilon"
        if case.probed
        else trained is not None and float(trained.alpha_bar(len(trained) - 1)) == 0
    )
    evidence = {"level": case.last, "alpha_bar": 0.0}
    without = [t for t in case.levels if float(case.schedule.alpha_bar(t)) == 0]
    message = "The terminal SNR is 0 and the network predicts epsilon: x0 = (x_t - sigma eps) / "
    if not without:
        return Finding(
            "warning",
            f"{message}alpha would divide by 0 at level {case.last}, which these {case.steps} "
            "steps do not visit.",
            "Nothing is divided by 0; but at that level the training loss teaches nothing, and "
            "steps that visit it are refused.",
            evidence,
            advice="If it was trained on these betas, start as near below as can be, with "
            f"timesteps of your own that begin with {case.last - 1}; if not, set "
            "rescale_betas_zero_snr=False.",
        )
    can_undo = case.config["rescale_betas_zero_snr"] and not is_right
    return Finding(
        "error",
        f"{message}alpha divides by 0 at level {without[0]}, which is visited.",
        "ddim.DDIMScheduler refuses that; plain diffusers makes NaN, or with clipping images that "
        "start from signs. At that level the training loss teaches nothing.",
        {**evidence, "level": without[0]},
        {"rescale_betas_zero_snr": False} if can_undo else {},
        advice=f"If it was trained on these betas, keep them and start below {without[-1]} "
        "(timesteps of your own), or train with v_prediction.",
    )


@check("DDIM008", f"{SONG}, Eq. 16")
def _eta_nan(case: Case) -> Finding | None:
    """An eta that gives NaN in plain diffusers."""
    eta = 1.0 if case.eta is None else case.eta
    if isinstance(eta, str) or eta == 0 or "snr_shift_scale" in case.read:  # CogVideoX ignores eta
        return None
    levels = stock_nan_levels(case.config, case.stock_pairs, eta)
    if not levels:
        return None
    return Finding(
        "info" if case.eta is None else "error",
        f"In plain diffusers, {case.steps} steps with eta={eta:g} make NaN from level {levels[0]} "
        "on.",
        "1 - alpha_bar - std^2 is "
        f"{'below 0 there' if eta > 1 else '0 there, and in float32 rounds below it'}, and its "
        "root is NaN.",
        {"eta": eta, "levels": levels},
        advice="Use an eta of at most 1."
        if eta > 1
        else "ddim.DDIMScheduler computes it in float64, where it is 0; or use eta=0.",
        diffusers_only=eta <= 1,
    )


@check("DDIM009", f"{SONG}, Sec. 4.3")
def _clipping(case: Case) -> Finding | None:
    """clip_sample on latents, or where images are encoded."""
    if not case.config["clip_sample"]:
        return None
    latent, bound = case.model.latent, case.config["clip_sample_range"]
    message = f"clip_sample is on: the predicted image is clamped to +-{bound:g}"
    evidence = {"clip_sample_range": bound, "latent": latent}
    off = {"clip_sample": False}
    if latent:
        message += ", and the model works on latents."
        return Finding("warning", message, "Latents reach far beyond it.", evidence, off)
    lost = "Where it clamps, an encoding of images is not undone by decoding"
    if is_inverse(case.config):
        return Finding("warning", f"{message}.", f"{lost}.", evidence, off)
    return Finding(
        "info",
        f"{message}.",
        f"{lost}; images drawn from noise keep their range by it.",
        evidence,
        advice="Turn it off to encode images, or if they come out in range without it.",
    )


@check("DDIM010", f"{SONG}, Eq. 12")
def _residual_noise(case: Case) -> Finding | None:
    """set_alpha_to_one=False leaves noise in the finished image."""
    left = math.sqrt(1 - case.schedule.final_alpha_cumprod)
    if case.config["set_alpha_to_one"] or left == 0:
        return None
    return Finding(
        grade(left),
        "set_alpha_to_one is off: the last step ends at level 0, where noise of std "
        f"{left:.4g} is left.",
        "The finished image keeps that noise.",
        {"residual_std": left},
        {"set_alpha_to_one": True} if left >= GREY_LEVEL else {},
    )


@check("DDIM011", f"{SALIMANS}, Sec. 4")
def _ill_posed(case: Case) -> Finding | None:
    """The prediction type cannot be solved for the image at a visited level, or hardly."""
    kind = case.config["prediction_type"]
    levels = [*case.levels, *([CLEAN] if is_inverse(case.config) else [])]
    alpha_bar = case.schedule.alpha_bar(torch.tensor(levels))
    p, q = prediction_row(kind, alpha_bar)
    determinants = (alpha_bar.sqrt() * q - (1 - alpha_bar).sqrt() * p).abs()
    smallest, place = (value.item() for value in determinants.min(0))
    level = levels[int(place)]
    if smallest > 1e-3 or (smallest == 0 and kind == "epsilon"):
        return None
    is_clean = level == CLEAN  # there our inverse reads the image as eps at the level it goes to
    clipped = smallest > 0 and (case.config["clip_sample"] or case.config["thresholding"])
    factor = "infinitely" if smallest == 0 else f"{1 / smallest:.4g} times"
    return Finding(
        "error" if smallest == 0 else "info" if clipped else "warning",
        f"{'In plain diffusers, ' * is_clean}{kind} prediction has determinant {smallest:.4g} at "
        f"level {level}{' (clean data)' * is_clean}.",
        f"The network's error is multiplied {factor} there"
        f"{'; clipping, which is on, holds the image in range' if clipped else ''}.",
        {"level": level, "determinant": smallest},
        advice="ddim.DDIMInverseScheduler takes the prediction at the level that it goes to."
        if is_clean
        else "Clip the predicted image, if it is one of pixels (clip_sample); v_prediction, with "
        "determinant 1, needs training.",
        diffusers_only=is_clean,
    )


@check("DDIM012", f"{_SAHARIA}, Sec. 2.3")
def _idle_thresholding(case: Case) -> Finding | None:
    """Thresholding that does nothing."""
    limit = case.config["sample_max_value"]
    if not case.config["thresholding"] or limit > 1:
        return None
    message = f"thresholding is on with sample_max_value {limit:g}: "
    if limit == 1:
        message += "the threshold lies between 1 and that, so it is always 1."
        consequence = "It is plain clipping to +-1, at the cost of a sort."
    else:
        message += "a threshold of at least 1 is cut to that."
        effect = "contrast grows at every step"
        consequence = f"Each predicted image is clamped to that and divided by it: {effect}."
    return Finding(
        "warning",
        message,
        consequence,
        {"sample_max_value": limit},
        {"thresholding": False, "clip_sample": not (case.model.latent or is_inverse(case.config))},
        advice="For dynamic thresholding of pixels raise sample_max_value, for example to 1.5 or "
        "more.",
    )


@check("DDIM013", f"{LIN}, Sec. 3.4")
def _unrescaled_guidance(case: Case) -> Finding | None:
    """Guidance without rescale on a zero-SNR model."""
    scale = case.guidance_scale
    guided = case.model.guided is not False if scale is None else scale > 1
    unusable = case.terminal > 0 or case.config["prediction_type"] == "epsilon"
    if unusable or not guided or case.guidance_rescale > 0:
        return None
    return Finding(
        "info",
        "The model has zero terminal SNR: strong guidance needs guidance_rescale with it.",
        "Without it images are over-exposed, the more the stronger the guidance.",
        {"guidance_scale": scale, "guidance_rescale": case.guidance_rescale},
        advice="Sample with guidance_rescale=0.7 (ddim sample --guidance-rescale 0.7).",
    )


@check("DDIM014", f"{LIN}, Table 2")
def _idle_offset(case: Case) -> Finding | None:
    """steps_offset is ignored by the spacing."""
    offset, spacing = case.config["steps_offset"], case.config["timestep_spacing"]
    # diffusers' pipelines with text want 1 for every spacing, and replace any other value by it.
    wanted = (0, 1) if case.model.guided is not False else (0,)
    if offset in wanted or spacing == "leading":
        return None
    return Finding(
        "info",
        f"steps_offset is {offset}, which {spacing} ignores.",
        "Images do not change; readers of the configuration expect a shift that is not there.",
        {"steps_offset": offset},
        {"steps_offset": int(bool(case.model.guided))},
    )


@check("DDIM015", f"{SONG}, Sec. 2")
def _betas_length(case: Case) -> Finding | None:
    """trained_betas are of another length than num_train_timesteps."""
    stated, given = case.config["num_train_timesteps"], len(case.schedule)
    if stated == given:
        return None
    return Finding(
        "error" if given < stated else "warning",
        f"trained_betas has {given} levels, and num_train_timesteps says {stated}.",
        "Sampling asks for levels that do not exist."
        if given < stated
        else "Sampling never visits the noisiest levels.",
        {"trained_betas": given, "num_train_timesteps": stated},
        {"num_train_timesteps": given},
    )


@check("DDIM017", f"{SONG}, Sec. 2")
def _other_total(case: Case) -> Finding | None:
    """The schedule has another number of levels than the model."""
    total = len(case.schedule)
    known = case.model.num_train_timesteps or (case.training or {}).get("num_train_timesteps")
    if known is None or known == total:
        return None
    return Finding(
        "error",
        f"The schedule has {total} levels, and the model was trained on {known}.",
        "The network is given levels that mean other amounts of noise to it, or that it never saw.",
        {"schedule": total, "model": known},
        {"num_train_timesteps": known} if case.config["trained_betas"] is None else {},
    )


@check("DDIM019", _HERE)
def _other_training(case: Case) -> Finding | None:
    """The model was trained with another noise schedule or prediction type than it is sampled
    with."""
    training, there, here = case.training, case.training_schedule, case.schedule
    if training is None or there is None or len(there) != len(here):
        return None
    kind, trained_kind = case.config["prediction_type"], training["prediction_type"]
    is_same = torch.allclose(there.alphas_cumprod, here.alphas_cumprod, atol=1e-6)
    if kind == trained_kind and is_same:
        return None
    oracle, pairs, first = GaussianOracle(there, *DATA), step_pairs(case.levels), case.levels[0]
    right_mean, right_std = mean_std(oracle.denoise, there, pairs, oracle, first)
    mean = std = math.inf  # if epsilon prediction divides by zero
    if kind != "epsilon" or bool((here.alpha_bar(torch.tensor(case.levels)) > 0).all()):
        mixed = ModelDenoiser(oracle.network(trained_kind), here, kind)
        mean, std = mean_std(mixed, here, pairs, oracle, first)
    made = f"makes {mean:.3f} +- {std:.3f}" if math.isfinite(mean) else "divides by zero"
    keys = [key for key in _TRAINED_KEYS if training[key] != case.config[key]]
    answers = case.probe.evidence if case.probe and case.probe.zero_terminal_snr else {}
    source = ", by its own answers" if answers else ""
    denied = []  # keys of which the network's own answers say otherwise
    if case.probed not in (None, trained_kind):
        denied.append("prediction_type")
        if case.probed == "epsilon":
            denied.append("rescale_betas_zero_snr")
    return Finding(
        "error" if kind != trained_kind else grade(math.hypot(mean - right_mean, std - right_std)),
        f"The model was trained with {', '.join(f'{k}={_short(training[k])}' for k in keys)}"
        f"{source}, and is sampled with "
        f"{', '.join(f'{k}={_short(case.config[k])}' for k in keys)}.",
        f"A perfect network that is sampled so {made}, and of images of {DATA_NAME} it should make "
        f"{right_mean:.3f} +- {right_std:.3f}.",
        {"mixed": [mean, std], "right": [right_mean, right_std], **answers},
        {key: training[key] for key in keys if key not in denied},
    )


@check("DDIM021", f"{SALIMANS}, Sec. 4")
def _probed_type(case: Case) -> Finding | None:
    """The network's answers are of another prediction type than the configuration says."""
    stated = case.config["prediction_type"]
    if case.probe is None or case.probe.prediction_type == stated:
        return None
    found, errors = case.probe.prediction_type, case.probe.errors
    listed = ", ".join(f"{kind} {error:.3f}" for kind, error in errors.items())
    evidence = {"errors": errors, "probed": found}
    message = f"The configuration says {stated}, and the network's answers are "
    if found is None:
        message += f"of no known type (relative errors: {listed})."
        consequence = "The network is not trained, or not on these images."
        return Finding("warning", message, consequence, evidence)
    fix: dict[str, Any] = {"prediction_type": found}
    if found == "epsilon" and case.terminal == 0 and case.config["rescale_betas_zero_snr"]:
        fix["rescale_betas_zero_snr"] = False
    message += f"those of {found} (relative errors: {listed})."
    consequence = "Its output is taken for another quantity: the images are noise, or washed out."
    return Finding("error", message, consequence, evidence, fix)


@check("DDIM022", f"{LIN}, Sec. 5.2")
def _probed_end(case: Case) -> Finding | None:
    """The network was never trained at level T-1."""
    if case.probe is None or case.probe.trained_at_end is not False:
        return None
    evidence = case.probe.evidence
    message = (
        f"The network was not trained at level {case.last} of this schedule: its relative error is "
        f"{evidence['error_at_end']:.3f} there and {evidence['error_below']:.3f} just below"
    )
    following = evidence.get("brightness_following_noise")
    if following is not None:
        share = f"{following:.2f} of the images' spread"
        message += f", and its brightness follows the noise's ({share})"
    return Finding(
        "warning",
        f"{message}.",
        "The first step, which sets an image's brightness, is guesswork.",
        dict(evidence),
        {"rescale_betas_zero_snr": True} if case.terminal == 0 else {},
        retrain=True,
        advice="Sample with the schedule that it was trained with.",
    )


@check("DDIM023", _HERE)
def _idle_keys(case: Case) -> Finding | None:
    """Keys that DDIM does not read."""
    known = sorted(OTHER_KEYS & set(case.config) - case.read)
    if not known:
        return None
    idle = {key: case.config[key] for key in known}
    listed = ", ".join(f"{key}={_short(value)}" for key, value in idle.items())
    message = f"DDIM does not read {listed}: other schedulers or versions do."
    if idle.get("predict_epsilon") is False and case.config["prediction_type"] == "epsilon":
        consequence = "The network predicts the image, and its answer is read as noise."
        return Finding("error", message, consequence, idle, {"prediction_type": "sample"})
    consequence = "Images do not change, unless they are expected to be that scheduler's."
    return Finding("info", message, consequence, idle)


def _short(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else str(value)
