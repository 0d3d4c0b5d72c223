"""What cannot work is refused in words, and what is odd is mentioned."""

import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from tests.scheduler.helpers import distance, randn

from ddim.core.noise import make_generators
from ddim.errors import DDIMError
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler


def test_a_step_says_what_is_wrong():
    x = randn(2, 3, 4)
    scheduler = DDIMScheduler()
    with pytest.raises(
        ValueError,
        match=(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating "
            "the scheduler"
        ),
    ):
        scheduler.step(x, 5, x)
    scheduler.set_timesteps(10)
    for t in (-3, -1, 1000):
        with pytest.raises(
            DDIMError,
            match=(
                rf"timestep must lie in \[0, 1000\), the levels the model was trained on; got {t}"
            ),
        ):
            scheduler.step(x, t, x)
    with pytest.raises(DDIMError, match="a timestep must lie in .* got 1000"):
        scheduler.step(x, torch.tensor(1000), x)
    with pytest.raises(DDIMError, match="a timestep must lie in .* got -3"):
        scheduler.step(x, torch.tensor(-3), x)
    with pytest.raises(DDIMError, match="a timestep must be a whole number.* got 2.5"):
        scheduler.step(x, 2.5, x)
    for t in ([500, 500, 500], [[500, 500]]):
        with pytest.raises(
            DDIMError, match="one timestep, or one for each of the 2 samples; got shape"
        ):
            scheduler.step(x, torch.tensor(t), x)
    for shape in ((1, 3, 4), (2, 9, 4), (2, 3, 8), (2, 3)):
        with pytest.raises(DDIMError, match=r"must have the sample's shape \[2, 3, 4\].*got \["):
            scheduler.step(torch.zeros(shape), 900, x)
    for generators in ([], [1, 2, 3]):
        with pytest.raises(
            DDIMError, match=f"one for each of the 2 samples; got {len(generators)}"
        ):
            scheduler.step(x, 900, x, 1.0, generator=make_generators(generators))
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(x, 900, x, 1.0, generator=torch.Generator(), variance_noise=x)
    scheduler.config.prediction_type = "flow"  # as pipelines write
    with pytest.raises(
        DDIMError, match="prediction_type must be one of epsilon, sample, v_prediction; got 'flow'"
    ):
        scheduler.step(x, 900, x)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_setting_timesteps_says_what_is_wrong(cls):
    scheduler = cls()
    for count in (0, -5, 2.5, "50", True):
        with pytest.raises(
            DDIMError, match="num_inference_steps must be a whole number from 1 to 1000.* got"
        ):
            scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="`num_inference_steps`: 1001 cannot be larger than 1000"):
        scheduler.set_timesteps(1001)
    with pytest.raises(DDIMError, match="either num_inference_steps or a list of timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(DDIMError, match="either num_inference_steps or a list of timesteps"):
        scheduler.set_timesteps(2, timesteps=[5, 4])
    for levels, message in (
        ([], "empty list"),
        ([5, 5], "repeat"),
        ([5, 9, 1], "must fall"),
        ([1000, 1], r"lie in \[0, 1000\)"),
        ([5, -1], r"lie in"),
        ([5.5, 1], "whole"),
        ([float("nan")], "whole numbers; got nan"),
        (["a", "b"], "whole numbers; got 'a'"),
        ([None], "whole numbers; got None"),
        (5, "one list of levels"),
        (torch.tensor([[5, 3]]), "one list of levels"),
    ):
        with pytest.raises(DDIMError, match=message):
            scheduler.set_timesteps(timesteps=levels)
    with pytest.raises(
        DDIMError,
        match=(
            "timestep_spacing must be one of leading, linspace, trailing, quadratic; got 'karras'"
        ),
    ):
        cls(timestep_spacing="karras")
    with pytest.raises(DDIMError, match="prediction_type must be one of .* got 'noise'"):
        cls(prediction_type="noise")
    with pytest.raises(DDIMError, match="beta_schedule must be one of .* got 'cosine'"):
        cls(beta_schedule="cosine")
    with pytest.raises(DDIMError, match="num_train_timesteps must be a whole number from 1"):
        cls(0)


def test_what_is_odd_but_accepted_by_diffusers_works_and_is_mentioned(said):
    x = randn(1, 3, 2, 2)
    short = DDIMScheduler(trained_betas=[0.1, 0.3])
    with pytest.raises(DDIMError, match="trained_betas has 2 levels, and num_train_timesteps says"):
        short.set_timesteps(50)
    short.set_timesteps(timesteps=[1, 0])
    assert torch.isfinite(short.step(x, 1, x).prev_sample).all()
    with pytest.raises(DDIMError, match=r"timestep must lie in \[0, 2\)"):
        short.step(x, 980, x)
    steep = DDIMScheduler(beta_end=2)
    steep.set_timesteps(50)
    assert torch.isfinite(steep.step(x, 0, x).prev_sample).all()
    low = DDIMScheduler(thresholding=True, sample_max_value=0.5)
    theirs = diffusers.DDIMScheduler(thresholding=True, sample_max_value=0.5)
    for scheduler in (low, theirs):
        scheduler.set_timesteps(50)
    assert (
        distance(
            low.step(x, 500, x).pred_original_sample, theirs.step(x, 500, x).pred_original_sample
        )
        < 2e-6
    )
    DDIMInverseScheduler(thresholding=True, sample_max_value=2.0, beta_strat=1)
    wanted = (
        "trained_betas has 2 levels",
        "Some betas lie outside",
        "sample_max_value=0.5",
        "ignores: beta_strat, sample_max_value, thre",
    )
    for words in wanted:
        assert sum(words in line for line in said) == 1, words


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("timestep_spacing", "trail", "got 'trail'; did you mean 'trailing'?"),
        ("timestep_spacing", "lead", "got 'lead'; did you mean 'leading'?"),
        ("prediction_type", "v", "got 'v'; did you mean 'v_prediction'?"),
        ("prediction_type", "v-prediction", "did you mean 'v_prediction'?"),
        ("beta_start", "a", "beta_start must be a finite number; got 'a'."),
        ("beta_end", float("nan"), "beta_end must be a finite number; got nan."),
        ("trained_betas", 5, "trained_betas must be null or a list of finite numbers; got 5."),
        ("rescale_betas_zero_snr", "false", "must be true or false; got 'false'."),
        ("clip_sample_range", -1.0, "clip_sample_range must be a number above 0; got -1.0."),
        ("steps_offset", 0.5, "steps_offset must be a whole number; got 0.5."),
        ("steps_offset", 5000, "steps_offset must lie in [0, 1000], the levels of num_train_time"),
        ("fitted_timesteps", [9, 5], "must be a list of lists of levels, such as [[999, 500], [99"),
        ("num_train_timesteps", 10.5, "a whole number from 1 to 1000000; got 10.5."),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_when_it_is_set(cls, option, value, message):
    for use in (
        lambda: cls(**{option: value}),
        lambda: cls.from_config({option: value}),
        lambda: cls.from_config({}, **{option: value}),
        lambda: cls().register_to_config(**{option: value}),
    ):
        with pytest.raises(DDIMError, match=re.escape(message)):
            use()


def test_values_of_numpy_and_torch_are_plain_ones():
    made = DDIMScheduler(
        np.int64(100), np.float64(0.001), torch.tensor(0.5), clip_sample=np.bool_(False)
    )
    assert (made.config.num_train_timesteps, made.config.beta_end) == (100, 0.5)
    assert made.config.clip_sample is False
    DDIMScheduler(beta_end=2)  # no schedule, as diffusers takes it


def test_an_option_that_there_is_not_is_refused_with_the_one_that_was_meant(said):
    for option, meant in (
        ("timestep_spaceing", "timestep_spacing"),
        ("clip_samples", "clip_sample"),
        ("solver_order", "multistep_order"),
    ):
        with pytest.raises(
            TypeError, match=f"DDIMScheduler has no option '{option}'; did you mean '{meant}'"
        ):
            DDIMScheduler(**{option: 2})
    with pytest.raises(TypeError, match="DDIMScheduler has no option 'qqq'; it has num_train_time"):
        DDIMScheduler(qqq=1)
    DDIMInverseScheduler(clip_samples=False)  # taken, as in diffusers
    assert said == ["DDIMInverseScheduler ignores: clip_samples; did you mean 'clip_sample'?"]


def test_arguments_of_a_step_that_are_swapped_or_not_unpacked_are_told():
    order = r"The order is step\(model_output, timestep, sample\)"
    scheduler, m, t = DDIMScheduler(), torch.zeros(1, 2, 4, 4), torch.tensor(900)
    inverse = DDIMInverseScheduler()
    output = UNet2DOutput(sample=m)
    for ours in (scheduler, inverse):
        ours.set_timesteps(10)
        for arguments, message in (
            ((m, m, t), f"must have the sample's shape .* {order}"),
            ((m, m, 900), f"sample must be a tensor; got 900. {order}"),
            ((900, m, m), f"model_output must be a tensor; got 900. {order}"),
            ((t, m, m), f"must have the sample's shape .* {order}"),
            ((output, t, m), "got a UNet2DOutput. Take the tensor out of what the network return"),
            (((m,), t, m), "got a tuple. Take the tensor out"),
            ((m.numpy(), t, m), "got a NumPy array of .*. torch.from_numpy"),
            (
                (m, t, m.numpy()),
                "sample must be a tensor; got a NumPy array of .*. torch.from_numpy",
            ),
        ):
            with pytest.raises(DDIMError, match=message):
                ours.step(*arguments)


def test_an_integer_sample_is_computed_with_as_in_diffusers():
    sample = torch.randint(-3, 4, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    m = randn(1, 2, 4, 4)
    for options in ({}, {"clip_sample": False}):
        ours, theirs = DDIMScheduler(**options), diffusers.DDIMScheduler(**options)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
        found, expected = (s.step(m, 500, sample).prev_sample for s in (ours, theirs))
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected)
