"""Encoders and exactly invertible samplers, on data whose exact flow is known and on the embedded
model."""

import dataclasses
import json
import pathlib
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tests.conftest import thinned

from ddim.core.denoiser import ModelDenoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import PREDICTION_TYPES, from_x0_eps
from ddim.core.sampler import sample
from ddim.core.schedule import CLEAN, NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.timesteps import SPACINGS, select_timesteps, step_pairs
from ddim.errors import DataError, DDIMError, DivergenceError
from ddim.fitting.timesteps import estimate_eps_mean_square
from ddim.inversion.code_files import load_code, save_code
from ddim.inversion.codes import (
    ENCODERS,
    Code,
    CodeWarning,
    decoding_timesteps,
    default_method,
    fingerprint,
    warn_of_rms,
)
from ddim.inversion.ddim import (
    ConvergenceWarning,
    encodable_timesteps,
    encode_explicit,
    encode_implicit,
)
from ddim.inversion.encoding import decode, encode, reconstruction_error
from ddim.inversion.reversible import (
    REVERSIBLE,
    DriftWarning,
    ReversibleSampler,
    StatePair,
    bdia_coefficients,
    decode_pair,
    encode_pair,
    o_belm_coefficients,
    reversible_trajectory,
)
from ddim.pipelines.unconditional import UnconditionalPipeline

LINEAR = NoiseSchedule.from_betas(make_betas("linear"))
LATENT = NoiseSchedule.from_betas(
    make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012), set_alpha_to_one=False
)
ZERO_SNR = NoiseSchedule.from_betas(
    rescale_zero_terminal_snr(make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012))
)
SCHEDULES = {"linear": LINEAR, "latent": LATENT, "zero SNR": ZERO_SNR}
EXACT = {"o-belm": 1e-8, "bdia": 1e-8, "edict": 1e-8}


def oracle(schedule=LINEAR):
    return GaussianOracle(schedule, mean=0.3, std=0.5)


def data(count=4):
    return oracle().draw((count, 1, 4, 4), t=CLEAN, generator=torch.Generator().manual_seed(0))


def nonlinear(schedule, prediction_type="epsilon"):
    """A network that is no oracle: smooth, different at every element, and far from linear."""
    exact = oracle(schedule)

    def network(x, t):
        x0, eps = exact.denoise(x.double(), t)
        bent = x0 + 0.15 * torch.sin(3 * x0.roll(1, -1))
        alpha_bar = schedule.alpha_bar(t)
        sigma = (1 - alpha_bar).sqrt().reshape(-1, 1, 1, 1)
        eps = (
            (x.double() - alpha_bar.sqrt().reshape(-1, 1, 1, 1) * bent) / sigma
            if bool((sigma > 0).all())
            else eps
        )
        return from_x0_eps(bent, eps, alpha_bar_t=alpha_bar, prediction_type=prediction_type)

    return ModelDenoiser(network, schedule, prediction_type)


# --- exactly invertible samplers


@pytest.mark.parametrize(
    ("method", "spacing", "name", "steps"),
    thinned(REVERSIBLE, SPACINGS, SCHEDULES, [2, 3, 10, 50, 137], stride=7),
)
def test_the_round_trip_is_exact_for_every_spacing_and_schedule(method, spacing, name, steps):
    schedule, timesteps = SCHEDULES[name], select_timesteps(1000, steps, spacing)
    denoise = nonlinear(schedule, "v_prediction")
    code = encode(denoise, data(), timesteps, schedule=schedule, method=method)
    error = reconstruction_error(data(), decode(denoise, code, schedule=schedule))
    assert float(error.max()) < EXACT[method]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("method", REVERSIBLE)
def test_the_round_trip_is_exact_for_every_parametrisation(method, prediction_type):
    denoise = nonlinear(LINEAR, prediction_type)
    code = encode(denoise, data(), select_timesteps(1000, 20), schedule=LINEAR, method=method)
    assert float(reconstruction_error(data(), decode(denoise, code, schedule=LINEAR)).max()) < 1e-16


@pytest.mark.parametrize("method", ["o-belm", "bdia"])
def test_one_step_is_a_code_too(method):
    denoise = nonlinear(LINEAR)
    code = encode(denoise, data(), [500], schedule=LINEAR, method=method)
    assert torch.equal(decode(denoise, code, schedule=LINEAR), data())


def test_o_belm_has_the_coefficients_of_its_paper():
    alpha_bar = LINEAR.alpha_bar(torch.tensor([CLEAN, *select_timesteps(1000, 8)[::-1]]))
    alpha, s = alpha_bar.sqrt(), ((1 - alpha_bar) / alpha_bar).sqrt()
    h = s[1:] - s[:-1]
    for i, (p, q, r) in enumerate(zip(*o_belm_coefficients(alpha_bar), strict=True), start=1):
        here, nxt = h[i - 1], h[i]
        assert torch.allclose(p, here**2 / nxt**2 * alpha[i - 1] / alpha[i + 1])
        assert torch.allclose(q, (nxt**2 - here**2) / nxt**2 * alpha[i - 1] / alpha[i])
        assert torch.allclose(r, -here * (here + nxt) / nxt * alpha[i - 1])


def test_bdia_has_the_form_of_its_paper():
    alpha_bar = LINEAR.alpha_bar(torch.tensor([CLEAN, 300, 600, 900]))
    x_above, x, eps = torch.randn(
        3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    gamma, i = 0.9, 2

    def change(j):
        x0 = (x - (1 - alpha_bar[i]).sqrt() * eps) / alpha_bar[i].sqrt()
        return alpha_bar[j].sqrt() * x0 + (1 - alpha_bar[j]).sqrt() * eps - x

    p, q, r = (c[i - 1] for c in bdia_coefficients(alpha_bar, gamma))
    paper = x_above - (1 - gamma) * (x_above - x) - gamma * change(i + 1) + change(i - 1)
    assert torch.allclose(p * x_above + q * x + r * eps, paper)


SMOOTH = NoiseSchedule(
    torch.linspace(0.02, torch.pi / 2 - 0.02, 1000, dtype=torch.float64).cos() ** 2
)
"""Evenly spaced angles, on which orders of convergence show."""


def evenly(steps):
    return [round(t) for t in np.linspace(999, 999 / steps, steps)]


@pytest.mark.parametrize(("method", "order"), [("o-belm", 1.7), ("bdia", 0.6), ("edict", 0.7)])
def test_as_samplers_they_come_to_the_exact_flow(method, order):
    """The error falls at least with this order, and O-BELM's is below DDIM's. (BDIA's swings about
    its trend.)"""
    exact = oracle(SMOOTH)
    x_T = exact.draw((16, 1, 2, 2), t=999, generator=torch.Generator().manual_seed(2))
    truth = exact.flow(x_T, 999, CLEAN)
    errors, counts = [], [20, 40, 80, 160]
    for steps in counts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)  # EDICT's, at the fewest of these steps
            *_, last = reversible_trajectory(
                exact.denoise,
                x_T,
                evenly(steps),
                schedule=SMOOTH,
                sampler=ReversibleSampler(method),
            )
        errors.append(float((last.x_s - truth).square().mean().sqrt()))
        if method == "o-belm":
            ddim = sample(exact.denoise, x_T, step_pairs(evenly(steps)), schedule=SMOOTH)
            assert errors[-1] < float((ddim - truth).square().mean().sqrt())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope < -order, (slope, errors)


@pytest.mark.parametrize("method", ["o-belm", "bdia"])
def test_sampling_and_decoding_are_one_trajectory(method):
    denoise, timesteps = nonlinear(LINEAR), select_timesteps(1000, 10)
    sampler, x_T = (
        ReversibleSampler(method),
        torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    states = list(reversible_trajectory(denoise, x_T, timesteps, schedule=LINEAR, sampler=sampler))
    assert [(s.t, s.s) for s in states] == step_pairs(timesteps)
    assert [s.number for s in states] == list(range(10))
    again = list(
        decode_pair(denoise, (x_T, states[0].x_s), timesteps, schedule=LINEAR, sampler=sampler)
    )
    assert [s.number for s in again] == list(range(1, 10))
    assert torch.equal(again[-1].x_s, states[-1].x_s)


@pytest.mark.parametrize("method", ["o-belm", "bdia"])
def test_sampling_starts_at_zero_snr_where_the_parametrisation_can(method):
    denoise = nonlinear(ZERO_SNR, "v_prediction")
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for steps in (1, 2, 10):
        *_, last = reversible_trajectory(
            denoise,
            x_T,
            select_timesteps(1000, steps),
            schedule=ZERO_SNR,
            sampler=ReversibleSampler(method),
        )
        assert bool(torch.isfinite(last.x_s).all())


def test_bdia_alone_is_turned_round_at_zero_snr():
    denoise, timesteps = nonlinear(ZERO_SNR, "v_prediction"), select_timesteps(1000, 10)
    pair = encode_pair(
        denoise, data(), timesteps, schedule=ZERO_SNR, sampler=ReversibleSampler("bdia")
    )
    *_, last = decode_pair(
        denoise, pair, timesteps, schedule=ZERO_SNR, sampler=ReversibleSampler("bdia")
    )
    assert torch.allclose(last.x_s, data(), atol=1e-12)
    for method in ("o-belm", "edict"):
        with pytest.raises(
            DDIMError, match=f"{method} cannot be run backwards from t=999, where the SNR is 0"
        ):
            encode_pair(
                denoise, data(), timesteps, schedule=ZERO_SNR, sampler=ReversibleSampler(method)
            )


def counted(denoise):
    """The denoiser, and the list of levels that it is called at."""
    calls = []

    def network(x_t, t):
        calls.append(int(t))
        return denoise(x_t, t)

    return network, calls


@pytest.mark.parametrize(
    ("name", "spacing", "steps"), thinned(SCHEDULES, SPACINGS, [2, 9, 21], stride=5)
)
def test_evaluations_are_told_as_they_are_made(name, spacing, steps):
    """Also where clean data is a level of the schedule, and the step out of that level is none."""
    schedule = SCHEDULES[name]
    timesteps = encodable_timesteps(schedule, select_timesteps(1000, steps, spacing))
    for method in REVERSIBLE:
        denoise, calls = counted(nonlinear(schedule, "v_prediction"))
        sampler = ReversibleSampler(method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            list(
                reversible_trajectory(
                    denoise, data(), timesteps, schedule=schedule, sampler=sampler
                )
            )
        assert len(calls) == sampler.evaluations(schedule, timesteps), method
    for method in ENCODERS:
        denoise, calls = counted(nonlinear(schedule, "v_prediction"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            code = encode(
                denoise, data(), timesteps, schedule=schedule, method=method, max_evaluations=20
            )
        assert len(calls) == code.evaluations, method


@pytest.mark.slow
def test_the_copies_of_edict_tell_that_they_have_drifted_apart():
    """As a sampler EDICT is of no use at few steps; as an encoder it is exact there, and loses
    everything at many."""
    denoise, sampler = nonlinear(LINEAR), ReversibleSampler("edict")
    x_T = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = sample(denoise, x_T, step_pairs(select_timesteps(1000, 1000)), schedule=LINEAR)

    def error(steps):
        *_, last = reversible_trajectory(
            denoise, x_T, select_timesteps(1000, steps), schedule=LINEAR, sampler=sampler
        )
        return float(reconstruction_error(last.x_s, reference).mean())

    with pytest.warns(
        DriftWarning,
        match=r"two copies of an image ended 2\.\de\+01 apart .*; sample with more steps",
    ):
        assert error(10) > 0.1
    assert error(100) < 0.01  # and no warning, which would be an error here
    timesteps = select_timesteps(1000, 500)
    pair = encode_pair(denoise, data(), timesteps, schedule=LINEAR, sampler=sampler)
    with pytest.warns(DriftWarning, match="decode a code of fewer"):
        list(decode_pair(denoise, pair, timesteps, schedule=LINEAR, sampler=sampler))


@pytest.mark.parametrize(
    ("method", "steps", "options", "advice"),
    [
        ("edict", 500, {}, "use fewer steps, a mixing nearer to 1, or method o-belm"),
        ("bdia", 50, {"gamma": 0.3}, "use gamma 1, or method o-belm"),
        ("bdia", 500, {"gamma": 0.1}, "use gamma 1, or method o-belm"),
    ],
)
def test_a_code_that_float64_cannot_bring_back_is_not_returned(method, steps, options, advice):
    denoise = nonlinear(LINEAR)
    with pytest.raises(
        DivergenceError,
        match=rf"where noise is of order 1: {method} diverged at {steps} steps; {advice}",
    ):
        encode(
            denoise,
            data(),
            select_timesteps(1000, steps),
            schedule=LINEAR,
            method=method,
            **options,
        )


def test_edict_is_refused_at_zero_snr_before_anything_is_evaluated():
    denoise, calls = counted(nonlinear(ZERO_SNR, "v_prediction"))
    with pytest.raises(DDIMError, match="edict cannot start at t=999, where the SNR is 0"):
        reversible_trajectory(
            denoise, data(), [999, 500], schedule=ZERO_SNR, sampler=ReversibleSampler("edict")
        )
    with pytest.raises(DDIMError, match="o-belm cannot be run backwards from t=999"):
        decode_pair(denoise, (data(), data()), [999, 500], schedule=ZERO_SNR)
    assert calls == []


def test_bdia_with_a_gamma_below_1_is_exact_at_few_steps():
    denoise = nonlinear(LINEAR)
    code = encode(
        denoise, data(), select_timesteps(1000, 10), schedule=LINEAR, method="bdia", gamma=0.96
    )
    assert float(reconstruction_error(data(), decode(denoise, code, schedule=LINEAR)).max()) < 1e-16


# --- inversion


def round_trip(denoise, timesteps, schedule):
    code = encode(denoise, data(), timesteps, schedule=schedule, method="ddim")
    assert code.evaluations == len(timesteps)
    return float(reconstruction_error(data(), decode(denoise, code, schedule=schedule)).mean())


def test_the_explicit_encoder_comes_back_at_first_order():
    counts = [10, 20, 50, 100, 200]
    errors = [round_trip(oracle(SMOOTH).denoise, evenly(steps), SMOOTH) for steps in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -2.3 < slope < -1.7, (slope, errors)  # of a squared error
    bent = [
        round_trip(nonlinear(LINEAR), select_timesteps(1000, steps), LINEAR) for steps in counts
    ]
    assert bent == sorted(bent, reverse=True)


def test_the_implicit_encoder_finds_where_sampling_comes_from():
    """Encoding the end of a trajectory gives its beginning, which the explicit encoder misses."""
    denoise, timesteps = nonlinear(LINEAR), select_timesteps(1000, 20)
    x_T = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x0 = sample(denoise, x_T, step_pairs(timesteps), schedule=LINEAR)
    found = encode_implicit(denoise, x0, timesteps, schedule=LINEAR, tolerance=1e-9)
    assert torch.allclose(found.x_T, x_T, atol=1e-5)
    assert float(found.residual.max()) <= 5e-8  # fifty times the tolerance at the first step
    explicit = encode_explicit(denoise, x0, timesteps, schedule=LINEAR)
    assert float((explicit.x_T - x_T).abs().max()) > 0.02


def test_acceleration_saves_evaluations():
    denoise, timesteps = nonlinear(LINEAR), select_timesteps(1000, 20)
    plain, accelerated = (
        encode_implicit(
            denoise,
            data(),
            timesteps,
            schedule=LINEAR,
            tolerance=1e-8,
            max_evaluations=200,
            depth=depth,
        )
        for depth in (0, 3)
    )
    assert torch.allclose(plain.x_T, accelerated.x_T, atol=1e-5)
    assert accelerated.evaluations < 0.8 * plain.evaluations


def test_a_samples_code_does_not_depend_on_its_batch():
    denoise, timesteps = nonlinear(LINEAR), select_timesteps(1000, 10)
    for method in ENCODERS:
        whole = encode(denoise, data(), timesteps, schedule=LINEAR, method=method)
        alone = encode(denoise, data()[2:3], timesteps, schedule=LINEAR, method=method)
        assert torch.allclose(whole.states[:, 2:3], alone.states, atol=1e-12), method


def test_what_is_not_solved_is_told():
    with pytest.warns(
        ConvergenceWarning,
        match=r"The implicit step to t=199 was solved to .*, not to 5.0e-12, in 3 evaluations",
    ):
        found = encode_implicit(
            nonlinear(LINEAR), data(), [199], schedule=LINEAR, tolerance=1e-13, max_evaluations=3
        )
    assert float(found.residual.min()) > 1e-12

    def broken(x, t):
        return torch.full_like(x, float("nan"))

    with pytest.raises(
        DDIMError, match="diverged at t=199: the network's prediction became NaN or infinite"
    ):
        encode_implicit(ModelDenoiser(broken, LINEAR), data(), [999, 199], schedule=LINEAR)


def test_an_iteration_that_would_explode_keeps_its_best():
    """A prediction that is too steep to be contracted: the residual is honest, and no worse than at
    the start."""

    def steep(x, t):
        return torch.sin(40 * x)

    denoise = ModelDenoiser(steep, LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = encode_implicit(denoise, data(), [999, 500], schedule=LINEAR, max_evaluations=20)
    assert bool(torch.isfinite(found.x_T).all())
    assert bool(torch.isfinite(found.residual).all())
    assert float(found.residual.max()) > 5e-4


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [([999, 500], [998, 500]), ([999, 998, 3], [998, 3]), ([500, 3], [500, 3]), ([999], [998])],
)
def test_levels_without_signal_are_moved_down(timesteps, expected):
    assert encodable_timesteps(ZERO_SNR, timesteps) == expected
    assert encodable_timesteps(LINEAR, timesteps) == timesteps


def test_a_schedule_of_noise_alone_cannot_be_encoded():
    with pytest.raises(DDIMError, match=r"needs a level whose SNR is above 0; got timesteps \[0\]"):
        encodable_timesteps(NoiseSchedule(torch.zeros(1)), [0])


# --- codes


def make(method="o-belm", steps=5, **options):
    return encode(
        nonlinear(LINEAR),
        data(),
        select_timesteps(1000, steps),
        schedule=LINEAR,
        method=method,
        **options,
    )


@pytest.mark.parametrize("method", ENCODERS)
def test_a_code_is_the_same_after_a_file(method, tmp_path):
    steps = 20 if method == "edict" else 5
    code = make(
        method, steps, labels=torch.arange(4), origin={"network": "abc"}, gamma=0.97, mixing=0.94
    )
    save_code(code, tmp_path / "code.safetensors")
    again = load_code(tmp_path / "code.safetensors")
    for field in dataclasses.fields(Code):
        ours, theirs = getattr(code, field.name), getattr(again, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, (
            field.name
        )
    assert torch.equal(
        decode(nonlinear(LINEAR), code, schedule=LINEAR),
        decode(nonlinear(LINEAR), again, schedule=LINEAR),
    )
    assert [p.name for p in tmp_path.iterdir()] == ["code.safetensors"]


def test_parts_of_codes_join_again():
    code = make("fixed-point", labels=torch.arange(4))
    joined = Code.join([code[:1], code[1:]])
    assert len(joined) == 4
    for name in ("states", "labels", "residual"):
        assert torch.equal(getattr(joined, name), getattr(code, name))
    with pytest.raises(
        DDIMError, match="all are of one method, one list of timesteps and one model"
    ):
        Code.join([code, make("ddim")])


def test_a_pair_of_states_is_refused_with_other_settings():
    code = make("o-belm", origin={"network": "abc"})
    denoise = nonlinear(LINEAR)
    with pytest.raises(
        DDIMError, match="a pair of states of its own 5 steps, and cannot be decoded with 10 others"
    ):
        decode(denoise, code, schedule=LINEAR, timesteps=select_timesteps(1000, 10))
    with pytest.raises(DDIMError, match=r"made with another network \(abc there, xyz here\)"):
        decode(denoise, code, schedule=LINEAR, origin={"network": "xyz"})
    assert torch.equal(
        decode(denoise, code, schedule=LINEAR, timesteps=code.timesteps),
        decode(denoise, code, schedule=LINEAR),
    )
    code = make(
        "ddim", origin={"network": "abc", "dtype": "float32"}
    )  # a network has another fingerprint in another dtype
    with pytest.raises(
        DDIMError,
        match="made by a network in float32, and this one is in float64; decode it in float32",
    ):
        decode(denoise, code, schedule=LINEAR, origin={"network": "xyz", "dtype": "float64"})


def test_a_code_of_one_state_takes_any_steps():
    code = make("fixed-point", 100)
    other = decode(nonlinear(LINEAR), code, schedule=LINEAR, timesteps=select_timesteps(1000, 50))
    assert float(reconstruction_error(data(), other).mean()) < 1e-3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_decoding_begins_where_the_code_lies(name, spacing):
    schedule = SCHEDULES[name]
    for first in SPACINGS:
        at = encodable_timesteps(schedule, select_timesteps(1000, 10, first))
        code = Code(torch.zeros(1, 1, 1), "ddim", tuple(at), 10)
        for steps in (1, 2, 7, 50, 1000):
            asked = select_timesteps(1000, steps, spacing)
            levels = decoding_timesteps(code, asked, schedule=schedule)
            assert levels[0] == at[0]
            assert list(levels) == sorted(set(levels), reverse=True)
            assert set(levels[1:]) == {t for t in asked[1:] if t < at[0]}


def test_another_first_level_would_be_another_image():
    """A code that lies at 600 comes back from there; taken for one at 999, it does not."""
    denoise = nonlinear(SMOOTH)
    code = encode(
        denoise,
        data(),
        list(range(600, 0, -5)),
        schedule=SMOOTH,
        method="fixed-point",
        tolerance=1e-7,
    )
    asked = evenly(100)
    back = decode(denoise, code, schedule=SMOOTH, timesteps=asked)
    assert float(reconstruction_error(data(), back).max()) < 1e-3
    elsewhere = sample(denoise, code.x_T, step_pairs(asked), schedule=SMOOTH)
    assert float(reconstruction_error(data(), elsewhere).mean()) > 0.01
    with pytest.raises(DDIMError, match="must fall from noise to data; got 2 after 1"):
        decode(denoise, code, schedule=SMOOTH, timesteps=[1, 2])


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "code.safetensors"
    with pytest.raises(DataError, match="there is no code at"):
        load_code(path)
    save_code(make(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is no code, or is damaged or cut off"):
        load_code(path)
    safetensors.torch.save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="is no code that `ddim encode` or save_code wrote"):
        load_code(path)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(
        DataError, match="the code is damaged: its states are not those that were written"
    ):
        load_code(path)


def told_in(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ddim-code"])


def test_files_whose_metadata_do_not_fit_are_refused(tmp_path):
    path, code = tmp_path / "code.safetensors", make()
    save_code(make(labels=torch.arange(4)), path)
    others, one = told_in(path), {"states": code.states[:1].contiguous()}
    save_code(code, path)
    told = told_in(path)
    for tensors, changed, message in [
        (code.tensors(), others, "the code is damaged: its labels are not those that were"),
        (
            one,
            told | {"tensors": {"states": fingerprint(one["states"])}},
            r"a code of o-belm holds 2 state\(s\)",
        ),
        (code.tensors(), told | {"code": {}}, "metadata is damaged"),
        (code.tensors(), told | {"code": []}, "metadata is damaged"),
        (code.tensors(), told | {"tensors": None}, "metadata is damaged"),
        (code.tensors(), told | {"code": told["code"] | {"x": 1}}, "metadata is damaged"),
        (code.tensors(), [], "metadata is damaged"),
    ]:
        metadata = {"ddim-code": json.dumps(changed)}
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        with pytest.raises(DataError, match=message):
            load_code(path)


def test_files_of_the_first_version_are_read(tmp_path):
    path, code = tmp_path / "code.safetensors", make(labels=torch.arange(4))
    save_code(code, path)
    told = {name: json.dumps(told_in(path)[name]) for name in ("code", "tensors")}
    metadata = {"format": "ddim-code", "version": "1", **told}
    safetensors.torch.save_file(code.tensors(), path, metadata=metadata)
    again = load_code(path)
    assert torch.equal(again.states, code.states)
    assert torch.equal(again.labels, code.labels)
    assert again.timesteps == code.timesteps
    metadata["tensors"] = "{"
    safetensors.torch.save_file(code.tensors(), path, metadata=metadata)
    with pytest.raises(DataError, match="metadata is damaged"):
        load_code(path)


def test_equal_codes_have_equal_bytes(tmp_path):
    for number in range(8):
        save_code(make(labels=torch.arange(4)), tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_options_out_of_range():
    for error, call in {
        r"method must be one of o-belm, .*; got 'euler'": lambda: make("euler"),
        r"gamma of BDIA must lie in \(0, 1\]; got 0": lambda: make("bdia", gamma=0),
        r"mixing of EDICT must lie in \(0, 1\); got 1": lambda: make("edict", mixing=1),
        "tolerance must be above 0": lambda: make("fixed-point", tolerance=0),
        "images and reconstructions must have one shape": lambda: reconstruction_error(
            data(), data()[:1]
        ),
        "one of o-belm, bdia, edict; got 'ddim'": lambda: ReversibleSampler("ddim"),
    }.items():
        with pytest.raises(DDIMError, match=error):
            call()


def test_the_error_is_that_of_pixels_in_unit_range():
    black, white = (
        torch.full((1, 1, 2, 2), -1.0),
        torch.full((1, 1, 2, 2), 5.0),
    )  # the finished image is clamped
    assert reconstruction_error(black, white).tolist() == [1.0]
    assert reconstruction_error(black, black + 0.2).tolist() == pytest.approx([0.01])


def test_a_fingerprint_tells_networks_apart():
    network = torch.nn.Linear(3, 3)
    before = fingerprint(network.state_dict())
    assert before == fingerprint(network.state_dict())
    with torch.no_grad():
        network.bias[0] += 1e-6
    assert fingerprint(network.state_dict()) != before


# --- the embedded model, real images


@pytest.fixture(scope="module")
def pipe():
    return UnconditionalPipeline.from_pretrained("fashion-mnist")


@pytest.fixture(scope="module")
def garments():
    path = pathlib.Path(__file__).parents[1] / "data" / "fashion_mnist_2048.npz"
    with np.load(path) as arrays:
        return arrays["test_images"][:8].reshape(8, 28, 28, 1)


def pixels(images):
    """Bytes [B, H, W, C] as [B, C, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255


def missed(pipe, images, steps, method):
    """(mean squared error, code) of a round trip, pixels in [0, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # of the stiff first step, whose residual is what the error is about
        code = pipe.encode(images, steps, method=method)
    return float(
        (pipe.decode(code, output_type="pt").double() - pixels(images)).square().mean()
    ), code


@pytest.mark.parametrize("method", ["o-belm", "bdia"])
def test_real_images_come_back_exactly(pipe, garments, method):
    error, code = missed(pipe, garments, 10, method)
    assert error < 1e-12
    assert (np.stack([np.asarray(p) for p in pipe.decode(code)])[..., None] == garments).all()
    assert code.evaluations == 10
    assert code.states.dtype == torch.float64
    assert 0.5 < float(code.rms().mean()) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 20, 50, 100])
@pytest.mark.parametrize("method", ["o-belm", "bdia"])
def test_real_images_come_back_exactly_at_all_steps(pipe, garments, method, steps):
    error, code = missed(pipe, garments[:4], steps, method)
    assert error < 1e-8
    assert 0.5 < float(code.rms().mean()) < 1.5


@pytest.mark.parametrize(
    "steps",
    [[5, 10, 20], pytest.param([10, 20, 50, 100, 200], marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_the_papers_encoder_comes_back_closer_with_more_steps(pipe, garments, steps):
    """The decay of the paper's Table 2."""
    errors = [missed(pipe, garments[:2], n, "ddim")[0] for n in steps]
    assert all(b < 0.8 * a for a, b in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize(
    ("steps", "longest"), [([10], 100), ([10, 20], 1000)], ids=["short", "1000 steps"]
)
@pytest.mark.slow
def test_o_belm_is_nearer_to_the_flow_than_ddim_at_few_steps(pipe, steps, longest):
    """The ODE error of both as samplers: without clipping, the finished image clamped, from the
    same x_T, trailing."""

    def draw(n, sampler):
        options = {
            "timestep_spacing": "trailing",
            "clip": "none",
            "output_type": "pt",
            "progress": False,
        }
        return pipe(seeds=[0, 1], num_inference_steps=n, sampler=sampler, **options).images.double()

    reference = draw(longest, "ddim")
    for n in steps:
        ours, ddim = (
            float((draw(n, sampler) - reference).square().mean()) for sampler in ("o-belm", "ddim")
        )
        assert ours < 0.7 * ddim, (n, ours, ddim)


@pytest.mark.slow
def test_the_implicit_encoder_spends_where_the_step_is_stiff(pipe, garments):
    """Dozens of evaluations out of the clean level, a few at each other; and its codes are as long
    as noise."""
    denoise, calls = counted(pipe.denoiser(2, clip="none"))
    timesteps = select_timesteps(1000, 10)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        code = encode(
            denoise,
            2 * pixels(garments[:2]) - 1,
            timesteps,
            schedule=pipe.noise_schedule,
            method="fixed-point",
        )
    spent = [calls.count(t) for t in timesteps]
    assert spent[-1] >= 20
    assert max(spent[:-1]) <= 12
    assert sum(spent) == code.evaluations
    assert torch.allclose(code.rms(), torch.ones(2, dtype=torch.float64), atol=0.15)
    back = decode(pipe.denoiser(2, clip="none"), code[:2], schedule=pipe.noise_schedule)
    assert float(reconstruction_error(2 * pixels(garments[:2]) - 1, back.detach()).mean()) < 1e-5


@pytest.mark.slow
def test_the_implicit_encoder_on_real_images(pipe, garments):
    error, code = missed(pipe, garments[:4], 50, "fixed-point")
    assert error < 1e-6
    assert code.evaluations <= 6 * 50
    assert missed(pipe, garments[:4], 50, "ddim")[0] > 1e-4


def test_pictures_bytes_and_tensors_have_one_code(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    forms = [
        images,
        list(images),
        [Image.fromarray(image[..., 0]) for image in images],
        torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1,
    ]
    codes = [pipe.encode(form, 4) for form in forms]
    for code in codes[1:]:
        assert torch.allclose(code.states, codes[0].states, atol=1e-6)
    assert [np.asarray(picture).tolist() for picture in pipe.decode(codes[0])] == images[
        ..., 0
    ].tolist()
    assert np.allclose(pipe.decode(codes[0], output_type="np"), images / 255, atol=1e-6)
    assert torch.allclose(
        pipe.decode(codes[0], output_type="pt").double(), pixels(images), atol=1e-6
    )


@pytest.mark.slow
def test_a_code_of_one_state_decodes_with_other_steps_nearly(pipe, garments):
    """As documented: from the code's own first level, at a distance that is the discretisation's; a
    pair of states is refused."""
    error, code = missed(pipe, garments[:2], 10, "fixed-point")
    for options in (
        {"num_inference_steps": 8},
        {"num_inference_steps": 12, "timestep_spacing": "leading"},
    ):
        other = float(
            (pipe.decode(code, **options, output_type="pt").double() - pixels(garments[:2]))
            .square()
            .mean()
        )
        assert 10 * error < other < 0.01
        assert pipe.decoding_timesteps(code, **options)[0] == 999


@pytest.mark.parametrize("method", ENCODERS)
def test_a_float64_network_has_its_own_codes(tiny, pipe, method):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    double = UnconditionalPipeline.from_pretrained(tiny, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        code = double.encode(list(images), 10, method=method)
    assert code.origin["dtype"] == "float64"
    assert code.states.dtype == torch.float64
    back = torch.from_numpy(double.decode(code, output_type="np")[..., 0])
    assert torch.allclose(
        back,
        torch.from_numpy(images) / 255,
        atol={"ddim": 0.5, "fixed-point": 2e-3}.get(method, 1e-7),
    )
    with pytest.raises(
        DDIMError,
        match="made by a network in float64, and this one is in float32; decode it in float64",
    ):
        UnconditionalPipeline.from_pretrained(tiny).decode(code)


@pytest.mark.slow
def test_half_precision_promises_no_exact_round_trip_and_tells_what_it_cannot_solve(pipe, garments):
    half = UnconditionalPipeline.from_pretrained("fashion-mnist", dtype=torch.bfloat16)
    error, code = missed(half, garments[:2], 5, "o-belm")
    assert error < 1e-3
    assert code.states.dtype == torch.float64
    with pytest.raises(
        DDIMError, match="made by a network in bfloat16, and this one is in float32"
    ):
        pipe.decode(code)
    with pytest.raises(
        DDIMError, match="made by a network in float32, and this one is in bfloat16"
    ):
        half.decode(pipe.encode(garments[:1], 1, method="ddim"))
    with pytest.warns(ConvergenceWarning, match=r"was solved to .*, not to .*, in 6 evaluations"):
        half.encode(garments[:1], 2, method="fixed-point", max_evaluations=6)


def test_the_pipeline_refuses_what_does_not_fit(pipe, garments, tiny_classes):
    code = pipe.encode(garments[:2], 4)
    for error, call in {
        "cannot be decoded with 5 others": lambda: pipe.decode(code, 5),
        "the code holds no images": lambda: pipe.decode(code[:0]),
        "trained without classes; leave out class_labels": lambda: pipe.decode(
            dataclasses.replace(code, labels=torch.zeros(2, dtype=int))
        ),
        r"image 0 is 8x8 and the model's are 28x28 \(width x height\); ask for resizing": lambda: (
            pipe.encode(np.zeros((1, 8, 8, 1), np.uint8))
        ),
        r"floating-point in \[-1, 1\]; got torch.float32 from 0 to 255": lambda: pipe.encode(
            torch.linspace(0, 255, 784).reshape(1, 1, 28, 28)
        ),
        r"must have shape \[B, 1, 28, 28\]; got \[1, 3, 28, 28\]": lambda: pipe.encode(
            torch.zeros(1, 3, 28, 28)
        ),
        "must hold bytes": lambda: pipe.encode(np.zeros((1, 28, 28, 1), np.float32)),
        "image 0 is a str": lambda: pipe.encode(["a.png"]),
        "only a Code can be decoded, which encode or load_code gives; got a tensor": lambda: (
            pipe.decode(code.x_T)
        ),
        "only a Code can be decoded, .* got": lambda: pipe.decoding_timesteps([code]),
        "only a Code can be decoded, .* got a tuple": lambda: decode(
            pipe.denoiser(1), (code, code), schedule=LINEAR
        ),
        "there must be images to encode": lambda: pipe.encode([]),
        "output_type must be one of pil, np, pt": lambda: pipe.decode(code, output_type="latent"),
        "o-belm is deterministic, and needs eta 0; got eta=1": lambda: pipe(
            sampler="o-belm", eta=1.0, num_inference_steps=2
        ),
        "bdia cannot be run backwards through clipping": lambda: pipe(
            sampler="bdia", clip="static", num_inference_steps=2
        ),
    }.items():
        with pytest.raises(DDIMError, match=error):
            call()
    other = UnconditionalPipeline.from_pretrained(tiny_classes)
    with pytest.raises(
        DDIMError, match=r"latents have shape \[1, 8, 8\]; the code's have \[1, 28, 28\]"
    ):
        other.decode(code)
    small = np.zeros((3, 8, 8, 1), np.uint8)
    for labels in ([0], [0, 1], [0, 1, 2, 3], [[0, 1, 2]]):
        with pytest.raises(
            DDIMError, match=r"one number for all images, or one for each of 3; got shape \["
        ):
            other.encode(small, 2, class_labels=labels)
    unlabelled = dataclasses.replace(other.encode(small, 2, class_labels=1), labels=None)
    with pytest.raises(
        DDIMError, match="class-conditional, and the code has no classes; encode with class_labels"
    ):
        other.decode(unlabelled)
    changed = UnconditionalPipeline.from_pretrained("fashion-mnist")
    with torch.no_grad():
        next(changed.unet.parameters()).add_(0.01)
    with pytest.raises(DDIMError, match="made with another network"):
        changed.decode(code)


def test_classes_belong_to_a_code_and_resizing_is_asked_for(tiny_classes):
    pipe = UnconditionalPipeline.from_pretrained(tiny_classes)
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10), dtype=np.uint8)
    code = pipe.encode(list(images), 4, class_labels=[0, 1, 2, 3, 0], resize=True, batch_size=2)
    assert code.labels.tolist() == [0, 1, 2, 3, 0]
    again = pipe.encode(list(images), 4, class_labels=[0, 1, 2, 3, 0], resize=True)
    assert torch.allclose(code.states, again.states, atol=1e-4)
    back = pipe.decode(code, output_type="np", batch_size=3)
    shrunk = pipe.encode(list(images), 1, class_labels=0, resize=True).states[1]
    assert np.allclose(back[..., 0], (shrunk[:, 0] / 2 + 0.5).numpy(), atol=1e-6)


@pytest.mark.parametrize("sampler", ["o-belm", "bdia"])
def test_the_pipeline_samples_with_them(pipe, sampler):
    seen = []
    images = pipe(
        seeds=[1, 2],
        num_inference_steps=8,
        sampler=sampler,
        callback=seen.append,
        output_type="pt",
        progress=False,
    ).images
    assert images.shape == (2, 1, 28, 28)
    assert len(seen) == 8
    ddim = pipe(seeds=[1, 2], num_inference_steps=8, output_type="pt", progress=False).images
    assert 0 < float((images - ddim).square().mean()) < 0.1


WALKS = {
    "sample": lambda denoise, x, sampler: sample(denoise, x, step_pairs([60, 30]), schedule=LINEAR),
    "explicit": lambda denoise, x, sampler: (
        encode_explicit(denoise, x, [60, 30], schedule=LINEAR).x_T
    ),
    "implicit": lambda denoise, x, sampler: (
        encode_implicit(denoise, x, [60, 30], schedule=LINEAR).x_T
    ),
    "to data": lambda denoise, x, sampler: [
        s.x_s for s in reversible_trajectory(denoise, x, [60, 30], schedule=LINEAR, sampler=sampler)
    ][-1],
    "from data": lambda denoise, x, sampler: (
        encode_pair(denoise, x, [60, 30], schedule=LINEAR, sampler=sampler).x
    ),
    "back": lambda denoise, x, sampler: [
        s.x_s
        for s in decode_pair(denoise, StatePair(x, x), [60, 30], schedule=LINEAR, sampler=sampler)
    ][-1],
    "eps_mean_square": lambda denoise, x, sampler: estimate_eps_mean_square(
        [(denoise, x)], [500], schedule=LINEAR
    ),
}


@pytest.mark.parametrize("method", REVERSIBLE)
@pytest.mark.parametrize("walk", WALKS)
def test_a_network_is_no_denoiser_and_a_batch_of_two_no_pair(walk, method):
    oracle, x, sampler = GaussianOracle(LINEAR), torch.randn(2, 3), ReversibleSampler(method)
    message = (
        r"denoise must return \(x0, eps\), and returned {}; .* ModelDenoiser\(network, schedule, "
        r"prediction_type\)"
    )
    for network, kind in (
        (oracle.network("epsilon"), "a tensor of .*"),
        (lambda x, t: [x, x], "a list"),
        (lambda x, t: (x,), "a tuple"),
    ):
        with pytest.raises(DDIMError, match=message.format(kind)):
            WALKS[walk](network, x, sampler)
    WALKS[walk](lambda x, t: tuple(oracle.denoise(x, t)), x, sampler)


@pytest.mark.parametrize("method", REVERSIBLE)
@pytest.mark.parametrize("walk", [walk for walk in WALKS if walk != "eps_mean_square"])
def test_it_can_be_differentiated_through_and_leaves_no_graph_without_gradients(walk, method):
    sampler, scale = (
        ReversibleSampler(method),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def end(value):
        return WALKS[walk](ModelDenoiser(lambda x, t: value * x, LINEAR), x, sampler).square().sum()

    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once a process of a graph that is cut off
    try:
        (slope,) = torch.autograd.grad(end(scale), scale)
    finally:
        torch.set_warn_always(always)
    with torch.no_grad():
        assert not end(scale).requires_grad
        difference = (end(scale + 1e-4) - end(scale - 1e-4)) / 2e-4
    assert float(slope) == pytest.approx(
        float(difference), rel=1e-2 if walk == "implicit" else 1e-5
    )


@pytest.mark.parametrize("method", ENCODERS)
def test_codes_can_be_differentiated_through_silently(method):
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    denoise = ModelDenoiser(lambda x, t: scale * x, LINEAR)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        back = decode(
            denoise,
            encode(
                denoise,
                torch.full((1, 3), 0.1),
                select_timesteps(1000, 5),
                schedule=LINEAR,
                method=method,
            ),
            schedule=LINEAR,
        )
    finally:
        torch.set_warn_always(always)
    assert back.requires_grad


@pytest.mark.parametrize("count", [20, 50])
def test_the_default_encoder_gives_noise_at_zero_terminal_snr_and_others_are_warned_of(count):
    sd = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedules = [NoiseSchedule.from_betas(b) for b in (sd, rescale_zero_terminal_snr(sd))]
    x0 = -0.3 + 0.4 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    levels = select_timesteps(1000, count)
    for schedule, method in zip(schedules, ("o-belm", "bdia"), strict=True):
        oracle = GaussianOracle(schedule, -0.3, 0.4)
        code = encode(oracle.denoise, x0, levels, schedule=schedule)
        assert code.method == default_method(schedule) == method
        assert torch.all((code.rms() > 0.7) & (code.rms() < 1.4))
        back = decode(oracle.denoise, code, schedule=schedule)
        assert torch.allclose(back, x0, atol=1e-10)
    code = encode(oracle.denoise, x0, levels, schedule=schedule, method="o-belm")
    assert float(code.rms().max()) > 5
    with pytest.warns(CodeWarning, match="o-belm .* root mean square .* use method bdia") as told:
        warn_of_rms(code)
    assert len(told) == 1


def test_a_pipeline_warns_once_of_codes_that_are_no_noise(garments):
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)
    options = {"timesteps": [998, 700, 400, 100], "batch_size": 2}
    with pytest.warns(CodeWarning, match="use method bdia, or more steps") as told:
        pipe.encode(garments[:4], method="o-belm", **options)
    assert len(told) == 1
    assert pipe.encode(garments[:4], **options).method == "bdia"


def test_one_image_of_a_code_keeps_the_axis_of_images():
    oracle, x = GaussianOracle(LINEAR), torch.randn(3, 1, 4, 4)
    labels = torch.tensor([5, 6, 7])
    code = encode(oracle.denoise, x, [900, 500], schedule=LINEAR, method="ddim", labels=labels)
    for chosen, place in ((1, 1), (-1, 2), (np.int64(0), 0)):
        part = code[chosen]
        assert len(part) == 1
        assert torch.equal(part.states, code.states[:, [place]])
        assert part.labels.tolist() == [5 + place]
        torch.testing.assert_close(
            decode(oracle.denoise, part, schedule=LINEAR),
            decode(oracle.denoise, code, schedule=LINEAR)[[place]],
        )
    assert code[[2, 0]].labels.tolist() == [7, 5]
    assert code[torch.tensor([True, False, True])].labels.tolist() == [5, 7]
    assert [len(part) for part in code] == [1, 1, 1]
    with pytest.raises(IndexError, match=r"the code holds 3 images; there is no code\[3\]"):
        code[3]
    with pytest.raises(DDIMError, match="chosen must be a place, a slice, or a list of places"):
        code["a"]


def test_edict_says_that_other_batches_round_otherwise(tiny, tmp_path):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
    for method in ("edict", "o-belm"):
        code = pipe.encode(x, 5, method=method, batch_size=64)
        assert code.batch_size == 3
        save_code(code, tmp_path / f"{method}.safetensors")
        code = load_code(tmp_path / f"{method}.safetensors")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            back = pipe.decode(code, output_type="pt")
            assert not told
            pipe.decode(code, output_type="pt", batch_size=2)
            pipe.decode(code[1], output_type="pt")
        assert (back * 2 - 1 - x).abs().max() < 1e-5
        expected = 2 * (method == "edict")
        assert [w.category for w in told] == [CodeWarning] * expected
    assert code.batch_size == 3
