"""Schedulers and pipelines exported to plain diffusers."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from tests.scheduler.helpers import exact, tiny_unet

from ddim.errors import DDIMError
from ddim.models.export import to_diffusers
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler


def test_an_exported_scheduler_is_diffusers_own_and_steps_alike():
    for options in (
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True},
    ):
        scheduler = DDIMScheduler(**options)
        scheduler.set_timesteps(10) if "rescale_betas_zero_snr" not in options else None
        exported = to_diffusers(scheduler)
        assert type(exported) is diffusers.DDIMScheduler
        assert {k: v for k, v in exported.config.items() if k in options} == options
        assert type(to_diffusers(DDIMInverseScheduler(**options))) is diffusers.DDIMInverseScheduler
    for schedule in ("sigmoid", "laplace"):
        ours = DDIMScheduler(beta_schedule=schedule)
        torch.testing.assert_close(
            to_diffusers(ours).alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-7
        )
    already = diffusers.DDPMScheduler()
    assert to_diffusers(already) is already


def test_an_export_says_what_is_lost():
    scheduler = DDIMScheduler(timestep_spacing="quadratic")
    with pytest.raises(
        DDIMError, match="diffusers has no 'quadratic' timesteps.*leading, linspace, trailing"
    ):
        to_diffusers(scheduler)
    with pytest.raises(DDIMError, match="diffusers has no 'linspace' timesteps for this scheduler"):
        to_diffusers(DDIMInverseScheduler(timestep_spacing="linspace"))
    with pytest.raises(
        DDIMError, match="only a scheduler or a pipeline can be converted to diffusers; got int"
    ):
        to_diffusers(3)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    with pytest.warns(
        UserWarning, match="timesteps that are set are not part of the configuration"
    ):
        to_diffusers(scheduler)
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    with pytest.warns(
        UserWarning,
        match=(
            "diffusers steps to t - 100 whatever the next timestep is, so at 10 steps with "
            "'linspace'"
        ),
    ):
        to_diffusers(scheduler)
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = exact(beta_end=0.01).alphas_cumprod
    with pytest.warns(
        UserWarning, match="replaced alphas_cumprod is not part of the configuration"
    ):
        to_diffusers(scheduler)


def test_an_exported_pipeline_loads_without_this_package(tmp_path):
    pipeline = diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    exported = to_diffusers(pipeline)
    assert type(exported) is diffusers.DDPMPipeline
    assert type(exported.scheduler) is diffusers.DDIMScheduler
    assert type(pipeline.scheduler) is DDIMScheduler
    assert exported.unet is pipeline.unet
    exported.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "DDIMScheduler",
    ]
    assert (
        json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())[
            "timestep_spacing"
        ]
        == "trailing"
    )


@pytest.mark.slow
def test_the_files_of_an_exported_pipeline_need_diffusers_only(tmp_path):
    to_diffusers(diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler())).save_pretrained(tmp_path)
    code = (
        f"import sys, diffusers; diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r}); assert "
        "'ddim' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_a_saved_configuration_has_keys_of_ours_only_where_they_say_something(cls, tmp_path):
    """diffusers warns of a key that it does not know."""
    cls().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert not {"multistep_order", "fitted_timesteps"} & set(written)
    told = {"multistep_order": 2} if cls is DDIMScheduler else {}
    cls(fitted_timesteps=[[900, 500]], **told).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {"fitted_timesteps": [[900, 500]], **told}.items() <= written.items()
    assert cls.from_pretrained(tmp_path).config.fitted_timesteps == [[900, 500]]
