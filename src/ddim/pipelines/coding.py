"""Codes of images by a pipeline: batch by batch, under the network that a code belongs to."""

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import check_whole
from ddim.core.denoiser import Denoiser
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.inversion.codes import (
    Code,
    check_origin,
    decoding_timesteps,
    fingerprint,
    warn_of_other_batches,
    warn_of_rms,
)
from ddim.inversion.encoding import Encoder, decode_trajectory
from ddim.models.folder import lasting_options
from ddim.pipelines.base import Callback, Sampling
from ddim.pipelines.networks import weights_of
from ddim.pipelines.routing import RouteOptions

__all__ = ["Coding"]


class Coding(Sampling):
    """A pipeline that encodes and decodes data of its network."""

    def _encodable_timesteps(
        self, steps: int | None, spacing: Spacing | None, timesteps: Sequence[int] | None
    ) -> list[int]:
        """The levels that images are encoded over with these options, checked."""
        given = RouteOptions(timestep_spacing=spacing, timesteps=timesteps)
        given |= RouteOptions(encodable=True, order=1, clip="none")
        return self.route(steps, **given).timesteps

    def _encode(
        self,
        x0: Tensor,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        encoder: Encoder,
        batch_size: int,
        labels: Tensor | None = None,
    ) -> Code:
        """The code of data [B, ...] batch by batch, under the denoiser of each batch's images."""
        batch_size = check_whole("batch_size", batch_size, least=1, most=MOST_IMAGES)
        if len(x0) == 0:
            raise DDIMError("there must be images to encode; got none.")
        parts, origin, schedule = [], self._origin(), self.noise_schedule
        for first in range(0, len(x0), batch_size):
            chosen = slice(first, first + batch_size)
            x, denoise = x0[chosen].to(self._execution_device), denoiser(chosen)
            code = encoder.encode(denoise, x, timesteps, schedule=schedule, origin=origin)
            parts.append(code if labels is None else replace(code, labels=labels[chosen]))
        self.maybe_free_model_hooks()
        code = replace(Code.join(parts), batch_size=min(batch_size, len(x0)))
        warn_of_rms(code)
        return code

    def _decode(
        self,
        code: Code,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        callback: Callback | None,
        progress: bool,
        batch_size: int,
    ) -> Tensor:
        """The data [B, ...] of a code over levels of :meth:`_decoding_timesteps`, under the
        denoiser of each batch's images."""
        size = check_whole("batch_size", batch_size, least=1, most=MOST_IMAGES)
        finished, schedule = [], self.noise_schedule
        warn_of_other_batches(code, min(size, len(code)))
        for first in range(0, len(code), size):
            chosen = slice(first, first + size)
            part, denoise = code[chosen].to(self._execution_device), denoiser(chosen)
            states = decode_trajectory(denoise, part, schedule=schedule, timesteps=timesteps)
            x = self._walk(states, part.states[-1], len(timesteps), callback, progress)
            finished.append(x)
        return torch.cat(finished)

    def _decoding_timesteps(
        self,
        code: Code,
        steps: int | None,
        spacing: Spacing | None,
        timesteps: Sequence[int] | None,
    ) -> list[int]:
        """The levels that a code is decoded over with these options; without any, its own. A
        DDIMError refuses an empty code, another model's, and steps that are not the code's."""
        if len(code) == 0:
            raise DDIMError("the code holds no images.")
        check_origin(code, self._origin())
        asked = None
        if any(option is not None for option in (steps, spacing, timesteps)):
            asked = self.select_timesteps(
                steps, timestep_spacing=spacing, timesteps=timesteps, order=1
            )
        levels = list(decoding_timesteps(code, asked, schedule=self.noise_schedule))
        self.route(timesteps=levels, order=1, clip="none")
        return levels

    def _origin(self) -> dict[str, str]:
        """What a code depends on beside its own options."""
        schedule = self.noise_schedule
        final = torch.tensor([schedule.final_alpha_cumprod], dtype=torch.float64)
        levels = torch.cat([schedule.alphas_cumprod, final])
        return {
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "network": fingerprint(weights_of(self.unet)),
            "schedule": f"{fingerprint(levels)} {self._options.prediction_type}",
            "network configuration": _settings(self.unet),
            **self._origin_of_parts(),
        }

    def _origin_of_parts(self) -> dict[str, str]:
        """What a code depends on beside the network and its schedule."""
        origin = {}
        for name, attribute in (("autoencoder", "vae"), ("text encoder", "text_encoder")):
            if (part := getattr(self, attribute, None)) is not None:
                origin[name] = f"{fingerprint(weights_of(part))} {_settings(part)}"
        if (tokenizer := getattr(self, "tokenizer", None)) is not None:
            read = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
            origin |= {"tokenizer": _hash(read), "tokenizer's rules": _hash(_rules(tokenizer))}
        return origin


def _rules(tokenizer: Any) -> Any:
    """How a tokenizer makes tokens of a text, beside its vocabulary: all that its files say."""
    special = [tokenizer.pad_token_id, tokenizer.padding_side]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        with tempfile.TemporaryDirectory() as folder:
            files = map(Path, tokenizer.save_vocabulary(folder))
            return [special, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    rules = json.loads(backend.to_str())
    for name in ("version", "padding", "truncation"):  # the last two are those of the last call
        rules.pop(name, None)
    model = rules["model"]
    model.pop("vocab", None)
    # Libraries write a merge as "a b" or as ["a", "b"].
    merges = model.get("merges") or ()
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return [special, rules]


# What the shapes of a text encoder's weights do not tell of it.
_OF_TEXT = ("hidden_act", "layer_norm_eps", "num_attention_heads")


def _settings(part: Any) -> str:
    """The fingerprint of a part's configuration: of a network of diffusers, what is not at its
    default, since later versions have further options."""
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        known = inspect.signature(type(part).__init__).parameters
        defaults = {name: _text(option.default) for name, option in known.items()}
        options = lasting_options(config).items()
        given = {name: value for name, value in options if defaults.get(name) != _text(value)}
    else:
        given = {name: getattr(config, name, None) for name in _OF_TEXT}
    return _hash(given)


def _hash(content: Any) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()[:16]


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)
