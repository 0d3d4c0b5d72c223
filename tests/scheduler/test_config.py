"""Configurations and files, here and in diffusers."""

import copy
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
from tests.scheduler.helpers import randn, tiny_unet

import ddim.scheduler
import ddim.scheduler_base
from ddim.errors import DDIMError
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler, as_ddim


def test_it_is_diffusers_class_and_keeps_its_place():
    scheduler = DDIMScheduler()
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    assert DDIMScheduler.__module__ == "ddim.scheduler"
    assert issubclass(DDIMScheduler, ddim.scheduler.SchedulerMixin)
    assert set(ddim.scheduler.__all__) >= {"SchedulerMixin", "DDIMSchedulerOutput"}
    assert DDIMScheduler._compatibles == diffusers.DDIMScheduler._compatibles
    assert diffusers.DDIMScheduler in scheduler.compatibles


def test_a_configuration_survives_files_and_foreign_classes(tmp_path):
    options = {
        "num_train_timesteps": 500,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    scheduler = DDIMScheduler(**options, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDIMScheduler"
    for cls in (DDIMScheduler, diffusers.DDIMScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert {k: v for k, v in loaded.config.items() if k in options} == options
        assert loaded.config.timestep_spacing == "trailing"
    for name in (
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
    ):
        foreign = getattr(diffusers, name).from_config(scheduler.config)
        back = DDIMScheduler.from_config(foreign.config)
        assert {k: v for k, v in back.config.items() if k in options} == options
        back.set_timesteps(10)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_other_schedulers_are_not_told_of_our_options_that_say_nothing(cls, monkeypatch):
    told = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", told.append)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"):
        other = getattr(diffusers, name)
        for config in (cls(beta_end=0.01).config, as_ddim({"beta_end": 0.01}).config):
            assert other.from_config(config).config.beta_end == 0.01
    assert told == []


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_options_given_by_position_or_changed_later_are_taken_over(cls):
    by_position, changed = cls(500, 0.001), cls()
    changed.register_to_config(num_train_timesteps=500, beta_start=0.001)
    for scheduler in (by_position, changed):
        for other in (
            DDIMScheduler,
            DDIMInverseScheduler,
            diffusers.DDIMScheduler,
            diffusers.DDPMScheduler,
        ):
            taken = other.from_config(scheduler.config).config
            assert (taken.num_train_timesteps, taken.beta_start, taken.beta_end) == (
                500,
                0.001,
                0.02,
            )
    assert (
        DDIMScheduler.from_config(diffusers.DDIMScheduler().config).config.timestep_spacing
        == "leading"
    )


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_a_mistyped_option_of_from_config_is_ignored_as_in_diffusers_but_with_a_warning(
    cls, tmp_path
):
    config = cls(timestep_spacing="linspace").config
    cls(timestep_spacing="linspace").save_pretrained(tmp_path)
    message = (
        rf"^{cls.__name__} has no option 'timestep_spaceing' and ignores it; did you mean "
        r"'timestep_spacing'\?$"
    )
    for load, source in ((cls.from_config, config), (cls.from_pretrained, tmp_path)):
        with pytest.warns(UserWarning, match=message):
            made = load(source, timestep_spaceing="trailing")
        assert made.config.timestep_spacing == "linspace"
    with pytest.warns(UserWarning, match=f"^{cls.__name__} has no option 'qqq' and ignores it.$"):
        cls.from_config(config, qqq=1)
    # What the family knows, what is returned, and what a file holds may stay.
    cls.from_config(config, algorithm_type="dpmsolver++", skip_prk_steps=True, beta_end=0.5)
    assert (
        cls.from_config(config, timestep_spaceing="trailing", return_unused_kwargs=True)[1][
            "timestep_spaceing"
        ]
        == "trailing"
    )
    cls.from_config({**config, "timestep_spaceing": "trailing"})


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_trained_betas_of_any_type_are_saved(kind, tmp_path):
    betas = [0.001, 0.01, 0.02]
    scheduler = DDIMScheduler(3, trained_betas=kind(betas))
    scheduler.save_pretrained(tmp_path)
    loaded = DDIMScheduler.from_pretrained(tmp_path)
    assert loaded.config.trained_betas == pytest.approx(betas)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_a_configuration_of_another_family_is_refused(cls, tmp_path):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    for config in (flow.config, {**flow.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}):
        with pytest.raises(
            DDIMError,
            match=(
                "DDIM cannot take over this configuration: it is a .* of a flow-matching model, "
                "which"
            ),
        ):
            cls.from_config(config)
    flow.save_pretrained(tmp_path)
    with pytest.raises(
        DDIMError, match="a FlowMatchEulerDiscreteScheduler of a flow-matching model"
    ):
        cls.from_pretrained(tmp_path)

    class Mine(cls):
        pass

    Mine(prediction_type="sample").save_pretrained(tmp_path)
    for reader in (Mine, cls):
        assert reader.from_pretrained(tmp_path).config.prediction_type == "sample"


def test_copies_and_pickles_step_alike():
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=2.0)
    scheduler.set_timesteps(10)
    x = randn(1, 3)
    expected = scheduler.step(x, 500, x).prev_sample
    for other in (
        copy.copy(scheduler),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        assert torch.equal(other.step(x, 500, x).prev_sample, expected)
        other.set_timesteps(5)
    assert len(scheduler.timesteps) == 10


def test_a_pipeline_of_diffusers_with_our_scheduler_is_saved_and_loaded(tmp_path):
    pipeline = diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    images = pipeline(
        num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert np.isfinite(images).all()


def test_the_unconditional_pipeline_of_diffusers_replaces_the_scheduler_unless_it_is_put_back():
    pipeline = diffusers.DDIMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_inference_steps=61,
        eta=1.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert np.isfinite(images).all()
    assert len(pipeline.scheduler.timesteps) == 61
