import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from ddim.core.denoiser import Clip
from ddim.core.noise import make_generators, seeded_randn
from ddim.errors import CheckpointError, DDIMError
from ddim.models.checkpoints import weight_hash
from ddim.pipelines.diffusion_pipeline import DiffusionPipeline
from ddim.pipelines.foreign import step_options
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.scheduler import DDIMScheduler

QUIET = {"progress": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tiny):
    return UnconditionalPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def classes(tiny_classes):
    return UnconditionalPipeline.from_pretrained(tiny_classes)


def draw(pipe, **options):
    return pipe(**{"num_inference_steps": 4, **QUIET, **options}).images


def test_betas_of_more_levels_than_of_training_are_walked_as_in_diffusers(pipe):
    betas = torch.linspace(1e-4, 0.02, 1500).tolist()
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, trained_betas=betas)
    theirs, ours = (
        k(pipe.unet, scheduler) for k in (diffusers.DDIMPipeline, UnconditionalPipeline)
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(1, make_generators([3]), num_inference_steps=4, output_type="pt").images
    assert ours.select_timesteps(4) == [999, 749, 499, 249]
    torch.testing.assert_close(draw(ours, seeds=[3]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_images_are_those_of_diffusers_where_its_stride_is_the_neighbour(steps, eta, tiny, pipe):
    theirs = diffusers.DDIMPipeline.from_pretrained(tiny)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        2, make_generators([3, 4]), eta=eta, num_inference_steps=steps, output_type="pt"
    ).images
    torch.testing.assert_close(
        draw(pipe, seeds=[3, 4], eta=eta, num_inference_steps=steps), expected, rtol=0, atol=2e-5
    )


def test_a_foreign_configuration_is_followed_with_eps_derived_again(foreign):
    theirs = diffusers.DDIMPipeline.from_pretrained(foreign)
    theirs.set_progress_bar_config(disable=True)
    mine = UnconditionalPipeline.from_pretrained(foreign)
    assert mine.select_clip() == Clip("static")
    assert mine.select_timesteps(50)[0] == 980
    expected = theirs(
        2,
        make_generators([3, 4]),
        num_inference_steps=10,
        use_clipped_model_output=True,
        output_type="pt",
    ).images
    torch.testing.assert_close(
        draw(mine, seeds=[3, 4], num_inference_steps=10), expected, rtol=0, atol=2e-5
    )
    unclipped = draw(mine, seeds=[3, 4], num_inference_steps=10, clip="none")
    assert (unclipped - expected).abs().max() > 0.01
    assert torch.equal(
        draw(mine, seeds=[3, 4], num_inference_steps=10, clip=Clip("static")),
        draw(mine, seeds=[3, 4], num_inference_steps=10),
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, "sigma-hat"])
def test_the_image_of_a_seed_does_not_depend_on_the_others(eta, pipe):
    together = draw(pipe, seeds=[0, 1, 2, 3, 4], eta=eta)
    apart = torch.cat([draw(pipe, seeds=part, eta=eta) for part in ([0], [1, 2], [3, 4])])
    assert (together - apart).abs().max() < 1e-5


def test_generators_mean_what_they_mean_in_diffusers_and_latents_take_the_place_of_the_first_draw(
    pipe,
):
    by_seed = draw(pipe, seeds=[5, 6], eta=1.0)
    assert torch.equal(draw(pipe, generator=make_generators([5, 6]), eta=1.0), by_seed)
    x = seeded_randn(pipe.image_shape, [5, 6])
    assert torch.equal(draw(pipe, seeds=[5, 6], latents=x, eta=1.0), by_seed)
    assert not torch.equal(
        draw(pipe, generator=make_generators([5, 6]), latents=x, eta=1.0), by_seed
    )
    one = draw(pipe, batch_size=2, generator=make_generators([5])[0])
    torch.testing.assert_close(one[:1], draw(pipe, seeds=[5]))


def test_without_seeds_the_global_generator_says(pipe):
    torch.manual_seed(7)
    first = draw(pipe, batch_size=2)
    assert not torch.equal(draw(pipe, batch_size=2), first)
    torch.manual_seed(7)
    assert torch.equal(draw(pipe, batch_size=2), first)
    assert not torch.equal(first[0], first[1])


def test_a_call_says_its_seeds_so_that_each_image_can_be_drawn_again(pipe):
    options = {"num_inference_steps": 4, "eta": 1.0, **QUIET}
    first = pipe(3, **options)
    assert len(set(first.seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in first.seeds)
    again = pipe(seeds=first.seeds[1:], **options)
    torch.testing.assert_close(again.images, first.images[1:])
    assert again.seeds == first.seeds[1:]
    assert set(first.keys()) == {"images"}
    assert len(pipe(return_dict=False, **options)) == 1
    assert pipe(generator=torch.Generator(), **options).seeds is None
    x_T = seeded_randn((1, 8, 8), [5])
    given = pipe(latents=x_T, **options)
    torch.testing.assert_close(pipe(latents=x_T, seeds=given.seeds, **options).images, given.images)
    made = UnconditionalPipeline(pipe.unet, pipe.scheduler)
    made.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    del options["eta"]
    first = made(2, **options)
    torch.testing.assert_close(made(seeds=first.seeds, **options).images, first.images)


def test_latents_may_have_another_size(pipe):
    assert draw(pipe, latents=torch.zeros(1, 1, 16, 12)).shape == (1, 1, 16, 12)


def test_output_types_hold_the_same_picture(foreign):
    pipe = UnconditionalPipeline.from_pretrained(foreign)
    options = {"seeds": [1, 2], "num_inference_steps": 2, "progress": False}
    tensor = pipe(**options, output_type="pt").images
    array = pipe(**options, output_type="np").images
    (pictures,) = pipe(**options, return_dict=False)
    assert tensor.shape == (2, 3, 8, 8)
    assert tensor.dtype == torch.float32
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.stack([np.asarray(p) for p in pictures]) - 255 * array).max() <= 0.51


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_keeps_a_float32_state(dtype, tiny, pipe):
    half = UnconditionalPipeline.from_pretrained(tiny, dtype=dtype)
    seen = []
    images = draw(half, seeds=[0], eta=1.0, callback=lambda state: seen.append(state.x_s.dtype))
    assert half.unet.dtype == dtype
    assert seen == [torch.float32] * 4
    assert images.dtype == torch.float32
    assert (images - draw(pipe, seeds=[0], eta=1.0)).abs().max() < 0.05
    assert half(seeds=[0], num_inference_steps=1, progress=False).images[0].size == (8, 8)


def test_to_moves_and_casts_and_double_precision_stays(tiny):
    moved = UnconditionalPipeline.from_pretrained(tiny).to(torch.float64)
    states = []
    draw(moved, seeds=[0], callback=states.append)
    assert states[0].x_s.dtype == torch.float64


def test_a_callback_sees_every_step_and_stops_with_what_is_predicted(pipe):
    states = []
    whole = draw(pipe, seeds=[0, 1], callback=states.append)
    assert [(s.t, s.s, s.number) for s in states] == [
        (999, 749, 0),
        (749, 499, 1),
        (499, 249, 2),
        (249, -1, 3),
    ]
    assert torch.equal((states[-1].x_s / 2 + 0.5).clamp(0, 1), whole)
    stopped = draw(pipe, seeds=[0, 1], callback=lambda state: state.number == 1)
    assert torch.equal(stopped, (states[1].x0 / 2 + 0.5).clamp(0, 1))


def test_timesteps_are_those_asked_for(pipe, capsys):
    states = []
    draw(pipe, seeds=[0], num_inference_steps=None, timesteps=[900, 40, 3], callback=states.append)
    assert [s.t for s in states] == [900, 40, 3]
    assert pipe.select_timesteps() == pipe.select_timesteps(50)
    assert pipe.select_timesteps(3, timestep_spacing="quadratic") == [999, 249, 0]
    assert capsys.readouterr().err == ""
    pipe(seeds=[0], num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err


def test_the_scheduler_is_read_at_call_time(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    before = draw(pipe, seeds=[0])
    pipe.scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    assert pipe.select_clip().kind == "static"
    assert (draw(pipe, seeds=[0]) - before).abs().max() > 1e-3


def test_the_order_is_the_configurations_unless_the_call_says_another(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    first, second = draw(pipe, seeds=[0]), draw(pipe, seeds=[0], order=2)
    assert (first - second).abs().max() > 1e-3
    pipe.scheduler.register_to_config(multistep_order=2)
    assert torch.equal(draw(pipe, seeds=[0]), second)
    assert torch.equal(draw(pipe, seeds=[0], order=1), first)
    with pytest.raises(
        DDIMError, match="order 2 solves the deterministic flow and draws no noise; got eta=1"
    ):
        draw(pipe, seeds=[0], eta=1.0)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    assert pipe.select_order() == 1


def test_class_labels_choose_the_image(classes):
    mixed = draw(classes, seeds=[0, 0, 1], class_labels=[1, 3, 3])
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-4)
    torch.testing.assert_close(draw(classes, seeds=[0], class_labels=3), mixed[1:2])
    torch.testing.assert_close(draw(classes, seeds=[0, 1], class_labels=torch.tensor(3)), mixed[1:])


def test_a_learned_variance_is_left_out():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        8,
        1,
        2,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    pipe = UnconditionalPipeline(network.eval(), DDIMScheduler(clip_sample=False))
    states = []
    assert draw(pipe, seeds=[0], callback=states.append).shape == (1, 1, 8, 8)
    with torch.no_grad():
        expected = network(seeded_randn((1, 8, 8), [0]), states[0].t).sample[:, :1]
    torch.testing.assert_close(states[0].eps, expected)


def test_zero_terminal_snr_starts_from_nothing(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert float(pipe.noise_schedule.alpha_bar(999)) == 0
    assert bool(draw(pipe, seeds=[0], eta=1.0).isfinite().all())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(DDIMError, match="epsilon prediction cannot be used"):
        draw(pipe, seeds=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "banana"}, "output_type must be one of pil, np, pt; got 'banana'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1000000; got 0"),
        ({"seeds": []}, "at least 1; got 0"),
        (
            {"batch_size": 3, "seeds": [0, 1]},
            r"different numbers of images \(batch_size: 3, seeds: 2\)",
        ),
        (
            {"seeds": [0], "generator": torch.Generator()},
            "seeds and generator both say where noise comes from",
        ),
        ({"seeds": [-1]}, "a seed must be a whole number from 0"),
        (
            {"latents": torch.zeros(1, 3, 8, 8)},
            r"latents must have shape \[B, 1, H, W\]; got \[1, 3, 8, 8\]",
        ),
        ({"timesteps": [5, 5], "num_inference_steps": None}, "must not repeat a level"),
        ({"timesteps": [5, 4]}, "leave out num_inference_steps and timestep_spacing, or timesteps"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"timestep_spacing": "logarithmic"}, "timestep_spacing must be one of"),
        ({"eta": -1}, "eta must be at least 0"),
        ({"eta": 2.0}, "eta=2.0 would draw more noise than the level can hold"),
        ({"eta": "big"}, "eta must be a number or 'sigma-hat'"),
        ({"clip": "soft"}, "clip must be none, static or dynamic"),
        ({"class_labels": 1}, "the network was trained without classes; leave out class_labels"),
    ],
)
def test_bad_calls_are_refused(options, message, pipe):
    with pytest.raises(DDIMError, match=message):
        draw(pipe, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "the network is class-conditional: give class_labels, from 0 to 3"),
        (4, "whole numbers from 0 to 3; got 4"),
        ([0, -1], r"got \[0, -1\]"),
        (0.5, "got 0.5"),
    ],
)
def test_bad_labels_are_refused(labels, message, classes):
    with pytest.raises(DDIMError, match=message):
        draw(classes, class_labels=labels)


def test_channels_that_do_not_fit_are_refused(tiny):
    network = diffusers.UNet2DModel(
        8,
        3,
        1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(DDIMError, match="the network takes 3 channels and returns 1"):
        draw(UnconditionalPipeline(network, DDIMScheduler()), seeds=[0])
    latent = diffusers.UNet2DModel(
        8,
        4,
        4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    pipe = UnconditionalPipeline(latent, DDIMScheduler())
    assert draw(pipe, seeds=[0]).shape == (1, 4, 8, 8)
    with pytest.raises(DDIMError, match="images of 4 channels, and a picture has 1 or 3"):
        draw(pipe, seeds=[0], output_type="pil")


def test_nan_is_an_error_not_a_black_image(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(DDIMError, match=r"became NaN or infinite in torch\.float32"):
        draw(pipe, seeds=[0])


@pytest.mark.slow
def test_what_is_saved_is_plain_diffusers(tiny, tmp_path, pipe):
    pipe.scheduler.register_to_config(multistep_order=2)
    pipe.save_pretrained(tmp_path / "saved")
    assert weight_hash(tmp_path / "saved") == weight_hash(tiny)
    code = """
import sys, numpy, diffusers
pipe = diffusers.DDIMPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
import torch
options = {"num_inference_steps": 10, "output_type": "np"}
images = pipe(generator=torch.Generator().manual_seed(3), **options).images
numpy.save(sys.argv[1] + "/images.npy", images)
assert not any(name.split(".")[0] == "ddim" for name in sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], check=True, capture_output=True
    )
    again = UnconditionalPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.scheduler, DDIMScheduler)
    assert again.scheduler.config["multistep_order"] == 2
    images = draw(
        again, seeds=[3], order=1, num_inference_steps=10, output_type="np"
    )  # diffusers passes over the order
    assert np.abs(images - np.load(tmp_path / "saved" / "images.npy")).max() < 2e-5
    assert torch.equal(draw(again, seeds=[3]), draw(pipe, seeds=[3]))


def test_what_diffusers_does_not_know_is_not_saved(tiny, tmp_path):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.scheduler = DDIMScheduler(timestep_spacing="quadratic")
    with pytest.raises(DDIMError, match="quadratic"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("model", ["tiny", "tiny_classes", "foreign"])
@pytest.mark.slow
def test_a_warm_up_compiles_all_there_is_and_saving_stays_as_it_was(model, request, tmp_path):
    folder = request.getfixturevalue(model)
    plain, compiled, compilations = (
        UnconditionalPipeline.from_pretrained(folder),
        UnconditionalPipeline.from_pretrained(folder),
        [],
    )

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    assert compiled.compile(backend=count) is compiled
    compiled.warm_up(2)
    before = len(compilations)
    assert before > 0
    options = {
        "seeds": [0, 1],
        "eta": 1.0,
        "class_labels": [1, 2] if model == "tiny_classes" else None,
    }
    torch.testing.assert_close(draw(compiled, **options), draw(plain, **options))
    assert len(compilations) == before
    compiled.save_pretrained(tmp_path)
    assert weight_hash(tmp_path) == weight_hash(folder)


def test_a_warm_up_draws_nothing(classes):
    state = torch.random.get_rng_state()
    classes.warm_up(3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("opened", ["tiny", "tiny_classes", "foreign"])
def test_unconditional_folders_open_as_our_pipeline(opened, request):
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(opened), dtype=torch.bfloat16)
    assert type(pipe) is UnconditionalPipeline
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.unet.dtype == torch.bfloat16


def test_parts_may_be_given_and_typos_are_not_swallowed(tiny):
    pipe = DiffusionPipeline.from_pretrained(
        tiny, scheduler=diffusers.PNDMScheduler(num_train_timesteps=200)
    )
    assert len(pipe.noise_schedule) == 200
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtipe'"):
        DiffusionPipeline.from_pretrained(tiny, dtipe=torch.float16)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A checkpoint of another kind: a class-conditional transformer on the latents of an
    autoencoder."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        norm_num_groups=4,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    folder = tmp_path_factory.mktemp("models") / "dit"
    diffusers.DiTPipeline(
        transformer, vae, diffusers.DPMSolverMultistepScheduler()
    ).save_pretrained(folder)
    return folder


def test_other_checkpoints_open_as_diffusers_pipeline_with_our_scheduler(dit):
    pipe = DiffusionPipeline.from_pretrained(dit)
    assert isinstance(pipe, diffusers.DiTPipeline)
    assert type(pipe.scheduler) is DDIMScheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [1], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
    ).images
    assert images.shape[0] == 1
    assert np.isfinite(images).all()
    given = diffusers.DPMSolverMultistepScheduler()
    assert DiffusionPipeline.from_pretrained(dit, scheduler=given).scheduler is given
    with pytest.raises(
        CheckpointError, match="is a DiTPipeline, which needs more than a network and a scheduler"
    ):
        UnconditionalPipeline.from_pretrained(dit)


def test_a_flow_matching_checkpoint_is_refused_before_its_weights_are_read(dit, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text((dit / "model_index.json").read_text())
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(
        CheckpointError, match="is a FlowMatchEulerDiscreteScheduler of a flow-matching model"
    ):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_checkpoint_that_diffusers_cannot_open_is_an_error_of_ours(dit, tmp_path):
    for name in ("scheduler", "vae"):
        (tmp_path / name).mkdir()
        for path in (dit / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model_index.json").write_text((dit / "model_index.json").read_text())
    with pytest.raises(
        CheckpointError, match="has no transformer, and its model_index.json lists one"
    ):
        DiffusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match="cannot be opened as a DiTPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [DDIMScheduler, diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_options_of_a_scheduler_that_were_given_by_position_count(cls, pipe):
    assert len(UnconditionalPipeline(pipe.unet, cls(500)).noise_schedule) == 500


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()]
)
def test_a_scheduler_of_another_family_is_refused(scheduler, pipe):
    for given in (scheduler, scheduler.config):
        with pytest.raises(DDIMError, match="DDIM cannot take over this configuration: it is a"):
            UnconditionalPipeline(pipe.unet, given)


def test_a_scheduler_that_is_put_in_later_is_taken_or_refused(pipe):
    made = UnconditionalPipeline(
        pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config, multistep_order=1)
    )
    expected = draw(made, seeds=[0])
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    assert torch.equal(draw(made, seeds=[0]), expected)
    made.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(DDIMError, match="FlowMatchEulerDiscreteScheduler walks no noise schedule"):
        draw(made, seeds=[0])


OTHERS = (
    *("DDPMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
    *("EulerAncestralDiscreteScheduler", "DDIMParallelScheduler", "DPMSolverSinglestepScheduler"),
)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_a_scheduler_of_another_family_samples_by_its_own_loop(name, pipe):
    kind = getattr(diffusers, name)
    made = UnconditionalPipeline(pipe.unet, pipe.scheduler)
    made.scheduler = kind.from_config(pipe.scheduler.config)
    states, noise = [], seeded_randn((1, 8, 8), [3, 4])
    images = draw(made, num_inference_steps=6, seeds=[3, 4], callback=states.append)
    own, generators = kind.from_config(pipe.scheduler.config), make_generators([3, 4])
    own.set_timesteps(6)
    x = noise * own.init_noise_sigma
    for generator in generators:
        torch.randn((1, 1, 8, 8), generator=generator)  # x_T
    options = step_options(own, 0.0, generators)
    with torch.no_grad():
        for t in own.timesteps:
            output = pipe.unet(own.scale_model_input(x, t), t).sample
            x = own.step(output, t, x, **options).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert [state.t for state in states] == [int(t) for t in own.timesteps]
    torch.testing.assert_close((states[-1].x_s / 2 + 0.5).clamp(0, 1), images)
    stopped = draw(made, num_inference_steps=6, seeds=[3, 4], callback=lambda state: True)
    torch.testing.assert_close(stopped, (states[0].x0 / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        *((name, "walks no noise schedule of") for name in ("EDMEulerScheduler", "IPNDMScheduler")),
        ("CMStochasticIterativeScheduler", "walks no noise schedule of DDIM's family"),
        ("ScoreSdeVeScheduler", "walks no noise schedule of DDIM's family"),
        ("DDIMInverseScheduler", "goes from data to noise"),
        ("DPMSolverMultistepInverseScheduler", "goes from data to noise"),
        ("RePaintScheduler", "needs original_image, mask, which this pipeline does not have"),
    ],
)
def test_a_scheduler_that_cannot_make_images_of_noise_is_refused(kind, why, pipe):
    made = UnconditionalPipeline(pipe.unet, pipe.scheduler)
    made.scheduler = getattr(diffusers, kind)()
    with pytest.raises(DDIMError, match=f"a {kind} {why}"):
        draw(made, seeds=[0])


def test_what_is_ddims_alone_is_refused_with_another_scheduler(pipe):
    made = UnconditionalPipeline(pipe.unet, pipe.scheduler)
    made.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for options, message in (
        ({"order": 1}, "DDPMScheduler samples by its own loop, which does not know order"),
        ({"sampler": "o-belm"}, "does not know sampler"),
        ({"clip": "none"}, "does not know clip"),
        ({"eta": 0.5}, "the step of a DDPMScheduler cannot take eta=0.5"),
        ({"timesteps": [9, 1]}, "leave out num_inference_steps and timestep_spacing"),
        ({"timestep_spacing": "x"}, "timestep_spacing must be one of"),
    ):
        with pytest.raises(DDIMError, match=message):
            draw(made, seeds=[0], **options)
    given = {"num_inference_steps": None, "timesteps": [900, 500, 100], "seeds": [0]}
    draw(made, **given)
    assert made.scheduler.timesteps.tolist() == [900, 500, 100]
    assert draw(made, seeds=[0], timestep_spacing="leading").shape == (1, 1, 8, 8)
    assert made.scheduler.timesteps.tolist() == [750, 500, 250, 0]
    assert made.scheduler.config.timestep_spacing == "trailing"
    made.warm_up()
    made.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(DDIMError, match="PNDMScheduler takes no timesteps"):
        draw(made, **given)
    with pytest.raises(DDIMError, match=r"replaced by a PNDMScheduler; set pipe\.scheduler = ddim"):
        made.encode(torch.zeros(1, 1, 8, 8), 4)


def test_an_attribute_of_the_configuration_that_is_changed_is_read(pipe):
    made = UnconditionalPipeline(pipe.unet, pipe.scheduler)
    made.scheduler.config.beta_end = 0.01
    other = UnconditionalPipeline(
        pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.01)
    )
    assert torch.equal(draw(made, seeds=[0]), draw(other, seeds=[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_saved_and_loaded_to_the_bit(dtype, tiny, tmp_path):
    made = UnconditionalPipeline.from_pretrained(tiny, dtype=dtype)
    made.save_pretrained(tmp_path)
    same, wider = (
        UnconditionalPipeline.from_pretrained(tmp_path, dtype=dtype),
        UnconditionalPipeline.from_pretrained(tmp_path),
    )
    theirs = diffusers.DDIMPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert (same.unet.dtype, wider.unet.dtype) == (dtype, torch.float32)
    for name, value in made.unet.state_dict().items():
        for other in (same, wider, theirs):
            assert torch.equal(other.unet.state_dict()[name].to(dtype), value)
    assert torch.equal(draw(same, seeds=[3]), draw(made, seeds=[3]))


def test_numpys_numbers_count(pipe, classes):
    expected = draw(pipe, seeds=[3, 4, 5])
    for seeds in (
        np.array([3, 4, 5]),
        torch.tensor([3, 4, 5]),
        range(3, 6),
        [np.int64(s) for s in (3, 4, 5)],
    ):
        assert torch.equal(draw(pipe, seeds=seeds), expected)
    assert len(draw(pipe, batch_size=np.int64(2))) == 2
    expected = draw(classes, seeds=[0, 1], class_labels=[2, 3])
    assert torch.equal(draw(classes, seeds=np.arange(2), class_labels=np.array([2, 3])), expected)
    assert len(draw(classes, class_labels=np.array([2, 3]))) == 2
    assert torch.equal(
        draw(classes, seeds=[0, 1], class_labels=np.int64(2)),
        draw(classes, seeds=[0, 1], class_labels=2),
    )
    with pytest.raises(
        DDIMError, match=r"different numbers of images \(seeds: 3, class_labels: 2\)"
    ):
        draw(classes, seeds=np.arange(3), class_labels=np.array([2, 3]))


def test_sizes_that_the_network_cannot_halve_are_refused(tiny):
    made = UnconditionalPipeline.from_pretrained(tiny)
    with pytest.raises(DDIMError, match="sides are multiples of 2; the latents' size is 7x8"):
        draw(made, latents=torch.zeros(1, 1, 8, 7))
    made.unet.register_to_config(sample_size=7)
    with pytest.raises(
        DDIMError, match="sides are multiples of 2; its configuration's sample_size is 7x7"
    ):
        draw(made, seeds=[0])
    for size in ("big", [8, 8, 8], 0, [8, None]):
        made.unet.register_to_config(sample_size=size)
        with pytest.raises(
            DDIMError,
            match="sample_size of the network's configuration must be one whole number or two; got",
        ):
            draw(made, seeds=[0])


def test_a_pipeline_of_parts_takes_any_scheduler_of_the_family(pipe):
    made = UnconditionalPipeline(
        pipe.unet, diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    )
    assert made.scheduler.config.beta_schedule == "sigmoid"
    assert bool(draw(made, seeds=[0]).isfinite().all())
