"""Every public name is called with every kind of wrong value in each of its arguments: it works, or
says in its own words which argument was wrong."""

import inspect
import warnings
from types import GeneratorType

import numpy as np
import pytest
import torch
from tests.conftest import tiny_text_parts, tiny_unet

import ddim
from ddim.core.checks import shown
from ddim.core.route import make_route

WRONG = {
    "None": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "text": "a",
    "True": True,
    "-1": -1,
    "3.7": 3.7,
    "huge": 10**30,
    "list": [],
    "object": object(),
    "array": np.zeros(3),
    "integers": torch.tensor([1, 2, 3]),
    "other shape": torch.zeros(7, 5),
}

SCHEDULE = ddim.NoiseSchedule.from_betas(ddim.make_betas("linear", 20))
ORACLE = ddim.GaussianOracle(SCHEDULE, std=0.5)
LEVELS = [19, 10, 3]
PAIRS = ddim.step_pairs(LEVELS)
X = torch.linspace(-1, 1, 2 * 1 * 8 * 8).reshape(2, 1, 8, 8)
Y = X.flip(0)
ONE, LOW, HIGH = (SCHEDULE.alpha_bar(t) for t in (10, 15, 3))


def of_seed():
    return torch.Generator().manual_seed(0)


def network(x, t):
    return x


def conditional(x, t, condition):
    return x


def denoiser():
    return ddim.ModelDenoiser(network, SCHEDULE, "sample")


def code(method="ddim"):
    return ddim.encode(ORACLE.denoise, X, LEVELS, schedule=SCHEDULE, method=method)


def scheduler(kind=ddim.DDIMScheduler):
    made = kind(num_train_timesteps=20)
    made.set_timesteps(4)
    return made


def pipeline():
    pipe = ddim.UnconditionalPipeline(
        tiny_unet(), ddim.DDIMScheduler(num_train_timesteps=20, clip_sample=False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_pipeline(kind=ddim.TextToImagePipeline):
    made = ddim.DDIMScheduler(num_train_timesteps=20, clip_sample=False, steps_offset=1)
    nothing = {"safety_checker": None, "feature_extractor": None}
    pipe = kind(**tiny_text_parts(), scheduler=made, **nothing, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
BETAS = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
CONFIGURED = {
    **{"num_train_timesteps": 20, **BETAS, "clip_sample": True, "set_alpha_to_one": True},
    **{"steps_offset": 0, "prediction_type": "epsilon", "clip_sample_range": 1.0},
    **{"timestep_spacing": "leading", "rescale_betas_zero_snr": False},
}
OF_PROMPTS = {
    **{"prompt": "a red square", "num_inference_steps": 2, "timesteps": None},
    **{"guidance_scale": 2.0, "negative_prompt": None, "eta": 0.0, "generator": None},
    **{"prompt_embeds": None, "negative_prompt_embeds": None, "output_type": "pt"},
    **{"return_dict": False, "guidance_rescale": 0.5, "clip_skip": None, "seeds": [1]},
    **{"num_images_per_prompt": 1, "timestep_spacing": "trailing", "order": 1, "clip": None},
    **{"sampler": "ddim", "guidance_batched": True, "callback": None, "progress": False},
}
OF_CODES = {
    **{"prompt": "a red square", "num_inference_steps": 2, "negative_prompt": None},
    **{"guidance_scale": 1.0, "guidance_rescale": 0.0, "prompt_embeds": None},
    **{"negative_prompt_embeds": None, "clip_skip": None, "guidance_batched": True},
    **{"timestep_spacing": "trailing", "timesteps": None, "batch_size": 1},
}
PROBLEM = ddim.SamplingProblem(ORACLE.denoise, X)
PRIOR = ddim.DataPrior((0.1,), ((0.2,),))
walked = {"denoise": ORACLE.denoise, "x_t": X, "pairs": PAIRS, "schedule": SCHEDULE}
encoded = {"denoise": ORACLE.denoise, "x0": X, "timesteps": LEVELS, "schedule": SCHEDULE}
levels = {"alpha_bar_t": LOW, "alpha_bar_s": HIGH}

CALLS = {
    "Clip": (ddim.Clip, {"kind": "dynamic", "bound": 1.0, "ratio": 0.9, "max_value": 2.0}),
    "Clip()": (ddim.Clip("static"), {"x0": X}),
    "ModelDenoiser": (
        ddim.ModelDenoiser,
        {
            "network": network,
            "schedule": SCHEDULE,
            "prediction_type": "sample",
            "clip": ddim.Clip(),
            "dtype": torch.float32,
        },
    ),
    "ModelDenoiser()": (denoiser(), {"x_t": X, "t": 3}),
    "guide": (ddim.guide, {"conditional": X, "unconditional": Y, "scale": 2.0, "rescale": 0.5}),
    "guided": (
        ddim.guided,
        {
            "network": conditional,
            "cond": X,
            "uncond": Y,
            "scale": 2.0,
            "rescale": 0.5,
            "batched": True,
        },
    ),
    "lerp": (ddim.lerp, {"a": X, "b": Y, "weight": 0.5}),
    "slerp": (ddim.slerp, {"a": X, "b": Y, "weight": 0.5}),
    "interpolate": (ddim.interpolate, {"a": X[0], "b": Y[0], "count": 3, "kind": "linear"}),
    "interpolate_grid": (
        ddim.interpolate_grid,
        {"corners": torch.cat([X, Y]), "rows": 2, "columns": 2, "kind": "linear"},
    ),
    "make_generators": (ddim.make_generators, {"seeds": [1, 2]}),
    "seeded_randn": (ddim.seeded_randn, {"shape": (1, 2), "seeds": [1, 2]}),
    "SeededNoise": (
        ddim.SeededNoise,
        {"seeds_or_generators": [1, 2], "shape": (1, 2), "device": "cpu", "dtype": torch.float32},
    ),
    "draw_timesteps": (
        ddim.draw_timesteps,
        {"batch_size": 2, "num_train_timesteps": 20, "generator": of_seed()},
    ),
    "loss_weights": (
        ddim.loss_weights,
        {
            "schedule": SCHEDULE,
            "t": torch.tensor([3, 10]),
            "prediction_type": "epsilon",
            "weighting": "min-snr",
            "gamma": 5.0,
            "floor": 0.1,
        },
    ),
    "training_loss": (
        ddim.training_loss,
        {
            "network": network,
            "x0": X,
            "schedule": SCHEDULE,
            "t": torch.tensor([3, 10]),
            "noise": Y,
            "prediction_type": "epsilon",
            "weights": torch.ones(2),
        },
    ),
    "GaussianOracle": (ddim.GaussianOracle, {"schedule": SCHEDULE, "mean": 0.1, "std": 0.5}),
    "GaussianOracle.denoise": (ORACLE.denoise, {"x_t": X, "t": 3}),
    "GaussianOracle.network": (ORACLE.network, {"prediction_type": "epsilon"}),
    "GaussianOracle.flow": (ORACLE.flow, {"x_t": X, "t": 10, "s": 3}),
    "GaussianOracle.variance": (ORACLE.variance, {"t": 10}),
    "GaussianOracle.draw": (ORACLE.draw, {"shape": (2, 3), "t": 10, "generator": of_seed()}),
    "clip_static": (ddim.clip_static, {"x0": X, "bound": 1.0}),
    "threshold_dynamic": (ddim.threshold_dynamic, {"x0": X, "ratio": 0.9, "max_value": 2.0}),
    "from_x0_eps": (
        ddim.from_x0_eps,
        {"x0": X, "eps": Y, "alpha_bar_t": ONE, "prediction_type": "v_prediction"},
    ),
    "to_eps": (ddim.to_eps, {"x0": X, "x_t": Y, "alpha_bar_t": ONE}),
    "to_x0_eps": (
        ddim.to_x0_eps,
        {"output": X, "x_t": Y, "alpha_bar_t": ONE, "prediction_type": "v_prediction"},
    ),
    "DataPrior": (ddim.DataPrior, {"mean": (0.1,), "covariance": ((0.2,),), "image": None}),
    "DataPrior.from_dict": (
        ddim.DataPrior.from_dict,
        {"content": {"mean": [0.1], "covariance": [[0.2]]}},
    ),
    "DataPrior.start": (PRIOR.start, {"z": X, "alpha_bar": ONE}),
    "fit_prior": (ddim.fit_prior, {"images": [X]}),
    "sample": (
        ddim.sample,
        {**walked, "eta": 0.5, "noise": ddim.SeededNoise([1, 2], (1, 8, 8)), "order": 1}
        | {"eps_mean_square": None},
    ),
    "trajectory": (
        ddim.trajectory,
        {**walked, "eta": 0.0, "noise": None, "order": 2, "eps_mean_square": None}
        | {"previous": None},
    ),
    "NoiseSchedule": (
        ddim.NoiseSchedule,
        {"alphas_cumprod": torch.tensor([0.9, 0.5]), "final_alpha_cumprod": 1.0},
    ),
    "NoiseSchedule.from_betas": (
        ddim.NoiseSchedule.from_betas,
        {"betas": [0.1, 0.2], "set_alpha_to_one": True},
    ),
    "NoiseSchedule.alpha_bar": (SCHEDULE.alpha_bar, {"t": 3}),
    "NoiseSchedule.snr": (SCHEDULE.snr, {"t": 3}),
    "NoiseSchedule.log_snr": (SCHEDULE.log_snr, {"t": 3}),
    "add_noise": (ddim.add_noise, {"schedule": SCHEDULE, "x0": X, "noise": Y, "t": 3}),
    "velocity": (ddim.velocity, {"schedule": SCHEDULE, "x0": X, "noise": Y, "t": 3}),
    "make_betas": (
        ddim.make_betas,
        {"kind": "linear", "num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.02},
    ),
    "rescale_zero_terminal_snr": (
        ddim.rescale_zero_terminal_snr,
        {"betas": torch.tensor([0.1, 0.2])},
    ),
    "ddim_step": (
        ddim.ddim_step,
        {"x0": X, "eps": Y, **levels, "eta": 0.5, "eps_mean_square": ONE, "noise": X},
    ),
    "linear_step": (ddim.linear_step, {"prediction_type": "epsilon", **levels, "eta": 0.5}),
    "multistep_weight": (ddim.multistep_weight, {"alpha_bar_previous": LOW / 2, **levels}),
    "step_coefficients": (ddim.step_coefficients, {**levels, "eta": 0.5, "eps_mean_square": ONE}),
    "check_timesteps": (ddim.check_timesteps, {"timesteps": LEVELS, "num_train_timesteps": 20}),
    "reverse_pairs": (ddim.reverse_pairs, {"pairs": PAIRS}),
    "select_timesteps": (
        ddim.select_timesteps,
        {
            "num_train_timesteps": 20,
            "num_inference_steps": 4,
            "spacing": "leading",
            "steps_offset": 1,
        },
    ),
    "step_pairs": (ddim.step_pairs, {"timesteps": LEVELS, "end": -1}),
    "truncate_timesteps": (ddim.truncate_timesteps, {"timesteps": LEVELS, "strength": 0.7}),
    "diagnose": (
        ddim.diagnose,
        {"config": {}, "steps": 10, "spacing": "trailing", "timesteps": None, "eta": 0.0}
        | {"guidance_scale": 2.0, "guidance_rescale": 0.5, "model": ddim.ModelFacts()}
        | {"brightness": None, "probe": None},
    ),
    "ModelFacts": (
        ddim.ModelFacts,
        {"latent": None, "guided": None, "shape": (1, 8, 8), "num_train_timesteps": 20}
        | {"training": None},
    ),
    "Brightness": (ddim.Brightness, {"mean": 0.1, "std": 0.2, "dimensions": 64}),
    "Brightness.of": (ddim.Brightness.of, {"prior": PRIOR, "dimensions": 64}),
    "Brightness.of_images": (ddim.Brightness.of_images, {"images": X}),
    "probe": (
        ddim.probe,
        {"network": ORACLE.network(), "schedule": SCHEDULE, "images": X, "seed": 0},
    ),
    "estimate_eps_mean_square": (
        ddim.estimate_eps_mean_square,
        {"data": [(ORACLE.denoise, X)], "timesteps": LEVELS, "schedule": SCHEDULE, "seed": 0},
    ),
    "fit_timesteps": (
        ddim.fit_timesteps,
        {"problem": PROBLEM, "held_out": [PROBLEM], "schedule": SCHEDULE, "steps": 2, "order": 1}
        | {"evaluations": 4, "bound": 1.0, "finish": None},
    ),
    "geometric_mean": (ddim.geometric_mean, {"values": torch.tensor([1.0, 2.0])}),
    "ode_error": (ddim.ode_error, {"x": X, "exact": Y, "bound": 1.0}),
    "Code": (
        ddim.Code,
        {"states": X[None], "method": "ddim", "timesteps": (19,), "evaluations": 1, "gamma": 1.0}
        | {"mixing": 0.9, "residual": None, "labels": None, "origin": {}},
    ),
    "Code[]": (code().__getitem__, {"chosen": 0}),
    "Code.to": (code().to, {"device": "cpu"}),
    "Code.join": (ddim.Code.join, {"parts": [code(), code()]}),
    "encodable_timesteps": (ddim.encodable_timesteps, {"schedule": SCHEDULE, "timesteps": LEVELS}),
    "encode_explicit": (ddim.encode_explicit, encoded),
    "encode_implicit": (
        ddim.encode_implicit,
        {**encoded, "tolerance": 1e-3, "max_evaluations": 4, "depth": 1},
    ),
    "encode": (
        ddim.encode,
        {**encoded, "method": "bdia", "gamma": 1.0, "mixing": 0.9, "tolerance": 1e-3}
        | {"max_evaluations": 4, "labels": None, "origin": None},
    ),
    "decode": (
        ddim.decode,
        {"denoise": ORACLE.denoise, "code": code(), "schedule": SCHEDULE, "timesteps": None}
        | {"origin": None},
    ),
    "decode_trajectory": (
        ddim.decode_trajectory,
        {"denoise": ORACLE.denoise, "code": code("bdia"), "schedule": SCHEDULE, "timesteps": None}
        | {"origin": None},
    ),
    "reconstruction_error": (ddim.reconstruction_error, {"images": X, "reconstructions": Y}),
    "ReversibleSampler": (ddim.ReversibleSampler, {"method": "edict", "gamma": 1.0, "mixing": 0.9}),
    "ReversibleSampler.evaluations": (
        ddim.ReversibleSampler().evaluations,
        {"schedule": SCHEDULE, "timesteps": LEVELS},
    ),
    "encode_pair": (ddim.encode_pair, {**encoded, "sampler": ddim.ReversibleSampler()}),
    "decode_pair": (
        ddim.decode_pair,
        {"denoise": ORACLE.denoise, "pair": ddim.StatePair(X, Y), "timesteps": LEVELS}
        | {"schedule": SCHEDULE, "sampler": ddim.ReversibleSampler()},
    ),
    "reversible_trajectory": (
        ddim.reversible_trajectory,
        {"denoise": ORACLE.denoise, "x_T": X, "timesteps": LEVELS, "schedule": SCHEDULE}
        | {"sampler": ddim.ReversibleSampler()},
    ),
    "to_diffusers": (ddim.to_diffusers, {"obj": scheduler()}),
    "DDIMScheduler.set_timesteps": (
        scheduler().set_timesteps,
        {"num_inference_steps": 4, "device": None, "timesteps": None},
    ),
    "DDIMScheduler.step": (
        scheduler().step,
        {"model_output": X, "timestep": 15, "sample": Y, "eta": 0.5}
        | {"use_clipped_model_output": False, "generator": None, "variance_noise": X}
        | {"return_dict": True},
    ),
    "DDIMScheduler.step, drawing": (
        scheduler().step,
        {"model_output": X, "timestep": 15, "sample": Y, "eta": 0.5, "generator": [of_seed()]},
    ),
    "DDIMScheduler.batch_step_no_noise": (
        scheduler().batch_step_no_noise,
        {"model_output": X, "timesteps": [15, 10], "sample": Y, "eta": 0.5}
        | {"use_clipped_model_output": False},
    ),
    "DDIMScheduler.add_noise": (
        scheduler().add_noise,
        {"original_samples": X, "noise": Y, "timesteps": [15, 10]},
    ),
    "DDIMScheduler.get_velocity": (
        scheduler().get_velocity,
        {"sample": X, "noise": Y, "timesteps": [15, 10]},
    ),
    "DDIMInverseScheduler.set_timesteps": (
        scheduler(ddim.DDIMInverseScheduler).set_timesteps,
        {"num_inference_steps": 4, "device": None, "timesteps": None},
    ),
    "DDIMInverseScheduler.step": (
        scheduler(ddim.DDIMInverseScheduler).step,
        {"model_output": X, "timestep": 15, "sample": Y, "return_dict": True},
    ),
    "UnconditionalPipeline": (
        ddim.UnconditionalPipeline,
        {"unet": tiny_unet(), "scheduler": ddim.DDIMScheduler()},
    ),
    "UnconditionalPipeline()": (
        pipeline(),
        {"batch_size": 2, "num_inference_steps": 1, "eta": 0.0, "order": 1}
        | {"eps_mean_square": None, "timestep_spacing": "trailing", "timesteps": None}
        | {"seeds": [1, 2], "generator": None, "latents": X, "prior": None}
        | {"class_labels": None, "clip": "none", "sampler": "ddim", "callback": None}
        | {"progress": False, "use_clipped_model_output": None, "output_type": "pt"}
        | {"return_dict": False},
    ),
    "UnconditionalPipeline.encode": (
        pipeline().encode,
        {"images": X.clamp(-1, 1), "num_inference_steps": 1, "method": "ddim"}
        | {"timestep_spacing": "trailing", "timesteps": None, "class_labels": None}
        | {"resize": False, "gamma": 1.0, "mixing": 0.9, "tolerance": 1e-3}
        | {"max_evaluations": 4, "batch_size": 2},
    ),
    "UnconditionalPipeline.decode": (
        pipeline().decode,
        {"code": pipeline().encode(X, 2, method="ddim"), "num_inference_steps": 1}
        | {"timestep_spacing": "trailing", "timesteps": None, "callback": None}
        | {"progress": False, "batch_size": 2, "output_type": "pt"},
    ),
    "UnconditionalPipeline.denoiser": (
        pipeline().denoiser,
        {"batch_size": 2, "class_labels": None, "clip": "none"},
    ),
    "DDIMScheduler": (
        ddim.DDIMScheduler,
        {**CONFIGURED, "thresholding": False, "dynamic_thresholding_ratio": 0.995}
        | {"sample_max_value": 1.0, "multistep_order": 1, "fitted_timesteps": None},
    ),
    "DDIMInverseScheduler": (ddim.DDIMInverseScheduler, CONFIGURED),
    "TextToImagePipeline": (
        ddim.TextToImagePipeline,
        {**tiny_text_parts(), "scheduler": text_pipeline().scheduler, "safety_checker": None}
        | {"feature_extractor": None, "image_encoder": None, "requires_safety_checker": False},
    ),
    "TextToImagePipeline()": (
        text_pipeline(),
        {**OF_PROMPTS, "height": 16, "width": 16, "latents": torch.zeros(1, 4, 8, 8)},
    ),
    "ImageToImagePipeline()": (
        text_pipeline(ddim.ImageToImagePipeline),
        {**OF_PROMPTS, "image": PICTURE / 2 + 0.5, "strength": 0.8, "num_inference_steps": 4},
    ),
    "TextToImagePipeline.encode": (
        text_pipeline().encode,
        {**OF_CODES, "images": PICTURE, "method": "ddim", "resize": False, "gamma": 1.0}
        | {"mixing": 0.9, "tolerance": 1e-3, "max_evaluations": 4},
    ),
    "TextToImagePipeline.decode": (
        text_pipeline().decode,
        {**OF_CODES, "code": text_pipeline().encode(PICTURE, "a", 2, method="ddim")}
        | {"callback": None, "progress": False, "output_type": "pt"},
    ),
}
"""A valid call of each public name: what is called, and its arguments."""


ALIASES = {
    "kind": ("clip", "interpolation", "beta_schedule"),  # as the options of pipelines and files
    "seeds": ("a seed",),
    "seeds_or_generators": ("a seed",),
    "t": ("timestep",),
    "s": ("timestep",),
    "timesteps": ("one timestep", "strength 0.7 of 0 steps"),
    "alpha_bar_t": ("one level", "where the SNR is 0"),
    "alpha_bar_s": ("a noisier level",),
    "eps_mean_square": ("one level",),
    "code": ("Code",),
    "data": ("measured on images",),
    "held_out": ("held-out",),
    "states": ("a code of",),
    "parts": ("codes can be joined",),
    "path": ("no code at", "no checkpoint at"),
    "obj": ("a scheduler or a pipeline",),
    "original_samples": ("the samples' shape",),
    "layout": ("names of the weights",),
}
"""Other words by which a sentence may name an argument."""

SWITCHES = {"set_alpha_to_one", "batched", "use_clipped_model_output", "return_dict", "progress"}
SWITCHES |= {"resize", "latent", "guided", "guidance_batched", "requires_safety_checker"}
OF_TORCH = {"device"}
PLAIN = {"StatePair", "SamplingProblem"}
NOT_TRIED = {
    "Denoised": "a plain pair, as Denoised(x0, eps) of a denoiser of one's own",
    "State": "a plain record of a step",
    "Denoiser": "a protocol",
    "Finding": "a result",
    "Diagnosis": "a result",
    "Probe": "a result",
    "Fit": "a result",
    "CLEAN": "a constant",
    "BETA_SCHEDULES": "a constant",
    "SIGMA_HAT": "a constant",
    "SPACINGS": "a constant",
    "write_model": "takes what convert returns",
    "DiffusionPipeline": "opens models; see tests/pipelines",
}
"""Public names without a call of their own above, and why."""


def run(call, arguments):
    """The result; a walk is walked to its end."""
    result = call(**arguments)
    return list(result) if isinstance(result, GeneratorType) else result


def tensors_in(result):
    """The tensors of a result, at any depth of lists, tuples and codes."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, ddim.Code):
        return [result.states]
    listed = result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in listed for tensor in tensors_in(part)]


def fault(call, arguments, name, kind):
    """What is wrong with the answer to a wrong value, if anything is."""
    value = WRONG[kind]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(call, arguments | {name: value})
    except ddim.DDIMError as error:
        text = str(error)
        named = any(word in text for word in (name, *ALIASES.get(name, ())))
        return "" if named and "\n" not in text else f"does not name {name} in a line: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if kind == "nan" or (kind != "other shape" and any(map(is_off, tensors_in(result)))):
        return f"took {name}={value!r}"
    return ""


def is_off(tensor):
    return tensor.is_floating_point() and bool(tensor.isnan().any())


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_works_or_is_refused_by_name(name, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("CRITICAL")
    call, arguments = CALLS[name]
    run(call, arguments)
    for argument in arguments.keys() - SWITCHES - OF_TORCH:
        for kind in WRONG:
            if (name, argument, kind) != ("Code[]", "chosen", "huge"):  # an IndexError ends loops
                wrong = fault(call, arguments, argument, kind)
                assert not wrong, f"{name}({argument}: {kind}): {wrong}"


def test_files_and_weights_are_told_apart_from_what_is_none(tmp_path):
    for call, argument in (
        (ddim.load_code, "path"),
        (ddim.read_state_dict, "path"),
        (ddim.convert, "state"),
        (lambda path: ddim.save_code(code(), path), "path"),
        (lambda code: ddim.save_code(code, tmp_path / "a.safetensors"), "code"),
    ):
        for kind in WRONG:
            if (argument, kind) != ("path", "text"):  # which is one
                with pytest.raises(ddim.DDIMError, match=argument):
                    run(lambda value, call=call: call(value), {"value": WRONG[kind]})


def test_every_public_name_is_called_or_excused():
    called = {key.partition(".")[0].partition("(")[0].partition("[")[0] for key in CALLS}
    called |= {"load_code", "save_code", "convert", "read_state_dict"}
    kinds = (Exception, Warning)
    errors = {
        n for n in ddim.__all__ if isinstance(e := getattr(ddim, n), type) and issubclass(e, kinds)
    }
    assert called | NOT_TRIED.keys() | errors | PLAIN == set(ddim.__all__) | PLAIN
    for name, (call, arguments) in CALLS.items():
        if inspect.isfunction(call) or inspect.ismethod(call):
            assert arguments.keys() <= inspect.signature(call).parameters.keys(), name


def test_what_was_received_is_a_few_words():
    for value, words in (
        (torch.zeros(2, 3), "a tensor of float32, shape [2, 3]"),
        (torch.tensor(3.0), "tensor(3.)"),
        (np.zeros(3), "a NumPy array of float64, shape [3]"),
        ("x" * 1000, "..."),
        (10**5000, "a whole number of more than 60 digits"),
        ((torch.zeros(2),), "a tuple"),
        ([1, 2], "[1, 2]"),
        (ddim.DDIMScheduler(), "a DDIMScheduler"),
        (ddim.DDIMScheduler, "the class DDIMScheduler"),
    ):
        found = shown(value)
        assert words in found
        assert len(found) < 70


def test_reprs_are_one_line_that_says_shape_range_and_device():
    route = make_route(SCHEDULE, PAIRS, eta=0.5)
    state = next(ddim.trajectory(ORACLE.denoise, X, PAIRS, schedule=SCHEDULE))
    for value, told in (
        (SCHEDULE, "20 levels, alpha_bar 0.9999 to 0.81"),
        (
            ddim.ModelDenoiser(network, SCHEDULE, "sample", ddim.Clip("static")),
            "network, sample, clip",
        ),
        (ORACLE, "std=0.5"),
        (ddim.Clip(), "kind='none'"),
        (state, "step 0 from level 19 to 10, x_s: float32 [2, 1, 8, 8], "),
        (ORACLE.denoise(X, 3), "x0: float32 [2, 1, 8, 8], "),
        (route, "ddim, 3 steps from level 19 to -1, eta 0.5, order 1, clip none"),
        (ddim.SeededNoise([1, 2], (1, 8, 8)), "2 images, float32 [1, 8, 8] each, cpu"),
        (ddim.StatePair(X, Y), "float32 [2, 1, 8, 8], -1 to 1, cpu; "),
        (code(), "ddim, 2 images, 3 steps from level 19, float64 [1, 2, 1, 8, 8], "),
        (code()[:0], "0 images"),
        (code("bdia")[0], "bdia, 1 image, "),
        (ddim.encode_explicit(ORACLE.denoise, X, LEVELS, schedule=SCHEDULE), "3 evaluations"),
    ):
        text = repr(value)
        assert told in text
        assert "\n" not in text
        assert len(text) < 250
