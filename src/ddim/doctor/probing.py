r"""Asks a network itself, for the doctor: what does it predict, and how was its last level trained?

Whether a network was trained with zero terminal SNR stands in no weight, and a checkpoint's
configuration may be silent or wrong. Its answers to pure noise tell. One that saw images through a
leak, :math:`x_{T-1} = \alpha x_0 + \sigma\epsilon`, has learnt to read them there by the Wiener
filter :math:`\alpha S / (\alpha^2 S + \sigma^2)` of the images' spectrum S, and reads pure noise so
too; one that was trained on noise alone says the same whatever the noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ddim.core.checks import check_function, check_whole
from ddim.core.noise import seeded_randn
from ddim.core.prediction import PredictionType, from_x0_eps, to_x0_eps
from ddim.core.schedule import NoiseSchedule, add_noise, check_schedule
from ddim.doctor.symptoms import check_images

__all__ = ["Probe", "probe"]

_FAINT_LEAK = 0.03
"""sqrt(alpha_bar) at level T-1 below which no answer tells a leak from none."""


@dataclass(frozen=True)
class Probe:
    """What a few calls of a network tell about it.

    Attributes:
        errors: By prediction type, the error if the network's output is read as that type: mean
            square relative to the target's, over levels.
        prediction_type: The type that explains the network; None if none does.
        trained_at_end: Whether it can have been trained at level T-1; None if that cannot be told.
        evidence: The numbers behind ``trained_at_end`` and ``zero_terminal_snr``.
        zero_terminal_snr: Whether it was trained with pure noise at level T-1, where the schedule
            has a leak there; None if that cannot be told.
    """

    errors: dict[PredictionType, float]
    prediction_type: PredictionType | None
    trained_at_end: bool | None
    evidence: dict[str, float]
    zero_terminal_snr: bool | None = None


@torch.no_grad()
def probe(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    images: Tensor,
    *,
    seed: int = 0,
) -> Probe:
    """Tells whether a network predicts epsilon, sample or v, whether it was trained at level T-1,
    and whether with pure noise there, from about ten calls on noised images.

    A network was trained at the end if it errs there no more than just below. At zero terminal SNR
    there is a sharper sign: the input is noise alone, so the brightness of what it predicts must
    not follow the noise's. Where the schedule leaks, pure noise is given at level T-1 and at two
    thirds of the levels, and how much of the answers the schedule explains is compared: the ratio
    (``leak_in_answers``) is near 1 if it was trained so, below 0.6 if with pure noise at T-1, and
    above 1.3 only after little training, which tells nothing; nor does epsilon.

    Args:
        network: (x_t, t) -> prediction, t an int64 tensor [B].
        schedule: The levels that its configuration describes.
        images: Images of its training data, [B, C, H, W] in [-1, 1], or latents of them, B at least
            8, on the network's device.
        seed: Seed of the first image's noise.

    Raises:
        DDIMError: If an argument is of another kind.

    References:
        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Sec. 5.2
        (what an ideal model says at T). https://arxiv.org/abs/2305.08891
    """
    check_function("network", network, "a network, (x_t, t) -> prediction")
    check_schedule(schedule)
    check_images(images)
    seed, total, last = check_whole("seed", seed, least=0), len(schedule), len(schedule) - 1
    noise = seeded_randn(images.shape[1:], range(seed, seed + len(images))).to(images)

    def answer(x_t: Tensor, t: int) -> Tensor:
        return network(x_t, torch.full((len(images),), t, device=images.device))

    def call(t: int) -> Tensor:
        return answer(add_noise(schedule, images, noise, t), t)

    def error(output: Tensor, t: int, kind: PredictionType) -> float:
        target = from_x0_eps(images, noise, alpha_bar_t=schedule.alpha_bar(t), prediction_type=kind)
        return float((output - target).square().mean() / target.square().mean())

    outputs = [(call(t), t) for t in (last * tenth // 10 for tenth in (1, 3, 5, 7, 9))]
    errors: dict[PredictionType, float] = {
        kind: sum(error(output, t, kind) for output, t in outputs) / len(outputs)
        for kind in get_args(PredictionType)
    }
    kind = min(errors, key=errors.__getitem__)
    if not errors[kind] < 0.7:
        return Probe(errors, None, None, {})
    near = {max(last - total // share, 0) for share in (1000, 100, 50)}
    below = max(error(call(t), t, kind) for t in near | {max(last - 1, 0)} - {last})
    said = call(last)
    evidence = {"error_at_end": error(said, last, kind), "error_below": below}
    trained = evidence["error_at_end"] <= 2 * below + 0.02
    alpha_bar = schedule.alpha_bar(last)
    is_leaky = float(alpha_bar) > 0
    if kind == "epsilon" or (is_leaky and float(alpha_bar) ** 0.5 < _FAINT_LEAK):
        # At zero SNR x0 cannot be told from eps, which is the input itself there.
        return Probe(errors, kind, trained if is_leaky else None, evidence)
    if is_leaky:
        shares = {
            t: _leak(answer(noise, t), noise, images, schedule.alpha_bar(t), kind)
            for t in (last, last * 2 // 3)
        }
        evidence["leak_in_answers"] = share = shares[last] / max(shares[last * 2 // 3], 1e-6)
        # A network of little training says at the end what is right before it, and so too much.
        was_zero = True if share < 0.6 else False if 0.8 < share < 1.3 else None
        return Probe(errors, kind, trained, evidence, was_zero)
    x0 = to_x0_eps(said, noise, alpha_bar_t=alpha_bar, prediction_type=kind).x0
    following = float(x0.mean((1, 2, 3)).std() / images.mean((1, 2, 3)).std())
    evidence["brightness_following_noise"] = following
    return Probe(errors, kind, trained and following < 0.2, evidence)


def _leak(
    said: Tensor, noise: Tensor, images: Tensor, alpha_bar: Tensor, kind: PredictionType
) -> float:
    """How much of what a network that was trained with this leak would say of the noise, were the
    images Gaussian and alike at every place, is in what this one said: 1 all of it, 0 none."""
    spectrum = torch.fft.fft2(images - images.mean(0), norm="ortho").abs().square().mean(0)
    alpha, variance = float(alpha_bar.sqrt()), float(1 - alpha_bar)
    gain = alpha * spectrum / (alpha**2 * spectrum + variance)
    x0 = torch.fft.ifft2(torch.fft.fft2(noise, norm="ortho") * gain, norm="ortho").real
    eps = (noise - alpha * x0) / variance**0.5
    wanted = from_x0_eps(x0, eps, alpha_bar_t=alpha_bar, prediction_type=kind)
    wanted, found = wanted - wanted.mean(0), said - said.mean(0)
    return float((wanted * found).sum() / wanted.square().sum())
