"""``ddim fit-steps``: fits the timesteps of a few steps to a model."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ddim.cli._arguments import ModelArgument
from ddim.cli._text import TextRequest, open_any
from ddim.errors import DDIMError, OutputError

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Finds the levels at which a few steps of a model come nearest to its own images of many
    steps, and tells by how much.

    The result goes into a JSON file for `ddim sample --timesteps`. No data is needed.
    """

    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""
    steps: int = 10
    """How many levels to choose: network evaluations an image."""
    order: Literal[1, 2] | None = None
    """Of the solver that will visit them: 1 is DDIM, 2 its multistep; by default what the model's
    configuration says."""
    out: str = "steps.json"
    """The file for the result; it must not exist."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Of a model of text: what the images show, in turn. Given again for more, or FILE.txt with one
    in a line."""
    negative_prompt: str | None = None
    """What guidance leads away from; by default the empty text."""
    guidance_scale: float | None = None
    """How far it leads: 1 is off. By default what the model's card says, else 7.5."""
    guidance_rescale: float | None = None
    """How far guided predictions are brought back to the contrast of unguided ones, from 0 to 1; by
    default the card's, else 0."""
    count: int = 32
    """Images that the search looks at."""
    held_out: int = 32
    """Other images, on which the result is compared with every spacing."""
    exact: bool = False
    """Measure the held-out errors against DDIM at all of the model's levels, which is their
    definition, and not against 100 steps of order 2, which are nearly the same and ten times as
    fast."""
    evaluations: int = 300
    """About how many evaluations of the network on all COUNT images the search may take."""
    seed: int = 1_000_000
    """Seed of the first image; far from the seeds that images are drawn and measured at."""
    batch_size: int = 16
    """Held-out images evaluated together."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Fits, prints the comparison, and writes the file."""
    began = time.perf_counter()
    for name, least in (
        ("steps", 1),
        ("count", 1),
        ("held_out", 2),
        ("evaluations", 0),
        ("batch_size", 1),
    ):
        if getattr(command, name) < least:
            raise DDIMError(
                f"--{name.replace('_', '-')} must be at least {least}; got "
                f"{getattr(command, name)}."
            )
    out = Path(command.out)
    if out.exists():
        raise OutputError(f"{out} is there already; use another --out, or delete that file.")

    from torch import Tensor

    from ddim.cli._model import enough_memory, find_device, progress_bar
    from ddim.cli._run import RunRecord, versions
    from ddim.core.denoiser import Denoiser
    from ddim.core.noise import check_seeds, seeded_randn
    from ddim.core.prediction import Denoised
    from ddim.core.sampler import sample
    from ddim.core.timesteps import select_timesteps, step_pairs
    from ddim.files import write_text
    from ddim.fitting.timesteps import SamplingProblem, fit_timesteps, geometric_mean
    from ddim.models.checkpoints import weight_hash

    device = find_device(command.device)
    seeds = check_seeds(range(command.seed, command.seed + command.count + command.held_out))
    opened, folder = open_any(command.model, device=device, dtype="float32", image=False)
    pipe: Any = opened
    text = TextRequest.read(command, pipe, folder)
    schedule, order, clip = (
        pipe.noise_schedule,
        pipe.select_order(command.order),
        pipe.select_clip(),
    )
    classes, total = pipe.unet.config.get("num_class_embeds"), len(pipe.noise_schedule)
    bound = 1.0 if text is None else None  # latents have none
    select_timesteps(total, command.steps)  # refuses a number that cannot be
    out.parent.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    with (
        enough_memory(device, max(command.count, command.batch_size)),
        contextlib.ExitStack() as stack,
    ):
        bar = stack.enter_context(progress_bar(pipe, None))

        def batch(drawn: list[int]) -> SamplingProblem:
            if text is None:
                labels = [seed % classes for seed in drawn] if classes else None
                denoise: Denoiser = pipe.denoiser(len(drawn), class_labels=labels, clip=clip)
            else:
                prompts = [text.prompts[seed % len(text.prompts)] for seed in drawn]
                guidance = {
                    "guidance_scale": text.guidance_scale,
                    "guidance_rescale": text.guidance_rescale,
                }
                conditions = pipe.conditions(
                    prompts, text.negative_prompt, guidance_scale=text.guidance_scale
                )
                denoise = pipe.denoiser(conditions, clip=clip, **guidance)
            shape = pipe.image_shape if text is None else pipe.latent_shape

            def told(x_t: Tensor, t: int | Tensor) -> Denoised:
                if bar is not None:
                    bar.update()
                return denoise(x_t, t)

            return SamplingProblem(told, seeded_randn(shape, drawn).to(device))

        def finish(part: SamplingProblem) -> Tensor:
            return sample(
                part.denoise,
                part.x_t,
                step_pairs(select_timesteps(total, total)),
                schedule=schedule,
            )

        found, judged = seeds[: command.count], seeds[command.count :]
        fit = fit_timesteps(
            batch(found),
            [
                batch(judged[first : first + command.batch_size])
                for first in range(0, len(judged), command.batch_size)
            ],
            schedule=schedule,
            steps=command.steps,
            order=order,
            evaluations=command.evaluations,
            bound=bound,
            finish=finish if command.exact else None,
        )
    seconds = time.perf_counter() - started

    results = []
    print(f"{'timesteps':10s} {'ODE error':>10s}   {fit.name} / this one, with its 95 % interval")
    for name, errors in fit.errors.items():
        error, ratio = geometric_mean(errors), fit.ratio(name)
        results.append(
            {
                "name": name,
                "timesteps": fit.paths.get(name),
                "ode_error": error._asdict(),
                "ratio": ratio._asdict(),
            }
        )
        print(
            f"{name:10s} {error.mean:10.2e}   {ratio.mean:.3f} ({ratio.low:.3f} to "
            f"{ratio.high:.3f})"
        )
    protocol = {
        "command": "fit-steps",
        "model": command.model,
        "weight_hash": weight_hash(folder),
        "steps": command.steps,
        "order": order,
        "clip": asdict(clip),
        "seeds": [found[0], found[-1]],
        "held_out": [judged[0], judged[-1]],
        "reference": {"order": 1, "steps": total}
        if command.exact
        else {"order": 2, "steps": min(100, total), "spacing": "quadratic"},
        "evaluations": command.evaluations,
        "prompt": None,
        "guidance_scale": None,
        **({} if text is None else text.protocol),
    }
    record = RunRecord(
        protocol=protocol,
        results=results,
        seconds=seconds,
        seconds_total=time.perf_counter() - began,
        evaluations=command.steps * (2 if text is not None and text.is_guided else 1),
        execution={"device": str(device), "batch_size": command.batch_size},
        versions=versions(),
    )
    write_text(
        out,
        json.dumps({"timesteps": fit.timesteps, **asdict(record)}, indent=2, allow_nan=False)
        + "\n",
    )
    print(
        f"The best of them, {fit.name}, is in {out}: {', '.join(map(str, fit.timesteps))}; found "
        f"in {seconds:.0f} s."
    )
    more = "" if text is None else " --prompt PROMPT"
    print(f"Draw with them: ddim sample {command.model} --order {order} --timesteps {out}{more}")
