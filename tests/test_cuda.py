"""On a machine with a CUDA device: the same numbers as on the CPU, half precision, and no wait for
the device inside a loop.

Skipped elsewhere; what can be known without a device is tested on the CPU and on ``meta``, beside
each part."""

import contextlib
import gc
import json
import logging
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from tests.conftest import pixels, record

from ddim import scheduler_base
from ddim.cli import main
from ddim.core.denoiser import ModelDenoiser
from ddim.core.guidance import guided
from ddim.core.noise import SeededNoise, seeded_randn
from ddim.core.sampler import sample, trajectory
from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.inversion.reversible import reversible_trajectory
from ddim.models.images import from_pictures
from ddim.pipelines import recording
from ddim.pipelines.cuda_graphs import CudaRecorder
from ddim.pipelines.pictures import encode_images
from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler
from ddim.training.config import TrainConfig
from ddim.training.trainer import train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # of the check for waits
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # which is left off on purpose
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of the first recording
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of other versions of torch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUIET = {"progress": False, "output_type": "pt"}
PROMPT = "a red square on a black background"
HALF = [torch.float16, torch.bfloat16]


@contextlib.contextmanager
def no_wait():
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def rounding_of_float32():
    """Convolutions of float32 numbers round as on the CPU, as a command has them once it has its
    device."""
    kept, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture
def there(tiny):
    return UnconditionalPipeline.from_pretrained(tiny).to("cuda")


@pytest.fixture
def here(tiny):
    return UnconditionalPipeline.from_pretrained(tiny)


def test_a_wait_is_seen():
    with pytest.raises(RuntimeError, match="synchroniz"), no_wait():
        torch.ones(1, device="cuda").item()


OPTIONS = [
    {"clip_sample": False},
    {},
    {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
    {"thresholding": True, "sample_max_value": 2.0},
    {"multistep_order": 2, "clip_sample": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fifty_steps_of_the_scheduler_are_those_of_the_cpu_and_wait_for_nothing(
    options, eta, dtype
):
    if eta and options.get("multistep_order") == 2:
        pytest.skip("order 2 draws no noise")
    ends = {}
    for device in ("cpu", "cuda"):
        scheduler = DDIMScheduler(**options)
        x, m, z = (seeded_randn((3, 8, 8), [seed]).to(device, dtype) for seed in range(3))
        noise = z if eta else None
        scheduler.set_timesteps(50, device=device)
        scheduler.step(m, scheduler.timesteps[0], x, eta, variance_noise=noise)  # makes the tables
        if options.get("multistep_order") == 2:
            scheduler.set_timesteps(50, device=device)
        with no_wait() if device == "cuda" else contextlib.nullcontext():
            for t in scheduler.timesteps:
                x = scheduler.step(m, t, x, eta, variance_noise=noise).prev_sample
        assert x.dtype == dtype
        ends[device] = x.cpu().float()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ends["cuda"], ends["cpu"], rtol=tolerance, atol=tolerance)


def test_noise_of_a_generator_there_is_drawn_there():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10, device="cuda")
    x = m = torch.ones(2, 3, 8, 8, device="cuda")
    one, other = (
        scheduler.step(
            m, scheduler.timesteps[3], x, 1.0, generator=torch.Generator(place).manual_seed(0)
        ).prev_sample
        for place in ("cuda", "cpu")
    )
    assert one.device.type == other.device.type == "cuda"
    assert not torch.equal(one, other)


def test_the_inverse_goes_back_there():
    x = seeded_randn((3, 8, 8), [0]).cuda()
    forward, back = DDIMScheduler(clip_sample=False), DDIMInverseScheduler(clip_sample=False)
    for scheduler in (forward, back):
        scheduler.set_timesteps(20, device="cuda")
    zero, y = torch.zeros_like(x), x
    with no_wait():
        for t in back.timesteps:
            y = back.step(zero, t, y).prev_sample
        for t in forward.timesteps:
            y = forward.step(zero, t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("eta", "order", "clip"),
    [(0.0, 1, "none"), (1.0, 1, "none"), ("sigma-hat", 1, "static"), (0.0, 2, "dynamic")],
)
def test_the_loop_of_a_network_waits_for_nothing(eta, order, clip, there):
    pairs = step_pairs(select_timesteps(1000, 10, "trailing"))
    denoise, noise = (
        there.denoiser(4, clip=clip),
        SeededNoise(range(4), there.image_shape, device="cuda"),
    )
    x = noise()
    options = {"schedule": there.noise_schedule, "eta": eta, "noise": noise, "order": order}
    with torch.no_grad():
        sample(denoise, x, pairs, **options)
        with no_wait():  # `sample` waits after the last step, to look for NaN
            deque(trajectory(denoise, x, pairs, **options), maxlen=0)


WALKS = [
    {},
    {"eta": 1.0},
    {"order": 2},
    {"clip": "static"},
    {"clip": "dynamic"},
    {"sampler": "o-belm"},
]


@pytest.mark.parametrize("options", WALKS, ids=str)
def test_images_of_a_seed_are_those_of_the_cpu(options, here, there):
    images = [
        pipe(seeds=[3, 4], num_inference_steps=10, **QUIET, **options).images.cpu()
        for pipe in (here, there)
    ]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1 / 255)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_has_a_float32_state_and_nearly_the_images(dtype, tiny, here):
    half, seen = UnconditionalPipeline.from_pretrained(tiny, dtype=dtype).to("cuda"), []
    images = half(
        seeds=[0, 1], num_inference_steps=10, callback=lambda s: seen.append(s.x_s.dtype), **QUIET
    ).images
    assert set(seen) == {torch.float32}
    assert (
        images.cpu() - here(seeds=[0, 1], num_inference_steps=10, **QUIET).images
    ).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.parametrize("mode", [{}, {"mode": "default"}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"eta": 1.0}, {"order": 2}, {"sampler": "o-belm"}, {"sampler": "bdia"}], ids=str
)
def test_a_compiled_network_gives_the_images_and_states_that_stay(mode, options, tiny, there):
    compiled = UnconditionalPipeline.from_pretrained(tiny).to("cuda").compile(**mode)
    compiled.warm_up(2)
    for seeds in ([0, 1], [5, 6], [7, 8, 9]):
        expected, found = (
            [],
            [],
            # looked at when all are there: a graph of kernels writes to the same memory
            # each time
        )
        images = []
        for pipe, states in ((there, expected), (compiled, found)):
            images.append(
                pipe(
                    seeds=seeds, num_inference_steps=5, callback=states.append, **QUIET, **options
                ).images
            )
        torch.testing.assert_close(images[1], images[0], rtol=0, atol=1 / 255)
        for one, other in zip(expected, found, strict=True):
            for name in ("x_s", "x0", "eps"):
                torch.testing.assert_close(
                    getattr(other, name), getattr(one, name), rtol=1e-3, atol=1e-3
                )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_compiled_model_of_text_gives_the_images_and_states_that_stay(scale, tiny_text, texts):
    compiled = TextToImagePipeline.from_pretrained(tiny_text).to("cuda").compile()
    compiled.warm_up(1, guidance_scale=scale)
    expected, found, images = [], [], []
    for pipe, states in ((texts[1], expected), (compiled, found)):
        options = {"seeds": [0], "num_inference_steps": 5, "guidance_scale": scale, **QUIET}
        images.append(pipe(PROMPT, callback=states.append, **options).images)
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1 / 255)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.eps, one.eps, rtol=1e-3, atol=1e-3)


# Recorded kernels


@pytest.fixture
def recorded(monkeypatch):
    """The recordings that are made from now on."""
    made, true = [], CudaRecorder.record

    def record(recorder, call, inputs):
        made.append(true(recorder, call, inputs))
        return made[-1]

    monkeypatch.setattr(CudaRecorder, "record", record)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", WALKS, ids=str)
def test_recorded_kernels_give_the_numbers_of_those_that_are_launched(
    options, dtype, tiny, recorded
):
    pipe, images = UnconditionalPipeline.from_pretrained(tiny, dtype=dtype).to("cuda"), []
    for records in (False, True, True):
        pipe.record_kernels(records)
        images.append(pipe(seeds=[3, 4], num_inference_steps=6, **QUIET, **options).images)
    assert len(recorded) == 1
    for found in images[1:]:
        torch.testing.assert_close(
            found, images[0], rtol=0, atol=1e-5 if dtype.itemsize == 4 else 0.02
        )


@pytest.mark.parametrize(
    "options", [{}, {"guidance_batched": False}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}]
)
def test_prompts_guidance_and_image_to_image_are_recorded(options, tiny_text, recorded):
    pipe = TextToImagePipeline.from_pretrained(tiny_text).to("cuda")
    other, images = ImageToImagePipeline(**pipe.components), []
    for records in (False, True):
        for drawn in (pipe, other):
            drawn.record_kernels(records)
        for prompt in (PROMPT, "a blue square"):
            given = {"seeds": [0], "num_inference_steps": 4, **QUIET, **options}
            images.append(pipe(prompt, **given).images)
            images.append(other(prompt, images[0], **given).images)
    for launched, replayed in zip(images[:4], images[4:], strict=True):
        torch.testing.assert_close(replayed, launched, rtol=0, atol=1e-5)
    assert len(recorded) == 1


def test_labels_batches_and_weights_act_in_replays(tiny_classes, recorded):
    pipe, images = UnconditionalPipeline.from_pretrained(tiny_classes).to("cuda"), []
    for records in (False, True):
        pipe.record_kernels(records)
        for count, factor in ((1, 1), (2, 1), (1, 1), (1, 2), (1, 0.5)):
            with torch.no_grad():
                pipe.unet.conv_out.weight.mul_(factor)
            options = {"seeds": range(count), "class_labels": list(range(count))}
            images.append(pipe(num_inference_steps=4, **options, **QUIET).images)
    for launched, replayed in zip(images[:5], images[5:], strict=True):
        torch.testing.assert_close(replayed, launched, rtol=0, atol=1e-5)
    assert len(recorded) == 4  # of two batch sizes, and after two changes


def test_a_layer_that_waits_for_the_device_is_launched_and_told_in_one_line(
    there, here, recorded, monkeypatch, caplog
):
    true = torch.nn.SiLU.forward
    monkeypatch.setattr(scheduler_base, "_logged", set())
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(
        torch.nn.SiLU, "forward", lambda act, x: true(act, x) if float(x.sum()) < 1e9 else x
    )
    images = [
        pipe(seeds=[0], num_inference_steps=4, **QUIET).images.cpu() for pipe in (here, there)
    ]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1 / 255)
    assert recorded == []
    assert sum("launched one by one" in message for message in caplog.messages) == 1
    assert torch.isfinite(there(seeds=[1], num_inference_steps=4, **QUIET).images).all()


def test_recordings_are_freed_with_the_pipeline(tiny):
    UnconditionalPipeline.from_pretrained(tiny).to("cuda")(
        seeds=[0], num_inference_steps=2, **QUIET
    )
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pipe = UnconditionalPipeline.from_pretrained(tiny).to("cuda")
    pipe(seeds=range(64), num_inference_steps=2, **QUIET)
    assert len(recording._recordings[pipe.unet]) == 1
    del pipe
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_threads_replay_by_turns(there):
    expected = [there(seeds=[seed], num_inference_steps=6, **QUIET).images for seed in range(4)]

    def draw(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream if seed % 2 else torch.cuda.current_stream()):
            images = there(seeds=[seed], num_inference_steps=6, **QUIET).images
        torch.cuda.synchronize()
        return images

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(draw, range(4)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["o-belm", "bdia", "edict", "fixed-point"])
def test_codes_bring_images_back(method, there):
    pictures = there(seeds=[0, 1, 2], num_inference_steps=10).images
    code = there.encode(pictures, 10, method=method)
    back = from_pictures(there.decode(code), (1, 8, 8))
    assert (back - from_pictures(pictures, (1, 8, 8))).abs().max() <= 2.1 / 255


@pytest.fixture
def texts(tiny_text):
    return TextToImagePipeline.from_pretrained(tiny_text), TextToImagePipeline.from_pretrained(
        tiny_text
    ).to("cuda")


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 1.0}, {"order": 2}, {"guidance_rescale": 0.7}, {"clip": "dynamic"}],
    ids=str,
)
def test_images_of_a_prompt_are_those_of_the_cpu(options, texts):
    images = [
        pipe(PROMPT, seeds=[0, 1], num_inference_steps=8, **QUIET, **options).images.cpu()
        for pipe in texts
    ]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1 / 255)


@pytest.mark.parametrize("dtype", HALF)
def test_text_in_half_precision(dtype, tiny_text, texts):
    half, seen = TextToImagePipeline.from_pretrained(tiny_text, dtype=dtype).to("cuda"), []
    options = {"seeds": [0], "num_inference_steps": 8, **QUIET}
    images = half(
        PROMPT, callback=lambda s: seen.append((s.x_s.dtype, s.x_s.device.type)), **options
    ).images
    assert set(seen) == {(torch.float32, "cuda")}
    assert (images.cpu() - texts[0](PROMPT, **options).images).abs().max() < 0.1


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_parts_give_the_images_twice(offload, tiny_text, texts):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    getattr(pipe, offload)()
    expected = texts[0](PROMPT, seeds=[0], num_inference_steps=4, **QUIET).images
    for _ in range(2):
        found = pipe(PROMPT, seeds=[0], num_inference_steps=4, **QUIET).images.cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)
    code = pipe.encode(
        pipe(PROMPT, seeds=[0], num_inference_steps=4, progress=False).images, PROMPT, 2
    )
    assert len(pipe.decode(code, PROMPT)) == 1


def test_the_text_loop_waits_for_nothing_between_its_steps(texts):
    pipe, waiting = texts[1], contextlib.ExitStack()

    def watch(state):
        if state.number == 0:
            torch.cuda.set_sync_debug_mode("error")
        if state.number == 8:
            torch.cuda.set_sync_debug_mode("default")

    waiting.callback(torch.cuda.set_sync_debug_mode, "default")
    with waiting:
        for options in ({}, {"eta": 1.0}, {"order": 2}, {"guidance_rescale": 0.7}):
            pipe(PROMPT, seeds=[0, 1], num_inference_steps=10, callback=watch, **QUIET, **options)


def test_latents_of_text_come_back(tiny_text):
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    pipe = TextToImagePipeline.from_pretrained(tiny_text, scheduler=scheduler).to("cuda")
    pipe.unet.double()
    pictures = pipe(PROMPT, seeds=[0, 1], num_inference_steps=4, progress=False).images
    code = pipe.encode(pictures, PROMPT, 10)
    latents = encode_images(pipe, from_pictures(pictures, (3, 16, 16)), torch.device("cuda")).mean
    assert (
        float((pipe.decode(code, PROMPT, output_type="latent") - latents).square().mean()) < 1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_diffusers_own_pipelines_walk_our_scheduler_there(dtype, tiny_text, tiny):
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text, dtype=dtype).to("cuda")
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "output_type": "pt", "eta": 1.0}
    images = []
    for kind in (diffusers.DDIMScheduler, DDIMScheduler):
        stock.scheduler = kind.from_config(stock.scheduler.config)
        images.append(
            stock(
                PROMPT, generator=torch.Generator("cuda").manual_seed(0), **options
            ).images.float()
        )
    torch.testing.assert_close(
        images[1], images[0], rtol=0, atol=1e-3 if dtype == torch.float32 else 0.1
    )


def test_a_reversible_loop_waits_for_nothing(there):
    schedule, x = there.noise_schedule, seeded_randn(there.image_shape, [0, 1]).cuda().double()
    denoise = there.denoiser(2, clip="none")
    levels = select_timesteps(1000, 10, "trailing")
    with torch.no_grad():
        list(reversible_trajectory(denoise, x, levels, schedule=schedule))
        with no_wait():
            list(reversible_trajectory(denoise, x, levels, schedule=schedule))


def test_guidance_waits_for_nothing():
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000))
    x, cond = (torch.randn(2, 4, 8, 8, device="cuda") for _ in range(2))
    network = guided(
        lambda x_t, t, condition: (x_t + condition).tanh(), cond, -cond, scale=3.0, rescale=0.7
    )
    denoise = ModelDenoiser(network, schedule, "v_prediction")
    pairs = step_pairs(select_timesteps(1000, 10, "trailing"))
    with no_wait():
        (last,) = deque(trajectory(denoise, x, pairs, schedule=schedule), maxlen=1)
    assert torch.isfinite(last.x_s).all()


# Commands


def test_commands_take_the_device_that_is_there(tiny, tmp_path):
    torch.backends.cudnn.allow_tf32 = True  # as torch has it before a command
    ends = {}
    for device in ("auto", "cuda:0", "cpu"):
        out = tmp_path / device.replace(":", "")
        assert (
            main(
                [
                    "sample",
                    str(tiny),
                    "--steps",
                    "8",
                    "--count",
                    "3",
                    "--eta",
                    "1",
                    "--device",
                    device,
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        ends[device] = record(out)
        for name in ("000000.png", "000002.png"):
            assert abs(pixels(out / name) - pixels(tmp_path / "auto" / name)).max() <= 1
    assert [ends[d]["execution"]["device"] for d in ends] == ["cuda", "cuda:0", "cpu"]
    assert ends["cpu"]["protocol"] == ends["auto"]["protocol"]
    for more in (
        ("--dtype", "float16"),
        ("--dtype", "bfloat16"),
        ("--compile",),
        ("--order", "2"),
        ("--clip", "dynamic"),
    ):
        assert (
            main(
                [
                    "sample",
                    str(tiny),
                    "--steps",
                    "4",
                    "--count",
                    "3",
                    *more,
                    "--out",
                    str(tmp_path / "-".join(more).lstrip("-")),
                ]
            )
            == 0
        )


def test_a_device_that_is_not_there_is_one_sentence(tiny, tmp_path, capsys):
    assert main(["sample", str(tiny), "--device", "cuda:99", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--device cuda:99 cannot be used here" in told
    assert len(told.strip().splitlines()) == 1


def test_steps_are_fitted_there(tiny, tmp_path):
    out = tmp_path / "steps.json"
    options = (
        "--steps",
        "4",
        "--count",
        "4",
        "--held-out",
        "6",
        "--evaluations",
        "20",
        "--order",
        "2",
        "--out",
        str(out),
    )
    assert main(["fit-steps", str(tiny), *options]) == 0


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_there_resumes_to_the_same_losses(precision, silent_log, tmp_path):
    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        sizes = {
            "block_out_channels": (8, 16),
            "batch_size": 4,
            "images": 48,
            "validation_images": 8,
            "lr_warmup_steps": 2,
        }
        often = {"checkpoint_every": 4, "log_every": 1, "keep_checkpoints": 9}
        return train(
            TrainConfig(
                data="digits", out=str(tmp_path), mixed_precision=precision, **sizes, **often
            )
        ).losses

    whole = run()
    assert len(whole) == 12
    for step in (8, 12):
        shutil.rmtree(tmp_path / "checkpoints" / f"{step:07d}")
    rest = run()
    assert [step for step, _ in rest] == [step for step, _ in whole[4:]]
    # Sums of gradients may be made in another order each time there, so equal to the last bit they
    # are not.
    for (_, again), (_, value) in zip(rest, whole[4:], strict=True):
        assert again == pytest.approx(value, rel=1e-3 if precision == "no" else 2e-2)
    assert json.loads((tmp_path / "card.json").read_text())["device"] == "cuda"
    pipe = UnconditionalPipeline.from_pretrained(tmp_path).to("cuda")
    assert torch.isfinite(pipe(seeds=[0], num_inference_steps=3, **QUIET).images).all()
