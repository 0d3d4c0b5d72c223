"""Records say what was measured; on Gaussian data the theory beside them is met by exact
sampling."""

import numpy as np
import pytest
import torch

from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from fashion_judge import Judged
from flaws_report import (
    TRAININGS,
    Setting,
    background_records,
    plot_flaws,
    saturation_record,
    settings,
    to_markdown,
    twins,
    unconditional_records,
)

LEAKY = NoiseSchedule.from_betas(make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012))
ZERO = NoiseSchedule.from_betas(
    rescale_zero_terminal_snr(make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012))
)


def judged(brightness):
    values = torch.tensor(brightness)
    right = torch.arange(len(values)) % 2 == 0
    return Judged(values, values - 0.5, right, torch.ones(len(values), dtype=torch.bool))


def test_every_fix_is_taken_alone_and_with_every_other():
    found = settings(0.7)
    assert len({s.name for s in found}) == len(TRAININGS) * 2 * 2
    assert [s.label for s in twins(0.7)] == [
        "epsilon, leaky, leading, no rescale",
        "epsilon, leaky, leading, rescale 0.7",
        "v, zero SNR, trailing, no rescale",
        "v, zero SNR, trailing, rescale 0.7",
    ]


def test_backgrounds_have_mean_spread_and_shares():
    (record,) = background_records(
        Setting("v", "trailing", 0.0), {"gray": judged([0.4, 0.6])}, {"gray": 0.5}
    )
    assert record["brightness"] == pytest.approx(0.5)
    assert record["spread"] == pytest.approx(0.1)
    assert (
        record["requested"],
        record["hue_right"],
        record["class_right"],
        record["both_right"],
        record["count"],
    ) == (0.5, 0.5, 1, 0.5, 2)


def test_saturation_is_a_share_of_values():
    images = torch.full((2, 3, 4, 4), 0.5)
    images[0, 0] = 1
    record = saturation_record(Setting("v", "trailing", 0.7), images, guidance_scale=7.5, real=0.0)
    assert record["saturated"] == pytest.approx(1 / 6)
    assert record["guidance_scale"] == 7.5


def brightness(schedule, first, made, real):
    """The records of latents whose channels' means are given."""
    shape = (1, 1, 16, 16)
    return unconditional_records(
        Setting("v", "trailing", 0.0),
        latents=made[..., None, None].expand(*made.shape, 16, 16),
        images=torch.rand(4, 3, 8, 8),
        real_latents=real[..., None, None].expand(*real.shape, *shape[2:]),
        real_images=torch.rand(4, 3, 8, 8),
        schedule=schedule,
        first=first,
    )


@pytest.mark.parametrize(
    ("schedule", "first", "flawed"), [(LEAKY, 999, True), (LEAKY, 961, True), (ZERO, 999, False)]
)
def test_exact_sampling_of_gaussian_brightness_meets_the_theory(schedule, first, flawed):
    torch.manual_seed(0)
    mean, std, n = -0.4, 0.6, 16
    noise = torch.randn(200_000, 1, dtype=torch.float64)
    real = mean + std * torch.randn(200_000, 1, dtype=torch.float64)
    # the exact flow from level t carries x to the data's quantile: N(a mu, a^2 s^2 + sigma^2) ->
    # N(mu, s^2), all times n
    alpha_bar = schedule.alpha_bar(first)
    s, mu = n * std, n * mean
    made = (
        mu + s * (noise - alpha_bar.sqrt() * mu) / (alpha_bar * s**2 + 1 - alpha_bar).sqrt()
    ) / n
    channel, decoded = brightness(schedule, first, made, real)
    assert channel["bias"] == pytest.approx(channel["bias_in_theory"], abs=0.01)
    assert channel["factor"] == pytest.approx(channel["factor_in_theory"], abs=0.01)
    assert (channel["factor_in_theory"] < 0.9) == flawed
    assert (channel["bias_in_theory"] > 0.03) == flawed
    assert decoded["bias_in_theory"] is None


@pytest.fixture(scope="module")
def records():
    found = []
    for setting in settings(0.7):
        found += background_records(
            setting,
            {"black": judged([0.1, 0.3]), "white": judged([0.9, 0.7])},
            {"black": 0.0, "white": 1.0},
        )
    for setting in twins(0.7):
        found += [
            saturation_record(setting, torch.rand(2, 3, 4, 4), guidance_scale=w, real=0.0)
            for w in (1.0, 7.5)
        ]
    return found + brightness(LEAKY, 999, torch.randn(9, 2), torch.randn(9, 2))


def test_the_document_has_every_setting_and_every_table(records):
    text = to_markdown(records, protocol="As it was done.")
    assert all(f"| {s.label} " in text for s in settings(0.7))
    assert "0.200 ± 0.100" in text
    assert "black (0.000)" in text
    assert "w = 7.5" in text
    assert "latent channel 1" in text
    assert "As it was done." in text


def test_a_document_of_a_run_that_has_just_begun_is_a_document():
    assert (
        to_markdown([], protocol="Nothing yet.")
        == "# What the fixes do, measured\n\nNothing yet.\n"
    )


def test_the_plot_draws_every_line(records):
    left, middle, right = plot_flaws(records).axes
    assert len(left.get_legend_handles_labels()[1]) == 12
    assert len(middle.get_lines()) == 4
    assert right.get_ylabel()


def test_no_error_bar_of_a_background_hides_another(records):
    left = plot_flaws(records).axes[0]
    places = [float(bar[0][0]) for drawn in left.collections for bar in drawn.get_segments()]
    assert len(places) == 12 * len(left.get_xticks())
    assert np.diff(sorted(places)).min() > 0.01
