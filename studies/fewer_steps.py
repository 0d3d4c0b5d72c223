"""Measures how many evaluations of the network each method needs, for the page docs/fewer-steps.md.

    python studies/fewer_steps.py errors --out out/fewer-steps
    python studies/fewer_steps.py quality --out out/fewer-steps --reference fashion-mnist
    python studies/fewer_steps.py report --out out/fewer-steps

``errors`` fits steps and measures the ODE error of every method at every number of steps, on the
same held-out seeds; ``quality`` draws images by each of them and measures the Frechet distance;
``report`` puts what is there into markdown and plots. What is measured stays in files of its own,
and is not measured again."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddim
from ddim.core.noise import seeded_randn
from ddim.core.sampler import sample
from ddim.core.timesteps import SPACINGS, select_timesteps, step_pairs
from ddim.data.sources import load_images
from ddim.evaluation.protocol import (
    Reference,
    collect,
    collect_reference,
    default_metrics,
    load_panel,
    measure,
    sample_cuts,
)
from ddim.evaluation.report import text_table
from ddim.figures import Point, draw_lines, save_figure
from ddim.files import write_text
from ddim.fitting.timesteps import (
    SamplingProblem,
    estimate_eps_mean_square,
    fit_timesteps,
    geometric_mean,
    ode_error,
)
from ddim.models.checkpoints import find_model, weight_hash
from ddim.models.images import from_uint8
from ddim.runs.model import find_device

STEPS = (5, 8, 10, 20, 50)
FITTED = (5, 8, 10, 12, 15, 20, 50)
BETWEEN = (12, 15, 18, 22, 25, 30, 40)
"""More numbers of trailing steps, to find the smallest that reaches a quality."""


@dataclass(frozen=True)
class Method:
    """A way to spend evaluations."""

    name: str
    order: int
    steps: int

    def __str__(self) -> str:
        return f"{self.name}, order {self.order}, {self.steps} steps"

    @property
    def file(self) -> str:
        return f"{self.name}-order-{self.order}-steps-{self.steps}.json"


MANY = Method("trailing", 1, 50)
METHODS = [
    *(Method(spacing, order, steps) for steps in STEPS for order in (1, 2) for spacing in SPACINGS),
    *(Method("fitted", order, steps) for steps in FITTED for order in (1, 2)),
    *(Method("trailing", 2, steps) for steps in BETWEEN),
    *(Method("trailing", 1, steps) for steps in (100, 200)),
]
"""Without noise, so that each has an ODE error."""
DRAWN = [*METHODS, Method("trailing", 2, 200), *(Method("analytic", 1, steps) for steps in STEPS)]
"""What is judged by its images; 200 steps of order 2 stand for the flow itself."""


class Run:
    """A folder of measurements of one model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.device = find_device(options.device)
        self.pipe = ddim.UnconditionalPipeline.from_pretrained(options.model).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.schedule = self.pipe.noise_schedule
        self.hash = weight_hash(find_model(options.model))
        self.compiled = False

    def stored(self, kind: str, method: Method) -> dict[str, Any] | None:
        """An earlier measurement with the same weights and as many images, if there is one."""
        path = self.out / kind / method.file
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        if content["weight_hash"] != self.hash:
            raise SystemExit(
                f"{path} is of other weights, {content['weight_hash']}; use another --out."
            )
        found, asked = self.images_of(kind, content)
        if found != asked:
            raise SystemExit(
                f"{path} is of {found} images, and {asked} are asked for; use another --out, or "
                "the same number."
            )
        return content

    def images_of(self, kind: str, content: dict[str, Any]) -> tuple[int, int]:
        """The number of images of a measurement, and the number that was asked for."""
        if kind == "errors":
            return len(content["errors"]), self.options.held_out
        if kind == "quality":
            return content["results"][-1]["count"], self.options.count
        return 0, 0

    def store(self, kind: str, method: Method, **content: Any) -> dict[str, Any]:
        (self.out / kind).mkdir(parents=True, exist_ok=True)
        record = {"weight_hash": self.hash, **asdict(method), **content}
        write_text(self.out / kind / method.file, json.dumps(record) + "\n")
        return record

    def levels(self, method: Method) -> list[int]:
        """The timesteps of a method; fitted ones are searched for unless they are stored."""
        if method.name == "analytic":
            return select_timesteps(len(self.schedule), method.steps, "trailing")
        if method.name != "fitted":
            return select_timesteps(len(self.schedule), method.steps, method.name)
        found = self.stored("fits", method)
        if found is None:  # what `ddim fit-steps` does by default
            seed = 1_000_000
            batch, held_out = (self.batch(range(first, first + 32)) for first in (seed, seed + 32))
            fit = fit_timesteps(
                batch, [held_out], schedule=self.schedule, steps=method.steps, order=method.order
            )
            found = self.store("fits", method, timesteps=fit.timesteps, found=fit.name)
        return list(found["timesteps"])

    def batch(self, seeds: range) -> SamplingProblem:
        return SamplingProblem(
            self.pipe.denoiser(len(seeds), clip="none"),
            seeded_randn(self.pipe.image_shape, seeds).to(self.device),
        )

    def compile(self) -> None:
        if not self.compiled:
            self.pipe.compile()
            self.compiled = True

    @torch.no_grad()
    def errors(self) -> None:
        """The ODE error of every method, against DDIM at all levels."""
        self.compile()
        count, size = self.options.held_out, self.options.batch_size
        parts = [
            self.batch(range(first, min(first + size, count))) for first in range(0, count, size)
        ]
        path = self.out / f"exact-{self.hash}-{count}.pt"
        if path.is_file():
            exact = torch.load(path, weights_only=True).to(self.device)
        else:
            exact = self.finish(
                parts, select_timesteps(len(self.schedule), len(self.schedule), "trailing"), 1
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(exact.cpu(), path)
        for method in METHODS:
            if self.stored("errors", method) is None:
                levels = self.levels(method)
                values = ode_error(self.finish(parts, levels, method.order), exact)
                self.store("errors", method, timesteps=levels, errors=values.tolist())
                print(f"{method}: {geometric_mean(values).mean:.3e}", flush=True)

    def finish(self, parts: list[SamplingProblem], levels: list[int], order: int) -> Tensor:
        return torch.cat(
            [
                sample(b.denoise, b.x_t, step_pairs(levels), schedule=self.schedule, order=order)
                for b in parts
            ]
        )

    @torch.no_grad()
    def quality(self) -> None:
        """The first metric of the panel for every method, on the same seeds, and on the seeds that
        long cells of `ddim table` draw."""
        self.compile()
        data = load_images(self.options.reference, channels=self.pipe.image_shape[0])
        shape = self.pipe.image_shape
        panel = load_panel(default_metrics(shape)[:1], image_shape=shape, device=self.device)
        count, reference = self.options.count, None
        counts = sorted({count, min(256, count)})
        for method in DRAWN:
            if self.stored("quality", method) is None:
                reference = reference or self.reference(data, panel, counts)
                collected = collect(self.images(method, data), panel, cuts=sample_cuts(counts))
                results = [
                    asdict(r) for n in counts for r in measure(collected, reference, panel, count=n)
                ]
                self.store("quality", method, results=results)
                metric, value = results[-1]["metric"], results[-1]["value"]
                print(f"{method}: {metric} {value:.4g}", flush=True)

    def reference(self, data: Any, panel: Any, counts: list[int]) -> Reference:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        batches = (self.pixels(data, order[i : i + 256]) for i in range(0, len(order), 256))
        return collect_reference(batches, panel, available=len(data), counts=counts)

    def pixels(self, data: Any, indices: list[int]) -> Tensor:
        return from_uint8(torch.stack([data[i][0] for i in indices]).permute(0, 2, 3, 1).numpy())

    def images(self, method: Method, data: Any) -> Iterator[Tensor]:
        """Pictures of 256 grey levels in [-1, 1], batch by batch."""
        size, levels, eps_mean_square = self.options.batch_size, self.levels(method), None
        if method.name == "analytic":
            chosen = list(range(0, len(data), len(data) // 256))[:256]
            parts = [
                self.pixels(data, chosen[i : i + size]).to(self.device)
                for i in range(0, len(chosen), size)
            ]
            eps_mean_square = estimate_eps_mean_square(
                [(self.pipe.denoiser(len(x0), clip="none"), x0) for x0 in parts],
                levels,
                schedule=self.schedule,
            )
        for first in range(0, self.options.count, size):
            seeds = range(first, min(first + size, self.options.count))
            made = self.pipe(
                seeds=seeds,
                timesteps=levels,
                order=method.order,
                eps_mean_square=eps_mean_square,
                clip="none",
                progress=False,
                output_type="pt",
            ).images
            yield (made * 255).round() / 127.5 - 1

    def report(self) -> None:
        """Writes report.md and two plots of what was measured."""
        errors = {
            m: torch.tensor(e["errors"], dtype=torch.float64)
            for m in METHODS
            if (e := self.stored("errors", m))
        }
        quality = {m: q["results"] for m in DRAWN if (q := self.stored("quality", m))}
        parts = [f"# Fewer evaluations, measured\n\nWeights {self.hash}.\n"]
        if MANY in errors:
            parts += [
                f"## ODE error ({len(errors[MANY])} images: geometric mean, and over that of 50 "
                "trailing steps of DDIM)\n"
            ]
            parts += [self.table(errors.keys(), lambda m: self.error_text(errors, m))]
        if quality:
            last = next(iter(quality.values()))[-1]
            parts += [
                f"## {last['metric']} ({last['count']} images; real against real "
                f"{last['floor']:.3g})\n"
            ]
            parts += [self.table(quality.keys(), lambda m: self.quality_text(quality[m][-1]))]
        parts += [*self.reached(errors, quality)]
        for name, values, up in (
            ("errors.png", {m: geometric_mean(v).mean for m, v in errors.items()}, "ODE error"),
            ("quality.png", {m: q[-1]["value"] for m, q in quality.items()}, "Frechet distance"),
        ):
            lines: dict[str, list[Point]] = {}
            for m, value in values.items():
                lines.setdefault(f"{m.name}, order {m.order}", []).append(Point(m.steps, value))
            chosen = {
                k: sorted(v)
                for k, v in lines.items()
                if not k.startswith(("leading", "linspace", "quadratic"))
            }
            if chosen:
                figure = draw_lines(chosen, across="evaluations an image", up=up)
                save_figure(figure, self.out / name)
        write_text(self.out / "report.md", "\n".join(parts))
        print("\n".join(parts))

    def error_text(self, errors: dict[Method, Tensor], method: Method) -> str:
        ratio = geometric_mean(errors[method] / errors[MANY])
        return (
            f"{geometric_mean(errors[method]).mean:.2e} ({ratio.mean:.3g}; {ratio.low:.3g} to "
            f"{ratio.high:.3g})"
        )

    def quality_text(self, result: dict[str, Any]) -> str:
        spread = "" if result["std"] is None else f" ± {result['std']:.1g}"
        return f"{result['value']:.3g}{spread}"

    def table(self, methods: Any, text: Any) -> str:
        methods = list(methods)
        steps = sorted({m.steps for m in methods})
        rows = [["method", *(f"{s} steps" for s in steps)]]
        for name, order in dict.fromkeys((m.name, m.order) for m in methods):
            there = {m.steps: text(m) for m in methods if (m.name, m.order) == (name, order)}
            rows.append([f"{name}, order {order}", *(there.get(s, "") for s in steps)])
        return text_table(rows)

    def reached(self, errors: dict[Method, Tensor], quality: dict[Method, Any]) -> Iterator[str]:
        """The fewest evaluations by which each method reaches 50 steps of DDIM, and the flow."""
        flow = Method("trailing", 2, 200)
        rows = [
            ["method", "ODE error of DDIM at 50", "distance of DDIM at 50", "distance of the flow"]
        ]
        for name, order in dict.fromkeys((m.name, m.order) for m in DRAWN if m != flow):
            mine = sorted(
                (m for m in DRAWN if (m.name, m.order) == (name, order)), key=lambda m: m.steps
            )
            near = {
                m: bool(geometric_mean(errors[m] / errors[MANY]).mean <= 1)
                for m in mine
                if m in errors and MANY in errors
            }
            judged = [m for m in mine if m in quality]
            good = {
                g: {m: within(quality[m][-1], quality[g][-1]) for m in judged if g in quality}
                for g in (MANY, flow)
            }
            rows.append(
                [
                    f"{name}, order {order}",
                    *(fewest(reached) for reached in (near, good[MANY], good[flow])),
                ]
            )
        yield (
            "## Fewest evaluations, of those measured, that reach it (a distance is reached within "
            "one spread over seeds)\n"
        )
        yield (
            f"The flow is {flow.steps} steps of order {flow.order}, which stand for DDIM at all "
            "levels.\n"
        )
        yield text_table(rows)


def fewest(reached: dict[Method, bool]) -> str:
    """The smallest number of steps that reaches a goal, or words if there is none."""
    steps = [m.steps for m, there in reached.items() if there]
    return str(min(steps)) if steps else "none" if reached else "not measured"


def within(result: dict[str, Any], goal: dict[str, Any]) -> bool:
    """Whether a distance is no larger than another's, but for that one's spread over seeds."""
    return bool(result["value"] <= goal["value"] + (goal["std"] or 0))


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("errors", "quality", "report"))
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--reference", default="fashion-mnist")
    parser.add_argument("--held-out", type=int, default=128, help="images of the ODE errors")
    parser.add_argument("--count", type=int, default=1024, help="images of the quality")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--device",
        default="auto",
        help="where to compute; auto takes an accelerator where there is one",
    )
    parser.add_argument("--out", type=Path, default=Path("out/fewer-steps"))
    options = parser.parse_args()
    getattr(Run(options), options.what)()


if __name__ == "__main__":
    main()
