"""Codes of images by a pipeline: batch by batch, under the network that a code belongs to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim.core.denoiser import Denoiser
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.inversion.codes import Code, check_origin, decoding_timesteps, fingerprint
from ddim.inversion.encoding import Encoder, decode_trajectory
from ddim.pipelines.base import Callback, Sampling
from ddim.pipelines.networks import weights_of

__all__ = ["Coding"]


class Coding(Sampling):
    """A pipeline that encodes and decodes data of its network."""

    def _encode(
        self,
        x0: Tensor,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        encoder: Encoder,
        *,
        batch_size: int,
        labels: Tensor | None = None,
    ) -> Code:
        """The code of data [B, ...] batch by batch, under the denoiser of each batch's images."""
        if len(x0) == 0 or batch_size < 1:
            raise DDIMError(
                f"there must be images to encode, and batch_size at least 1; got {len(x0)} images, "
                f"batch_size={batch_size}."
            )
        parts, origin, schedule = [], self._origin(), self.noise_schedule
        for first in range(0, len(x0), batch_size):
            chosen = slice(first, first + batch_size)
            part = encoder.encode(
                denoiser(chosen),
                x0[chosen].to(self._execution_device),
                timesteps,
                schedule=schedule,
                labels=None if labels is None else labels[chosen],
                origin=origin,
            )
            parts.append(part)
        self.maybe_free_model_hooks()
        return Code.join(parts)

    def _decode(
        self,
        code: Code,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        *,
        callback: Callback | None,
        progress: bool,
        batch_size: int,
    ) -> Tensor:
        """The data [B, ...] of a code over levels of :meth:`_decoding_timesteps`, under the
        denoiser of each batch's images."""
        finished = []
        for first in range(0, len(code), max(1, batch_size)):
            chosen = slice(first, first + max(1, batch_size))
            part = code[chosen].to(self._execution_device)
            states = decode_trajectory(
                denoiser(chosen), part, schedule=self.noise_schedule, timesteps=timesteps
            )
            x = part.states[-1]
            x = self._walk(states, x, len(timesteps), callback=callback, progress=progress)
            finished.append(x)
        return torch.cat(finished)

    def _decoding_timesteps(
        self,
        code: Code,
        num_inference_steps: int | None,
        *,
        timestep_spacing: Spacing | None,
        timesteps: Sequence[int] | None,
    ) -> list[int]:
        """The levels that a code is decoded over with these options; without any, its own.

        Raises:
            DDIMError: If the code is empty, or of another model or other steps, before anything is
                evaluated.
        """
        if len(code) == 0:
            raise DDIMError("the code holds no images.")
        check_origin(code, self._origin())
        asked = None
        if num_inference_steps is not None or timestep_spacing is not None or timesteps is not None:
            asked = self.select_timesteps(
                num_inference_steps, timestep_spacing=timestep_spacing, timesteps=timesteps, order=1
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
        }
