"""Text to image: diffusers' pipeline is the reference wherever its timesteps are valid; then what
goes beyond it."""

import inspect
import itertools
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tests.conftest import thinned

from ddim.core.noise import SeededNoise, make_generators, seeded_randn
from ddim.core.schedule import add_noise
from ddim.core.timesteps import SPACINGS
from ddim.errors import CheckpointError, DDIMError
from ddim.models.export import to_diffusers
from ddim.models.images import from_pictures
from ddim.pipelines.coding import _rules
from ddim.pipelines.diffusion_pipeline import DiffusionPipeline
from ddim.pipelines.networks import weights_of
from ddim.pipelines.pictures import encode_images
from ddim.pipelines.prompts import PromptWarning
from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
from ddim.scheduler import DDIMScheduler

PROMPT = "a red square on a black background"
VELOCITY = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
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
    pipe.scheduler, theirs.scheduler = (
        DDIMScheduler.from_config(config),
        diffusers.DDIMScheduler.from_config(config),
    )


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

    options = {
        "timesteps": levels,
        "output_type": "latent",
        "guidance_scale": 3.0,
        "callback_on_step_end": note,
    }
    latents = theirs(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    assert [t for t, _ in visited] == levels == theirs.scheduler.timesteps.tolist()

    scheduler, network = DDIMScheduler.from_config(theirs.scheduler.config), theirs.unet
    scheduler.set_timesteps(timesteps=levels)
    positive, negative = theirs.encode_prompt(PROMPT, "cpu", 1, True)
    x = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (t, state), level in zip(visited, scheduler.timesteps, strict=True):
            down, up = network(
                torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, positive])
            ).sample.chunk(2)
            x = scheduler.step(down + 3.0 * (up - down), level, x).prev_sample
            torch.testing.assert_close(x, state)
    torch.testing.assert_close(x, latents)


@pytest.mark.parametrize(
    ("kind", "how", "guidance"),
    thinned(
        ["epsilon", "v_prediction", "sample"],
        [("leading", 0.0), ("trailing", 0.7), ("trailing", 0.0)],
        [(7.5, 0.0), (3.0, 1.0), (1.0, 0.5)],
        stride=2,
    ),
)
def test_images_are_those_of_diffusers(kind, how, guidance, both):
    pipe, theirs = both
    (spacing, rescale), (scale, eta) = how, guidance
    schedule_both(pipe, theirs, prediction_type=kind, timestep_spacing=spacing)
    options = {"guidance_scale": scale, "guidance_rescale": rescale, "eta": eta}
    for more in (
        {"num_inference_steps": 5},
        {"negative_prompt": "blue", "num_images_per_prompt": 2, "num_inference_steps": 10},
    ):
        if options["guidance_scale"] == 1.0:
            more = {name: value for name, value in more.items() if name != "negative_prompt"}
        count = more.get("num_images_per_prompt", 1)
        mine, stock = (
            p(
                PROMPT, output_type="pt", generator=make_generators(range(count)), **options, **more
            ).images
            for p in (pipe, theirs)
        )
        torch.testing.assert_close(mine, stock, rtol=0, atol=1e-4)


def test_the_folder_opens_as_our_pipeline(tiny_text):
    pipe = DiffusionPipeline.from_pretrained(tiny_text, torch_dtype=torch.float16)
    assert type(pipe) is TextToImagePipeline
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    image = pipe(PROMPT, guidance_rescale=0.7, num_inference_steps=3).images[0]
    assert image.size == (16, 16)


# --- beside diffusers


@pytest.mark.parametrize("batched", [True, False])
def test_two_prompts_two_negative_ones_and_one_generator(batched, both):
    pipe, theirs = both
    prompts, away = ["a red square", "a blue square"], ["black", "a green background"]
    options = {
        "num_inference_steps": 5,
        "eta": 0.7,
        "negative_prompt": away,
        "output_type": "pt",
        "num_images_per_prompt": 2,
    }
    expected = theirs(prompts, generator=torch.Generator().manual_seed(3), **options).images
    found = pipe(
        prompts, generator=torch.Generator().manual_seed(3), guidance_batched=batched, **options
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"height": 24, "width": 8},
        {"cross_attention_kwargs": {}},
        {"latents": torch.ones(1, 4, 8, 8)},
        {"output_type": "latent"},
        {"output_type": "np"},
        {"return_dict": False},
        {"guidance_scale": 0.0},
    ],
    ids=lambda more: next(iter(more)),
)
def test_arguments_mean_what_they_mean_in_diffusers(more, both):
    found, expected = (
        p(
            PROMPT,
            **{
                "num_inference_steps": 2,
                "generator": make_generators([1]),
                "output_type": "pt",
                **more,
            },
        )
        for p in both
    )
    assert type(found) is type(expected)
    found, expected = found[0], expected[0]
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-4)


def test_layers_of_the_text_encoder_are_left_out(pipe):
    """diffusers 0.42 looks for them where later releases of transformers 5 no longer have them."""
    ids = pipe.tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt").input_ids
    encoder, names = pipe.text_encoder, set(pipe.text_encoder.state_dict())
    with torch.no_grad():
        norm = getattr(encoder, "text_model", encoder).final_layer_norm  # by release
        cond = norm(encoder(ids[:1], output_hidden_states=True).hidden_states[-2])
        uncond = encoder(ids[1:])[0]
    expected = draw(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond, seeds=[0])
    torch.testing.assert_close(draw(pipe, clip_skip=1, seeds=[0]), expected)
    assert not torch.allclose(draw(pipe, seeds=[0]), expected, atol=1e-4)
    assert set(pipe.text_encoder.state_dict()) == names


def test_places_are_those_of_diffusers(both):
    pipe, theirs = both
    for mine, stock in (
        (TextToImagePipeline, theirs),
        (ImageToImagePipeline, diffusers.StableDiffusionImg2ImgPipeline),
    ):
        placed = [
            [
                p.name
                for p in inspect.signature(cls.__call__).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            for cls in (mine, stock if inspect.isclass(stock) else type(stock))
        ]
        assert placed[0] == placed[1]
    found, expected = (
        p(
            PROMPT,
            16,
            8,
            2,
            None,
            None,
            3.0,
            "blue",
            1,
            1.0,
            make_generators([2]),
            output_type="pt",
        ).images
        for p in both
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_embeddings_stand_for_prompts(both):
    pipe, theirs = both
    cond, uncond = theirs.encode_prompt(PROMPT, "cpu", 1, True, "blue")
    by_text = draw(pipe, negative_prompt="blue", seeds=[0, 1])
    found = draw(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond, seeds=[0, 1])
    torch.testing.assert_close(found, by_text)
    torch.testing.assert_close(
        draw(pipe, None, prompt_embeds=cond, negative_prompt="blue", seeds=[0, 1]), by_text
    )


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_where_the_stride_is_no_neighbour_images_differ_and_ours_are_the_loops(spacing, both):
    """diffusers leaves its own list there: docs/numerics.md."""
    pipe, theirs = both
    schedule_both(pipe, theirs, prediction_type="v_prediction", timestep_spacing=spacing)
    mine, stock = (
        p(PROMPT, num_inference_steps=7, generator=make_generators([0]), output_type="pt").images
        for p in both
    )
    assert (mine - stock).abs().max() > 1e-4
    # diffusers' own loop over our scheduler goes to the neighbours too
    theirs.scheduler = pipe.scheduler
    torch.testing.assert_close(
        theirs(
            PROMPT, num_inference_steps=7, generator=make_generators([0]), output_type="pt"
        ).images,
        mine,
        rtol=0,
        atol=1e-4,
    )


# --- image to image


@pytest.fixture(scope="module")
def edit(pipe):
    return ImageToImagePipeline(**pipe.components)


@pytest.fixture(scope="module")
def their_edit(theirs):
    stock = diffusers.StableDiffusionImg2ImgPipeline(
        **theirs.components, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def edits(edit, their_edit):
    kept = edit.scheduler, their_edit.scheduler
    yield edit, their_edit
    edit.scheduler, their_edit.scheduler = kept


def picture(seed=0, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "start", "guidance"),
    thinned(
        ["epsilon", "v_prediction", "sample"],
        [("leading", 0.8), ("trailing", 0.5), ("leading", 1.0), ("trailing", 0.25)],
        [(7.5, 0.0), (7.5, 1.0), (1.0, 0.5)],
        stride=5,
    ),
)
def test_images_out_of_images_are_those_of_diffusers(kind, start, guidance, edits):
    (spacing, strength), (scale, eta) = start, guidance
    schedule_both(*edits, prediction_type=kind, timestep_spacing=spacing)
    options = {
        "strength": strength,
        "eta": eta,
        "num_inference_steps": 10,
        "guidance_scale": scale,
        "output_type": "pt",
    }
    options |= {} if scale == 1.0 else {"negative_prompt": "blue"}
    mine, stock = (
        p(PROMPT, picture(), generator=make_generators([4]), **options).images for p in edits
    )
    torch.testing.assert_close(mine, stock, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((16, 8, 3), np.float32),
        torch.rand(1, 3, 8, 16),
        torch.randn(1, 4, 8, 8),
        [picture(1)],
    ],
)
def test_images_may_be_what_they_may_be_in_diffusers(image, edits):
    mine, stock = (
        p(
            PROMPT, image, num_inference_steps=4, generator=make_generators([4]), output_type="pt"
        ).images
        for p in edits
    )
    torch.testing.assert_close(mine, stock, rtol=0, atol=1e-4)


def test_bytes_are_the_picture_that_they_are(edit):
    by_picture = draw(edit, image=[picture(1), picture(2)], seeds=[0, 1])
    by_bytes = draw(
        edit, image=np.stack([np.asarray(picture(1)), np.asarray(picture(2))]), seeds=[0, 1]
    )
    assert torch.equal(by_picture, by_bytes)
    assert torch.equal(
        draw(edit, image=np.asarray(picture(1)), seeds=[0]), draw(edit, image=picture(1), seeds=[0])
    )


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")  # of diffusers
def test_one_image_goes_with_all_prompts_and_one_generator(edits):
    prompts, options = (
        ["a red square", "a blue square"],
        {"num_inference_steps": 4, "output_type": "pt", "eta": 1.0},
    )
    mine, stock = (
        p(prompts, picture(), generator=torch.Generator().manual_seed(5), **options).images
        for p in edits
    )
    torch.testing.assert_close(mine, stock, rtol=0, atol=1e-4)


def test_each_prompt_keeps_its_own_image(edit):
    """diffusers gives image b modulo 2 to prompt b // 2 here."""
    prompts, images = ["a red square", "a blue square"], [picture(1), picture(2)]
    together = draw(
        edit, prompts, image=images, num_images_per_prompt=2, seeds=range(4), strength=0.5
    )
    apart = [
        draw(edit, prompts[b // 2], image=images[b // 2], seeds=[b], strength=0.5) for b in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)
    many = draw(edit, prompts[0], image=images, seeds=[0, 2], strength=0.5)
    torch.testing.assert_close(
        many[1:],
        draw(edit, prompts[0], image=images[1], seeds=[2], strength=0.5),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("steps", "strength"), [(10, 0.5), (7, 0.8), (50, 0.02), (3, 1.0)])
def test_strength_lands_on_its_first_level(spacing, steps, strength, edit):
    states, options = [], {"num_inference_steps": steps, "timestep_spacing": spacing}
    draw(edit, image=picture(), strength=strength, seeds=[0], callback=states.append, **options)
    levels = edit.select_timesteps(steps, timestep_spacing=spacing)
    assert [state.t for state in states] == levels[len(levels) - int(steps * strength) :]
    # What it was denoised from is the image's latents at exactly that level, with the seed's noise.
    posterior = encode_images(edit, edit.image_processor.preprocess(picture()), torch.device("cpu"))
    stream = SeededNoise([0], posterior.mean.shape[1:])
    x0 = posterior.mean + posterior.std * stream()
    expected = add_noise(edit.noise_schedule, x0, stream(), states[0].t)
    schedule = edit.noise_schedule
    found = add_noise(schedule, states[0].x0, states[0].eps, states[0].t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_rescaled_in_image_to_image_too(edit):
    plain, rescaled = (
        draw(edit, image=picture(), seeds=[0], guidance_scale=15.0, guidance_rescale=phi)
        for phi in (0.0, 1.0)
    )
    assert (plain - rescaled).abs().max() > 1e-3


# --- beyond diffusers


@pytest.mark.parametrize("eta", [0.0, 0.5, "sigma-hat"])
def test_the_image_of_a_prompt_and_a_seed_does_not_depend_on_the_others(eta, pipe):
    prompts = ["a red square", "a blue square", "a green square"]
    together = draw(pipe, prompts, seeds=range(6), eta=eta)
    for (p, k), image in zip(itertools.product(range(3), range(2)), together, strict=True):
        alone = draw(pipe, prompts[p], seeds=[2 * p + k], eta=eta)[0]
        torch.testing.assert_close(alone, image, rtol=0, atol=1e-5)
    apart = torch.cat(
        [draw(pipe, prompts[p : p + 1], seeds=[2 * p, 2 * p + 1], eta=eta) for p in range(3)]
    )
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_without_seeds_the_global_generator_says(pipe):
    torch.manual_seed(7)
    first = draw(pipe)
    assert not torch.equal(draw(pipe), first)
    torch.manual_seed(7)
    assert torch.equal(draw(pipe), first)


def cheap(x_t, t, condition, **options):
    """In place of a network: it depends on all that it is given, saturates, and costs nothing."""
    shift = condition.float().mean((1, 2)).reshape(-1, 1, 1, 1).to(x_t.dtype)
    return (torch.tanh(x_t + 40 * shift) - 0.3 * x_t,)


def test_a_call_says_its_seeds_in_either_loop(pipe, edit, tiny_text):
    theirs = TextToImagePipeline.from_pretrained(tiny_text)
    theirs.scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
    for made, options in ((pipe, {}), (edit, {"image": picture()}), (theirs, {})):
        given = {"num_inference_steps": 3, "progress": False, "output_type": "pt", **options}
        first = made(["a", "red"], **given)
        assert len(set(first.seeds)) == 2
        again = made(["a", "red"], seeds=first.seeds, **given)
        torch.testing.assert_close(again.images, first.images)
        assert len(first.to_tuple()) <= 2


@pytest.mark.slow
def test_nothing_is_nan_for_any_count_eta_guidance_rescale_and_precision(tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    pipe.unet.forward = cheap
    cases = list(itertools.product((0.0, 1.0), (1.0, 1.5, 7.5, 30.0), (0.0, 0.7, 1.0)))
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    for dtype in (torch.float32, torch.bfloat16):
        pipe.unet.to(dtype)
        for steps in range(1, 101):
            for eta, scale, rescale in cases[steps % 6 :: 6]:  # every case at every sixth count
                latents = pipe(
                    prompt_embeds=cond,
                    negative_prompt_embeds=uncond if scale > 1 else None,
                    eta=eta,
                    guidance_scale=scale,
                    guidance_rescale=rescale,
                    num_inference_steps=steps,
                    seeds=[steps],
                    output_type="latent",
                    progress=False,
                ).images
                assert torch.isfinite(latents).all(), (dtype, steps, eta, scale, rescale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_keeps_a_float32_state(dtype, tiny_text, pipe):
    half, seen = TextToImagePipeline.from_pretrained(tiny_text, dtype=dtype), []
    images = draw(
        half,
        seeds=[0],
        eta=1.0,
        callback=lambda state: seen.append((state.x_s.dtype, state.eps.dtype)),
    )
    assert seen == [(torch.float32, torch.float32)] * 4
    assert images.dtype == torch.float32
    assert (images - draw(pipe, seeds=[0], eta=1.0)).abs().max() < 0.1
    assert half(PROMPT, num_inference_steps=1, progress=False).images[0].size == (16, 16)


def test_more_than_diffusers_takes(pipe):
    base = draw(pipe, seeds=[0])
    assert torch.equal(
        draw(pipe, num_inference_steps=None, timesteps=pipe.select_timesteps(4), seeds=[0]), base
    )
    for options in (
        {"timestep_spacing": "quadratic"},
        {"order": 2},
        {"sampler": "o-belm"},
        {"sampler": "edict"},
        {"clip": "dynamic"},
    ):
        assert (draw(pipe, seeds=[0], **options) - base).abs().max() > 1e-5, options
    x = seeded_randn((4, 8, 8), [0])
    assert torch.equal(draw(pipe, seeds=[0], latents=x, eta=1.0), draw(pipe, seeds=[0], eta=1.0))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own code
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}])
def test_the_second_order_of_a_guided_network_is_dpm_solvers(options, both):
    pipe, theirs = both
    levels = [999, 800, 620, 370, 160, 40]
    config = {
        **theirs.scheduler.config,
        **options,
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    pipe.scheduler = DDIMScheduler.from_config(config, multistep_order=2)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    stock = {name: pipe.scheduler.config[name] for name in names}
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler(
        **stock, solver_order=2, lower_order_final=True, final_sigmas_type="zero"
    )
    asked = {"timesteps": levels, "guidance_scale": 5.0, "guidance_rescale": 0.7}
    expected = theirs(PROMPT, generator=make_generators([0]), output_type="latent", **asked).images
    found = draw(pipe, seeds=[0], num_inference_steps=None, **{**asked, "output_type": "latent"})
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    first = draw(
        pipe, seeds=[0], num_inference_steps=None, order=1, **{**asked, "output_type": "latent"}
    )
    assert (first - expected).abs().max() > 1e-2


def test_the_second_order_takes_guidance_and_rescale_at_zero_snr_in_both_loops(both):
    pipe, theirs = both
    config = {**theirs.scheduler.config, **VELOCITY, "rescale_betas_zero_snr": True}
    pipe.scheduler = theirs.scheduler = DDIMScheduler.from_config(config, multistep_order=2)
    asked = {
        "num_inference_steps": 5,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "output_type": "latent",
    }
    expected = theirs(PROMPT, generator=make_generators([0]), **asked).images
    found = draw(pipe, seeds=[0], **asked)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()
    assert (draw(pipe, seeds=[0], order=1, **asked) - found).abs().max() > 1e-3


def test_a_saved_pipeline_visits_its_fitted_timesteps_at_their_number_of_steps(tiny_text, tmp_path):
    fitted, seen = [[920, 610, 90]], []
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    pipe.scheduler.register_to_config(multistep_order=2, fitted_timesteps=fitted)
    pipe.save_pretrained(tmp_path)

    def watch(state):
        seen.append(state.t)

    def visited(pipe, *given, **options):
        seen.clear()
        pipe(*given, **{**QUIET, "callback": watch, **options})
        return list(seen)

    text = DiffusionPipeline.from_pretrained(tmp_path)
    assert visited(text, PROMPT, num_inference_steps=3) == fitted[0]
    assert (
        visited(text, PROMPT, num_inference_steps=3, order=1)
        == pipe.select_timesteps(3, order=1)
        != fitted[0]
    )
    assert len(visited(text, PROMPT, num_inference_steps=4)) == 4
    edit = ImageToImagePipeline.from_pretrained(tmp_path)
    assert visited(edit, PROMPT, picture(), num_inference_steps=3, strength=0.7) == fitted[0][1:]
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is diffusers.DDIMScheduler
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "output_type": "latent"}
    expected = stock(PROMPT, generator=make_generators([2]), **given).images
    torch.testing.assert_close(draw(text, seeds=[2], **given), expected, rtol=1e-3, atol=1e-3)


def test_a_callback_sees_every_state_and_stops_with_what_is_predicted(pipe):
    states = []
    whole = draw(pipe, seeds=[0], callback=states.append, output_type="latent")
    assert [state.number for state in states] == [0, 1, 2, 3]
    assert torch.equal(states[-1].x_s, whole)
    stopped = draw(pipe, seeds=[0], callback=lambda state: state.number == 1, output_type="latent")
    assert torch.equal(stopped, states[1].x0)


def their_callbacks():
    """diffusers' protocol, by name: what changes, and what ends."""

    def watch(pipe, number, t, tensors):
        assert set(tensors) == {"latents"}
        assert int(t) > 0 or number == 3
        return tensors

    def push(pipe, number, t, tensors):
        return {"latents": tensors["latents"] + 0.1}

    def stop(pipe, number, t, tensors):
        pipe._interrupt = number == 1
        return tensors

    return {
        "watch": watch,
        "push": push,
        "stop": stop,
        "cut off": diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5),
    }


@pytest.mark.parametrize("name", their_callbacks())
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_callbacks_do_what_they_do_there(name, eta, both):
    found, expected = (
        p(
            PROMPT,
            num_inference_steps=4,
            generator=make_generators([1]),
            eta=eta,
            output_type="pt",
            callback_on_step_end=their_callbacks()[name],
        ).images
        for p in both
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if name == "watch":
        assert torch.equal(found, draw(both[0], seeds=[1], eta=eta))


def test_the_second_order_goes_on_across_their_callback(pipe):
    options = {"seeds": [1], "order": 2}
    assert torch.equal(
        draw(pipe, callback_on_step_end=lambda *a: a[3], **options), draw(pipe, **options)
    )


def test_progress_is_shown_unless_it_is_off(pipe, capsys):
    pipe(PROMPT, num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    draw(pipe)
    assert capsys.readouterr().err == ""


# --- codes


@pytest.mark.parametrize(
    ("method", "tolerance"), [("o-belm", 1e-10), ("bdia", 1e-10), ("fixed-point", 1e-6)]
)
def test_images_come_back_as_the_vae_has_them_and_other_prompts_edit(method, tolerance, tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text, scheduler=DDIMScheduler(**VELOCITY))
    pipe.unet.double()
    images, prompts = (
        [picture(1), picture(2), picture(3)],
        ["a red square", "a blue square", "black"],
    )
    code = pipe.encode(images, prompts, 10, method=method, batch_size=2)
    latents = encode_images(pipe, from_pictures(images, (3, 16, 16)), torch.device("cpu")).mean
    back = pipe.decode(code, prompts, output_type="latent")
    assert float((back - latents).square().mean()) < tolerance
    torch.testing.assert_close(
        pipe.decode(code[1:], prompts[1:], output_type="latent", batch_size=1),
        back[1:],
        rtol=0,
        atol=1e-4,
    )
    edited = pipe.decode(code, "a green square", guidance_scale=3.0, output_type="latent")
    assert float((edited - latents).square().mean()) > 1e-3
    assert pipe.decode(code, prompts)[0].size == (16, 16)


def test_guided_codes_come_back_too(tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text, scheduler=DDIMScheduler(**VELOCITY))
    pipe.unet.double()
    options = {"guidance_scale": 3.0, "negative_prompt": "blue", "guidance_rescale": 0.5}
    code = pipe.encode(picture(), PROMPT, 10, **options)
    again = pipe.encode(pipe.decode(code, PROMPT, **options), PROMPT, 10)
    assert len(again) == 1
    latents = encode_images(pipe, from_pictures(picture(), (3, 16, 16)), torch.device("cpu")).mean
    assert (
        float(
            (pipe.decode(code, PROMPT, output_type="latent", **options) - latents).square().mean()
        )
        < 1e-10
    )


def test_codes_that_do_not_fit_are_refused(pipe, tiny_text):
    code = pipe.encode(picture(), PROMPT, 4)
    with pytest.raises(
        DDIMError, match=r"give either prompt or prompt_embeds, one of the two; got neither"
    ):
        pipe.decode(code)
    with pytest.raises(DDIMError, match="there are 2 prompts and 1 images"):
        pipe.decode(code, ["a", "b"])
    with pytest.raises(DDIMError, match=r"o-belm is a pair of states of its own 4 steps"):
        pipe.decode(code, PROMPT, 5)
    with pytest.raises(
        DDIMError,
        match=(
            r"width and height must be multiples of 2, the VAE's factor; got 16x15 \(width x "
            r"height\), and 16x16 would do"
        ),
    ):
        pipe.encode(picture(size=(15, 16)), PROMPT)
    with pytest.raises(DDIMError, match="image 1 is 8x16 and the model's are 16x16"):
        pipe.encode([picture(), picture(size=(16, 8))], PROMPT)
    for images in ("a.png", ["a.png"]):
        with pytest.raises(
            DDIMError,
            match="images must be Pillow images, arrays of bytes, or a tensor; image 0 is a str",
        ):
            pipe.encode(images, [picture()], 5)
    with pytest.raises(
        DDIMError, match=r"a tensor of images must have shape \[B, C, H, W\]; got \[3, 16, 16\]"
    ):
        pipe.encode(torch.zeros(3, 16, 16), PROMPT)
    steps = (
        r"takes a prompt before the number of steps, {}, prompt=\.\.\., num_inference_steps=20\); "
        r"got the prompt 20"
    )
    with pytest.raises(DDIMError, match="a text model's encode " + steps.format(r"encode\(images")):
        pipe.encode(picture(), 20)
    with pytest.raises(DDIMError, match="a text model's decode " + steps.format(r"decode\(code")):
        pipe.decode(code, 20)
    with pytest.raises(
        DDIMError, match="only a Code can be decoded, which encode or load_code gives; got a list"
    ):
        pipe.decode([picture()], PROMPT)
    assert pipe.encode(picture(size=(20, 31)), PROMPT, 2, resize=True).x_T.shape == (1, 4, 8, 8)
    other = TextToImagePipeline.from_pretrained(tiny_text)
    other.unet.conv_out.bias.data += 1
    with pytest.raises(DDIMError, match="the code was made with another network"):
        other.decode(code, PROMPT)


def another_encoder(pipe):
    next(pipe.text_encoder.parameters()).data += 1


def fewer_merges(pipe):
    """The same vocabulary, of which a word is made by other tokens."""
    backend = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].pop()
    pipe.tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(backend))


def another_autoencoder(pipe):
    pipe.vae.decoder.conv_out.bias.data += 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (another_encoder, "text encoder"),
        (lambda p: setattr(p.text_encoder.config, "hidden_act", "gelu"), "text encoder"),
        (another_autoencoder, "autoencoder"),
        (lambda p: p.vae.register_to_config(scaling_factor=0.4), "autoencoder"),
        (lambda p: p.unet.register_to_config(norm_eps=0.1), "network configuration"),
        (lambda p: setattr(p.tokenizer, "model_max_length", 11), "tokenizer"),
        (fewer_merges, "tokenizer's rules"),
    ],
)
def test_a_code_belongs_to_all_that_makes_its_picture(change, name, pipe, tiny_text, tmp_path):
    code = pipe.encode(picture(), PROMPT, 2)
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.decode(code, PROMPT)  # what is stored and opened is the same model
    change(again)
    with pytest.raises(DDIMError, match=f"the code was made with another {name} "):
        again.decode(code, PROMPT)
    older = replace(code, origin={n: code.origin[n] for n in ("dtype", "network", "schedule")})
    again.decode(older, PROMPT)  # whose file does not say the rest


@pytest.mark.parametrize("merges", ["a b", "b a"])
def test_a_tokenizer_that_python_runs_is_known_by_its_files(merges):
    class Slow:
        pad_token_id, padding_side = 0, "right"

        def __init__(self, merges):
            self.merges = merges

        def save_vocabulary(self, folder):
            path = Path(folder, "merges.txt")
            path.write_text(self.merges)
            return (str(path),)

    assert (_rules(Slow(merges)) == _rules(Slow("a b"))) == (merges == "a b")


# --- what goes to diffusers' own call


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own code
def test_what_the_loop_does_not_know_goes_to_diffusers_call_with_our_scheduler(tiny_text, both):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    options = {"num_inference_steps": 4, "output_type": "pt"}
    with pytest.warns(FutureWarning, match="callback"):
        found = pipe(
            PROMPT,
            seeds=[1],
            callback=lambda i, t, x: seen.append(int(t)),
            callback_steps=1,
            **options,
        ).images
    assert seen == pipe.select_timesteps(4)
    torch.testing.assert_close(found, draw(pipe, seeds=[1]), rtol=0, atol=1e-4)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(both[1].scheduler.config)
    stock = diffusers.StableDiffusionPipeline(
        **pipe.components, requires_safety_checker=False
    )  # of the same weights, laid out alike
    stock.set_progress_bar_config(disable=True)
    found, expected = (
        p(PROMPT, generator=make_generators([1]), **options).images for p in (pipe, stock)
    )
    assert torch.equal(found, expected)
    with pytest.raises(
        DDIMError,
        match=(
            r"a EulerDiscreteScheduler is sampled by diffusers' own loop, which does not know order"
        ),
    ):
        pipe(PROMPT, order=2, **options)
    with pytest.raises(ValueError, match="sigmas"):
        draw(both[0], sigmas=[1.0, 0.5])
    with pytest.raises(
        TypeError, match="TextToImagePipeline got an unexpected keyword argument 'guidence_scale'"
    ):
        pipe(PROMPT, guidence_scale=3)


def test_an_argument_of_the_other_pipeline_names_it(pipe, edit):
    hint = (
        r"got an unexpected keyword argument '{0}'; {1} takes it, and {1}\(\*\*pipe.components\) "
        r"is one of the same parts"
    )
    with pytest.raises(
        TypeError, match="^TextToImagePipeline " + hint.format("image", "ImageToImagePipeline")
    ):
        pipe(PROMPT, image=picture(), strength=0.5)
    with pytest.raises(
        TypeError, match="^ImageToImagePipeline " + hint.format("height", "TextToImagePipeline")
    ):
        edit(PROMPT, picture(), height=16)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'heigth'$"):
        edit(PROMPT, picture(), heigth=16)
    ours = (TextToImagePipeline, ImageToImagePipeline)
    for one, other in (ours, ours[::-1]):
        mine, its = (set(inspect.signature(each.__call__).parameters) for each in (one, other))
        assert one._other == (other.__name__, its - mine)


def test_a_distilled_network_that_is_told_the_scale_goes_there_too(both, tiny_text):
    config = both[0].unet.config
    pipe = TextToImagePipeline.from_pretrained(
        tiny_text, unet=diffusers.UNet2DConditionModel.from_config(config, time_cond_proj_dim=8)
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = diffusers.StableDiffusionPipeline(**{**pipe.components}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    found, expected = (
        p(PROMPT, num_inference_steps=2, generator=make_generators([1]), output_type="pt").images
        for p in (pipe, theirs)
    )
    assert torch.equal(found, expected)


# --- what the parents bring


def test_an_offloaded_pipeline_encodes(tiny_text, pipe):
    offloaded = TextToImagePipeline.from_pretrained(tiny_text)
    offloaded.enable_model_cpu_offload(device="cpu")
    codes = [each.encode(picture(), PROMPT, 2) for each in (offloaded, offloaded, pipe)]
    for code in codes[:2]:  # the hooks are set again after a call
        torch.testing.assert_close(code.x_T, codes[2].x_T, rtol=1e-3, atol=1e-3)


def test_codes_know_a_network_whose_weights_are_offloaded_one_by_one(tiny_text, pipe):
    offloaded = TextToImagePipeline.from_pretrained(tiny_text)
    offloaded.enable_sequential_cpu_offload(device="cpu")
    assert all(parameter.is_meta for parameter in offloaded.unet.parameters())
    assert offloaded._origin() == pipe._origin()
    with (
        torch.device("meta"),
        pytest.raises(DDIMError, match=r"no weights for weight: it lies on the meta device"),
    ):
        weights_of(torch.nn.Linear(2, 2))


def test_textual_inversions_are_words(tiny_text):
    pipe, theirs = (
        TextToImagePipeline.from_pretrained(tiny_text),
        diffusers.StableDiffusionPipeline.from_pretrained(tiny_text),
    )
    theirs.set_progress_bar_config(disable=True)
    learned = torch.randn(16, generator=torch.Generator().manual_seed(0))
    without = draw(pipe, "a red <thing>", seeds=[0])
    for each in (pipe, theirs):
        each.load_textual_inversion({"<thing>": learned}, token="<thing>")
    found = draw(pipe, "a red <thing>", seeds=[0])
    expected = theirs(
        "a red <thing>", generator=make_generators([0]), num_inference_steps=4, output_type="pt"
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - without).abs().max() > 1e-3


def test_pipelines_are_made_of_pipelines(pipe, theirs):
    made = ImageToImagePipeline.from_pipe(pipe)
    assert made.unet is pipe.unet
    assert type(made.scheduler) is DDIMScheduler
    stock = diffusers.StableDiffusionPipeline(
        **pipe.components, requires_safety_checker=False
    )  # of the same weights, laid out alike
    assert torch.equal(draw(TextToImagePipeline.from_pipe(stock), seeds=[0]), draw(pipe, seeds=[0]))
    torch.testing.assert_close(
        draw(TextToImagePipeline.from_pipe(theirs), seeds=[0]), draw(pipe, seeds=[0])
    )
    plain = to_diffusers(pipe)
    assert type(plain.scheduler) is diffusers.DDIMScheduler
    torch.testing.assert_close(draw(plain, seeds=[0]), draw(pipe, seeds=[0]))


# --- folders


def test_what_is_saved_is_plain_diffusers(pipe, edit, tmp_path, both):
    for mine, name in ((pipe, "StableDiffusionPipeline"), (edit, "StableDiffusionImg2ImgPipeline")):
        mine.save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == name
        assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
        assert index["requires_safety_checker"] is mine.config.requires_safety_checker
    code = """
import sys, numpy, diffusers, torch
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 4, "output_type": "np"}
images = pipe("a red square", generator=torch.Generator().manual_seed(3), **options).images
numpy.save(sys.argv[1] + "/images.npy", images)
assert not any(name.split(".")[0] == "ddim" for name in sys.modules)
"""
    folder = tmp_path / "StableDiffusionPipeline"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
    found = draw(
        DiffusionPipeline.from_pretrained(folder), "a red square", seeds=[3], output_type="np"
    )
    assert np.abs(found - np.load(folder / "images.npy")).max() < 1e-4
    assert (
        type(DiffusionPipeline.from_pretrained(tmp_path / "StableDiffusionImg2ImgPipeline"))
        is ImageToImagePipeline
    )
    assert type(ImageToImagePipeline.from_pretrained(folder)) is ImageToImagePipeline


def test_a_checkpoints_own_scheduler_becomes_ours_and_later_changes_count(tiny_text, tmp_path):
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text)
    stock.scheduler = diffusers.PNDMScheduler.from_config(
        {**stock.scheduler.config, "skip_prk_steps": True}
    )  # as Stable Diffusion 1.5's
    stock.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.select_timesteps(4) == [751, 501, 251, 1]
    before = draw(pipe, seeds=[0])
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    changed = draw(pipe, seeds=[0])
    assert (changed - before).abs().max() > 1e-3
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert pipe.select_timesteps(4)[0] == 999
    assert (draw(pipe, seeds=[0]) - changed).abs().max() > 1e-3
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(DDIMError, match="epsilon prediction cannot be used where the SNR is 0"):
        draw(pipe, seeds=[0])


def test_inpainting_and_controlnet_are_sampled_by_diffusers_with_our_scheduler(pipe, theirs):
    mask, shown = Image.new("L", (16, 16), 255), {"num_inference_steps": 5, "output_type": "pt"}
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(4, 8)
    )
    for kind, more, given in (
        (
            diffusers.StableDiffusionInpaintPipeline,
            {},
            {"image": picture(), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16},
        ),
        (
            diffusers.StableDiffusionControlNetPipeline,
            {"controlnet": control},
            {"image": picture()},
        ),
    ):
        images = []
        for source in (pipe, theirs):
            made = kind(**{**source.components, **more}, requires_safety_checker=False)
            made.set_progress_bar_config(disable=True)
            images.append(made(PROMPT, generator=make_generators([0]), **shown, **given).images)
        torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_other_kinds_keep_diffusers_pipeline_with_our_scheduler(theirs, tmp_path):
    parts = {
        **theirs.components,
        "unet": diffusers.UNet2DConditionModel.from_config(theirs.unet.config, in_channels=9),
    }
    diffusers.StableDiffusionInpaintPipeline(
        **parts, requires_safety_checker=False
    ).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe, diffusers.StableDiffusionInpaintPipeline)
    assert type(pipe.scheduler) is DDIMScheduler
    with pytest.raises(
        CheckpointError,
        match="is a StableDiffusionInpaintPipeline, not in Stable Diffusion's format",
    ):
        TextToImagePipeline.from_pretrained(tmp_path)
    made = TextToImagePipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(
        DDIMError, match="the network takes 9 channels and returns 4: it is one for inpainting"
    ):
        draw(made)


def test_a_safety_checker_is_asked_and_its_pictures_stay_black(tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)

    class Checker(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, images, clip_input):
            images[0] = 0.0
            return images, [True, False]

    pipe.register_modules(
        safety_checker=Checker(), feature_extractor=lambda pictures, return_tensors: Features()
    )
    result = pipe(PROMPT, seeds=[0, 1], num_inference_steps=2, **QUIET)
    assert result.nsfw_content_detected == [True, False]
    assert float(result.images[0].max()) == 0.0
    assert float(result.images[1].max()) > 0.0


class Features(dict):
    pixel_values = torch.zeros(1)

    def to(self, device):
        return self


# --- bad input


def test_a_prompt_that_is_too_long_is_cut_and_said_so_once(pipe, caplog):
    long = "a red square on a black background a green square on a white background"
    with pytest.warns(
        UserWarning,
        match=(
            r"a prompt has 14 tokens and the text encoder reads 10; this was cut off: 'on a white "
            r"background'"
        ),
    ):
        images = draw(pipe, long, seeds=[0])
    assert torch.equal(images, draw(pipe, " ".join(long.split()[:10]), seeds=[0]))
    with pytest.warns(UserWarning, match="cut off: 'white background'"):
        draw(pipe, "a", negative_prompt="red " * 10 + "white background", seeds=[0])
    assert "truncated" not in caplog.text


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_negative_prompt_without_guidance_is_ignored_with_a_warning(scale, pipe):
    with pytest.warns(
        UserWarning,
        match=f"the negative prompt is ignored: guidance is off at guidance_scale={scale}",
    ):
        images = draw(pipe, seeds=[0], guidance_scale=scale, negative_prompt="blue")
    assert torch.equal(images, draw(pipe, seeds=[0], guidance_scale=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "give either prompt or prompt_embeds, one of the two; got neither"),
        ({"prompt": []}, r"prompt must be a text, or a list of at least one; got \[\]"),
        ({"prompt": ["a", 3]}, r"prompt must be a text, or a list of at least one; got \['a', 3\]"),
        ({"prompt": 5}, "prompt must be a text"),
        (
            {"negative_prompt": 5},
            "negative_prompt must be a text, or a list of at least one; got 5",
        ),
        (
            {"negative_prompt": [None]},
            r"negative_prompt must be a text, or a list of at least one; got \[None\]",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(12, 16)},
            r"prompt_embeds must be a tensor \[P, L, 16\].*; got shape \[12, 16\]",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 12, 7)},
            r"prompt_embeds must be .*; got shape \[1, 12, 7\]",
        ),
        (
            {"negative_prompt_embeds": np.zeros((1, 12, 16))},
            r"negative_prompt_embeds must be a tensor .*; got ndarray",
        ),
        (
            {"clip_skip": 2},
            "clip_skip must be a whole number from 0 to 1, the layers of the text encoder; got 2",
        ),
        ({"seeds": 3}, "seeds must be a list of whole numbers, one an image; got 3"),
        (
            {"latents": np.zeros((1, 4, 8, 8))},
            r"latents must be a tensor \[B, C, h, w\]; got ndarray",
        ),
        *(
            (
                {"guidance_scale": s},
                f"guidance_scale must be a finite number, of which 1 or less is off; got {s}",
            )
            for s in (None, math.nan, math.inf)
        ),
        (
            {"guidance_rescale": None},
            r"guidance_rescale must lie in \[0, 1\], where 0 is off; got None",
        ),
        ({"prompt_embeds": torch.zeros(1, 12, 16)}, "one of the two; got both"),
        (
            {"negative_prompt": ["a", "b"]},
            (
                "there are 1 prompts, and negative_prompt has 2; give one text for all, or one for "
                "each"
            ),
        ),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 12, 16)},
            "give either negative_prompt or negative_prompt_embeds",
        ),
        (
            {"prompt": ["a", "b"], "seeds": [0, 1, 2]},
            r"other lengths than there are images to make \(a multiple of 2\): seeds: 3",
        ),
        ({"seeds": [0, 1], "num_images_per_prompt": 3}, r"\(1 x 3 = 3\): seeds: 2"),
        ({"seeds": [0, 1], "latents": torch.zeros(3, 4, 8, 8)}, "seeds: 2, latents: 3"),
        (
            {"generator": make_generators([0, 1]), "num_images_per_prompt": 1},
            r"\(1 x 1 = 1\): generator: 2",
        ),
        (
            {"num_images_per_prompt": 0},
            "num_images_per_prompt must be a whole number of at least 1; got 0",
        ),
        (
            {"seeds": [0], "generator": torch.Generator()},
            "seeds and generator both say where noise comes from",
        ),
        ({"seeds": [-1]}, "a seed must be a whole number"),
        (
            {"latents": torch.zeros(1, 3, 8, 8)},
            r"latents must have shape \[B, 4, 8, 8\]; got \[1, 3, 8, 8\]",
        ),
        (
            {"height": picture()},
            (
                r"height must be a whole number of pixels; got an Image\. Images to begin at are "
                r"for ImageToImagePipeline"
            ),
        ),
        ({"width": 16.5}, "width must be a whole number of pixels; got 16.5"),
        (
            {"height": 17},
            (
                r"width and height must be multiples of 2, the VAE's factor; got 16x17 \(width x "
                r"height\), and 16x16 would do"
            ),
        ),
        ({"height": 0, "width": 16}, r"got 16x0 \(width x height\), and 16x2 would do"),
        ({"output_type": "banana"}, "output_type must be pil, np, pt or latent; got 'banana'"),
        (
            {"guidance_rescale": 1.2},
            r"guidance_rescale must lie in \[0, 1\], where 0 is off; got 1.2",
        ),
        ({"eta": -1}, "eta must be at least 0"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"timesteps": [5]}, "leave out num_inference_steps and timestep_spacing, or timesteps"),
        ({"sampler": "o-belm", "eta": 1.0}, "o-belm is deterministic, and needs eta 0"),
        (
            {"sampler": "o-belm", "callback_on_step_end": print},
            "callback_on_step_end may change latents, and o-belm looks two steps back",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]},
            r"must be of \['latents'",
        ),
    ],
)
def test_bad_calls_are_refused(options, message, pipe):
    with pytest.raises(DDIMError, match=message):
        draw(pipe, **{"prompt": PROMPT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"strength": s}, r"strength must lie in \(0, 1\]; got") for s in (0.0, -0.5, 1.5)),
        (
            {"strength": 0.1},
            "strength 0.1 of 4 steps keeps none; use a strength of at least 0.25, or more steps",
        ),
        (
            {"image": None},
            "image must be a picture, an array or a tensor, or a list of them; got NoneType",
        ),
        ({"image": []}, "got an empty list"),
        (
            {"image": picture(size=(15, 16))},
            r"multiples of 2, the VAE's factor; got 16x15 \(width x height\), and 16x16 would do",
        ),
        ({"image": torch.zeros(1, 3, 16, 9)}, r"got 9x16 \(width x height\), and 8x16 would do"),
        (
            {"image": [picture(), picture(size=(16, 8))]},
            r"images of one call must have one size; got 8x16, 16x16 \(width x height\)",
        ),
        (
            {"image": torch.zeros(16, 16)},
            (
                r"a tensor must have shape \[C, H, W\] or \[B, C, H, W\] with 3 channels, or 4 for "
                r"latents; got \[16, 16\]"
            ),
        ),
        (
            {"image": torch.zeros(1, 1, 16, 16)},
            r"with 3 channels, or 4 for latents; got \[1, 1, 16, 16\]",
        ),
        (
            {"image": torch.zeros(0, 3, 16, 16)},
            r"the image has a wrong shape: .*; got \[0, 3, 16, 16\]",
        ),
        (
            {"image": np.zeros((16, 16), np.float32)},
            (
                r"an array must have shape \[H, W, C\] or \[B, H, W, C\] with 3 channels; got "
                r"\[16, 16\]"
            ),
        ),
        (
            {"image": np.zeros((3, 16, 16), np.uint8)},
            r"an array of bytes must have shape .* with 1, 3 or 4 channels; got \[3, 16, 16\]",
        ),
        (
            {"image": torch.full((1, 3, 16, 16), 200.0)},
            r"must lie in \[0, 1\]; bytes go in as uint8 arrays",
        ),
        (
            {"image": [picture()] * 3, "prompt": ["a", "b"]},
            "there are 2 prompts and 3 images; give as many of both, or one of either",
        ),
    ],
)
def test_bad_images_are_refused(options, message, edit):
    with pytest.raises(DDIMError, match=message):
        draw(edit, **{"prompt": PROMPT, "image": picture(), **options})


def test_grey_bytes_are_pictures(edit):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = draw(edit, image=np.stack([grey] * 3, -1), seeds=[0])
    for image in (grey, grey[..., None]):
        assert torch.equal(draw(edit, image=image, seeds=[0]), colour)
    with pytest.raises(DDIMError, match="there are no images to encode"):
        edit.encode([], PROMPT)


def test_latents_need_no_vae_and_embeddings_no_text_encoder(tiny_text, pipe):
    bare = TextToImagePipeline(**{**pipe.components, "vae": None}, requires_safety_checker=False)
    bare.warm_up()
    assert torch.equal(
        draw(bare, output_type="latent", height=64, width=64, seeds=[0]),
        draw(bare, output_type="latent", seeds=[0]),
    )
    with pytest.raises(CheckpointError, match="the checkpoint has no vae"):
        _ = bare.image_shape
    bare = TextToImagePipeline(
        **{**pipe.components, "text_encoder": None, "tokenizer": None},
        requires_safety_checker=False,
    )
    cond, uncond = pipe.conditions(PROMPT)
    found = draw(
        bare, None, prompt_embeds=cond, negative_prompt_embeds=uncond, clip_skip=1, seeds=[0]
    )
    torch.testing.assert_close(found, draw(pipe, seeds=[0]))


def test_a_scheduler_of_another_family_is_refused(both):
    pipe, _ = both
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        DDIMError,
        match=(
            r"a FlowMatchEulerDiscreteScheduler walks no noise schedule .* set pipe.scheduler to a "
            r"ddim.DDIMSch"
        ),
    ):
        draw(pipe)
    pipe.scheduler = None
    with pytest.raises(CheckpointError, match="the checkpoint has no scheduler"):
        draw(pipe)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"),
        *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"),
    ],
)
def test_a_scheduler_that_is_put_in_samples_by_its_own_loop(name, both, edit):
    kind = getattr(diffusers, name)
    for pipe, theirs, given in (
        (*both, {}),
        (
            edit,
            diffusers.StableDiffusionImg2ImgPipeline(
                **both[1].components, requires_safety_checker=False
            ),
            {"image": picture(), "strength": 1.0},
        ),
    ):
        kept, images = (pipe.scheduler, theirs.scheduler), []
        theirs.set_progress_bar_config(disable=True)
        for each, quiet in ((pipe, QUIET), (theirs, {"output_type": "pt"})):
            each.scheduler = kind.from_config(kept[0].config)
            options = {"num_inference_steps": 4, "generator": make_generators([1]), **quiet}
            images.append(each(PROMPT, **options, **given))
        pipe.scheduler, theirs.scheduler = kept
        torch.testing.assert_close(images[0].images, images[1].images, rtol=0, atol=1e-4)
        own = pipe(PROMPT, num_inference_steps=4, seeds=[1], **QUIET, **given).images
        assert (own - images[0].images).abs().max() > 1e-3  # no DDIM in silence


@pytest.mark.filterwarnings("ignore:.*`callback:FutureWarning")
def test_what_goes_to_diffusers_own_call_is_checked_and_counted_alike(pipe, edit, capsys):
    theirs = {
        "callback": lambda step, t, latents: None,
        "callback_steps": 1,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    two, second = (
        pipe(PROMPT, seeds=[0, 1], progress=False, **theirs).images,
        pipe(PROMPT, seeds=[1], **theirs).images,
    )
    torch.testing.assert_close(two[1:], second)
    assert capsys.readouterr().err.count("0/2") == 1  # the bar of the second
    assert len(pipe(PROMPT, latents=torch.randn(2, 4, 8, 8), **theirs).images) == 2
    with pytest.warns(PromptWarning, match="the negative prompt is ignored: guidance is off"):
        pipe(PROMPT, negative_prompt="blue", guidance_scale=1.0, **theirs)
    for bad, message in (
        ({"guidance_rescale": 1.7}, "guidance_rescale must lie in"),
        ({"output_type": "banana"}, "output_type must be pil, np, pt or latent"),
        ({"seeds": [0, 1], "num_images_per_prompt": 3}, "seeds: 2"),
    ):
        with pytest.raises(DDIMError, match=message):
            pipe(PROMPT, **{**theirs, **bad})
    for bad, message in (
        ({"strength": 0}, "strength must lie in"),
        ({"image": picture(size=(15, 16))}, "multiples of 2"),
    ):
        with pytest.raises(DDIMError, match=message):
            edit(PROMPT, **{"image": picture(), **theirs, **bad})


def test_diffusers_auto_pipelines_find_the_other_tasks(pipe, edit):
    for auto, kind in (
        (diffusers.AutoPipelineForText2Image, TextToImagePipeline),
        (diffusers.AutoPipelineForImage2Image, ImageToImagePipeline),
        (diffusers.AutoPipelineForInpainting, diffusers.StableDiffusionInpaintPipeline),
    ):
        for each in (pipe, edit):
            made = auto.from_pipe(each)
            assert type(made) is kind
            assert made.unet is each.unet
            assert type(made.scheduler) is DDIMScheduler


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet"])
def test_a_missing_part_is_named(part, tiny_text, tmp_path):
    shutil.copytree(tiny_text, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(CheckpointError, match=f"has no {part}, and its model_index.json lists one"):
        DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "model", **{part: None})
    with pytest.raises(CheckpointError, match=f"the checkpoint has no {part}"):
        draw(pipe)


def test_a_vae_that_overflows_is_an_error_not_a_black_picture(tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    pipe.vae.decoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(
        DDIMError,
        match=r"the VAE's picture became NaN or infinite in torch.float32; keep the VAE in float32",
    ):
        draw(pipe)
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(DDIMError, match="the network's prediction became NaN or infinite"):
        draw(pipe)


@pytest.mark.slow
def test_without_transformers_one_sentence_says_what_to_install(tiny_text, tiny):
    code = """
import sys
from dataclasses import replace
sys.modules["transformers"] = sys.modules["peft"] = None  # as if not installed
import ddim
assert ddim.DiffusionPipeline.from_pretrained(sys.argv[2]).unet is not None
opened = lambda: ddim.DiffusionPipeline.from_pretrained(sys.argv[1])
for act in (opened, lambda: ddim.TextToImagePipeline):
    try:
        act()
    except (ImportError, ddim.DDIMError) as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tiny_text), str(tiny)],
        check=True,
        capture_output=True,
        text=True,
    )
    sentence = (
        "text models need transformers, which is not installed; run: pip install 'ddim[text]'."
    )
    assert run.stdout.splitlines() == [sentence, sentence]


def test_threads_may_share_a_pipeline_and_its_options_do_not_mix(tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    asked = [{"guidance_scale": scale, "eta": eta} for scale in (1.0, 3.0) for eta in (0.0, 1.0)]

    def make(options):
        told = {"seeds": [0], "num_inference_steps": 4, "output_type": "latent", "progress": False}
        return pipe(PROMPT, **told, **options).images

    alone = [make(options) for options in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # else a fault would show once in a hundred runs
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(make, asked * 6))
    finally:
        sys.setswitchinterval(before)
    for one, other in zip(alone * 6, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert not any(torch.allclose(alone[0], other, atol=1e-3) for other in alone[1:])
