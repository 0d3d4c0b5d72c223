"""Pipelines that stay diffusers' own behind ddim.DiffusionPipeline: their files, their calls, and
the schedulers that are replaced in them."""

import copy
import inspect
import json
import pickle
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from ddim.errors import DDIMError
from ddim.pipelines.adopted import _taken, adopt, replace_schedulers
from ddim.pipelines.diffusion_pipeline import DiffusionPipeline
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """An LDMPipeline, whose call takes any keyword and reads none of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "ldm"
    diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(
            latent_channels=3,
            num_vq_embeddings=16,
            scaling_factor=1.0,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **BLOCKS,
        ),
        unet=diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            **BLOCKS,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    return folder


PLAIN = """
import sys
sys.modules["ddim"] = None
import diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
print([type(pipe).__name__, type(pipe.scheduler).__module__.split(".")[0]])
"""


@pytest.mark.slow
def test_what_was_opened_and_saved_opens_without_this_package(latent_model, tmp_path):
    DiffusionPipeline.from_pretrained(latent_model).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "['LDMPipeline', 'diffusers']", run.stderr
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


def test_a_pipeline_of_diffusers_writes_diffusers_names_of_our_schedulers(latent_model, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(latent_model)
    pipe.scheduler = DDIMScheduler(beta_schedule="sigmoid", num_train_timesteps=20)
    expected = pipe.scheduler.alphas_cumprod
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is diffusers.DDIMScheduler  # which knows no sigmoid
    torch.testing.assert_close(stock.scheduler.alphas_cumprod, expected)
    assert pipe.scheduler.config.beta_schedule == "sigmoid"
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
    pipe.register_modules(inverse=DDIMInverseScheduler())
    assert pipe.config["inverse"] == ("diffusers", "DDIMInverseScheduler")
    assert DDIMInverseScheduler.__module__ == DDIMScheduler.__module__ == "ddim.scheduler"


@pytest.fixture
def pipe(latent_model):
    opened = DiffusionPipeline.from_pretrained(latent_model)
    opened.set_progress_bar_config(disable=True)
    return opened


def draw(pipe, **options):
    return pipe(num_inference_steps=3, output_type="np", **options).images


def test_seeds_give_one_image_each_that_does_not_depend_on_the_others(pipe):
    images = draw(pipe, seeds=[4, 5])
    assert len(images) == 2
    torch.manual_seed(1)
    np.testing.assert_allclose(draw(pipe, seeds=[5])[0], images[1], rtol=0, atol=1e-5)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    assert np.array_equal(draw(pipe, generator=generators, batch_size=2), images)
    for options, message in (
        ({"seeds": [1, 2], "batch_size": 3}, "a seed an image, 3 of them; got 2 seeds"),
        ({"seeds": [1], "generator": generators}, "both say where noise comes from"),
        ({"seeds": [-1]}, "a seed must be a whole number"),
        ({"seeds": []}, "there are none"),
    ):
        with pytest.raises(DDIMError, match=message):
            draw(pipe, **options)


def test_spacing_and_order_act_for_their_call_alone(pipe):
    pipe.scheduler.register_to_config(fitted_timesteps=[[900, 500, 100]])
    before, images = dict(pipe.scheduler.config), {}
    for spacing, levels in (("trailing", [999, 666, 332]), ("leading", [666, 333, 0])):
        images[spacing] = draw(pipe, seeds=[1], timestep_spacing=spacing)
        assert pipe.scheduler.timesteps.tolist() == levels
        assert dict(pipe.scheduler.config) == before
    assert abs(images["trailing"] - images["leading"]).max() > 1e-3
    second = draw(pipe, seeds=[1], timestep_spacing="trailing", order=2)
    assert abs(second - images["trailing"]).max() > 1e-5
    assert dict(pipe.scheduler.config) == before
    draw(pipe, seeds=[1])
    assert pipe.scheduler.timesteps.tolist() == [900, 500, 100]
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    draw(pipe, seeds=[1], timestep_spacing="trailing")
    assert pipe.scheduler.timesteps[0] == 999
    with pytest.raises(DDIMError, match="order is ddim.DDIMScheduler's, and the scheduler is a"):
        draw(pipe, seeds=[1], order=1)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"]
)
def test_a_scheduler_that_is_put_in_samples_by_its_own_loop(name, pipe, latent_model):
    theirs, images = diffusers.LDMPipeline.from_pretrained(latent_model), []
    theirs.set_progress_bar_config(disable=True)
    own = draw(pipe, seeds=[1])
    for each in (pipe, theirs):
        each.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        torch.manual_seed(0)  # this pipeline gives no generator to a step
        images.append(draw(each, generator=torch.Generator().manual_seed(1)))
    np.testing.assert_allclose(*images, rtol=0, atol=1e-4)
    assert abs(images[0] - own).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sampler": "o-belm"}, DDIMError, "a LDMPipeline is sampled by diffusers' own loop"),
        ({"clip": "static"}, DDIMError, "which does not know clip; leave it out"),
        ({"timestep_spacing": "no such"}, DDIMError, "must be one of .*; got 'no such'"),
        ({"order": 7}, DDIMError, "order of the solver must be 1"),
        ({"bach_size": 3}, TypeError, "'bach_size'; did you mean 'batch_size'"),
        ({"sedes": [1]}, TypeError, "'sedes'; did you mean 'seeds'"),
    ],
)
def test_what_cannot_act_is_refused(options, kind, message, pipe):
    with pytest.raises(kind, match=message):
        draw(pipe, **options)


def test_opened_pipelines_are_copied_pickled_and_known_by_name(pipe):
    expected = draw(pipe, seeds=[1])
    for other in (copy.copy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(other, DiffusionPipeline)
        assert isinstance(other, diffusers.LDMPipeline)
        np.testing.assert_allclose(draw(other, seeds=[1]), expected, rtol=0, atol=1e-5)
    theirs = inspect.signature(diffusers.LDMPipeline.__call__)
    assert inspect.signature(type(pipe).__call__) == theirs


def test_a_scale_that_older_files_lack_is_the_one_of_their_time(latent_model, tmp_path):
    """diffusers would divide the latents of such a file by 0.18215."""
    old = tmp_path / "old"
    shutil.copytree(latent_model, old)
    path = old / "vqvae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    stated, opened = (DiffusionPipeline.from_pretrained(folder) for folder in (latent_model, old))
    assert opened.vqvae.config.scaling_factor == stated.vqvae.config.scaling_factor == 1.0
    np.testing.assert_allclose(draw(opened, seeds=[1]), draw(stated, seeds=[1]), atol=1e-5)
    opened.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "vqvae" / "config.json").read_text())
    assert written["scaling_factor"] == 1.0
    given = diffusers.VQModel.from_pretrained(old / "vqvae")
    kept = DiffusionPipeline.from_pretrained(old, vqvae=given).vqvae.config.scaling_factor
    assert kept == 0.18215


def pipelines():
    """Every class of pipeline that diffusers exports and that can be looked at here."""
    for name in (name for name in dir(diffusers) if name.endswith("Pipeline")):
        kind = getattr(diffusers, name)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            yield kind


ALONE = {"scheduler", "inverse_scheduler"} | {
    # of another stage, which samples or only adds noise, with a schedule of its own
    *("prior_scheduler", "decoder_scheduler", "super_res_scheduler", "low_res_scheduler"),
    *("image_noising_scheduler", "audio_scheduler", "prior_prior_scheduler"),
    *("decoder_scheduler", "bb_ca_scheduler", "local_latents_scheduler", "prior_image_scheduler"),
}


def test_no_pipeline_of_diffusers_has_a_pair_that_is_not_known():
    """A scheduler and its inverse are replaced together; a new part must be looked at."""
    found = {}
    for kind in pipelines():
        for part in inspect.signature(kind.__init__).parameters:
            if "scheduler" in part:
                found.setdefault(part, []).append(kind.__name__)
    assert set(found) <= ALONE
    assert sorted(found["inverse_scheduler"]) == [
        "StableDiffusionDiffEditPipeline",
        "StableDiffusionPix2PixZeroPipeline",
    ]


def test_a_scheduler_and_its_inverse_are_replaced_together():
    class Pair:
        def __init__(self):
            options = {"clip_sample": False, "timestep_spacing": "trailing", "beta_end": 0.01}
            self.scheduler = diffusers.DDIMScheduler(**options)
            self.inverse_scheduler = diffusers.DDIMInverseScheduler(**options)

    pair = Pair()
    replace_schedulers(pair, {})
    down, up = pair.scheduler, pair.inverse_scheduler
    assert (type(down), type(up)) == (DDIMScheduler, DDIMInverseScheduler)
    for scheduler in (down, up):
        scheduler.set_timesteps(30)
        assert scheduler.config.beta_end == 0.01
    start = x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    eps = torch.randn_like(x)
    for t in up.timesteps:
        x = up.step(eps, t, x).prev_sample
    for t in down.timesteps:
        x = down.step(eps, t, x).prev_sample
    torch.testing.assert_close(x, start)
    for given, kinds in (
        ({"scheduler": 1}, (diffusers.DDIMScheduler, diffusers.DDIMInverseScheduler)),
        ({"inverse_scheduler": 1}, (DDIMScheduler, diffusers.DDIMInverseScheduler)),
    ):
        pair = Pair()
        replace_schedulers(pair, given)
        assert (type(pair.scheduler), type(pair.inverse_scheduler)) == kinds


def test_every_pipeline_of_diffusers_can_be_adopted():
    """Two combined ones pass keywords on to others, which refuse them."""
    passing = []
    for kind in pipelines():
        pipe = adopt(kind.__new__(kind))
        assert isinstance(pipe, DiffusionPipeline)
        assert type(pipe).__name__ == kind.__name__
        if not any("__call__" in vars(base) for base in kind.__mro__):
            continue
        if _taken(kind) is None:
            passing.append(kind.__name__)
        else:
            with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_argument'"):
                pipe(no_such_argument=1)
    assert passing == ["KandinskyV22InpaintCombinedPipeline", "WuerstchenCombinedPipeline"]
