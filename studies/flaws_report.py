r"""What each fix of "Common Diffusion Noise Schedules and Sample Steps are Flawed" does to a text
model's images, in numbers: the settings, their records, the tables and the plot.

Three models that differ in their training alone (in what they predict, and in whether the terminal
SNR is zero) are sampled with and without the two fixes that need no training: trailing timesteps,
and the rescale of guidance. A measurement is a list of flat records.

References:
    Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023.
    https://arxiv.org/abs/2305.08891
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import Spacing
from ddim.doctor.symptoms import Brightness, leaked_brightness
from ddim.evaluation.report import text_table
from ddim.files import replacing
from fashion_judge import Judged, saturated, summarise

__all__ = [
    "TRAININGS",
    "Setting",
    "Training",
    "background_records",
    "draw_sheet",
    "plot_flaws",
    "saturation_record",
    "save_figure",
    "settings",
    "to_markdown",
    "twins",
    "unconditional_records",
]

Record = Mapping[str, Any]


class Training(NamedTuple):
    """What distinguishes the training of a model from that of the other two."""

    prediction_type: str
    zero_snr: bool
    label: str


TRAININGS: Mapping[str, Training] = {
    "epsilon": Training("epsilon", False, "epsilon, leaky"),
    "v": Training("v_prediction", False, "v, leaky"),
    "zero-snr": Training("v_prediction", True, "v, zero SNR"),
}
_COLOURS = {"epsilon": "tab:red", "v": "tab:orange", "zero-snr": "tab:blue"}


_BESIDE = 0.014
"""How far the points of two settings are apart that were asked for the same brightness."""


@dataclass(frozen=True)
class Setting:
    """A model and how it is sampled."""

    model: str
    spacing: Spacing
    guidance_rescale: float

    @property
    def name(self) -> str:
        """The name of this setting's files."""
        return f"{self.model}-{self.spacing}-{self.guidance_rescale:g}"

    @property
    def label(self) -> str:
        """The name of this setting in tables and plots."""
        rescale = f"rescale {self.guidance_rescale:g}" if self.guidance_rescale else "no rescale"
        return f"{TRAININGS[self.model].label}, {self.spacing}, {rescale}"


def settings(guidance_rescale: float) -> list[Setting]:
    """All twelve settings: each training with each choice of the two fixes that need none."""
    spacings: tuple[Spacing, ...] = ("leading", "trailing")
    return [Setting(m, s, r) for m in TRAININGS for s in spacings for r in (0.0, guidance_rescale)]


def twins(guidance_rescale: float) -> list[Setting]:
    """The model without any fix, and the one with the fixes of training and spacing, each with and
    without the rescale."""
    ends = (("epsilon", "leading"), ("zero-snr", "trailing"))
    return [s for s in settings(guidance_rescale) if (s.model, s.spacing) in ends]


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
        made, right = summarise(images.brightness), images.hue_right & images.class_right
        records.append(
            {
                "measured": "background",
                **vars(setting),
                "background": background,
                "requested": requested[background],
                "brightness": made.mean,
                "spread": made.spread,
                "hue_right": images.hue_right.double().mean().item(),
                "class_right": images.class_right.double().mean().item(),
                "both_right": right.double().mean().item(),
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
    return {
        "measured": "saturation",
        **vars(setting),
        "guidance_scale": guidance_scale,
        "saturated": made.mean,
        "spread": made.spread,
        "real": real,
        "contrast": summarise(images.flatten(1).std(1, correction=0)).mean,
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
    """The brightness of samples without a caption, beside the data's and beside what theory expects
    to leak through the first level.

    The theory takes the mean of a channel over its n x n values to be Gaussian, with the data's
    mean m and spread b, the network to be the best one, and the steps to be infinitely many: N(0,
    1) noise at a level that still holds signal then costs a bias and a part of the spread
    (:func:`ddim.doctor.symptoms.leaked_brightness`). It holds for each channel of the latents;
    there is none for decoded images.

    Args:
        setting: Where the samples come from.
        latents: Latents of the samples, [N, C, n, n].
        images: The samples, [N, 3, H, W] in [0, 1].
        real_latents: Latents of images of the data set, [M, C, n, n].
        real_images: Images of the data set, [M, 3, H, W] in [0, 1].
        schedule: The levels.
        first: The level at which sampling starts.
    """

    def record(what: str, made: Tensor, real: Tensor) -> dict[str, Any]:
        ours, data = summarise(made), summarise(real)
        return {
            "measured": "unconditional",
            **vars(setting),
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
    channels = zip(latents.mean((2, 3)).T, real_latents.mean((2, 3)).T, strict=True)
    for channel, (made, real) in enumerate(channels):
        measured = record(f"latent channel {channel}", made, real)
        data = Brightness(measured["data_mean"], measured["data_std"], dimensions)
        bias, factor = leaked_brightness(schedule, first, data)
        records.append(measured | {"bias_in_theory": bias, "factor_in_theory": factor})
    return [*records, record("decoded images", images.mean((1, 2, 3)), real_images.mean((1, 2, 3)))]


def to_markdown(records: Sequence[Record], *, protocol: str) -> str:
    """All records as tables, with what was done above them."""
    parts = ["# What the fixes do, measured\n", f"{protocol}\n"]
    tables = {
        "background": _background_table,
        "saturation": _saturation_table,
        "unconditional": _unconditional_table,
    }
    for measured, table in tables.items():
        if found := [r for r in records if r["measured"] == measured]:
            parts += table(found)
    return "\n".join(parts)


def _background_table(records: Sequence[Record]) -> list[str]:
    requested = {r["background"]: r["requested"] for r in records}
    head = [f"{name} ({level:.3f})" for name, level in requested.items()]
    rows = [["setting", *head, "hue", "class", "both"]]
    for setting, group in _by_setting(records):
        at = {r["background"]: f"{r['brightness']:.3f} ± {r['spread']:.3f}" for r in group}
        shares = [
            f"{100 * sum(r[key] for r in group) / len(group):.0f} %"
            for key in ("hue_right", "class_right", "both_right")
        ]
        rows.append([setting.label, *(at.get(name, "") for name in requested), *shares])
    return [
        "## Background asked for and made\n",
        "Mean ± spread between images of the frame's brightness, pixels in [0, 1].\n",
        text_table(rows),
    ]


def _saturation_table(records: Sequence[Record]) -> list[str]:
    scales = sorted({r["guidance_scale"] for r in records})
    rows = [["setting", *(f"w = {w:g}" for w in scales)]]
    for setting, group in _by_setting(records):
        at = {r["guidance_scale"]: f"{100 * r['saturated']:.2f} %" for r in group}
        rows.append([setting.label, *(at.get(w, "") for w in scales)])
    real = f"Real images of the same captions have {100 * records[0]['real']:.2f} %.\n"
    return [
        "## Saturated values\n",
        f"The share of values that are 0 or 1. {real}",
        text_table(rows),
    ]


def _unconditional_table(records: Sequence[Record]) -> list[str]:
    rows = [
        ["setting", "of", "data", "made", "bias", "in theory", "spread made / data", "in theory"]
    ]
    for setting, group in _by_setting(records):
        name = f"{TRAININGS[setting.model].label}, {setting.spacing}"
        for r in group:
            bias, factor = r["bias_in_theory"], r["factor_in_theory"]
            rows.append(
                [
                    name,
                    r["of"],
                    f"{r['data_mean']:.3f} ± {r['data_std']:.3f}",
                    f"{r['mean']:.3f} ± {r['std']:.3f}",
                    f"{r['bias']:+.3f}",
                    "" if bias is None else f"{bias:+.3f}",
                    f"{r['factor']:.3f}",
                    "" if factor is None else f"{factor:.3f}",
                ]
            )
    note = (
        "The mean of a channel over an image, in units of the latents (of decoded images: pixels "
        "in [0, 1]). The theory holds for the best network if that mean is Gaussian, and tells "
        "what starting from N(0, 1) costs at the first level; network and steps err besides.\n"
    )
    return ["## Brightness without a caption\n", note, text_table(rows)]


def plot_flaws(records: Sequence[Record]) -> Figure:
    """Brightness made against asked for, saturation against guidance, and the
    spread of brightness without a caption."""
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_backgrounds(left, [r for r in records if r["measured"] == "background"])
    _plot_saturation(middle, [r for r in records if r["measured"] == "saturation"])
    _plot_unconditional(right, [r for r in records if r["measured"] == "unconditional"])
    for axes, below in ((left, -0.12), (middle, -0.12), (right, -0.25)):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, below), ncol=2)
    return figure


def _plot_backgrounds(axes: Any, records: Sequence[Record]) -> None:
    drawn = _by_setting(records)
    requested = sorted({r["requested"] for r in records})
    for number, (setting, group) in enumerate(drawn):
        beside = _BESIDE * (number - (len(drawn) - 1) / 2)  # so that no error bar hides another
        colour = _COLOURS[setting.model]
        axes.errorbar(
            [r["requested"] + beside for r in group],
            [r["brightness"] - r["requested"] for r in group],
            yerr=[r["spread"] for r in group],
            color=colour,
            linestyle="",
            elinewidth=1,
            marker="o" if setting.spacing == "trailing" else "s",
            markersize=4,
            markerfacecolor=colour if setting.guidance_rescale else "white",
            label=setting.label,
        )
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(requested, [f"{value:.2f}" for value in requested])
    axes.set(xlabel="brightness asked for", ylabel="brightness made, less that asked for")


def _plot_saturation(axes: Any, records: Sequence[Record]) -> None:
    for setting, group in _by_setting(records):
        line = sorted(group, key=lambda r: r["guidance_scale"])
        axes.plot(
            [r["guidance_scale"] for r in line],
            [100 * r["saturated"] for r in line],
            marker="o",
            color=_COLOURS[setting.model],
            linestyle="-" if setting.guidance_rescale else ":",
            label=setting.label,
        )
    axes.set(xlabel="guidance", ylabel="values that are 0 or 1, %")


def _plot_unconditional(axes: Any, records: Sequence[Record]) -> None:
    names: list[str] = []
    for setting, group in _by_setting(records):
        place, colour = len(names), _COLOURS[setting.model]
        names.append(f"{TRAININGS[setting.model].label}\n{setting.spacing}")
        for r in group:
            has_theory = r["factor_in_theory"] is not None
            axes.plot(place, r["factor"], marker="o" if has_theory else "D", color=colour)
            if has_theory:
                axes.plot(place, r["factor_in_theory"], marker="x", color="black")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xticks(range(len(names)), names, fontsize="small", rotation=30)
    axes.set(ylabel="spread of brightness, of the data's")
    legend = {"o": "latent channels", "x": "the same in theory", "D": "decoded images"}
    for marker, name in legend.items():
        axes.plot([], [], marker=marker, linestyle="", color="black", label=name)


def draw_sheet(rows: Sequence[Setting], strips: Sequence[NDArray[np.uint8]]) -> Figure:
    """The first images of each background, a row a setting, under the setting's name."""
    height, width = strips[0].shape[:2]
    figure = Figure(figsize=(width / 48, len(strips) * (height / 48 + 0.3)), layout="constrained")
    for axes, setting, strip in zip(figure.subplots(len(rows), 1), rows, strips, strict=True):
        axes.imshow(strip, interpolation="nearest")
        axes.set_title(setting.label, loc="left", fontsize="small", pad=2)
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def _by_setting(records: Iterable[Record]) -> list[tuple[Setting, list[Record]]]:
    """The records of each setting, in the order of the settings."""
    groups: dict[Setting, list[Record]] = {}
    for r in records:
        groups.setdefault(Setting(r["model"], r["spacing"], r["guidance_rescale"]), []).append(r)
    order = list(TRAININGS)
    return sorted(
        groups.items(),
        key=lambda pair: (order.index(pair[0].model), pair[0].spacing, pair[0].guidance_rescale),
    )
