r"""What each fix of "Common Diffusion Noise Schedules and Sample Steps are Flawed" does to a text
model's images, in numbers.

Three models that differ in their training alone (what they predict, and whether the terminal SNR is
zero) are sampled with and without the two fixes that need no training: trailing timesteps, and the
rescale of guidance. A measurement is a list of flat records.

References:
    Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023.
    https://arxiv.org/abs/2305.08891
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import Spacing
from ddim.doctor.symptoms import Brightness, leaked_brightness
from ddim.evaluation.fashion_text import Judged, saturated, summarise
from ddim.evaluation.report import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TRAININGS",
    "Setting",
    "Training",
    "background_records",
    "plot_flaws",
    "saturation_record",
    "settings",
    "to_markdown",
    "twins",
    "unconditional_records",
]


class Training(NamedTuple):
    """What distinguishes the training of a model from that of its twins."""

    prediction_type: str
    zero_snr: bool
    told: str


TRAININGS: Mapping[str, Training] = {
    "epsilon": Training("epsilon", False, "epsilon, leaky"),
    "v": Training("v_prediction", False, "v, leaky"),
    "zero-snr": Training("v_prediction", True, "v, zero SNR"),
}


@dataclass(frozen=True)
class Setting:
    """A model and how it is sampled."""

    model: str
    spacing: Spacing
    guidance_rescale: float

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.model}-{self.spacing}-{self.guidance_rescale:g}"

    @property
    def told(self) -> str:
        """For people."""
        rescale = f"rescale {self.guidance_rescale:g}" if self.guidance_rescale else "no rescale"
        return f"{TRAININGS[self.model].told}, {self.spacing}, {rescale}"

    @property
    def record(self) -> dict[str, Any]:
        """The part of a record that says where it was measured."""
        return {
            "model": self.model,
            "spacing": self.spacing,
            "guidance_rescale": self.guidance_rescale,
        }


def settings(guidance_rescale: float) -> list[Setting]:
    """All twelve: each training with each of the two fixes that need none. One fix at a time, and
    every other way through them."""
    spacings: tuple[Spacing, ...] = ("leading", "trailing")
    return [Setting(m, s, r) for m in TRAININGS for s in spacings for r in (0.0, guidance_rescale)]


def twins(guidance_rescale: float) -> list[Setting]:
    """The model without any fix and the one with those of training and spacing, each with and
    without the rescale."""
    return [
        s
        for s in settings(guidance_rescale)
        if (s.model, s.spacing) in (("epsilon", "leading"), ("zero-snr", "trailing"))
    ]


def background_records(
    setting: Setting, judged: Mapping[str, Judged], requested: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One record a background: the brightness asked for and made, and how often the garment is
    right.

    Args:
        setting: Where the images come from.
        judged: What they show, by background.
        requested: The brightness of each background.
    """
    records = []
    for background, images in judged.items():
        made = summarise(images.brightness)
        records.append(
            {
                "measured": "background",
                **setting.record,
                "background": background,
                "requested": requested[background],
                "brightness": made.mean,
                "spread": made.spread,
                "hue_right": images.hue_right.double().mean().item(),
                "class_right": images.class_right.double().mean().item(),
                "both_right": (images.hue_right & images.class_right).double().mean().item(),
                "count": made.values,
            }
        )
    return records


def saturation_record(
    setting: Setting, images: Tensor, *, guidance_scale: float, real: float
) -> dict[str, Any]:
    """How many values of images [B, 3, H, W] in [0, 1] are 0 or 1, beside those of real images of
    the same captions."""
    made = summarise(saturated(images))
    contrast = summarise(images.flatten(1).std(1, correction=0))
    return {
        "measured": "saturation",
        **setting.record,
        "guidance_scale": guidance_scale,
        "saturated": made.mean,
        "spread": made.spread,
        "real": real,
        "contrast": contrast.mean,
        "count": made.values,
    }


def unconditional_records(
    setting: Setting,
    *,
    latents: Tensor,
    images: Tensor,
    real_latents: Tensor,
    real_images: Tensor,
    schedule: NoiseSchedule,
    first: int,
) -> list[dict[str, Any]]:
    """The brightness of samples without a caption beside the data's, and beside what leaks through
    the first level in theory.

    The theory takes the mean of a channel over its n x n values for a Gaussian of the data's mean m
    and spread b, the best network, and steps without end: N(0, 1) noise at a level where the signal
    is not gone costs a bias and a part of the spread
    (:func:`ddim.doctor.symptoms.leaked_brightness`). It is given for each channel of the latents;
    of decoded images there is none.

    Args:
        setting: Where the samples come from.
        latents: Of the samples, [N, C, n, n].
        images: The samples, [N, 3, H, W] in [0, 1].
        real_latents: Of images of the data set, [M, C, n, n].
        real_images: Of the data set, [M, 3, H, W] in [0, 1].
        schedule: The levels.
        first: The level at which sampling starts.
    """

    def record(what: str, made: Tensor, real: Tensor) -> dict[str, Any]:
        ours, data = summarise(made), summarise(real)
        return {
            "measured": "unconditional",
            **setting.record,
            "of": what,
            "mean": ours.mean,
            "std": ours.spread,
            "data_mean": data.mean,
            "data_std": data.spread,
            "bias": ours.mean - data.mean,
            "factor": ours.spread / data.spread,
            "bias_in_theory": None,
            "factor_in_theory": None,
            "count": ours.values,
        }

    records = []
    dimensions = latents[0, 0].numel()
    for channel, (made, real) in enumerate(
        zip(latents.mean((2, 3)).T, real_latents.mean((2, 3)).T, strict=True)
    ):
        told = record(f"latent channel {channel}", made, real)
        bias, factor = leaked_brightness(
            schedule, first, Brightness(told["data_mean"], told["data_std"], dimensions)
        )
        records.append(told | {"bias_in_theory": bias, "factor_in_theory": factor})
    return [*records, record("decoded images", images.mean((1, 2, 3)), real_images.mean((1, 2, 3)))]


def to_markdown(records: Sequence[Mapping[str, Any]], *, protocol: str) -> str:
    """All records as tables, with what was done above them."""
    parts = ["# What the fixes do, measured\n", f"{protocol}\n"]
    found = [r for r in records if r["measured"] == "background"]
    if found:
        names = list(dict.fromkeys(r["background"] for r in found))
        requested = {r["background"]: r["requested"] for r in found}
        rows = [["setting", *(f"{n} ({requested[n]:.3f})" for n in names), "hue", "class", "both"]]
        for setting, group in _by_setting(found):
            of = {r["background"]: r for r in group}
            cells = [
                f"{of[n]['brightness']:.3f} ± {of[n]['spread']:.3f}" if n in of else ""
                for n in names
            ]
            shares = [
                f"{100 * sum(r[key] for r in group) / len(group):.0f} %"
                for key in ("hue_right", "class_right", "both_right")
            ]
            rows.append([setting.told, *cells, *shares])
        parts += [
            "## Background asked for and made\n",
            "Mean ± spread between images of the frame's brightness, pixels in [0, 1].\n",
            text_table(rows),
        ]
    found = [r for r in records if r["measured"] == "saturation"]
    if found:
        scales = sorted({r["guidance_scale"] for r in found})
        rows = [["setting", *(f"w = {w:g}" for w in scales)]]
        for setting, group in _by_setting(found):
            at = {r["guidance_scale"]: r for r in group}
            rows.append(
                [
                    setting.told,
                    *(f"{100 * at[w]['saturated']:.2f} %" if w in at else "" for w in scales),
                ]
            )
        real = f"Real images of the same captions have {100 * found[0]['real']:.2f} %.\n"
        parts += [
            "## Saturated values\n",
            f"The share of values that are 0 or 1. {real}",
            text_table(rows),
        ]
    found = [r for r in records if r["measured"] == "unconditional"]
    if found:
        rows = [
            [
                "setting",
                "of",
                "data",
                "made",
                "bias",
                "in theory",
                "spread made / data",
                "in theory",
            ]
        ]
        for setting, group in _by_setting(found):
            for r in group:
                theory = [
                    "" if r[k] is None else f"{r[k]:{form}}"
                    for k, form in (("bias_in_theory", "+.3f"), ("factor_in_theory", ".3f"))
                ]
                data, made = (
                    f"{r[m]:.3f} ± {r[s]:.3f}"
                    for m, s in (("data_mean", "data_std"), ("mean", "std"))
                )
                name = f"{TRAININGS[setting.model].told}, {setting.spacing}"
                rows.append(
                    [
                        name,
                        r["of"],
                        data,
                        made,
                        f"{r['bias']:+.3f}",
                        theory[0],
                        f"{r['factor']:.3f}",
                        theory[1],
                    ]
                )
        said = (
            "The mean of a channel over an image, in units of the latents (of decoded images: "
            "pixels in [0, 1]). The theory holds for the "
            "best network if that mean is Gaussian, and tells what starting from N(0, 1) costs at "
            "the first level; network and steps err "
            "besides.\n"
        )
        parts += ["## Brightness without a caption\n", said, text_table(rows)]
    return "\n".join(parts)


def plot_flaws(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """Brightness made against asked for, saturation against guidance, and the spread of brightness
    without a caption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    shown = [r for r in records if r["measured"] == "background"]
    for setting, group in _by_setting(shown):
        line = sorted(group, key=lambda r: r["requested"])
        spread = [r["spread"] for r in line]
        error = [r["brightness"] - r["requested"] for r in line]
        style = {
            "linestyle": "-" if setting.guidance_rescale else ":",
            "marker": "o" if setting.spacing == "trailing" else "s",
        }
        left.errorbar(
            [r["requested"] for r in line],
            error,
            yerr=spread,
            color=_COLOURS[setting.model],
            capsize=2,
            markersize=4,
            **style,
        )
        left.plot([], [], color=_COLOURS[setting.model], label=setting.told, markersize=4, **style)
    left.axhline(0, color="grey", linewidth=1)
    left.set(xlabel="brightness asked for", ylabel="brightness made, less that asked for")
    for setting, group in _by_setting([r for r in records if r["measured"] == "saturation"]):
        line = sorted(group, key=lambda r: r["guidance_scale"])
        scales, values = [r["guidance_scale"] for r in line], [100 * r["saturated"] for r in line]
        middle.plot(
            scales,
            values,
            marker="o",
            color=_COLOURS[setting.model],
            linestyle="-" if setting.guidance_rescale else ":",
            label=setting.told,
        )
    middle.set(xlabel="guidance", ylabel="values that are 0 or 1, %")
    names: list[str] = []
    for setting, group in _by_setting([r for r in records if r["measured"] == "unconditional"]):
        names.append(f"{TRAININGS[setting.model].told}\n{setting.spacing}")
        for r in group:
            pixels = r["factor_in_theory"] is None
            right.plot(
                len(names) - 1,
                r["factor"],
                marker="D" if pixels else "o",
                color=_COLOURS[setting.model],
            )
            if not pixels:
                right.plot(len(names) - 1, r["factor_in_theory"], marker="x", color="black")
    right.axhline(1, color="grey", linewidth=1)
    right.set_xticks(range(len(names)), names, fontsize="small", rotation=30)
    right.set(ylabel="spread of brightness, of the data's")
    for marker, name in (
        ("o", "latent channels"),
        ("x", "the same in theory"),
        ("D", "decoded images"),
    ):
        right.plot([], [], marker=marker, linestyle="", color="black", label=name)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                fontsize="x-small",
                loc="upper center",
                bbox_to_anchor=(0.5, -0.12 if axes is not right else -0.25),
                ncol=2,
            )
    return figure


_COLOURS = {"epsilon": "tab:red", "v": "tab:orange", "zero-snr": "tab:blue"}


def _by_setting(
    records: Iterable[Mapping[str, Any]],
) -> list[tuple[Setting, list[Mapping[str, Any]]]]:
    """The records of each setting, in the order of the settings."""
    groups: dict[Setting, list[Mapping[str, Any]]] = {}
    for r in records:
        groups.setdefault(Setting(r["model"], r["spacing"], r["guidance_rescale"]), []).append(r)
    order = list(TRAININGS)
    return sorted(
        groups.items(),
        key=lambda pair: (order.index(pair[0].model), pair[0].spacing, pair[0].guidance_rescale),
    )
