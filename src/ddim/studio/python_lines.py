"""The lines of Python that make the pictures of a run again."""

from typing import Any

from ddim.runs.sample import SampleJob

__all__ = ["python_lines"]


def python_lines(job: SampleJob, *, model: str) -> str:
    """The lines that draw what a job of the Draw tab draws, bit for bit: in one batch, too.

    Args:
        job: The job, resolved.
        model: The model's name, as a person opens it.
    """
    request, protocol = job.request, job.protocol
    seeds = list(range(request.seed, request.seed + request.count))
    options: dict[str, Any] = {"seeds": seeds}
    if request.steps is not None:
        options["num_inference_steps"] = request.steps
    if request.spacing is not None:
        options["timestep_spacing"] = request.spacing
    if request.eta:
        options["eta"] = request.eta
    if request.order is not None:
        options["order"] = request.order
    first = ""
    if job.text is not None:
        first = f"\n    {job.text.prompts[0]!r},"
        options["guidance_scale"] = protocol["guidance_scale"]
        if protocol["guidance_rescale"]:
            options["guidance_rescale"] = protocol["guidance_rescale"]
        if request.negative_prompt:
            options["negative_prompt"] = request.negative_prompt
    elif (labels := job.model.labels_of(seeds, job.label)) is not None:
        options["class_labels"] = labels
    given = "".join(f"\n    {name}={value!r}," for name, value in options.items())
    lines = [
        "from ddim import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({model!r})",
        f"images = pipe({first}{given}\n).images",
        'images[0].save("picture.png")',
    ]
    return "\n".join(lines) + "\n"
