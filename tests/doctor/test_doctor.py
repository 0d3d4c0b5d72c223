"""Each check finds the flaw that is planted for it, and is silent on a sound configuration; figures
match what really happens."""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import re
import runpy
import time
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.conftest import thinned

import ddim
from ddim.configuration import _FAMILY
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import PREDICTION_TYPES, from_x0_eps
from ddim.core.prior import DataPrior, fit_prior
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule, make_betas
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.doctor.checks import CHECKS
from ddim.doctor.findings import FAINT, ModelFacts
from ddim.doctor.probing import Probe, probe
from ddim.doctor.reading import OTHER_KEYS, complete, levels_of
from ddim.doctor.report import diagnose
from ddim.doctor.symptoms import (
    Brightness,
    leaked_brightness,
    predict_brightness,
    stock_nan_levels,
    stock_pairs,
    stock_timesteps,
)
from ddim.errors import DDIMError
from ddim.pipelines.unconditional import UnconditionalPipeline

DATA = Path(__file__).parents[1] / "data"
CONFIGS = sorted((DATA / "scheduler_configs").glob("*.json"))
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
SOUND = {
    **SD,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
LEAKY = {**SD, "timestep_spacing": "trailing"}
COSINE = {**LEAKY, "beta_schedule": "squaredcos_cap_v2"}
ERRORS = dict.fromkeys(PREDICTION_TYPES, 1.0)
EPSILON_AT_END = {"error_at_end": 0.9, "error_below": 0.1}

PLANTED = [
    ("DDIM001", "warning", LEAKY, {}),
    ("DDIM001", "info", LEAKY, {"brightness": Brightness(-0.01, 0.1, 64)}),
    ("DDIM002", "warning", {**SOUND, "timestep_spacing": "leading"}, {"steps": 10}),
    (
        "DDIM002",
        "info",
        {**SOUND, "timestep_spacing": "leading"},
        {"steps": 10, "brightness": Brightness(0.001, 0.1, 64)},
    ),
    ("DDIM002", "warning", SOUND, {"timesteps": [500, 100]}),
    ("DDIM003", "error", SOUND, {"timesteps": [999, 500, 500]}),
    ("DDIM003", "error", SOUND, {"timesteps": [999, -1]}),
    ("DDIM003", "error", SOUND, {"timesteps": [999, 500], "steps": 3}),
    ("DDIM003", "error", {**SOUND, "fitted_timesteps": [[999, 1000]]}, {"steps": 2}),
    ("DDIM003", "error", {**SD, "timestep_spacing": "leading", "steps_offset": 1}, {"steps": 1000}),
    ("DDIM004", "warning", SOUND, {"steps": 150}),
    ("DDIM004", "warning", {**SD, "timestep_spacing": "linspace"}, {"steps": 10}),
    ("DDIM004", "info", LEAKY, {"steps": 30}),
    ("DDIM005", "error", SOUND, {"steps": 61}),
    ("DDIM006", "error", {**SOUND, "prediction_type": "epsilon"}, {"steps": 50}),
    ("DDIM007", "warning", {**SOUND, "timestep_spacing": "leading"}, {"steps": 50}),
    ("DDIM008", "error", SOUND, {"steps": 50, "eta": 1.5}),
    ("DDIM009", "warning", {**SOUND, "clip_sample": True}, {"model": ModelFacts(latent=True)}),
    (
        "DDIM009",
        "warning",
        {**SOUND, "clip_sample": True, "_class_name": "DDIMInverseScheduler"},
        {},
    ),
    ("DDIM009", "info", {**SOUND, "clip_sample": True}, {"model": ModelFacts(latent=False)}),
    ("DDIM010", "info", {**SOUND, "set_alpha_to_one": False}, {}),
    (
        "DDIM010",
        "warning",
        {**SOUND, "set_alpha_to_one": False, "beta_start": 0.01, "beta_end": 0.02},
        {},
    ),
    ("DDIM011", "warning", COSINE, {}),
    ("DDIM011", "info", {**COSINE, "clip_sample": True}, {}),
    (
        "DDIM011",
        "error",
        {**SOUND, "prediction_type": "sample", "_class_name": "DDIMInverseScheduler"},
        {},
    ),
    ("DDIM012", "warning", {**SOUND, "thresholding": True}, {}),
    ("DDIM012", "warning", {**SOUND, "thresholding": True, "sample_max_value": 0.5}, {}),
    ("DDIM013", "info", SOUND, {"guidance_scale": 7.5}),
    ("DDIM014", "info", {**SOUND, "steps_offset": 2}, {}),
    ("DDIM014", "info", {**SOUND, "steps_offset": 1}, {"model": ModelFacts(guided=False)}),
    ("DDIM014", "info", {**SOUND, "steps_offset": 5}, {"model": ModelFacts(guided=True)}),
    ("DDIM015", "error", {**LEAKY, "trained_betas": [0.1, 0.2]}, {}),
    ("DDIM015", "warning", {**LEAKY, "trained_betas": [0.01] * 1001}, {}),
    ("DDIM016", "error", SOUND, {"steps": 1001}),
    ("DDIM017", "error", SOUND, {"model": ModelFacts(num_train_timesteps=4000)}),
    ("DDIM018", "warning", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}),
    (
        "DDIM019",
        "warning",
        LEAKY,
        {
            "model": ModelFacts(
                training={**LEAKY, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
            )
        },
    ),
    (
        "DDIM019",
        "error",
        SOUND,
        {"model": ModelFacts(training={**SOUND, "prediction_type": "sample"})},
    ),
    ("DDIM020", "info", SOUND, {}),
    ("DDIM021", "error", SOUND, {"probe": Probe(ERRORS, "epsilon", True, {})}),
    ("DDIM021", "warning", SOUND, {"probe": Probe(ERRORS, None, None, {})}),
    (
        "DDIM021",
        "error",
        SOUND,
        {"probe": Probe({**ERRORS, "sample": math.nan}, "epsilon", True, {})},
    ),
    ("DDIM022", "warning", SOUND, {"probe": Probe(ERRORS, "v_prediction", False, EPSILON_AT_END)}),
    ("DDIM024", "error", {**SOUND, "timestep_spacing": "quadratic"}, {"steps": 50, "eta": 1.5}),
    ("DDIM023", "info", {**SOUND, "skip_prk_steps": True}, {}),
    ("DDIM023", "error", {**LEAKY, "predict_epsilon": False}, {}),
]


@pytest.mark.parametrize(("code", "severity", "config", "options"), PLANTED)
def test_a_planted_flaw_is_found_with_numbers_and_words(code, severity, config, options):
    (found,) = (f for f in diagnose(config, **options).findings if f.code == code)
    assert found.severity == severity
    assert found.message
    assert found.consequence
    assert found.reference
    assert found.evidence
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@pytest.mark.parametrize(("code", "severity", "config", "options"), PLANTED)
def test_a_fix_mends_what_it_is_given_for_and_plants_nothing(code, severity, config, options):
    before = diagnose(config, **options)
    after = diagnose(before.fixed(), **options)
    grave, left = ([f for f in d.findings if f.severity != "info"] for d in (before, after))
    assert not {f.code for f in grave if f.fix and not f.retrain} & {f.code for f in left}
    assert {f.code for f in left if not f.retrain} <= {f.code for f in grave}
    assert [f.fix for f in after.findings if f.fix and not f.retrain] == []


BAD = {
    **SD,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@pytest.mark.parametrize("guided", [None, False, True])
def test_a_fix_that_worsens_a_predicted_figure_says_so_and_why_and_plants_no_note(guided):
    """Zero terminal SNR with epsilon is mended at the cost of brightness."""
    bad = {**BAD, "timestep_spacing": "trailing", "steps_offset": 0}
    before = diagnose(bad, steps=30, model=ModelFacts(guided=guided))
    assert before.worse == (
        "The fix makes what is predicted worse (brightness bias from +0.000 to +0.355, brightness "
        "spread from 0.847 to 0.541): zero "
        "terminal SNR is given up, because the weights predict epsilon, from which no image can be "
        "told there."
    )
    assert before.fixed() == {**bad, "rescale_betas_zero_snr": False}
    after = diagnose(before.fixed(), steps=30, model=ModelFacts(guided=guided))
    assert (after.after, after.worse) == (None, "")
    assert "DDIM014" not in [f.code for f in after.findings]
    wrong = {"model": ModelFacts(training={**LEAKY, "beta_end": 0.002})}
    assert "what is mended is graver (DDIM019)." in diagnose(LEAKY, steps=50, **wrong).worse


def test_a_level_that_is_not_visited_makes_no_nan_and_no_fix_visits_it():
    """Epsilon prediction on a zero-SNR schedule with leading timesteps, as it was trained."""
    diagnosis = diagnose(BAD, steps=30)
    found = {f.code: f for f in diagnosis.findings}
    assert not diagnosis.has("error")
    assert "level 999, which these 30 steps do not visit" in found["DDIM006"].message
    assert "NaN" not in found["DDIM006"].message + found["DDIM006"].consequence
    for code in ("DDIM002", "DDIM007"):
        assert found[code].fix == {}
        assert "timestep_spacing='trailing' is no fix here: epsilon" in found[code].advice
    assert (diagnosis.fixed(), diagnosis.after) == (BAD, None)
    # Steps that visit it are refused, and then the check says so and names it.
    (error,) = (
        f
        for f in diagnose(BAD, steps=1000).findings
        if f.severity == "error" and not f.diffusers_only
    )
    assert "divides by 0 at level 999, which is visited" in error.message
    # What the network is known to predict goes along with the fix that needs it.
    training = ModelFacts(training={**BAD, "prediction_type": "v_prediction"})
    known = {f.code: f for f in diagnose(BAD, steps=30, model=training).findings}
    assert known["DDIM002"].fix == {
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }


def samples(config, steps):
    """Whether our own scheduler samples with a configuration."""
    try:
        kind = (
            ddim.DDIMInverseScheduler
            if "Inverse" in config.get("_class_name", "")
            else ddim.DDIMScheduler
        )
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[:100]:
            x = scheduler.step(0.9 * x, t, x).prev_sample
        return bool(x.isfinite().all())
    except (DDIMError, RuntimeError):  # the second: trained_betas without the level
        return False


def check_agreement(config, options):
    """No fix and no combination of fixes leads to a refusal or to a new error, and none contradicts
    another."""
    options = {"steps": diagnose(config, **options).summary.get("steps"), **options}
    diagnosis = diagnose(config, **options)
    if not diagnosis.summary:
        return
    config = {**diagnosis.config, **diagnosis.asked}
    options = {**options, "spacing": None}
    retrained = [f.fix for f in diagnosis.findings if f.fix and f.retrain]
    fixes = [f.fix for f in diagnosis.findings if f.fix and not f.retrain]
    fixes = [fix for n, fix in enumerate(fixes) if fix not in fixes[:n]]
    together = [
        subset for n in range(1, len(fixes) + 1) for subset in itertools.combinations(fixes, n)
    ]
    steps, is_asked = options["steps"], options.get("timesteps") is None
    before = {f.code for f in diagnosis.findings if f.severity == "error"}
    sampled = samples(config, steps)
    for subset in together:
        fixed = dict(config)
        for fix in subset:
            assert all(fixed.get(k) in (v, config.get(k)) for k, v in fix.items()), "contradiction"
            fixed |= fix
        if sampled and is_asked:
            assert samples(fixed, min(steps, fixed.get("num_train_timesteps", 1000))), subset
        after = diagnose(fixed, **options).findings
        assert {f.code for f in after if f.severity == "error"} <= before, subset
    if together and is_asked and not {"DDIM003", "DDIM016"} & before:
        assert samples(diagnosis.fixed(), steps)
    for fix in retrained:
        assert not sampled or samples({**config, **fix}, steps)


@pytest.mark.parametrize(("code", "severity", "config", "options"), PLANTED)
def test_no_fix_and_no_combination_of_fixes_leads_to_a_refusal(code, severity, config, options):
    check_agreement(config, options)


@pytest.mark.parametrize(
    ("spacing", "kind", "rescale", "steps"),
    thinned(
        ["leading", "linspace", "trailing"],
        ["epsilon", "v_prediction"],
        [True, False],
        [1, 61],
        stride=5,
    ),
)
def test_findings_agree_whatever_is_combined(spacing, kind, rescale, steps):
    config = {**BAD, "timestep_spacing": spacing, "prediction_type": kind}
    config |= {"rescale_betas_zero_snr": rescale, "set_alpha_to_one": False}
    for model in (ModelFacts(), ModelFacts(training={**config, "prediction_type": "v_prediction"})):
        check_agreement(config, {"steps": steps, "model": model})
    for found in PREDICTION_TYPES:
        check_agreement(config, {"steps": steps, "probe": Probe(ERRORS, found, True, {})})


def test_a_single_leading_step_returns_its_noise_and_that_is_an_error():
    for spacing in ("leading", "linspace"):  # both visit level 0 alone
        diagnosis = diagnose({**SD, "timestep_spacing": spacing}, steps=1)
        (found,) = (f for f in diagnosis.findings if f.code == "DDIM002")
        assert (found.severity, found.fix) == ("error", {"timestep_spacing": "trailing"})
        assert "the images are noise" in found.consequence
        assert diagnosis.verdict.startswith("Your pictures are noise")
    assert not diagnose(LEAKY, steps=1).has("error")


def test_a_fix_that_its_own_figures_call_useless_is_not_proposed():
    dark = Brightness(-0.01, 0.1, 64)
    (small,) = (
        f for f in diagnose(LEAKY, steps=50, brightness=dark).findings if f.code == "DDIM001"
    )
    assert (small.fix, small.advice) == ({}, "This is too little to be seen.")
    late = diagnose({**SD, "timestep_spacing": "leading"}, steps=500)  # 998 in place of 999
    (found,) = (f for f in late.findings if f.code == "DDIM002")
    assert found.fix == {}
    assert "changes nothing that can be seen" in found.advice
    (soon,) = (
        f
        for f in diagnose({**SD, "timestep_spacing": "leading"}, steps=10).findings
        if f.code == "DDIM002"
    )
    assert soon.fix == {"timestep_spacing": "trailing"}
    # 600 steps leave the grid of plain diffusers under every spacing.
    (strides,) = (
        f
        for f in diagnose({**SD, "timestep_spacing": "linspace"}, steps=600).findings
        if f.code == "DDIM004"
    )
    assert strides.fix == {}


def test_weights_that_epsilon_cannot_sample_are_told_to_divide_by_zero():
    training = {**SOUND, "_class_name": "DDIMScheduler"}
    diagnosis = diagnose(
        {**SOUND, "prediction_type": "epsilon"}, model=ModelFacts(training=training)
    )
    (found,) = (f for f in diagnosis.findings if f.code == "DDIM019")
    assert found.consequence.startswith("A perfect network that is sampled so divides by zero, and")
    assert found.evidence["mixed"] == [None, None]  # infinite, which JSON cannot say


def test_defects_of_diffusers_are_told_as_such():
    for code, _, config, options in PLANTED:
        for found in diagnose(config, **options).findings:
            is_theirs = found.code in ("DDIM004", "DDIM005") or "plain diffusers" in found.message
            assert not found.diffusers_only or found.message.startswith("In plain diffusers,")
            assert found.code in ("DDIM008", "DDIM020") or found.diffusers_only == is_theirs, code
    sample = {**SOUND, "prediction_type": "sample", "_class_name": "DDIMInverseScheduler"}
    (clean,) = (f for f in diagnose(sample, steps=50).findings if f.code == "DDIM011")
    assert clean.diffusers_only
    assert samples(sample, 50)


def test_what_our_sampler_refuses_is_always_an_error():
    for config, options in [
        ({**SOUND, "timestep_spacing": "quadratic"}, {"steps": 50, "eta": 1.5}),
        ({**SOUND, "_class_name": "DDIMScheduler", "solver_order": 2}, {"steps": 50, "eta": 1.0}),
    ]:
        (error,) = (f for f in diagnose(config, **options).findings if f.code == "DDIM024")
        assert error.severity == "error"
        assert error.message.startswith("ddim.DDIMScheduler refuses these steps: ")


def test_references_are_installed_or_on_the_web():
    codes = set()
    for _, _, config, options in PLANTED:
        for found in diagnose(config, **options).findings:
            codes.add(found.code)
            name = re.search(r"pydoc ([\w.]+)", found.reference)
            assert "arXiv" in found.reference or name, found.reference
            if name:
                assert importlib.import_module(name[1]).__doc__
    assert codes >= set(CHECKS)


def test_a_spacing_that_was_asked_for_is_told_where_the_configuration_is_right():
    config = SD | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    worse = diagnose(config, steps=5, spacing="leading")
    assert worse.verdict.endswith("; the configuration's own spacing mends it.")
    assert worse.after.summary == diagnose(config, steps=5).summary
    assert (worse.python, worse.changed) == ("", {})
    leaky = diagnose(config | {"rescale_betas_zero_snr": False}, steps=5, spacing="leading")
    assert "the configuration's own spacing brings that down to about" in leaky.verdict
    assert (
        diagnose(config, steps=5, spacing="trailing").verdict == diagnose(config, steps=5).verdict
    )
    other = diagnose(config | {"timestep_spacing": "linspace"}, steps=5, spacing="leading")
    assert other.changed == {"timestep_spacing": "trailing"}
    assert other.verdict.endswith("; the line below mends it.")


def test_the_verdict_is_one_sentence_and_the_line_of_python_does_what_is_proposed():
    scheduler = ddim.DDIMScheduler.from_config({**SD, "timestep_spacing": "leading"})
    diagnosis = diagnose(dict(scheduler.config), steps=10)
    assert "too bright, by about" in diagnosis.verdict
    assert diagnosis.verdict.count(".") == 1
    assert diagnosis.python == (
        "pipe.scheduler = ddim.DDIMScheduler.from_config(pipe.scheduler.config, "
        "timestep_spacing='trailing')"
    )
    pipe = types.SimpleNamespace(scheduler=scheduler)
    exec(diagnosis.python, {"pipe": pipe, "ddim": ddim})
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    sound = diagnose(SOUND, steps=50, eta=0.0)
    assert sound.python == ""
    assert "do not make your pictures dark" in sound.verdict
    stock = diagnose(SOUND, steps=61, eta=0.0)  # right here, and wrong in plain diffusers
    assert "Plain diffusers spoils your pictures (DDIM005)" in stock.verdict
    assert stock.python.endswith("from_config(pipe.scheduler.config)")
    assert diagnose({"_class_name": "FlowMatchEulerDiscreteScheduler"}).verdict.startswith(
        "The doctor"
    )


def test_a_prior_is_advised_only_where_it_can_be_used():
    """`ddim sample --prior` refuses models of text, and knows the colours of pixels."""
    for model, told in [
        (ModelFacts(guided=False, latent=False), "Without training: ddim sample --prior data"),
        (
            ModelFacts(),
            "Without training, for a model of pixels and without text: ddim sample --prior data",
        ),
        (
            ModelFacts(guided=True),
            (
                "ddim train --base MODEL --data CAPTIONED --prediction-type v_prediction "
                "--rescale-betas-zero-snr."
            ),
        ),
        (
            ModelFacts(latent=True),
            (
                "ddim train --base MODEL --data CAPTIONED --prediction-type v_prediction "
                "--rescale-betas-zero-snr."
            ),
        ),
    ]:
        (found,) = (
            f for f in diagnose(LEAKY, steps=50, model=model).findings if f.code == "DDIM001"
        )
        assert told in found.advice
        assert ("--prior" in found.advice) is (
            model.guided is not True and model.latent is not True
        )
    (found,) = (
        f
        for f in diagnose(
            {**LEAKY, "prediction_type": "v_prediction"}, model=ModelFacts(guided=True)
        ).findings
        if f.code == "DDIM001"
    )
    assert "--data CAPTIONED --rescale-betas-zero-snr" in found.advice


def test_the_fixes_of_a_configuration_that_belongs_to_another_run_are_those_of_that_run():
    training = {**SOUND, "prediction_type": "v_prediction"}
    fixed = diagnose(
        {**SOUND, "prediction_type": "epsilon"}, steps=50, model=ModelFacts(training=training)
    ).fixed()
    assert (fixed["prediction_type"], fixed["rescale_betas_zero_snr"]) == ("v_prediction", True)
    fixed = diagnose(
        {**SOUND, "prediction_type": "epsilon"},
        steps=50,
        probe=Probe(ERRORS, "v_prediction", True, {}),
    ).fixed()
    assert (fixed["prediction_type"], fixed["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert (
        diagnose({**SOUND, "timestep_spacing": "leading"}, steps=50, spacing="trailing").fixed()
        == SOUND
    )


def test_every_check_has_a_planted_flaw():
    assert {code for code, *_ in PLANTED} == {*CHECKS, "DDIM018", "DDIM024"}


@pytest.mark.parametrize("steps", [n for n in range(1, 1001) if 1000 % n == 0])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_a_sound_configuration_has_no_warning_and_with_all_told_no_finding(steps, schedule):
    config = {**SOUND, "beta_schedule": schedule}
    assert {f.severity for f in diagnose(config, steps=steps).findings} <= {"info"}
    told = {"steps": steps, "eta": 0.0, "guidance_scale": 7.5, "guidance_rescale": 0.7}
    model = ModelFacts(latent=True, num_train_timesteps=1000, training=config)
    assert (
        diagnose(
            config, **told, model=model, probe=Probe(ERRORS, "v_prediction", True, {})
        ).findings
        == ()
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_real_configurations_are_diagnosed(path):
    config = json.loads(path.read_text())
    diagnosis = diagnose(config)
    assert not diagnosis.has("error")
    assert diagnosis.findings
    if diagnosis.summary:
        kind = (
            diffusers.CogVideoXDDIMScheduler
            if config.get("snr_shift_scale")
            else diffusers.DDIMScheduler
        )
        stock = kind(
            **{
                key: value
                for key, value in config.items()
                if key in inspect.signature(kind.__init__).parameters
            }
        )
        stock.set_timesteps(50)
        last = float(stock.alphas_cumprod[-1])
        assert diagnosis.summary["terminal_snr"] == pytest.approx(last / (1 - last), rel=1e-3)
        assert diagnosis.summary["first_level"] == int(stock.timesteps[0])
        again = diagnose(diagnosis.fixed())
        assert [f.code for f in again.findings if f.severity != "info" and not f.retrain] == []
        assert again.after is None
        assert [f.fix for f in again.findings if f.fix and not f.retrain] == []


def test_a_fitted_list_of_the_number_of_steps_is_what_is_visited():
    config = {**SOUND, "fitted_timesteps": [[999, 700, 300], [999, 400]]}
    assert diagnose(config, steps=3).summary["timestep_spacing"] == "custom"
    assert diagnose(config, steps=3).findings[0].code == "DDIM013"
    assert diagnose(config, steps=2).summary["last_level"] == 400
    for options in ({"steps": 5}, {"steps": 3, "spacing": "trailing"}):
        assert diagnose(config, **options).summary["timestep_spacing"] == "trailing"


def test_absent_keys_of_cogvideox_are_its_own_and_its_shift_is_nobody_elses():
    full = complete({"_class_name": "CogVideoXDDIMScheduler"})
    stock = diffusers.CogVideoXDDIMScheduler()
    assert torch.allclose(levels_of(full).alphas_cumprod, stock.alphas_cumprod.double(), atol=1e-6)
    assert torch.equal(
        levels_of(complete({**SD, "snr_shift_scale": 3.0})).alphas_cumprod,
        levels_of(complete(SD)).alphas_cumprod,
    )


def test_zero_snr_of_cogvideox_is_seen_through_its_shift():
    config = json.loads((DATA / "scheduler_configs" / "THUDM_CogVideoX-2b.json").read_text())
    ours, stock = (
        levels_of(complete({**config, "rescale_betas_zero_snr": False})),
        diffusers.CogVideoXDDIMScheduler(),
    )
    assert torch.allclose(ours.alphas_cumprod, stock.alphas_cumprod.double(), atol=1e-6)
    assert diagnose(config, steps=50).summary["terminal_snr"] == 0


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_lists_of_plain_diffusers_are_as_it_makes_them(spacing):
    stock = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for count in (1, 2, 7, 50, 61, 97, 150, 600, 999, 1000):
        stock.set_timesteps(count)
        assert stock_timesteps(1000, count, spacing, steps_offset=1) == stock.timesteps.tolist()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [1.0, 1.5])
def test_nan_is_predicted_exactly_where_plain_diffusers_makes_it(kind, eta):
    config = complete({**SOUND, "beta_schedule": kind})
    stock = diffusers.DDIMScheduler(**config)
    x = torch.ones(1, 1, 1, 1)
    for count in (5, *range(17, 26), 50):
        stock.set_timesteps(count)
        steps = [
            stock.step(x, t, x, eta=eta, variance_noise=x).prev_sample for t in stock.timesteps
        ]
        expected = [int(t) for t, y in zip(stock.timesteps, steps, strict=True) if y.isnan().any()]
        assert (
            stock_nan_levels(config, stock_pairs(stock.timesteps.tolist(), 1000, count), eta)
            == expected
        )


def test_the_error_of_strides_is_what_plain_diffusers_makes():
    (finding,) = (f for f in diagnose(LEAKY, steps=600).findings if f.code == "DDIM004")
    schedule = NoiseSchedule.from_betas(
        make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    oracle = GaussianOracle(schedule, 0.5, 0.25)
    stock = diffusers.DDIMScheduler(**LEAKY)
    stock.set_timesteps(600)
    x = oracle.draw((20_000, 1), t=999, generator=torch.Generator().manual_seed(0))
    for t in stock.timesteps:
        x = stock.step(oracle.network("epsilon")(x, t), t, x).prev_sample
    assert finding.evidence["diffusers"] == pytest.approx(
        [float(x.mean()), float(x.std())], abs=0.01
    )
    assert finding.evidence["error"] > 5 * FAINT


@pytest.mark.parametrize(
    ("kind", "level", "brightness", "bias", "factor"),
    [
        ("linear", 999, Brightness(-0.43, 0.35, 28 * 28), 0.027, 0.998),
        ("scaled_linear", 999, Brightness(-0.43, 0.35, 28 * 28), 0.239, 0.832),
        ("linear", 999, Brightness(-0.1, 0.4, 64 * 64), 0.016, 0.987),
        ("scaled_linear", 999, Brightness(-0.1, 0.4, 64 * 64), 0.087, 0.497),
        ("squaredcos_cap_v2", 900, Brightness(-0.1, 0.4, 64 * 64), 0.097, 0.247),
    ],
)
def test_leaked_brightness_is_the_closed_form(kind, level, brightness, bias, factor):
    options = {"beta_start": 0.00085, "beta_end": 0.012} if kind == "scaled_linear" else {}
    schedule = NoiseSchedule.from_betas(make_betas(kind, **options))
    got = leaked_brightness(schedule, level, brightness)
    assert got == pytest.approx((bias, factor), abs=6e-4)
    alpha_bar, s = float(schedule.alpha_bar(level)), brightness.std * brightness.dimensions**0.5
    root = math.sqrt(alpha_bar * s * s + 1 - alpha_bar)
    assert got == pytest.approx(
        (
            -brightness.std
            * math.sqrt(alpha_bar)
            * brightness.mean
            * brightness.dimensions**0.5
            / root,
            1 / root,
        )
    )


@pytest.mark.parametrize("most", [1, 5, 2**20])
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_steps_that_are_put_together_are_those_of_the_sampler(count, most, fashion, monkeypatch):
    monkeypatch.setattr("ddim.doctor.symptoms._MOST_MAPS", most)
    schedule = NoiseSchedule.from_betas(make_betas())
    pairs = step_pairs(select_timesteps(1000, count, "quadratic"))
    pairs.append((999, 3))  # as diffusers' may begin elsewhere
    brightness = Brightness.of_images(fashion[:64, :, ::4, ::4])
    oracle, x = brightness.oracle(schedule), torch.zeros(len(brightness.modes.mean), 2).double()
    x[:, 1] = 1
    for pair in pairs:
        x = sample(oracle.denoise, x, [pair], schedule=schedule)
    wanted = brightness.change(x[:, 0], x[:, 1] - x[:, 0])
    assert predict_brightness(schedule, pairs, brightness) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.slow
def test_a_million_steps_of_a_million_levels_are_examined_at_once():
    """What a step at a time would take is a thousand seconds."""
    begun = time.process_time()
    config = {"num_train_timesteps": 10**6, "beta_start": 1e-7, "beta_end": 2e-5}
    for spacing in ("quadratic", "leading"):
        diagnose({**config, "timestep_spacing": spacing}, steps=10**6)
    assert time.process_time() - begun < 60


def test_many_steps_come_to_the_closed_form():
    schedule = NoiseSchedule.from_betas(make_betas())
    brightness = Brightness(-0.43, 0.35, 784)
    limit = leaked_brightness(schedule, 999, brightness)
    errors = [
        max(
            abs(a - b)
            for a, b in zip(
                predict_brightness(schedule, step_pairs(select_timesteps(1000, n)), brightness),
                limit,
                strict=True,
            )
        )
        for n in (10, 100, 1000)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.005


@pytest.fixture(scope="module")
def fashion():
    with np.load(DATA / "fashion_mnist_2048.npz") as file:
        images = next(file[k] for k in file.files if file[k].ndim >= 3)
    return torch.from_numpy(images).reshape(-1, 1, 28, 28).float().div(127.5).sub(1)


@pytest.mark.slow
def test_the_predicted_bias_is_what_the_prior_takes_from_the_embedded_models_samples(fashion):
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    prior, brightness = fit_prior([fashion]), Brightness.of_images(fashion)
    timesteps = [
        600,
        450,
        300,
        150,
        50,
    ]  # starts where much of the image is left, so that the bias is no matter of the last digit
    options = {"seeds": range(48), "timesteps": timesteps, "progress": False, "output_type": "pt"}
    plain, corrected = (
        pipe(**options, prior=p).images.mul(2).sub(1).mean((1, 2, 3)) for p in (None, prior)
    )
    bias, _ = predict_brightness(pipe.noise_schedule, step_pairs(timesteps), brightness)
    assert bias > 0.1
    taken = plain - corrected  # of the same seeds, so that most of the sampling error cancels
    assert float(taken.mean()) == pytest.approx(bias, abs=3 * float(taken.std()) / 48**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("start", [600, 800])
def test_the_brightness_of_the_embedded_models_samples_is_the_predicted_one(fashion, start):
    """In the absolute: beside the images' own brightness, within three standard errors of 160
    samples."""
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    prior, brightness = fit_prior([fashion]), Brightness.of_images(fashion)
    timesteps = [int(t) for t in np.linspace(start, 0, 13)[:-1].round()]
    options = {
        "seeds": range(160),
        "timesteps": timesteps,
        "order": 2,
        "progress": False,
        "output_type": "pt",
    }
    flat = dataclasses.replace(prior, image=None)
    made = [
        pipe(**options, prior=p).images.mul(2).sub(1).mean((1, 2, 3)) for p in (None, flat, prior)
    ]
    bias, _ = leaked_brightness(pipe.noise_schedule, start, brightness)
    error = 3 * brightness.std / 160**0.5
    off = [float(m.mean()) - brightness.mean for m in made]
    assert off[0] == pytest.approx(bias, abs=error)
    assert off[2] == pytest.approx(0, abs=error)
    # What the mean colour alone predicts, and mends, is another thing: brightness goes with the
    # rest of the image.
    alone, _ = leaked_brightness(pipe.noise_schedule, start, Brightness.of(prior, 784))
    assert alone > 1.8 * bias
    assert off[1] < off[2] - 0.02


def test_brightness_of_images_whose_pixels_are_independent_is_the_closed_form():
    """Then the constant component is independent of the rest, and the whole covariance tells
    nothing more."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 4, 4, generator=generator, dtype=torch.float64)
    images = (
        -0.3
        + 0.3 * torch.randn(4000, 1, 1, 1, generator=generator)
        + 0.1 * (noise - noise.mean((2, 3), keepdim=True))
    )
    measured = Brightness.of_images(images)
    alone = Brightness(measured.mean, measured.std, 16)
    assert (measured.mean, measured.std) == pytest.approx((-0.3, 0.3), abs=0.015)
    schedule = NoiseSchedule.from_betas(make_betas())
    for t in (400, 700, 999):
        assert leaked_brightness(schedule, t, measured) == pytest.approx(
            leaked_brightness(schedule, t, alone), rel=0.02
        )
    pairs = step_pairs([700, 300, 100])
    assert predict_brightness(schedule, pairs, measured) == pytest.approx(
        predict_brightness(schedule, pairs, alone), rel=0.02
    )


@pytest.mark.parametrize("count", [3, 40])
def test_brightness_of_images_is_that_of_their_whole_covariance(count):
    """Beside the same computed with matrices; of fewer images than pixels, the mean lies partly
    where none deviates from it."""
    generator = torch.Generator().manual_seed(count)
    pattern = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    images = -0.5 * pattern + 0.3 * torch.randn(
        count, 1, 4, 4, generator=generator, dtype=torch.float64
    )
    rows, schedule = images.flatten(1), NoiseSchedule.from_betas(make_betas())
    mean, one = rows.mean(0), torch.full((16,), 1 / 16, dtype=torch.float64)
    variances, basis = torch.linalg.eigh(rows.T.cov())
    for t in (500, 800):
        alpha_bar = float(schedule.alpha_bar(t))
        flow = (
            basis
            @ torch.diag(
                (
                    variances.clamp(min=0) / (alpha_bar * variances.clamp(min=0) + 1 - alpha_bar)
                ).sqrt()
            )
            @ basis.T
        )
        bias, factor = leaked_brightness(schedule, t, Brightness.of_images(images))
        assert bias == pytest.approx(-float(one @ flow @ mean) * alpha_bar**0.5, rel=1e-6)
        assert factor == pytest.approx(float((one @ flow).norm() / (rows @ one).std()), rel=1e-6)


def test_large_images_are_averaged_down_and_few_are_enough(fashion):
    schedule = NoiseSchedule.from_betas(make_betas())
    large = torch.nn.functional.interpolate(fashion[:500], scale_factor=3, mode="nearest")
    bias, factor = leaked_brightness(schedule, 600, Brightness.of_images(large))
    # Nine times as many pixels hide nine times less: the level at which as much is seen lies
    # higher.
    lower = int((schedule.snr(torch.arange(1000)) * 1 > 9 * schedule.snr(600)).sum())
    assert (bias, factor) == pytest.approx(
        leaked_brightness(schedule, lower, Brightness.of_images(fashion[:500])), abs=0.03
    )
    same = Brightness.of_images(torch.full((3, 1, 4, 4), 0.5))
    assert leaked_brightness(schedule, 800, same) == (
        pytest.approx(0, abs=1e-6),
        math.inf,
    )  # without spread the mean is known
    with pytest.raises(DDIMError, match="brightness of images needs at least 2; got 1"):
        Brightness.of_images(fashion[:1])


def test_a_mean_image_is_where_x_t_begins_and_must_fit(fashion):
    prior = fit_prior(fashion.split(100))
    assert torch.allclose(torch.tensor(prior.image), fashion.mean(0), atol=1e-4)
    z = torch.randn(4000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)
    x = prior.start(z, alpha_bar)
    assert torch.allclose(x.mean(0), 0.3**0.5 * fashion.mean(0), atol=0.07)
    assert torch.allclose(
        x - z - (x - z).mean((2, 3), keepdim=True),
        0.3**0.5 * (fashion.mean(0) - fashion.mean()),
        atol=1e-3,
    )
    assert DataPrior.from_dict(json.loads(json.dumps(dataclasses.asdict(prior)))) == prior
    assert (
        prior.describe()["image"]
        != dataclasses.replace(prior, image=((tuple(reversed(prior.image[0]))),)).describe()[
            "image"
        ]
    )
    with pytest.raises(DDIMError, match="mean image is 28x28; the model makes images of 8x8"):
        prior.start(z[:, :, :8, :8], alpha_bar)
    for image, message in [
        ([[[0.0]]], "of the mean colour"),
        ([[[math.nan]]], "must be finite"),
        ([[[0.0, 1.0], [0.0]]], "one length"),
    ]:
        with pytest.raises(DDIMError, match=message):
            DataPrior.from_dict({"mean": [0.5], "covariance": [[1.0]], "image": image})


@pytest.mark.parametrize("alpha_bar", [0.0, 0.0047, 0.5])
def test_the_prior_draws_what_it_says(alpha_bar):
    prior = DataPrior((-0.4, 0.1, 0.3), ((0.1, 0.05, 0.0), (0.05, 0.2, 0.02), (0.0, 0.02, 0.05)))
    z = torch.randn(20_000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = prior.start(z, torch.tensor(alpha_bar, dtype=torch.float64))
    colour = x.mean((2, 3))
    assert torch.allclose(colour.mean(0), alpha_bar**0.5 * torch.tensor(prior.mean), atol=0.01)
    expected = alpha_bar * torch.tensor(prior.covariance) + (1 - alpha_bar) / 16 * torch.eye(3)
    assert torch.allclose(colour.T.cov(), expected, atol=0.005)
    assert torch.allclose(x - colour[..., None, None], z - z.mean((2, 3), keepdim=True), atol=1e-5)
    if alpha_bar == 0:
        assert torch.allclose(x, z, atol=1e-6)


def test_the_prior_of_images_is_their_mean_and_covariance_and_bad_ones_are_refused():
    images = torch.rand(50, 3, 4, 4) * 2 - 1
    prior = fit_prior(images.split(20))
    assert torch.allclose(torch.tensor(prior.covariance), images.mean((2, 3)).T.cov(), atol=1e-6)
    assert DataPrior.from_dict(json.loads(json.dumps(dataclasses.asdict(prior)))) == prior
    for content, message in [
        ({"mean": [0]}, "needs the keys mean and covariance"),
        ({"mean": [0, 0], "covariance": [[1]]}, "as many rows"),
        ({"mean": [0], "covariance": [[-1]]}, "no negative eigenvalue"),
        ({"mean": [math.nan], "covariance": [[1]]}, "must be finite"),
    ]:
        with pytest.raises(DDIMError, match=message):
            DataPrior.from_dict(content)
    with pytest.raises(DDIMError, match="at least 2 images"):
        fit_prior([])
    with pytest.raises(DDIMError, match="3 channels; the model makes images of 1"):
        prior.start(torch.zeros(1, 1, 2, 2), torch.tensor(0.1))


class ImageOracle:
    """A perfect network for images whose brightness is Gaussian and whose pixels are so too around
    it."""

    def __init__(self, schedule, kind, *, mean=-0.3, bright=0.3, std=0.2, pixels=64):
        self.schedule, self.kind = schedule, kind
        self.flat = GaussianOracle(schedule, 0.0, std)
        self.dc = GaussianOracle(schedule, mean * pixels**0.5, bright * pixels**0.5)
        self.root = pixels**0.5

    def __call__(self, x_t, t):
        t = int(t[0])
        centre = x_t.mean((2, 3), keepdim=True)
        rest, dc = self.flat.denoise(x_t - centre, t), self.dc.denoise(centre * self.root, t)
        x0, eps = (a + b / self.root for a, b in zip(rest, dc, strict=True))
        return from_x0_eps(
            x0, eps, alpha_bar_t=self.schedule.alpha_bar(t), prediction_type=self.kind
        )


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, 1, 8, 8, generator=generator)
    return (
        -0.3
        + 0.3 * torch.randn(64, 1, 1, 1, generator=generator)
        + 0.2 * (noise - noise.mean((2, 3), keepdim=True))
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("config", [LEAKY, SOUND], ids=["leaky", "zero"])
def test_a_probe_tells_the_types_apart_and_sees_a_trained_end(kind, config, images):
    schedule = levels_of(complete(config))
    found = probe(ImageOracle(schedule, kind), schedule, images)
    assert found.prediction_type == kind
    assert found.trained_at_end is (None if kind == "epsilon" and config is SOUND else True)


def test_a_probe_sees_that_a_leaky_model_was_never_shown_pure_noise(images):
    zero = levels_of(complete(SOUND))
    uneven = images + 3 * (images.mean((1, 2, 3), keepdim=True) + 0.3)
    found = probe(ImageOracle(levels_of(complete(LEAKY)), "v_prediction", bright=1.2), zero, uneven)
    assert found.trained_at_end is False
    assert found.evidence["brightness_following_noise"] > 0.2


def test_a_probe_sees_a_level_that_was_left_out_and_a_network_that_says_nothing(images):
    schedule = levels_of(complete(LEAKY))
    network = ImageOracle(schedule, "epsilon")
    assert (
        probe(
            lambda x, t: torch.zeros_like(x) if int(t[0]) == 999 else network(x, t),
            schedule,
            images,
        ).trained_at_end
        is False
    )
    assert probe(lambda x, t: torch.zeros_like(x), schedule, images).prediction_type is None


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("count", [8, 64])
def test_a_probe_tells_which_schedule_a_network_was_trained_with(kind, count, images):
    """Of two configurations of the same checkpoint only one is right, and no file says which."""
    leaky, zero = (levels_of(complete(config)) for config in (LEAKY, SOUND))
    uneven = (images + 3 * (images.mean((1, 2, 3), keepdim=True) + 0.3))[:count]
    for trained, is_zero in ((leaky, False), (zero, True)):
        found = probe(ImageOracle(trained, kind, bright=1.2), leaky, uneven)
        assert (found.prediction_type, found.zero_terminal_snr) == (kind, is_zero)
        assert found.evidence["leak_in_answers"] == pytest.approx(1 - is_zero, abs=0.2)


def test_a_probe_does_not_tell_what_no_answer_shows(images):
    leaky = levels_of(complete(LEAKY))
    assert probe(ImageOracle(leaky, "epsilon"), leaky, images).zero_terminal_snr is None
    faint = NoiseSchedule.from_betas(make_betas("linear", 1000))
    assert probe(ImageOracle(faint, "v_prediction"), faint, images).zero_terminal_snr is None
    network = ImageOracle(leaky, "v_prediction")

    def early(x_t, t):
        """As after little training: the last levels are answered like those before them."""
        return network(x_t, t.clamp(max=800))

    found = probe(early, leaky, images)
    assert found.zero_terminal_snr is None
    assert found.evidence["leak_in_answers"] > 1.3


def test_weights_without_a_record_may_have_been_trained_with_zero_snr():
    config = {**SOUND, "rescale_betas_zero_snr": False}
    open_ = diagnose(config, steps=20)
    otherwise = "unless the weights were trained otherwise than the configuration says"
    assert f"{otherwise} (--data PICTURES --probe asks them)." in open_.verdict
    (leak,) = (f for f in open_.findings if f.code == "DDIM001")
    assert leak.retrain
    assert "No record says how the weights were trained" in leak.advice
    assert "--data PICTURES --probe asks them" in leak.advice
    undecided = diagnose(config, steps=20, probe=_said(None))
    assert undecided.verdict.endswith(f"{otherwise}.")
    for told in ({"model": ModelFacts(training=config)}, {"probe": _said(False)}):
        (leak,) = (f for f in diagnose(config, steps=20, **told).findings if f.code == "DDIM001")
        assert "No record" not in leak.advice
    epsilon = diagnose(LEAKY, steps=20)
    assert otherwise in epsilon.verdict
    (leak,) = (f for f in epsilon.findings if f.code == "DDIM001")
    wanted = "set rescale_betas_zero_snr=True, prediction_type='v_prediction' and train nothing"
    assert wanted in leak.advice
    asked = Probe(ERRORS, "epsilon", True, {})
    assert otherwise not in diagnose(LEAKY, steps=20, probe=asked).verdict


def _said(zero):
    return Probe(ERRORS, "v_prediction", True, {"leak_in_answers": 0.1}, zero)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("told", ["record", "probe"])
def test_weights_that_were_trained_with_zero_snr_need_no_training(kind, told):
    config = {**SOUND, "rescale_betas_zero_snr": False, "prediction_type": kind}
    known = {"model": ModelFacts(training=SOUND)} if told == "record" else {"probe": _said(True)}
    diagnosis = diagnose(config, steps=20, **known)
    assert not [f.code for f in diagnosis.findings if f.retrain and f.fix]
    fixed = diagnosis.fixed()
    assert (fixed["prediction_type"], fixed["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert diagnosis.verdict.endswith("; the line below mends it.")
    assert "DDIM019" in diagnosis.verdict


def test_a_probe_of_the_embedded_model(fashion):
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    found = probe(lambda x, t: pipe.unet(x, t).sample, pipe.noise_schedule, fashion[:32])
    assert found.prediction_type == "epsilon"
    assert found.errors["epsilon"] < 0.2 < min(found.errors["sample"], found.errors["v_prediction"])
    assert found.trained_at_end is True


def test_fixes_that_need_training_are_left_out():
    diagnosis = diagnose({**SD, "set_alpha_to_one": False, "_diffusers_version": "0.1"}, steps=20)
    assert diagnosis.has("warning")
    assert diagnosis.fixed() == {
        **diagnosis.config,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    assert [f.code for f in diagnosis.findings if f.retrain] == ["DDIM001"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_strat": 0.1}, "unknown key 'beta_strat'; did you mean 'beta_start'?"),
        ({"colour": 1}, "unknown key 'colour'; no scheduler of this family has it"),
        ({"beta_end": math.nan}, "beta_end must be a number from 0 to 1; got nan"),
        ({"use_karras_sigma": True}, "did you mean 'use_karras_sigmas'?"),
        (
            {"_class_name": "UNet2DModel"},
            (
                "this is the configuration of a UNet2DModel, and not of a scheduler; give a "
                "scheduler_config.json"
            ),
        ),
        ({"beta_start": 0, "beta_end": 0}, "adds no noise: all its betas are 0"),
        ({"fitted_timesteps": [5]}, "fitted_timesteps must be a list of lists of levels"),
        (
            {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 0},
            "snr_shift_scale must be a finite number above 0",
        ),
        ({"beta_end": 2.0}, "beta_end must be a number from 0 to 1; got 2.0"),
        (
            {"trained_betas": [0.1, math.nan]},
            r"trained_betas\[1\] must be a number from 0 to 1; got nan",
        ),
        (
            {"trained_betas": "many"},
            "trained_betas must be null or a list of numbers from 0 to 1; got 'many'",
        ),
        (
            {"num_train_timesteps": "1000"},
            "num_train_timesteps must be a whole number from 1 to 1000000; got '1000'",
        ),
        ({"clip_sample": 1}, "clip_sample must be true or false; got 1"),
        ({"beta_schedule": "lines"}, "beta_schedule must be one of"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"timestep_spacing": "wide"}, "timestep_spacing must be one of"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(DDIMError, match=message):
        diagnose(config)


def test_every_key_of_every_scheduler_that_ddim_can_walk_is_known():
    names = [*_FAMILY, "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]
    classes = [
        found
        for name in names
        if (found := getattr(diffusers, name, None)) is not None and not hasattr(found, "_backends")
    ]
    assert len(classes) > 20
    keys = {key for found in classes for key in inspect.signature(found.__init__).parameters} - {
        "self",
        "args",
        "kwargs",
    }
    assert keys <= {*complete({}), *OTHER_KEYS}


VALUES = {
    "num_train_timesteps": [1, 2, 10, 0, -1, True, "x", 1.5, None],
    "beta_start": [0, 1e-3, 1.0, math.nan, -1, "a"],
    "beta_end": [0.02, 1.0, math.inf, None],
    "beta_schedule": [
        "linear",
        "scaled_linear",
        "squaredcos_cap_v2",
        "sigmoid",
        "laplace",
        "x",
        None,
    ],
    "trained_betas": [
        None,
        [0.0] * 5,
        [1.0] * 5,
        [0.1],
        [0.1, 0.1, 1.0],
        [0.0, 0.1, 0.2],
        [[0.1]],
        [True],
        [],
        "x",
        [1e-300] * 4,
    ],
    "clip_sample": [True, False, None],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1, -5, 10**6],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction", "other", None],
    "thresholding": [True, False],
    "sample_max_value": [1.0, 2, 0.5, -1],
    "timestep_spacing": ["leading", "linspace", "trailing", "quadratic", "q", None],
    "rescale_betas_zero_snr": [True, False],
    "_class_name": [
        "DDIMScheduler",
        "DDIMInverseScheduler",
        "CogVideoXDDIMScheduler",
        "UNet2DModel",
        None,
        3,
    ],
    "snr_shift_scale": [3.0, 0, "x", math.nan],
    "fitted_timesteps": [None, [[5, 1]], [[1.5]], "abc", [[]]],
}
TRAINED = {**SOUND, "num_train_timesteps": 5}
OPTIONS = {
    "steps": [1, 2, 5, 100, 0, -1, None, 1.5, "x", True],
    "spacing": [None, "leading", "trailing", "quadratic", "other"],
    "timesteps": [None, [2, 1], [], [9, -1], [5.5], [1, 2], [math.inf]],
    "eta": [None, 0.0, 1.0, 1.5, -1, "sigma-hat", math.nan],
    "model": [
        ModelFacts(),
        ModelFacts(latent=True, num_train_timesteps=10),
        ModelFacts(training={"prediction_type": "sample"}),
        ModelFacts(training=TRAINED),
        ModelFacts(shape=(1, 1, 1)),
    ],
    "brightness": [None, Brightness(0.0, 0.1, 1)],
    "probe": [
        None,
        Probe(ERRORS, "epsilon", True, {}),
        Probe(ERRORS, "v_prediction", False, EPSILON_AT_END),
    ],
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    *(
        st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in space.items()})
        for space in (VALUES, OPTIONS)
    )
)
def test_whatever_is_given_is_diagnosed_or_refused(config, options):
    with contextlib.suppress(DDIMError):
        diagnosis = diagnose({"num_train_timesteps": 5, **config}, **options)
        json.dumps(
            [dataclasses.asdict(f) for f in diagnosis.findings] + [diagnosis.summary],
            allow_nan=False,
        )
        again = diagnose(diagnosis.fixed(), **{**options, "spacing": None})
        assert again.fixed() == diagnosis.fixed()


def test_the_tables_in_the_documents_are_current():
    module = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "doctor_tables.py"))
    text = module["PAGE"].read_text()
    assert module["page"](text) == text, "run: python docs/doctor_tables.py"
