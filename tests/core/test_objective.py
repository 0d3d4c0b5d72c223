import pytest
import torch

from ddim.core.objective import draw_timesteps, loss_weights, offset_noise, training_loss
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import PREDICTION_TYPES
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.errors import DDIMError

LINEAR = NoiseSchedule.from_betas(make_betas())
ZERO = NoiseSchedule.from_betas(rescale_zero_terminal_snr(make_betas()))
LEVELS = torch.arange(1000)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_best_prediction_has_the_lowest_loss(kind):
    oracle = GaussianOracle(LINEAR, mean=0.3, std=0.4)
    x0, noise = 0.3 + 0.4 * torch.randn(4000, 3), torch.randn(4000, 3)
    t = draw_timesteps(4000, 1000, generator=torch.Generator().manual_seed(0))
    best = training_loss(
        oracle.network(kind), x0, schedule=LINEAR, t=t, noise=noise, prediction_type=kind
    ).mean()
    for scale in (0.9, 1.1):
        worse = training_loss(
            lambda x, t, s=scale: s * oracle.network(kind)(x, t),
            x0,
            schedule=LINEAR,
            t=t,
            noise=noise,
            prediction_type=kind,
        ).mean()
        assert worse > best


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_network_that_knows_the_answer_has_no_loss(kind):
    x0, noise = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 900, 999])
    a = LINEAR.alpha_bar(t)[:, None]
    answer = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0,
    }[kind]
    losses = training_loss(
        lambda x, t: answer, x0, schedule=LINEAR, t=t, noise=noise, prediction_type=kind
    )
    assert losses.shape == (5,)
    assert float(losses.max()) < 1e-20
    doubled = training_loss(
        lambda x, t: answer + 1,
        x0,
        schedule=LINEAR,
        t=t,
        noise=noise,
        prediction_type=kind,
        weights=torch.full((5,), 2.0),
    )
    torch.testing.assert_close(doubled, torch.full((5,), 2.0, dtype=torch.float64))


def test_min_snr_is_one_weighting_of_x0_whatever_is_predicted():
    snr = LINEAR.snr(LEVELS)
    x0 = loss_weights(LINEAR, LEVELS, prediction_type="sample", weighting="min-snr")
    torch.testing.assert_close(x0, snr.clamp(max=5))
    # ||eps error||^2 = SNR ||x0 error||^2 and ||v error||^2 = (SNR + 1) ||x0 error||^2
    torch.testing.assert_close(
        loss_weights(LINEAR, LEVELS, prediction_type="epsilon", weighting="min-snr") * snr, x0
    )
    torch.testing.assert_close(
        loss_weights(LINEAR, LEVELS, prediction_type="v_prediction", weighting="min-snr")
        * (snr + 1),
        x0,
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_weights_are_finite_at_zero_snr_and_the_floor_keeps_the_terminal_level(kind):
    weights = loss_weights(ZERO, LEVELS, prediction_type=kind, weighting="min-snr", floor=0.01)
    assert torch.isfinite(weights).all()
    plain = loss_weights(ZERO, LEVELS, prediction_type=kind, weighting="min-snr")
    has_signal = ZERO.snr(LEVELS) > 0
    assert torch.equal(weights[has_signal], plain[has_signal])  # the paper's, however small
    assert float(weights[~has_signal].min()) >= 0.01
    if kind == "v_prediction":
        assert (
            float(
                loss_weights(ZERO, torch.tensor([999]), prediction_type=kind, weighting="min-snr")
            )
            == 0.0
        )
    assert (loss_weights(ZERO, LEVELS, prediction_type=kind) == 1).all()


def test_noise_is_added_in_the_datas_precision():
    seen = []
    training_loss(
        lambda x, t: seen.append(x) or x,
        torch.zeros(1, 2),
        schedule=LINEAR,
        t=torch.tensor([0]),
        noise=torch.ones(1, 2),
    )
    assert seen[0].dtype == torch.float32
    assert float(seen[0][0, 0]) == pytest.approx(0.01, rel=1e-6)


def test_timesteps_cover_all_levels_and_follow_the_generator():
    t = draw_timesteps(50_000, 1000, generator=torch.Generator().manual_seed(1))
    assert t.unique().numel() == 1000
    assert torch.equal(t, draw_timesteps(50_000, 1000, generator=torch.Generator().manual_seed(1)))


def test_errors():
    t = torch.tensor([1])
    with pytest.raises(DDIMError, match="weighting must be one of uniform, min-snr; got 'p2'"):
        loss_weights(LINEAR, t, prediction_type="epsilon", weighting="p2")
    with pytest.raises(DDIMError, match="gamma must be above 0 and finite; got 0"):
        loss_weights(LINEAR, t, prediction_type="epsilon", weighting="min-snr", gamma=0)
    with pytest.raises(DDIMError, match="prediction_type must be one of .* got 'flow'"):
        loss_weights(LINEAR, t, prediction_type="flow")


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5])
def test_offset_noise_adds_one_number_an_image_and_channel(strength):
    noise = torch.randn(4000, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    shifted = offset_noise(noise, strength, generator=torch.Generator().manual_seed(2))
    shift = shifted - noise
    assert float((shift - shift[:, :, :1, :1]).abs().max()) < 1e-5
    assert float(shift[:, :, 0, 0].std(0).sub(strength).abs().max()) < 0.03 * strength + 1e-9
    assert (
        abs(float(torch.corrcoef(shift[:, :, 0, 0].T)[0, 1])) < 0.06
        if strength
        else torch.equal(shifted, noise)
    )
    assert float(shifted.var()) == pytest.approx(1 + strength**2, rel=0.03)
