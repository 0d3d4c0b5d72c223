"""Samples a network of your own: any torch.nn.Module, whatever its arguments are called and scaled
like.

Run: python examples/60_any_module.py
"""

import torch

from ddim import (
    ModelDenoiser,
    NoiseSchedule,
    make_betas,
    sample,
    seeded_randn,
    select_timesteps,
    step_pairs,
)


class MyNetwork(torch.nn.Module):
    """Stands for your network: it wants channels last and the noise level as a number from 0 to 1,
    and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3 + 1, 3)

    def forward(self, *, pixels: torch.Tensor, level: torch.Tensor) -> dict[str, torch.Tensor]:
        told = level.reshape(-1, 1, 1, 1).expand(*pixels.shape[:-1], 1)
        return {"noise": self.mix(torch.cat([pixels, told], dim=-1))}


class Adapter(torch.nn.Module):
    """Ten lines between the two: (x_t [B, C, H, W], t [B]) -> prediction [B, C, H, W]."""

    def __init__(self, network: torch.nn.Module, levels: int) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = self.network(pixels=x_t.permute(0, 2, 3, 1), level=t.to(x_t.dtype) / self.levels)
        return output["noise"].permute(0, 3, 1, 2)


def main() -> torch.Tensor:
    torch.manual_seed(0)
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    denoise = ModelDenoiser(Adapter(MyNetwork(), len(schedule)), schedule, "epsilon")
    pairs = step_pairs(select_timesteps(len(schedule), 10))
    with torch.no_grad():
        images = sample(
            denoise, seeded_randn((3, 16, 16), seeds=range(4)), pairs, schedule=schedule
        )
    print(f"{len(images)} images of {tuple(images.shape[1:])}")
    return images


if __name__ == "__main__":
    main()
