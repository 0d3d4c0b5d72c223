"""What a run says of itself before its first step."""

from typing import Any

from ddim.data.dataset import ImageData
from ddim.training.loop import Run

__all__ = ["summary"]


def summary(run: Run, record: dict[str, Any], data: ImageData) -> tuple[str, ...]:
    """Returns lines that say what data were found, what is trained, and how long the run is."""
    config, steps, start = run.config, run.steps, int(record["step"])
    facts, held = record["data"], len(record["held_out_images"])
    height, width = data.resolution
    colour = "grey" if data.channels == 1 else "colour"
    found = [f"{len(data)} {colour} images of {width}x{height} (width x height)"]
    found += [f"{held} of them held out"]
    if data.class_names:
        use = "used" if config.class_conditional else "not used"
        found.append(f"labels of {len(data.class_names)} classes ({use})")
    elif "captions" not in facts:
        found.append("no labels")
    if "captions" in facts:
        found.append(f"{facts['captions']} different captions")
    where = str(record["device"])
    where += "" if run.division.world == 1 else f", {run.division.world} processes"
    precision = "float32" if config.mixed_precision == "no" else config.mixed_precision
    times = steps * run.division.images / max(1, len(data) - held)
    lines = [
        f"data: {', '.join(found)}",
        f"model: {record['parameters']:,} parameters, {precision}, {where}",
        f"run: {steps} steps of {run.division.images} images, {times:.1f} passes over the data",
    ]
    if start:
        lines.append(f"going on after step {start}")
    if config.pace(steps).preview_every:
        lines.append(f"previews: {config.out}/previews; tensorboard --logdir {config.out}/log")
    short = config.shortness(steps)
    return (*lines, *([] if short is None else [f"note: {short}"]))
