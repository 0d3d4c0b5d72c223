"""What the tests of diffusers' own schedulers demand, demanded of ours, with the stock classes
beside them as the reference.

A dummy model ``x t / (t + 1)`` on a fixed sample runs the loops; sums and means are reference
numbers that diffusers keeps."""

import inspect
import tempfile

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging

from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

BOTH = [pytest.param(DDIMScheduler, id="ours"), pytest.param(diffusers.DDIMScheduler, id="theirs")]
BATCHED = [
    pytest.param(DDIMScheduler, id="ours"),
    pytest.param(diffusers.DDIMParallelScheduler, id="theirs"),
]
INVERSES = [
    pytest.param(DDIMInverseScheduler, id="ours"),
    pytest.param(diffusers.DDIMInverseScheduler, id="theirs"),
]
OURS = [DDIMScheduler, DDIMInverseScheduler]
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
}


def deterministic_sample():
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def deterministic_noise():
    count = 4 * 3 * 8 * 8
    return torch.arange(count).flip(-1).reshape(3, 8, 8, 4).div(count).permute(3, 0, 1, 2)


def model(sample, t):
    t = (
        t.reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        if isinstance(t, torch.Tensor)
        else t
    )
    return sample * t / (t + 1)


def make(cls, **options):
    return cls(**{**CONFIG, **options})


def full_loop(cls, **options):
    scheduler, sample = make(cls, **options), deterministic_sample()
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        residual = model(sample, t)
        sample = (
            scheduler.step(residual, t, sample)
            if "Inverse" in cls.__name__
            else scheduler.step(residual, t, sample, 0.0)
        ).prev_sample
    return sample


def check(sample, total, mean):
    assert float(sample.abs().sum()) == pytest.approx(total, abs=1e-2)
    assert float(sample.abs().mean()) == pytest.approx(mean, abs=1e-3)


# Reference numbers


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("options", "total", "mean"),
    [
        ({}, 172.0067, 0.223967),
        ({"prediction_type": "v_prediction"}, 52.5302, 0.0684),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784, 0.1941),
    ],
    ids=str,
)
def test_full_loops(cls, options, total, mean):
    check(full_loop(cls, **options), total, mean)


@pytest.mark.parametrize("cls", BOTH)
def test_full_loop_that_starts_from_added_noise(cls):
    scheduler = make(cls)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[8 * scheduler.order :]
    sample = scheduler.add_noise(deterministic_sample(), deterministic_noise(), timesteps[:1])
    for t in timesteps:
        sample = scheduler.step(model(sample, t), t, sample, 0.0).prev_sample
    check(sample, 354.5418, 0.4616)


@pytest.mark.parametrize("cls", INVERSES)
@pytest.mark.parametrize(
    ("options", "total", "mean"),
    [
        ({}, 671.6816, 0.8746),
        ({"prediction_type": "v_prediction"}, 1394.2185, 1.8154),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 539.9622, 0.7031),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 542.6722, 0.7066),
    ],
    ids=str,
)
def test_inverse_full_loops(cls, options, total, mean):
    check(full_loop(cls, **options), total, mean)


@pytest.mark.parametrize("cls", BATCHED)
def test_batch_step_no_noise(cls):
    scheduler = make(cls)
    scheduler.set_timesteps(10)
    sample = deterministic_sample()
    samples = torch.stack([sample, sample + 0.1, sample - 0.1])
    timesteps = torch.arange(1000)[:3, None].repeat(1, samples.shape[1])
    residual = model(samples.flatten(0, 1), timesteps.flatten(0, 1))
    moved = scheduler.batch_step_no_noise(
        residual, timesteps.flatten(0, 1), samples.flatten(0, 1), 0.0
    )
    check(moved, 1147.7904, 0.4982)


@pytest.mark.parametrize("cls", BOTH)
def test_variance(cls):
    scheduler = make(cls)
    expected = {
        (0, 0): 0.0,
        (420, 400): 0.14771,
        (980, 960): 0.32460,
        (487, 486): 0.00979,
        (999, 998): 0.02,
    }
    for (t, s), value in expected.items():
        assert float(scheduler._get_variance(t, s)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("cls", BOTH)
def test_steps_offset(cls):
    scheduler = make(cls, steps_offset=1)
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, torch.LongTensor([801, 601, 401, 201, 1]))


# Options, through files: the loaded scheduler steps as the saved one

OPTIONS = (
    [{"num_train_timesteps": count} for count in (100, 500, 1000)]
    + [{"steps_offset": offset} for offset in (0, 1)]
    + [
        {"beta_start": a, "beta_end": b}
        for a, b in zip([0.0001, 0.001, 0.01, 0.1], [0.002, 0.02, 0.2, 2], strict=True)
    ]
    + [{"beta_schedule": schedule} for schedule in ("linear", "squaredcos_cap_v2")]
    + [{"prediction_type": kind} for kind in ("epsilon", "v_prediction")]
    + [{"clip_sample": clip} for clip in (True, False)]
    + [{"timestep_spacing": spacing} for spacing in ("trailing", "leading")]
    + [{"rescale_betas_zero_snr": rescale} for rescale in (True, False)]
    + [{"thresholding": False}]
    + [
        {"thresholding": True, "prediction_type": kind, "sample_max_value": largest}
        for largest in (0.5, 1.0, 2.0)
        for kind in ("epsilon", "v_prediction")
    ]
)


def arguments(cls, eta=0.0):
    return () if "Inverse" in cls.__name__ else (eta,)


def compare_through_files(cls, t, count=50, eta=0.0, **options):
    scheduler = make(cls, **options)
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_config(folder)
        loaded = cls.from_pretrained(folder)
    sample, moved = deterministic_sample(), []
    for s in (scheduler, loaded):
        s.set_timesteps(count)
        kwargs = {"generator": torch.manual_seed(0)} if eta else {}
        moved.append(s.step(0.1 * sample, t, sample, *arguments(cls, eta), **kwargs).prev_sample)
    assert float((moved[0] - moved[1]).abs().sum()) < 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OURS)
def test_options_through_files(cls, options):
    compare_through_files(cls, 1 if cls is DDIMInverseScheduler else 0, **options)


@pytest.mark.parametrize("t", [1, 10, 49])
@pytest.mark.parametrize("cls", OURS)
def test_timesteps_of_any_value(cls, t):
    compare_through_files(cls, t)


@pytest.mark.parametrize(("t", "count"), [(1, 10), (10, 50), (50, 500)])
def test_inference_steps(t, count):
    compare_through_files(DDIMScheduler, t, count)


@pytest.mark.parametrize(("t", "eta"), [(1, 0.0), (10, 0.5), (49, 1.0)])
def test_eta(t, eta):
    compare_through_files(DDIMScheduler, t, eta=eta)


@pytest.mark.parametrize("cls", OURS)
def test_trained_betas_of_any_length_through_files(cls, tmp_path):
    for betas in (np.array([0.1, 0.3]), [0.1, 0.3]):
        scheduler = make(cls, trained_betas=betas)
        scheduler.save_pretrained(tmp_path)
        assert scheduler.betas.tolist() == cls.from_pretrained(tmp_path).betas.tolist()


# Behaviour common to all schedulers


@pytest.mark.parametrize("cls", OURS)
def test_a_step_keeps_the_shape_at_neighbouring_timesteps(cls):
    scheduler, sample = make(cls), deterministic_sample()
    scheduler.set_timesteps(50)
    for t in (0, 1):
        assert scheduler.step(0.1 * sample, t, sample).prev_sample.shape == sample.shape


@pytest.mark.parametrize("cls", OURS)
def test_tuples_and_objects_hold_the_same(cls):
    scheduler, sample = make(cls), deterministic_sample()
    scheduler.set_timesteps(50)
    for t in (0, torch.tensor(0)):
        kwargs = {} if cls is DDIMInverseScheduler else {"generator": torch.manual_seed(0)}
        named = scheduler.step(0.1 * sample, t, sample, **kwargs)
        plain = scheduler.step(0.1 * sample, t, sample, return_dict=False, **kwargs)
        for a, b in zip(named.to_tuple(), plain, strict=True):
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize("cls", OURS)
def test_public_interface(cls):
    scheduler = make(cls)
    assert hasattr(scheduler, "init_noise_sigma")
    assert hasattr(scheduler, "scale_model_input")
    assert "timestep" in inspect.signature(scheduler.scale_model_input).parameters
    assert "sample" in inspect.signature(scheduler.scale_model_input).parameters
    sample = deterministic_sample()
    assert torch.equal(scheduler.scale_model_input(sample, 0.0), sample)


@pytest.mark.parametrize("cls", OURS)
def test_deprecated_arguments_are_declared(cls):
    takes_more = "kwargs" in inspect.signature(cls.__init__).parameters
    assert takes_more == (len(cls._deprecated_kwargs) > 0)


@pytest.mark.parametrize("cls", OURS)
def test_attributes(cls):
    scheduler = make(cls)
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    assert scheduler.dummy_attribute == 5
    assert scheduler.config.test_attribute == 5
    with pytest.warns(FutureWarning, match="Accessing config attribute `test_attribute` directly"):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError) as error:
        scheduler.does_not_exist  # noqa: B018
    assert str(error.value) == f"'{cls.__name__}' object has no attribute 'does_not_exist'"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a class of diffusers makes it
def test_a_configuration_passes_every_compatible_class_and_back():
    scheduler = make(DDIMScheduler)
    assert all(c is not None for c in scheduler.compatibles)
    for compatible in scheduler.compatibles:
        if getattr(compatible, "_backends", None) and "torchsde" in compatible._backends:
            continue  # needs a package that is not there
        foreign = compatible.from_config(scheduler.config)
        back = DDIMScheduler.from_config(foreign.config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(
            scheduler.config
        )
        more = {k for k in back.config if k not in scheduler.config}
        assert not more & set(inspect.signature(DDIMScheduler.__init__).parameters)


@pytest.mark.parametrize("cls", OURS)
def test_defaults_are_remembered_until_a_file_names_them(cls, tmp_path):
    scheduler = make(cls)
    assert "_use_default_values" in scheduler.config
    scheduler.save_config(tmp_path)
    assert {"_class_name", "_diffusers_version"} <= set(scheduler.config)
    remembered = cls.from_pretrained(tmp_path).config._use_default_values
    assert set(remembered) <= {"multistep_order", "fitted_timesteps"}  # which are left out of files


def test_unknown_options_of_a_file_are_named_in_the_log(monkeypatch):
    logger, lines = logging.get_logger("diffusers.configuration_utils"), []
    monkeypatch.setattr(logger, "warning", lines.append)
    scheduler = DDIMScheduler.from_config({**DDIMScheduler(**CONFIG).config, "made_up": 3})
    assert lines == [
        "The config attributes {'made_up': 3} were passed to DDIMScheduler, but are not expected "
        "and will be ignored. "
        "Please verify your scheduler_config.json configuration file."
    ]
    assert scheduler.config.made_up == 3


def test_a_configuration_that_is_read_with_other_values():
    scheduler, unused = DDIMScheduler.from_config(
        DDIMScheduler(**CONFIG).config, beta_end=0.5, extra=1, return_unused_kwargs=True
    )
    assert scheduler.config.beta_end == 0.5
    assert unused["extra"] == 1


@pytest.mark.parametrize("cls", BOTH)
def test_noise_is_added_at_any_timestep(cls):
    scheduler = make(cls)
    scheduler.set_timesteps(100)
    sample = deterministic_sample()
    scaled = scheduler.scale_model_input(sample, 0.0)
    assert scaled.shape == sample.shape
    noisy = scheduler.add_noise(scaled, torch.randn_like(scaled), scheduler.timesteps[5][None])
    assert noisy.shape == scaled.shape


def test_the_inverse_ignores_what_the_forward_direction_has_more():
    scheduler = make(
        DDIMInverseScheduler,
        thresholding=True,
        sample_max_value=2.0,
        dynamic_thresholding_ratio=0.9,
    )
    assert "thresholding" not in scheduler.config
    scheduler.set_timesteps(50)
    sample = deterministic_sample()
    plain = make(DDIMInverseScheduler)
    plain.set_timesteps(50)
    assert torch.equal(
        scheduler.step(sample, 500, sample).prev_sample, plain.step(sample, 500, sample).prev_sample
    )
