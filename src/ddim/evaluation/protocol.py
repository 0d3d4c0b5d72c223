"""The protocol of a measurement: the metrics, the numbers of images, the reference, the floor and
the spread.

A metric is named METRIC-EXTRACTOR, such as ``fd-fashion``. Images pass through the extractors batch
by batch, and only what the metrics need is kept (:class:`Sketch`): sums for a Frechet distance,
features or projections for the others.

The reference's M images are shuffled. For the floor, real against real, the first of them stand in
for the samples: as many as there are samples, but at most M // 2, so that both sides are disjoint.
The spread is that of the samples' disjoint thirds, each measured by itself; divided by the root of
3, it estimates the spread of the metric of all samples over seeds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddim.core.checks import check_kind, check_samples, check_whole, wrong_argument
from ddim.errors import DataError, DDIMError
from ddim.evaluation.features import EXTRACTORS, Extractor, load_extractor
from ddim.evaluation.metrics import (
    NEIGHBOURS,
    Statistics,
    class_histogram,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision,
    project,
    recall,
    sliced_wasserstein,
    total_variation,
)

__all__ = [
    "METRICS",
    "Collected",
    "Metric",
    "Panel",
    "Reference",
    "Result",
    "Sketch",
    "collect",
    "collect_reference",
    "default_metrics",
    "load_panel",
    "measure",
    "over_repeats",
    "sample_cuts",
]


@dataclass(frozen=True, eq=False)
class Sketch:
    """What an extractor leaves of some images; two sets add up to their union."""

    count: int = 0
    statistics: Statistics | None = None
    features: tuple[Tensor, ...] = ()
    projections: tuple[Tensor, ...] = ()

    def __add__(self, other: "Sketch") -> "Sketch":
        one, two = self.statistics, other.statistics
        return Sketch(
            self.count + other.count,
            one + two if one is not None and two is not None else one or two,
            self.features + other.features,
            self.projections + other.projections,
        )


class Metric(NamedTuple):
    """A number that compares two sets of images: what it needs of them, and how it is computed."""

    needs: str
    compute: Callable[[Sketch, Sketch, Extractor], float]
    minimum: Callable[[Extractor], int]
    whole: bool = False
    """Whether it compares with the whole reference; else with as many of its images as there are
    samples."""
    higher_is_better: bool = False


def _frechet(a: Sketch, b: Sketch, extractor: Extractor) -> float:
    assert a.statistics is not None
    assert b.statistics is not None
    return frechet_distance(a.statistics, b.statistics)


def _of_features(
    compute: Callable[[Tensor, Tensor], float],
) -> Callable[[Sketch, Sketch, Extractor], float]:
    return lambda a, b, extractor: compute(torch.cat(a.features), torch.cat(b.features))


def _classes(a: Sketch, b: Sketch, extractor: Extractor) -> float:
    return total_variation(histogram(a, extractor), histogram(b, extractor))


def histogram(sketch: Sketch, extractor: Extractor) -> list[int]:
    """How many of the images the extractor assigns to each of its classes."""
    assert extractor.classify is not None
    classes = extractor.classify(torch.cat(sketch.features))
    return class_histogram(classes, count=len(extractor.classes))


def _projected(a: Sketch, b: Sketch, extractor: Extractor) -> float:
    return sliced_wasserstein(torch.cat(a.projections), torch.cat(b.projections))


def _mean_nearest(samples: Tensor, reference: Tensor) -> float:
    return float(nearest_distances(samples, reference).mean())


_MANIFOLD = Metric(
    "features", _of_features(precision), lambda e: NEIGHBOURS + 1, higher_is_better=True
)
METRICS: dict[str, Metric] = {
    # With fewer images than D the covariance has no full rank.
    "fd": Metric("statistics", _frechet, lambda e: max(2, e.dimensions), whole=True),
    "kid": Metric("features", _of_features(kernel_distance), lambda e: 2),
    "precision": _MANIFOLD,
    "recall": _MANIFOLD._replace(compute=_of_features(recall)),
    "nearest": Metric("features", _of_features(_mean_nearest), lambda e: 1, whole=True),
    "classes": Metric("features", _classes, lambda e: 1, whole=True),
    "swd": Metric("projections", _projected, lambda e: 1),
}
"""Frechet distance, KID, precision and recall, mean distance to the nearest reference image, wrong
classes, sliced Wasserstein."""


@dataclass(frozen=True)
class Result:
    """The value of a metric, and what is needed to interpret it."""

    metric: str
    extractor: str
    value: float
    floor: float
    """The same number of real images against real ones."""
    std: float | None
    """Spread of the value over seeds; None if a third of the samples would be too few."""
    count: int
    floor_count: int
    """Real images that stood in for the samples; fewer than ``count`` if the reference is small,
    and then the floor is too high."""


@dataclass(frozen=True, eq=False)
class Panel:
    """The metrics of a run, by full name, and their extractors."""

    metrics: tuple[str, ...]
    extractors: Mapping[str, Extractor]

    def parts(self, name: str) -> tuple[Metric, Extractor]:
        """The metric and the extractor that a full name stands for."""
        metric, _, extractor = name.partition("-")
        return METRICS[metric], self.extractors[extractor]

    def fitting(self, count: int, available: int) -> "Panel | None":
        """The metrics that this many samples and reference images are enough for; None if none."""
        possible, extractors = [], {}
        for name in self.metrics:
            metric, extractor = self.parts(name)
            if metric.minimum(extractor) <= min(count, available // 2):
                possible.append(name)
                extractors[extractor.name] = extractor
        return Panel(tuple(possible), extractors) if possible else None

    def check_counts(self, counts: Iterable[int], available: int) -> None:
        """Checks that counts are large enough for each metric, and no larger than the reference.

        Raises:
            DDIMError: If one is not; the message says which number is enough.
        """
        smallest, largest = min(counts := list(counts)), max(counts)
        for name in self.metrics:
            metric, extractor = self.parts(name)
            needed = metric.minimum(extractor)
            if smallest < needed:
                raise DDIMError(f"{name} needs at least {needed} images; got {smallest}.")
            if available < 2 * needed:
                wanted = f"a reference of at least {2 * needed} images, for its floor too"
                raise DataError(f"{name} needs {wanted}; got {available}.")
        if available < largest:
            need = f"{largest} samples need a reference of as many images"
            raise DataError(f"{need}, and it holds {available}; use at most {available}.")


def default_metrics(image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The default metrics for images of shape (C, H, W)."""
    names: tuple[str, ...] = ("kid", "precision", "recall", "nearest")
    extractor = "pixels" if image_shape[0] == 1 else "efficientnet-lite0"
    if image_shape == (1, 28, 28):
        names, extractor = ("fd", *names, "classes"), "fashion"
    return (*(f"{name}-{extractor}" for name in names), "swd-pixels")


def load_panel(
    names: Sequence[str],
    *,
    image_shape: tuple[int, int, int],
    weights: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
) -> Panel:
    """Opens the extractors of metrics.

    Args:
        names: METRIC-EXTRACTOR each, from :data:`METRICS` and
            :data:`~ddim.evaluation.features.EXTRACTORS`.
        image_shape: (C, H, W).
        weights: Paths of the weights, by extractor.
        device: Where the extractors compute.

    Raises:
        DDIMError: If a name is unknown or names repeat; also what
            :func:`~ddim.evaluation.features.load_extractor` raises.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise wrong_argument("names", "be a list of metrics, such as ['fd-fashion']", names)
    is_shape = isinstance(image_shape, (list, tuple)) and len(image_shape) == 3
    if not is_shape or not all(type(n) is int and 0 < n < 2**16 for n in image_shape):
        raise wrong_argument("image_shape", "be (C, H, W)", image_shape)
    if weights is not None:
        check_kind("weights", weights, Mapping, "paths by extractor (a dict)")
    pairs = [name.partition("-") for name in names]
    if not names or len(set(names)) < len(names):
        raise DDIMError(f"metrics must be named, each once; got {', '.join(names) or 'none'}.")
    for name, (metric, _, extractor) in zip(names, pairs, strict=True):
        if metric not in METRICS or extractor not in EXTRACTORS:
            raise DDIMError(
                f"{name!r} is no metric; a metric is one of {', '.join(METRICS)}, a hyphen, and "
                f"one of {', '.join(EXTRACTORS)}, such as fd-fashion."
            )
    given = dict(weights or {})
    if unused := set(given) - {extractor for *_, extractor in pairs}:
        raise DDIMError(
            f"weights are given for {', '.join(sorted(unused))}, and no metric uses them; add one "
            f"such as fd-{min(unused)}."
        )
    opened = {
        e: load_extractor(e, image_shape=image_shape, weights=given.get(e), device=device)
        for e in dict.fromkeys(p[2] for p in pairs)
    }
    for name, (metric, _, extractor) in zip(names, pairs, strict=True):
        if metric == "classes" and opened[extractor].classify is None:
            raise DDIMError(
                f"{name} needs an extractor that classifies images, and {extractor} does not; use "
                "classes-fashion."
            )
    return Panel(tuple(names), opened)


class Collected:
    """Sketches of a stream of images, which is cut where sets begin or end."""

    def __init__(self) -> None:
        self.count = 0
        self._pieces: dict[str, dict[int, Sketch]] = {}

    def add(self, extractor: str, start: int, sketch: Sketch) -> None:
        """Adds images to the piece that starts at ``start``."""
        pieces = self._pieces.setdefault(extractor, {})
        pieces[start] = pieces[start] + sketch if start in pieces else sketch

    def pieces(self) -> Iterator[tuple[str, int, Sketch]]:
        """Each extractor's pieces: where they start, and their sketches."""
        for extractor, pieces in self._pieces.items():
            for start in sorted(pieces):
                yield extractor, start, pieces[start]

    def between(self, extractor: str, first: int, last: int) -> Sketch:
        """The sketch of images ``first`` to ``last`` - 1; both must be cuts."""
        chosen = sum(
            (s for start, s in self._pieces[extractor].items() if first <= start < last), Sketch()
        )
        if chosen.count != last - first:
            raise DDIMError(
                f"the images were not collected with cuts at {first} and {last}; give collect the "
                "cuts of sample_cuts(counts), and collect_reference these counts."
            )
        return chosen


def collect(images: Iterable[Tensor], panel: Panel, *, cuts: Iterable[int]) -> Collected:
    """Passes a stream of batches [B, C, H, W] in [-1, 1] through the extractors, and returns
    sketches between the cuts, the indices at which a set begins or ends. They do not depend on how
    the stream is divided into batches."""
    check_kind("panel", panel, Panel, _PANEL)
    edges = sorted({0, *_whole_numbers("cuts", cuts)})
    needs = {
        e: {metric.needs for metric, x in map(panel.parts, panel.metrics) if x.name == e}
        for e in panel.extractors
    }
    result = Collected()
    for batch in _batches(images):
        first, last = result.count, result.count + len(batch)
        start = max(e for e in edges if e <= first)
        bounds = [first, *(e for e in edges if first < e < last), last]
        for name, extractor in panel.extractors.items():
            features = extractor.embed(batch)
            for a, b in pairwise(bounds):
                part = features[a - first : b - first]
                sketch = Sketch(
                    len(part),
                    Statistics.of(part) if "statistics" in needs[name] else None,
                    (part,) if "features" in needs[name] else (),
                    (project(part),) if "projections" in needs[name] else (),
                )
                result.add(name, start if a == first else a, sketch)
        result.count = last
    return result


def sample_cuts(counts: Iterable[int]) -> set[int]:
    """The cuts of a stream of samples that is measured on its first ``counts`` images."""
    counts = _whole_numbers("counts", counts)
    return {i * (count // 3) for count in counts for i in (1, 2, 3)} | set(counts)


_PANEL = "a Panel, which load_panel gives"


def _whole_numbers(name: str, given: Any) -> list[int]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise wrong_argument(name, "be a list of whole numbers", given)
    return [check_whole(name, number, least=0, most=2**40) for number in given]


def _batches(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of images, each checked."""
    if isinstance(images, (str, Tensor)) or not isinstance(images, Iterable):
        raise wrong_argument("images", "be batches [B, C, H, W], such as images.split(64)", images)
    for batch in images:
        check_samples(images=batch)
        if batch.ndim != 4:
            raise wrong_argument("images", "be batches [B, C, H, W]", batch)
        yield batch


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images, and the floor of each metric at each number of images."""

    collected: Collected
    floors: Mapping[tuple[str, int], tuple[float, int]]

    def against(self, metric: Metric, extractor: str, count: int) -> Sketch:
        """The images that ``count`` samples are compared with: all, or the last ``count``."""
        return _last(self.collected, metric, extractor, count, before=0)


def _last(
    collected: Collected, metric: Metric, extractor: str, count: int, *, before: int
) -> Sketch:
    first = before if metric.whole else collected.count - count
    return collected.between(extractor, first, collected.count)


def collect_reference(
    images: Iterable[Tensor], panel: Panel, *, available: int, counts: Iterable[int]
) -> Reference:
    """Passes the reference through the extractors, and measures real against real.

    Args:
        images: Batches [B, C, H, W] in [-1, 1], in random order.
        panel: What is to be measured.
        available: M, the number of images.
        counts: The numbers of samples that are to be measured.

    Raises:
        DDIMError: As :meth:`Panel.check_counts`.
    """
    check_kind("panel", panel, Panel, _PANEL)
    available = check_whole("available", available, least=1, most=2**40)
    if not (counts := _whole_numbers("counts", counts)):
        raise DDIMError("counts must name at least one number of samples; got none.")
    panel.check_counts(counts, available)
    halves = {count: min(count, available // 2) for count in counts}
    cuts = {available, *halves.values()}
    cuts |= {available - n for count, half in halves.items() for n in (count, count // 3, half)}
    collected = collect(images, panel, cuts=cuts)
    if collected.count != available:
        raise DDIMError(f"images hold {collected.count} images, and available says {available}.")
    floors = {}
    for name in panel.metrics:
        metric, extractor = panel.parts(name)
        for count, half in halves.items():
            held = collected.between(extractor.name, 0, half)
            others = _last(collected, metric, extractor.name, half, before=half)
            floors[name, count] = metric.compute(held, others, extractor), half
    return Reference(collected, floors)


def measure(samples: Collected, reference: Reference, panel: Panel, *, count: int) -> list[Result]:
    """The panel's numbers for the first ``count`` samples, which were collected with the cuts of
    :func:`sample_cuts`; the reference was collected for the same panel and count."""
    check_kind("samples", samples, Collected, "what collect gives")
    check_kind("reference", reference, Reference, "what collect_reference gives")
    check_kind("panel", panel, Panel, _PANEL)
    count = check_whole("count", count, least=1)
    if missing := [n for n in panel.metrics if (n, count) not in reference.floors]:
        raise DDIMError(
            f"the reference was not collected for {missing[0]} of count={count} images; give "
            "collect_reference the same panel and counts."
        )
    results, third = [], count // 3
    for name in panel.metrics:
        metric, extractor = panel.parts(name)
        value = partial(_value, samples, reference, metric, extractor)
        spread = None
        if third >= metric.minimum(extractor):
            spread = stdev(value(i * third, (i + 1) * third) for i in range(3)) / math.sqrt(3)
        floor, floor_count = reference.floors[name, count]
        whole = value(0, count)
        results.append(Result(name, extractor.name, whole, floor, spread, count, floor_count))
    return results


def _value(
    samples: Collected,
    reference: Reference,
    metric: Metric,
    extractor: Extractor,
    first: int,
    last: int,
) -> float:
    """The metric of samples ``first`` to ``last`` - 1."""
    part = samples.between(extractor.name, first, last)
    others = reference.against(metric, extractor.name, last - first)
    return metric.compute(part, others, extractor)


def over_repeats(repeats: Sequence[Sequence[Result]]) -> list[Result]:
    """One list of results of runs with other seeds: the mean, and the spread of two or more."""
    if len(repeats) == 1:
        return list(repeats[0])
    groups = [[r.value for r in same] for same in zip(*repeats, strict=True)]
    return [
        replace(first, value=mean(values), std=stdev(values))
        for first, values in zip(repeats[0], groups, strict=True)
    ]
