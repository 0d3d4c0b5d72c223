"""A configuration says what it is of, what cannot be meant in it, and what was given."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from tests.conftest import edit, tiny_unet

from ddim.configuration import (
    DEFAULTS,
    check_levels,
    check_options,
    foreign_family,
    given_options,
    noise_schedule,
    spelled_betas,
)
from ddim.core.schedule import make_betas
from ddim.errors import CheckpointError, DDIMError
from ddim.models.checkpoints import read_scheduler_config
from ddim.scheduler import DDIMScheduler, as_ddim

FILES = sorted((Path(__file__).parent / "data" / "scheduler_configs").glob("*.json"))
FOREIGN = ("FlowMatch", "EDM", "Wuerstchen", "CogVideoX")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_well_known_checkpoints_are_accepted_or_of_another_family(path):
    config = json.loads(path.read_text())
    assert (foreign_family(config) is not None) == any(
        word in config["_class_name"] for word in FOREIGN
    )
    if foreign_family(config) is None:
        check_options(config)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"]
)
def test_a_flow_matching_scheduler_in_memory_is_known_by_its_options(name):
    config = getattr(diffusers, f"{name}Scheduler")().config
    assert "_class_name" not in config
    assert "a scheduler of a flow-matching model" in foreign_family(config)


@pytest.mark.parametrize(
    "name",
    ["EDMEuler", "EDMDPMSolverMultistep", "CogVideoXDDIM", "CMStochasticIterative", "KarrasVe"],
)
def test_other_families_in_memory_are_known_by_their_options(name):
    assert "no noise schedule of discrete betas" in foreign_family(
        getattr(diffusers, f"{name}Scheduler")().config
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a class of diffusers makes it
def test_the_family_in_memory_is_accepted_and_so_is_a_part_of_a_configuration():
    for compatible in diffusers.DDIMScheduler().compatibles:
        if not getattr(compatible, "_backends", None) and not any(
            word in compatible.__name__ for word in FOREIGN
        ):
            assert foreign_family(compatible().config) is None
    for config in (
        {},
        {"num_train_timesteps": 500},
        {"variance_type": "learned"},
        {"_class_name": None, "beta_end": 0.01},
    ):
        assert foreign_family(config) is None
    assert "no noise schedule" in foreign_family({"_class_name": ["odd"]})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("_class_name", None, "_class_name must be the name of a scheduler; got null."),
        (
            "num_train_timesteps",
            "1000",
            "num_train_timesteps must be a whole number from 1 to 1000000; got '1000'.",
        ),
        ("num_train_timesteps", 0, "from 1 to 1000000; got 0."),
        ("num_train_timesteps", 10**9, "from 1 to 1000000; got 1000000000."),
        ("num_train_timesteps", None, "from 1 to 1000000; got null."),
        ("num_train_timesteps", True, "from 1 to 1000000; got True."),
        ("beta_start", "0.1", "beta_start must be a number from 0 to 1; got '0.1'."),
        ("beta_end", float("nan"), "beta_end must be a number from 0 to 1; got nan."),
        ("beta_schedule", None, "beta_schedule must be a name, such as linear; got null."),
        ("beta_end", 2, "beta_end must be a number from 0 to 1; got 2."),
        ("trained_betas", [0.1, 1.5], "null or a list of numbers from 0 to 1; got [0.1, 1.5]."),
        (
            "trained_betas",
            "abc",
            "trained_betas must be null or a list of numbers from 0 to 1; got 'abc'.",
        ),
        ("trained_betas", [], "null or a list of numbers from 0 to 1; got []."),
        ("trained_betas", [0.1, None], "null or a list of numbers from 0 to 1; got [0.1, None]."),
        ("trained_betas", ["x" * 200], "got ['xxx"),
        ("steps_offset", "1", "steps_offset must be a whole number; got '1'."),
        ("steps_offset", 0.5, "steps_offset must be a whole number; got 0.5."),
        ("steps_offset", 5000, "steps_offset must lie in [0, 1000], the levels of num_train_"),
        ("steps_offset", -1, "steps_offset must lie in [0, 1000]"),
        ("fitted_timesteps", "abc", "fitted_timesteps must be a list of lists of levels"),
        ("clip_sample", "yes", "clip_sample must be true or false; got 'yes'."),
        ("set_alpha_to_one", None, "set_alpha_to_one must be true or false; got null."),
        ("clip_sample_range", 0, "clip_sample_range must be a number above 0; got 0."),
        (
            "dynamic_thresholding_ratio",
            2,
            "dynamic_thresholding_ratio must be a number from 0 to 1; got 2.",
        ),
        (
            "prediction_type",
            None,
            "prediction_type must be one of epsilon, sample, v_prediction; got null.",
        ),
        (
            "timestep_spacing",
            ["leading"],
            (
                "timestep_spacing must be one of leading, linspace, trailing, quadratic; got "
                "['leading']."
            ),
        ),
    ],
)
def test_values_that_cannot_be_meant_are_refused(option, value, message):
    with pytest.raises(DDIMError) as caught:
        check_options({option: value, "unknown": "anything"})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_betas_that_lack_levels_are_refused_where_a_model_is_opened(tmp_path):
    message = (
        "trained_betas has 2 levels, and num_train_timesteps says 1000: levels that are not there "
        "would be visited; set num_train_timesteps to 2."
    )
    short = {"trained_betas": [0.1, 0.3]}
    for use in (check_levels, as_ddim, lambda c: as_ddim(diffusers.DDPMScheduler(**c))):
        with pytest.raises(DDIMError, match=message):
            use(short)
    check_levels({**short, "num_train_timesteps": 2})
    assert len(as_ddim({**short, "num_train_timesteps": 2})) == 2
    check_levels({"trained_betas": [0.1] * 1001})
    diffusers.DDIMPipeline(tiny_unet(), diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    edit(path, **short)
    with pytest.raises(CheckpointError, match=f"cannot be used: {message} Correct that file"):
        read_scheduler_config(tmp_path)


def test_an_option_that_is_not_at_its_default_was_given():
    by_position = diffusers.DDPMScheduler(500)
    assert "num_train_timesteps" in by_position.config["_use_default_values"]
    unset = given_options(by_position.config, diffusers.DDPMScheduler)["_use_default_values"]
    assert set(by_position.config["_use_default_values"]) - set(unset) == {"num_train_timesteps"}
    assert given_options({"beta_end": 0.5}, diffusers.DDPMScheduler) == {"beta_end": 0.5}


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, DDIMScheduler])
def test_the_defaults_are_those_of_the_schedulers(scheduler):
    parameters = inspect.signature(scheduler).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    "config",
    [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "laplace", "set_alpha_to_one": False}],
)
def test_the_levels_of_a_configuration_are_those_of_its_scheduler(config):
    described, used = noise_schedule(config), DDIMScheduler(**config).noise_schedule
    assert torch.equal(described.alphas_cumprod, used.alphas_cumprod)
    assert described.final_alpha_cumprod == used.final_alpha_cumprod


def test_betas_are_spelled_where_diffusers_does_not_know_their_schedule():
    assert spelled_betas({}) is None
    assert spelled_betas({"trained_betas": (0.1, 0.2)}) == [0.1, 0.2]
    spelled = spelled_betas({"beta_schedule": "sigmoid", "num_train_timesteps": 5})
    assert spelled == make_betas("sigmoid", 5).tolist()


EULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_type": "continuous"},
        {"sigma_data": 0.5},
        {"sigma_min": 0.002, "sigma_max": 700.0},
        {"sigma_max": 80.0, "beta_start": 0.00085, "beta_end": 0.012},
    ],
)
def test_continuous_levels_are_told_by_the_options_of_a_familiar_class(options):
    name, value = next(iter(options.items()))
    for config in (options, {**EULER, **options}):
        config = {"beta_schedule": "linear", **config}
        assert f"of continuous noise levels ({name} {value})" in foreign_family(config)
        with pytest.raises(DDIMError, match="of continuous noise levels"):
            DDIMScheduler.from_config(config)


def test_options_of_samplers_for_discrete_levels_are_no_other_family():
    stable = {**EULER, "beta_start": 0.00085, "beta_end": 0.012, "timestep_type": "discrete"}
    for options in ({}, {"sigma_min": None}, {"sigma_min": 0.0292, "sigma_max": 14.6146}):
        assert foreign_family({**stable, **options}) is None


@pytest.mark.parametrize("name", ["IPNDM", "UnCLIP", "DDPMWuerstchen", "ScoreSdeVe", "SCM"])
def test_a_scheduler_in_memory_without_betas_is_of_another_family(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    assert "no noise schedule of discrete betas" in foreign_family(scheduler.config)
    for use in (as_ddim, lambda scheduler: DDIMScheduler.from_config(scheduler.config)):
        with pytest.raises(DDIMError, match="no noise schedule of discrete betas"):
            use(scheduler)


def test_rectified_flow_is_told_by_a_class_that_diffusers_does_not_have():
    config = {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000}
    with pytest.raises(DDIMError, match="of a flow-matching model"):
        DDIMScheduler.from_config(config)


@pytest.mark.parametrize(
    "name", ["LCM", "TCD", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DDPM"]
)
@pytest.mark.parametrize("convert", [as_ddim, lambda s: DDIMScheduler.from_config(s.config)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # classes of diffusers make it
def test_a_scheduler_in_memory_keeps_its_own_levels(name, convert):
    theirs = getattr(diffusers, f"{name}Scheduler")()
    ours = convert(theirs)
    for option in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert ours.config[option] == theirs.config[option]
    assert ours.config.clip_sample == theirs.config.get("clip_sample", True)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
