"""What commands ask of models of text: prompts from arguments and files, and guidance as the
model's card has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ddim.cli._model import open_model, quiet_libraries
from ddim.errors import DataError, DDIMError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
    from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = ["Item", "TextOptions", "TextRequest", "open_any", "read_prompts"]


class TextOptions(Protocol):
    """The options that every command on models of text has."""

    @property
    def model(self) -> str: ...
    @property
    def prompt(self) -> list[str]: ...
    @property
    def negative_prompt(self) -> str | None: ...
    @property
    def guidance_scale(self) -> float | None: ...
    @property
    def guidance_rescale(self) -> float | None: ...


@dataclass(frozen=True, order=True)
class Item:
    """One image to draw."""

    prompt: int | None
    """Its prompt's place in the list; None where there is one prompt, or none."""
    seed: int

    @property
    def file(self) -> str:
        """The name of its picture."""
        return (
            f"{self.seed:06d}.png"
            if self.prompt is None
            else f"{self.prompt:03d}-{self.seed:06d}.png"
        )

    @classmethod
    def of(cls, stem: str) -> "Item | None":
        """The item whose picture has this name without its ending; None for the name of another
        file."""
        *prompt, seed = stem.split("-")
        if len(prompt) > 1 or not all(part.isdigit() for part in (*prompt, seed)) or len(seed) < 6:
            return None
        return cls(int(prompt[0]) if prompt else None, int(seed))


@dataclass(frozen=True)
class TextRequest:
    """What is asked of a model of text, resolved."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    guidance_scale: float
    guidance_rescale: float
    picture: "Image | None"
    """Of image-to-image."""
    protocol: dict[str, Any]

    @classmethod
    def read(
        cls,
        command: TextOptions,
        pipe: Any,
        folder: Path,
        *,
        image: str | None = None,
        strength: float | None = None,
    ) -> "TextRequest | None":
        """Resolves a command's options; None for a model without text.

        Raises:
            DDIMError: If they do not go with the model, or are out of range.
        """
        from ddim.core.guidance import check_rescale, check_scale
        from ddim.models.checkpoints import read_guidance
        from ddim.pipelines.unconditional import UnconditionalPipeline

        names = ("negative_prompt", "guidance_scale", "guidance_rescale")
        options = {name: getattr(command, name) for name in names} | {
            "image": image,
            "strength": strength,
        }
        given = [name for name, value in options.items() if value is not None]
        if isinstance(pipe, UnconditionalPipeline):
            if command.prompt or given:
                option = "prompt" if command.prompt else given[0].replace("_", "-")
                raise DDIMError(
                    f"--{option} is for models of text, and {command.model} was trained without; "
                    "leave it out."
                )
            return None
        if not command.prompt:
            raise DDIMError(
                f"{command.model} makes images of prompts: give --prompt TEXT, or --prompt "
                "FILE.txt with one in a line."
            )
        card = read_guidance(folder)
        scale = (
            card.get("guidance_scale", 7.5)
            if command.guidance_scale is None
            else command.guidance_scale
        )
        rescale = (
            card.get("guidance_rescale", 0.0)
            if command.guidance_rescale is None
            else command.guidance_rescale
        )
        check_rescale(rescale)
        check_scale(scale)
        prompts = tuple(read_prompts(command.prompt))
        if strength is not None and image is None:
            raise DDIMError(
                "--strength says how much of --image is kept; give an image with it, or leave it "
                "out."
            )
        picture, described = _read_image(image, pipe)
        told = {
            "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
            "negative_prompt": command.negative_prompt,
            "guidance_scale": scale,
            "guidance_rescale": rescale,
            "image": described,
            "strength": None if image is None else 0.8 if strength is None else strength,
        }
        return cls(prompts, command.negative_prompt, scale, rescale, picture, told)

    def items(self, seeds: Sequence[int]) -> list[Item]:
        """All images: of each prompt one a seed."""
        return [
            Item(None if len(self.prompts) == 1 else p, seed)
            for p in range(len(self.prompts))
            for seed in seeds
        ]

    def prompt_of(self, item: Item) -> str:
        """The text of an item."""
        return self.prompts[item.prompt or 0]

    @property
    def strength(self) -> float | None:
        """Of image-to-image; None where images begin at noise."""
        return None if self.picture is None else float(self.protocol["strength"])

    @property
    def is_guided(self) -> bool:
        """Whether each step evaluates the network twice."""
        return self.guidance_scale > 1

    def options(self, items: Sequence[Item]) -> dict[str, Any]:
        """Of the pipeline's call, for these images."""
        guidance = {
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
        }
        start = {} if self.picture is None else {"image": self.picture, "strength": self.strength}
        return {
            "prompt": [self.prompt_of(item) for item in items],
            "negative_prompt": self.negative_prompt,
            **guidance,
            **start,
        }


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts from the command line, where ``FILE.txt`` stands for the lines of that file that are
    not empty.

    Raises:
        DataError: If there is no such file, or it holds none.
    """
    prompts = []
    for text in given:
        if not text.endswith(".txt"):
            prompts.append(text)
            continue
        try:
            lines = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--prompt {text}: a text that ends in .txt is a file of prompts, and it cannot be "
                f"read ({error})."
            ) from error
        if not any(lines):
            raise DataError(f"--prompt {text}: the file holds no prompt; write one in a line.")
        prompts += [line for line in lines if line]
    return prompts


def _read_image(path: str | None, pipe: Any) -> "tuple[Image | None, dict[str, str] | None]":
    """The picture to begin with, and its name and hash."""
    if path is None:
        return None, None
    from ddim.files import file_hash
    from ddim.models.images import open_picture
    from ddim.pipelines.pictures import prepare_images

    picture = open_picture(path)
    try:
        prepare_images(pipe, picture)
    except DDIMError as error:
        raise DataError(f"{path}: {error}") from error
    return picture, {"name": Path(path).name, "hash": file_hash([Path(path)])}


def open_any(
    name: str,
    *,
    device: Any,
    dtype: str,
    image: bool,
) -> "tuple[UnconditionalPipeline | TextToImagePipeline | ImageToImagePipeline, Path]":
    """The pipeline of a model with or without text, and its folder; ``image`` asks for
    image-to-image.

    Raises:
        CheckpointError: If there is no such model, or it is of another kind.
        DDIMError: If its images are no pictures, or transformers is not installed.
    """
    from ddim.models.checkpoints import STABLE_DIFFUSION, find_model, read_model_index

    folder = find_model(name)
    if read_model_index(folder).get("_class_name") not in STABLE_DIFFUSION:
        return open_model(name, device=device, dtype=dtype)
    import torch

    from ddim.pipelines.opening import text_pipeline

    quiet_libraries(text=True)
    kind = text_pipeline("StableDiffusionImg2ImgPipeline" if image else "StableDiffusionPipeline")
    pipe = kind.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    return pipe, folder
