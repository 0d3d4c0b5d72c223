"""The model's card for people and for a hub: README.md, from what the run knows."""

import json
import shlex
from pathlib import Path
from typing import Any

from ddim.errors import plain_words, printable
from ddim.files import write_text

__all__ = ["NAME", "model_card", "write_model_card"]

NAME = "README.md"

_MARK = "<!-- written by ddim train; delete this line to keep your own text -->"


def model_card(card: dict[str, Any], *, name: str) -> str:
    """The text: metadata as Hugging Face's hub reads it, how the model was made, how it is used.

    Args:
        card: The content of card.json.
        name: The name of the model.
    """
    config, data = card["config"], card["data"]
    is_text = "captions" in data
    task = "text-to-image" if is_text else "unconditional-image-generation"
    height, width = data.get("resolution", (None, None))
    facts = {
        "data": data["name"],
        "images of the data": data.get("images"),
        "size": None if height is None else f"{width} x {height}, {data['channels']} channels",
        "classes": ", ".join(map(str, data.get("classes") or [])) or None,
        "parameters": card.get("parameters"),
        "images seen": card.get("images_seen"),
        "prediction": config.get("prediction_type"),
        "schedule": _schedule(config),
        "held-out loss": card.get("validation_loss"),
        "device": card.get("device"),
        "processes": card.get("processes"),
        "weights": card.get("weight_hash"),
        "versions": ", ".join(f"{k} {v}" for k, v in (card.get("versions") or {}).items()),
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value is not None]
    prompt = " --prompt TEXT" if is_text else ""
    call, place = '"TEXT", ' if is_text else "", _line(f"./{name}")
    lines = [
        "---",
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        "tags: [ddim, diffusion]",
        "---",
        "",
        _MARK,
        "",
        f"# {_cell(name)}",
        "",
        "A denoising diffusion implicit model, trained by `ddim train`; card.json has the options.",
        "",
        "| what | value |",
        "|---|---|",
        *rows,
        "",
        "```sh",
        _line(card["command"]),
        f"ddim sample {shlex.quote(place)}{prompt}",
        "```",
        "",
        "```python",
        "import ddim",
        "",
        f"pipe = ddim.DiffusionPipeline.from_pretrained({json.dumps(place)})",
        f"image = pipe({call}num_inference_steps=50).images[0]",
        "```",
        "",
        "The folder is in diffusers' format, and diffusers opens it without ddim, too.",
        "What the data may be used for, and what the model should not be used for, nobody has said",
        "here: add it.",
        "",
    ]
    return "\n".join(lines)


def write_model_card(folder: Path, card: dict[str, Any], *, name: str) -> None:
    """Writes README.md, unless there is one that a person has made their own."""
    path = folder / NAME
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(path, model_card(card, name=name))


def _schedule(config: dict[str, Any]) -> str | None:
    if (kind := config.get("beta_schedule")) is None:
        return None
    rescaled = ", zero terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    return f"{kind}, {config.get('num_train_timesteps')} levels{rescaled}"


def _line(text: str) -> str:
    """A text as a line of a block of code: it may come from a file's name."""
    return printable(text).replace("`", "'")


def _cell(value: object) -> str:
    """A value as a cell of Markdown: it may come from a file's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return plain_words(" ".join(text.split())).replace("_", "\\_")
