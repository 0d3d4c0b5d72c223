"""Text to image: diffusers' pipeline is the reference wherever its timesteps are valid; then what goes beyond it."""

import itertools

import diffusers
import pytest
import torch

from ddim.noise import make_generators
from ddim.pipelines import DiffusionPipeline
from ddim.scheduler import DDIMScheduler
from ddim.text_to_image import TextToImagePipeline

PROMPT = "a red square on a black background"
QUIET = {"progress": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tiny_text):
    return TextToImagePipeline.from_pretrained(tiny_text)


@pytest.fixture(scope="module")
def theirs(tiny_text):
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text)
    stock.set_progress_bar_config(disable=True)
    return stock


def schedule_both(pipe, theirs, **options):
    """Both pipelines with the same configuration of their own schedulers."""
    config = {**theirs.scheduler.config, **options}
    pipe.scheduler, theirs.scheduler = DDIMScheduler.from_config(config), diffusers.DDIMScheduler.from_config(config)


@pytest.fixture
def both(pipe, theirs):
    kept = pipe.scheduler, theirs.scheduler
    yield pipe, theirs
    pipe.scheduler, theirs.scheduler = kept


def draw(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **{"num_inference_steps": 4, **QUIET, **options}).images


def test_in_diffusers_own_pipeline_our_scheduler_walks_the_timesteps_of_the_call(both):
    _, theirs = both
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    levels, visited = [990, 700, 333, 120, 7], []

    def note(pipe, step, t, tensors):
        visited.append((int(t), tensors["latents"].clone()))
        return tensors

    options = {"timesteps": levels, "output_type": "latent", "guidance_scale": 3.0, "callback_on_step_end": note}
    latents = theirs(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    assert [t for t, _ in visited] == levels == theirs.scheduler.timesteps.tolist()

    scheduler, network = DDIMScheduler.from_config(theirs.scheduler.config), theirs.unet
    scheduler.set_timesteps(timesteps=levels)
    positive, negative = theirs.encode_prompt(PROMPT, "cpu", 1, True)
    x = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (t, state), level in zip(visited, scheduler.timesteps, strict=True):
            down, up = network(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, positive])).sample.chunk(2)
            x = scheduler.step(down + 3.0 * (up - down), level, x).prev_sample
            torch.testing.assert_close(x, state)
    torch.testing.assert_close(x, latents)


CASES = [
    {"prediction_type": kind, "timestep_spacing": spacing, "guidance_scale": scale, "guidance_rescale": rescale, "eta": eta}
    for kind, (spacing, rescale), (scale, eta) in itertools.product(
        ("epsilon", "v_prediction", "sample"),
        (("leading", 0.0), ("trailing", 0.7), ("trailing", 0.0)),
        ((7.5, 0.0), (3.0, 1.0), (1.0, 0.5)),
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_images_are_those_of_diffusers(case, both):
    pipe, theirs = both
    options = dict(case)
    schedule_both(pipe, theirs, **{name: options.pop(name) for name in ("prediction_type", "timestep_spacing")})
    for more in ({"num_inference_steps": 5}, {"negative_prompt": "blue", "num_images_per_prompt": 2, "num_inference_steps": 10}):
        if options["guidance_scale"] == 1.0:
            more = {name: value for name, value in more.items() if name != "negative_prompt"}
        count = more.get("num_images_per_prompt", 1)
        mine, stock = (
            p(PROMPT, output_type="pt", generator=make_generators(range(count)), **options, **more).images for p in (pipe, theirs)
        )
        torch.testing.assert_close(mine, stock, rtol=0, atol=1e-4)


def test_the_folder_opens_as_our_pipeline(tiny_text):
    pipe = DiffusionPipeline.from_pretrained(tiny_text, torch_dtype=torch.float16)
    assert type(pipe) is TextToImagePipeline
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    image = pipe(PROMPT, guidance_rescale=0.7, num_inference_steps=3).images[0]
    assert image.size == (16, 16)
