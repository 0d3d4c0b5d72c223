"""Fits the timesteps of a few steps to a model."""

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ddim.core.denoiser import Denoiser
from ddim.core.noise import check_seeds, seeded_randn
from ddim.core.prediction import Denoised
from ddim.core.sampler import sample
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.files import write_json
from ddim.fitting.timesteps import Fit, SamplingProblem, fit_timesteps, geometric_mean
from ddim.runs.engine import Control, FileJob, Made, Row
from ddim.runs.model import ModelJob, enough_memory
from ddim.runs.record import RunRecord
from ddim.runs.requests import FitStepsRequest
from ddim.runs.rules import Options
from ddim.runs.text import read_text

__all__ = ["FitStepsJob"]


class FitStepsJob(FileJob, ModelJob):
    """One list of levels, and what it was compared with."""

    request: FitStepsRequest
    command = "fit-steps"

    def __init__(self, request: FitStepsRequest, control: Control) -> None:
        super().__init__(request, control)
        always = "model device seed count held_out steps order out exact evaluations batch_size"
        options = Options(request, *always.split())
        last, first = request.count, request.seed
        self.seeds = seeds = check_seeds(range(first, first + last + request.held_out))
        self.fit: Fit | None = None
        self.find()
        model = self.model
        self.text = text = read_text(options, model) if model.is_text else None
        options.refuse_unread(model.name, model.kinds)
        plan, total = self.plan, len(self.plan.noise_schedule)
        select_timesteps(total, request.steps)  # refuses more steps than levels
        many = {"order": 2, "steps": min(100, total), "spacing": "quadratic"}
        self.protocol = {
            "command": self.command,
            "model": request.model,
            **model.hashes(),
            "steps": request.steps,
            "order": plan.select_order(request.order),
            "clip": asdict(plan.select_clip()),
            "seeds": [seeds[0], seeds[last - 1]],
            "held_out": [seeds[last], seeds[-1]],
            "reference": {"order": 1, "steps": total} if request.exact else many,
            "evaluations": request.evaluations,
            "prompt": None,
            "guidance_scale": None,
            **({} if text is None else text.protocol),
        }
        self.execution = self.executed("batch_size")

    def make(self, missing: Sequence[Path]) -> Generator[Made]:
        request = self.request
        found, judged = self.seeds[: request.count], self.seeds[request.count :]
        size = request.batch_size
        with enough_memory(self.device, max(request.count, size)):
            began = time.perf_counter()
            batches = [judged[n : n + size] for n in range(0, len(judged), size)]
            self.fit = fit_timesteps(
                self._problem(found),
                [self._problem(batch) for batch in batches],
                schedule=self.plan.noise_schedule,
                steps=request.steps,
                order=self.protocol["order"],
                evaluations=request.evaluations,
                bound=1.0 if self.text is None else None,  # latents have no range
                finish=self._all_levels if request.exact else None,
            )
        yield Made(self.folder, seconds=time.perf_counter() - began)

    def _problem(self, seeds: list[int]) -> SamplingProblem:
        """What is sampled from the noise of these seeds; every call of the network is a step."""
        pipe, text, clip = self.pipe, self.text, self.pipe.select_clip()
        if text is None:
            labels = self.model.labels_of(seeds)
            denoise: Denoiser = pipe.denoiser(len(seeds), class_labels=labels, clip=clip)
            shape = pipe.image_shape
        else:
            prompts = [text.prompts[seed % len(text.prompts)] for seed in seeds]
            scale, rescale = text.guidance.scale, text.guidance.rescale
            conditions = pipe.conditions(prompts, text.negative_prompt, guidance_scale=scale)
            guidance = {"guidance_scale": scale, "guidance_rescale": rescale}
            denoise = pipe.denoiser(conditions, clip=clip, **guidance)
            shape = pipe.latent_shape

        def counted(x_t: Tensor, t: int | Tensor) -> Denoised:
            self.control.step()
            return denoise(x_t, t)

        return SamplingProblem(counted, seeded_randn(shape, seeds).to(self.device))

    def _all_levels(self, problem: SamplingProblem) -> Tensor:
        """The images of DDIM at all levels."""
        schedule = self.plan.noise_schedule
        pairs = step_pairs(select_timesteps(len(schedule), len(schedule)))
        return sample(problem.denoise, problem.x_t, pairs, schedule=schedule)

    def results(self, rows: list[Row]) -> list[Row]:
        fit = self.fit
        if fit is None:
            return []
        return [
            {
                "name": name,
                "timesteps": fit.paths.get(name),
                "ode_error": geometric_mean(errors)._asdict(),
                "ratio": fit.ratio(name)._asdict(),
            }
            for name, errors in fit.errors.items()
        ]

    def evaluations(self, rows: list[Row]) -> float:
        return self.request.steps * (1 if self.text is None else self.text.calls_a_step)

    def save(self, record: RunRecord) -> None:
        if self.fit is not None:
            self.refuse_existing()
            write_json(self.folder, {"timesteps": self.fit.timesteps, **asdict(record)})
