"""A text-conditional network on the latents of an autoencoder, as in Stable Diffusion.

The autoencoder is never trained, and the text encoder only if that is asked for. A latent is drawn
from the autoencoder's posterior anew at every step; the draw follows from the seed and the step, as
all noise of a run."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ddim.core.guidance import guided
from ddim.data.batches import pick
from ddim.data.dataset import ImageData
from ddim.errors import DDIMError
from ddim.files import replacing
from ddim.models.checkpoints import check_finite, load_network
from ddim.models.folder import part_names
from ddim.training.base import Base, has_plain_weights, load_part
from ddim.training.config import TrainConfig
from ddim.training.draws import Draws, Loadable, collate
from ddim.training.network import (
    Ends,
    check_text_network,
    latent_factor,
    make_text_network,
    resolution_for,
)
from ddim.training.package import Package, make_scheduler
from ddim.training.stopping import Stopped, ignore_signals
from ddim.training.subject import Predictor, mirror, to_float

__all__ = ["Captions", "TextSubject", "TrainedAlong", "text_subject"]

_MOST_EMBEDDINGS = 2**30  # bytes; above, each batch embeds its own captions
_EMPTY = 0  # the row of the empty prompt among the captions


class TrainedAlong(nn.Module):
    """A network and the text encoder that is trained with it, as one module: (x_t, t, tokens) ->
    prediction."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Any:
        embedded = self.text_encoder(tokens)[0]
        return self.unet(x_t, t, encoder_hidden_states=embedded, return_dict=False)


@dataclass(frozen=True, eq=False)
class Captions:
    """The distinct captions of a data set, tokenised once."""

    texts: list[str]
    """The empty prompt, then each caption once."""
    rows: Tensor
    """The caption of each image, shape [N]."""
    tokens: Tensor
    """Shape [len(texts), L]."""
    cut: int
    """Number of images whose caption is longer than L tokens."""


@dataclass(frozen=True, eq=False)
class _Indexed:
    """Images, or cached posteriors [mirrored or not, mean or std, C, H, W], with their indices."""

    items: ImageData | Tensor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        return item if isinstance(item, Tensor) else item[0], index

    def crop(self, index: int, seed: int) -> tuple[Tensor, int]:
        """An image, cut at a place that follows from the seed."""
        assert isinstance(self.items, ImageData)  # the configuration refuses both
        return self.items.crop(index, seed)[0], index


@dataclass(frozen=True, eq=False)
class TextSubject:
    """A text-conditional network on latents, with the frozen parts that its condition and its
    pictures need."""

    config: TrainConfig
    data: ImageData
    network: nn.Module
    package: Package
    vae: Any
    text_encoder: Any
    captions: Captions
    shape: tuple[int, int, int]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    embeddings: Tensor | None = None
    moments: Tensor | None = None

    @property
    def examples(self) -> Any:
        return _Indexed(self.data if self.moments is None else self.moments)

    def prepared(
        self, accelerator: Accelerator, cache: Path, check: Callable[[], None]
    ) -> "TextSubject":
        """Moves the frozen parts to the device, embeds all captions if they fit, and encodes all
        images if their latents are to be cached.

        In memory, each process holds all posteriors. On the disk, all processes map the file that
        the first one writes. Its name is removed at once, so that the space is freed however the
        run ends."""
        self.vae.to(accelerator.device)
        self.text_encoder.to(accelerator.device)
        captions = replace(self.captions, tokens=self.captions.tokens.to(accelerator.device))
        embeddings = self._embed_all(captions.tokens, check)
        moments = self._encode_all(accelerator, cache, check)
        return replace(self, captions=captions, embeddings=embeddings, moments=moments)

    def clean(
        self, batch: list[Tensor], device: torch.device, draws: Draws | None
    ) -> tuple[Tensor, Tensor]:
        """Returns latents drawn from their posteriors (or their means, without ``draws``), and the
        rows of their captions."""
        items, index = batch
        flip = None
        if draws is not None and self.config.horizontal_flip:
            flip = mirror(len(items), draws, device)
        items = items.to(device, non_blocking=True)
        if self.moments is None:
            pixels = to_float(items)
            pixels = pixels if flip is None else torch.where(flip, pixels.flip(-1), pixels)
            mean, std = self._posterior(pixels)
        else:
            plain = items[:, 0]
            both = plain if flip is None else torch.where(flip[..., None], items[:, 1], plain)
            mean, std = both.unbind(1)
        rows = self.captions.rows[index]
        if draws is not None:
            count, shape = len(rows), mean.shape[1:]
            latents, captions = draws.stream(6), draws.stream(7)
            noise = draws.own(count, lambda n: torch.randn((n, *shape), generator=latents))
            chance = draws.own(count, lambda n: torch.rand(n, generator=captions))
            mean = mean + std * noise.to(device)
            rows = torch.where(chance < self.config.caption_dropout, _EMPTY, rows)
        return mean * self.vae.config.scaling_factor, rows.to(device, non_blocking=True)

    def predictor(self, network: Callable[..., Any], condition: Tensor) -> Predictor:
        tokens = self.captions.tokens[condition]
        if self.config.train_text_encoder:
            return lambda x_t, t: network(x_t, t, tokens)[0].float()
        embedded = self._embed(tokens) if self.embeddings is None else self.embeddings[condition]
        options = {"encoder_hidden_states": embedded, "return_dict": False}
        return lambda x_t, t: network(x_t, t, **options)[0].float()

    def preview(
        self, network: nn.Module, count: int, device: torch.device
    ) -> tuple[Predictor, list[str]]:
        """Guides by captions that are picked from all there are."""
        total = len(self.captions.texts) - 1
        chosen = [1 + row for row in pick(total, count)] or [_EMPTY]
        rows = torch.tensor([chosen[i % len(chosen)] for i in range(count)])

        def conditioned(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.predictor(network, condition)(x_t, t)

        empty, scale = torch.full_like(rows, _EMPTY), self.config.preview_guidance_scale
        predict = guided(conditioned, rows.to(device), empty.to(device), scale=scale)
        return predict, [self.captions.texts[int(row)] for row in rows]

    def images(self, x0: Tensor) -> Tensor:
        """Decodes latents one by one, since an autoencoder takes more memory than the network."""
        latents = torch.split(x0 / self.vae.config.scaling_factor, 1)
        return torch.cat([self.vae.decode(x, return_dict=False)[0] for x in latents])

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):  # which the network is called in
            hidden: Tensor = self.text_encoder(tokens)[0]
        return hidden

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        return posterior.mean, posterior.std

    def _embed_all(self, tokens: Tensor, check: Callable[[], None]) -> Tensor | None:
        count, length = tokens.shape
        size = count * length * self.text_encoder.config.hidden_size * 4
        if self.config.train_text_encoder or size > _MOST_EMBEDDINGS or count > self.config.images:
            return None
        embedded = []
        with contextlib.suppress(Stopped):
            for part in torch.split(tokens, 256):
                check()
                embedded.append(self._embed(part))
        return torch.cat(embedded) if embedded else None

    def _encode_all(
        self, accelerator: Accelerator, cache: Path, check: Callable[[], None]
    ) -> Tensor | None:
        """The posteriors of all images: [N, mirrored or not, mean or std, C, H, W], float32."""
        shape = (len(self.data), 2 if self.config.horizontal_flip else 1, 2, *self.shape)
        if self.config.cache_latents == "no":
            return None
        if self.config.cache_latents == "memory":
            moments = torch.empty(shape)
            with contextlib.suppress(Stopped):
                for first, part in self._encoded(accelerator.device, check):
                    moments[first : first + len(part)] = part
            return moments
        if accelerator.is_main_process:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with (
                contextlib.suppress(Stopped),
                replacing(cache) as partial,
                partial.open("wb") as file,
            ):
                for _, part in self._encoded(accelerator.device, check):
                    file.write(part.numpy().tobytes())
        accelerator.wait_for_everyone()
        if not cache.exists():
            return None
        size, float32 = math.prod(shape), torch.float32
        mapped = torch.from_file(str(cache), shared=False, size=size, dtype=float32).view(shape)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            cache.unlink()
        return mapped

    def _encoded(
        self, device: torch.device, check: Callable[[], None]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields posteriors batch by batch on the CPU, each with the index of its first image."""
        loader: DataLoader[Any] = DataLoader(
            Loadable(_Indexed(self.data)),
            batch_size=self.config.batch_size,
            num_workers=self.config.workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
        )
        for batch in loader:
            check()
            if isinstance(batch, DDIMError):
                raise batch
            images, indices = batch
            pixels = to_float(images.to(device, non_blocking=True))
            views = (pixels, pixels.flip(-1)) if self.config.horizontal_flip else (pixels,)
            moments = [torch.stack(self._posterior(view), 1) for view in views]
            yield int(indices[0]), torch.stack(moments, 1).float().cpu()


def text_subject(config: TrainConfig, data: ImageData, base: Base) -> TextSubject:
    """Makes a base in Stable Diffusion's format ready to be trained on captioned images.

    Raises:
        DDIMError: If base, data and configuration do not fit together; the message says what to do.
    """
    if config.class_conditional:
        raise DDIMError(
            f"{base.name} is a text model, which knows captions and no classes; leave out "
            "--class-conditional."
        )
    if config.clip_sample is not None:
        raise DDIMError(
            f"{base.name} draws latents, which have no range to be clipped to; leave out "
            "--clip-sample."
        )
    names = ("vae", "text_encoder", "tokenizer")
    vae, text_encoder, tokenizer = (load_part(base, name) for name in names)
    vae.requires_grad_(False).eval()
    text_encoder.requires_grad_(config.train_text_encoder).train(config.train_text_encoder)
    shape = _latent_shape(config, data, base, vae)
    torch.manual_seed(config.seed)  # for initial weights and dropout; the run owns its process
    ends = Ends(shape, latent_factor(vae.config), int(text_encoder.config.hidden_size))
    is_new = config.from_scratch
    unet = make_text_network(config, base, ends) if is_new else load_network(base.folder)
    check_finite(base.name, dict(unet.named_parameters()))
    check_text_network(unet, base, ends)
    unet.train().to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if config.train_text_encoder:  # transformers 5 has renamed the method
            enable = getattr(text_encoder, "activation_checkpointing_enable", None)
            (enable or text_encoder.gradient_checkpointing_enable)()
    captions = _tokenise(list(data.captions or ()), tokenizer, text_encoder)
    package, notes = _package(config, base)
    if captions.cut:
        notes += (
            f"{captions.cut} of {len(data)} captions are longer than the "
            f"{captions.tokens.shape[1]} tokens that {base.name} reads, and are cut there.",
        )
    facts = {"captions": len(captions.texts) - 1, "captions_cut": captions.cut}
    network = TrainedAlong(unet, text_encoder) if config.train_text_encoder else unet
    return TextSubject(
        config, data, network, package, vae, text_encoder, captions, shape, facts, notes
    )


def _package(config: TrainConfig, base: Base) -> tuple[Package, tuple[str, ...]]:
    """Returns the content of the model's folder, and notes on parts of the base that are left
    out."""
    trained = ("unet", "text_encoder") if config.train_text_encoder else ("unet",)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    frozen: dict[str, Path] = {}
    notes: tuple[str, ...] = ()
    listed = part_names(base.index)
    for name, value in base.index.items():
        folder = base.folder / name
        if name.startswith("_") or name == "scheduler":
            continue
        is_part = name in listed and name not in trained
        is_pickled = any(folder.glob("*.bin")) and not has_plain_weights(folder)
        if is_part and is_pickled:
            notes += (f"the {name} of {base.name} has pickled weights alone, and is left out.",)
        if is_part and (is_pickled or not folder.is_dir()):
            index[name] = [None, None]
        else:
            index[name] = value
            frozen |= {name: folder} if is_part else {}
    if index["safety_checker"][0] is None:
        index["requires_safety_checker"] = False

    def parts(module: Any) -> dict[str, Any]:
        is_alone = not config.train_text_encoder
        return {"unet": module} if is_alone else {name: getattr(module, name) for name in trained}

    scheduler = make_scheduler(config, {**base.scheduler, "steps_offset": 1, "clip_sample": False})
    return Package(index, scheduler, parts, frozen), notes


def _latent_shape(
    config: TrainConfig, data: ImageData, base: Base, vae: Any
) -> tuple[int, int, int]:
    factor, (height, width) = latent_factor(vae.config), data.resolution
    if data.channels != vae.config.in_channels:
        raise DDIMError(
            f"the autoencoder of {base.name} takes {vae.config.in_channels} channel(s), and the "
            f"images have {data.channels}; use --channels {vae.config.in_channels}."
        )
    if height % factor or width % factor:
        usable = resolution_for(config, base, data.resolution)
        raise DDIMError(
            f"images of {width}x{height} (width x height) cannot be made into latents: the "
            f"autoencoder of {base.name} divides by {factor}; use --resolution {usable}."
        )
    return (int(vae.config.latent_channels), height // factor, width // factor)


def _tokenise(captions: list[str], tokenizer: Any, text_encoder: Any) -> Captions:
    length = min(int(tokenizer.model_max_length), int(text_encoder.config.max_position_embeddings))
    numbers = {text: row for row, text in enumerate(dict.fromkeys(["", *captions]))}
    texts = list(numbers)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length).input_ids
    tokens = torch.tensor(encoded, dtype=torch.int64)
    whole = tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
    long = torch.tensor([len(ids) > length for ids in whole])
    rows = torch.tensor([numbers[text] for text in captions], dtype=torch.int64)
    return Captions(texts, rows, tokens, int(long[rows].sum()))
