"""Prompts, guidance and a first picture, as requests on text-to-image models give them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ddim.core.guidance import is_guided
from ddim.data.captions import read_prompts
from ddim.errors import DataError, DDIMError
from ddim.files import file_hash
from ddim.models.checkpoints import read_guidance
from ddim.models.facts import FoundModel
from ddim.models.images import open_picture
from ddim.pipelines.pictures import prepare_images
from ddim.pipelines.prompts import Guidance, Prompts
from ddim.runs.rules import Options, refuse_unguided

__all__ = ["Item", "TextOptions", "read_text"]


@dataclass(frozen=True, order=True)
class Item:
    """One image to draw.

    Attributes:
        prompt: The place of its prompt in the list; None where there is one prompt, or none.
        seed: Its seed.
    """

    prompt: int | None
    seed: int

    @property
    def stem(self) -> str:
        """The name of its picture, without ending."""
        prefix = "" if self.prompt is None else f"{self.prompt:03d}-"
        return f"{prefix}{self.seed:06d}"

    @classmethod
    def of(cls, stem: str) -> "Item | None":
        """The item whose picture has this name without ending; None for any other name."""
        *prompt, seed = stem.split("-")
        if len(prompt) > 1 or not all(part.isdigit() for part in (*prompt, seed)) or len(seed) < 6:
            return None
        return cls(int(prompt[0]) if prompt else None, int(seed))


@dataclass(frozen=True)
class TextOptions:
    """What is asked of a text-to-image model, resolved."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    guidance: Guidance
    picture: Image | None
    """The picture that image-to-image starts from."""
    strength: float | None
    """The share of the steps that is walked from the picture; None without a picture."""
    protocol: dict[str, Any]
    """The keys of a protocol that say this."""

    def items(self, seeds: Sequence[int]) -> list[Item]:
        """All images: for each prompt one a seed."""
        places = [None] if len(self.prompts) == 1 else range(len(self.prompts))
        return [Item(place, seed) for place in places for seed in seeds]

    def prompt_of(self, item: Item) -> str:
        """The prompt of an item."""
        return self.prompts[item.prompt or 0]

    @property
    def calls_a_step(self) -> int:
        """How often each step evaluates the network."""
        return 2 if is_guided(self.guidance.scale) else 1

    @property
    def scale(self) -> dict[str, float]:
        """What a pipeline's ``warm_up`` needs to know of guidance."""
        return {"guidance_scale": self.guidance.scale}

    def check_picture(self, pipe: Any) -> None:
        """Checks that image-to-image can start from the picture.

        Raises:
            DataError: If it cannot.
        """
        if self.picture is not None:
            try:
                prepare_images(pipe, self.picture)
            except DDIMError as error:
                raise DataError(f"{self.protocol['image']['name']}: {error}") from error

    def draw_options(self, items: Sequence[Item]) -> dict[str, Any]:
        """The options of a pipeline's ``draw`` for these images."""
        prompts = Prompts([self.prompt_of(item) for item in items], self.negative_prompt)
        start = {} if self.picture is None else {"image": self.picture}
        return {"prompts": prompts, "guidance": self.guidance, **start}


def read_text(options: Options, model: FoundModel, *, image: bool = False) -> TextOptions:
    """Resolves the options of a text-to-image model; ``image`` where the request may start from a
    picture.

    Raises:
        DDIMError: If there is no prompt, or an option is out of range.
        DataError: If a file cannot be read.
    """
    if not options.prompt:
        raise DDIMError(
            f"{model.name} makes images of prompts: give --prompt TEXT, or --prompt FILE.txt with "
            "one prompt a line."
        )
    card = read_guidance(model.folder)
    scale, rescale = options.guidance_scale, options.guidance_rescale
    scale = card.get("guidance_scale", 7.5) if scale is None else scale
    rescale = card.get("guidance_rescale", 0.0) if rescale is None else rescale
    guidance = Guidance(scale, rescale)
    refuse_unguided(options, scale)
    prompts = tuple(read_prompts(options.prompt))
    picture = strength = described = None
    if image and options.image is not None:
        path = Path(options.image)
        picture, described = open_picture(path), {"name": path.name, "hash": file_hash([path])}
        strength = 0.8 if options.strength is None else float(options.strength)
    protocol = {
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        "negative_prompt": options.negative_prompt,
        "guidance_scale": scale,
        "guidance_rescale": rescale,
        "image": described,
        "strength": strength,
    }
    negative: str | None = options.negative_prompt
    return TextOptions(prompts, negative, guidance, picture, strength, protocol)
