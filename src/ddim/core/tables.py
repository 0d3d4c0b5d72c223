r"""The levels of a scheduler, twice: as other code reads and replaces them, and as they are used.

diffusers' schedulers hold float32 tables that anybody may edit. Ours are the exact levels, rounded:
as long as they are, the exact levels are used, and otherwise what was put in their place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ddim.core.checks import shown, wrong_argument
from ddim.core.schedule import NoiseSchedule, rescaled
from ddim.errors import DDIMError

__all__ = ["Tables", "gather"]


@dataclass(frozen=True, eq=False)
class Tables:
    """The public tables, float32 on the CPU, and the exact levels behind them, float64.

    Attributes:
        exact: The levels of the betas.
        is_valid: Whether all betas lie in [0, 1]; diffusers accepts others.
        betas: Public, shape [T].
        alphas: Public, 1 - betas.
        alphas_cumprod: Public, alpha_bar of all levels; may be replaced, or edited in place.
        clean: Public, alpha_bar of clean data, shape []; may be replaced or edited too.
        schedule: What the last two mean: ``exact``, unless they were replaced or edited.
        versions: Theirs, when ``schedule`` was read from them; None: not read yet.
        signals: alpha_t and sigma_t of all levels [2, T], by dtype and device.
    """

    exact: NoiseSchedule
    is_valid: bool
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    clean: Tensor
    schedule: NoiseSchedule
    versions: tuple[int, int] | None = None
    signals: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def from_betas(cls, betas: Tensor, *, rescale: bool, set_alpha_to_one: bool) -> "Tables":
        """The tables of betas [T], float64, after a ``rescale`` to zero terminal SNR."""
        is_valid = bool(((betas >= 0) & (betas <= 1)).all())
        betas = rescaled(betas) if rescale else betas
        levels = (1 - betas).cumprod(0)  # not from_betas, which refuses what is no schedule
        exact = NoiseSchedule.unchecked(levels, 1.0 if set_alpha_to_one else float(levels[0]))
        table = exact.alphas_cumprod.float()
        clean = torch.tensor(1.0) if set_alpha_to_one else table[0].clone()
        return cls(exact, is_valid, betas.float(), (1 - betas).float(), table, clean, exact)

    def current(self) -> "Tables":
        """These tables, with the schedule that the public ones mean now."""
        versions = _version(self.alphas_cumprod), _version(self.clean)
        if versions == self.versions:
            return self
        own, clean = self.exact.alphas_cumprod, self.exact.final_alpha_cumprod
        table = self.alphas_cumprod.detach().cpu()
        own_clean = torch.tensor(clean, dtype=torch.float64, device="cpu")
        is_own_clean = _is_rounded(self.clean.detach().cpu(), own_clean)
        schedule = NoiseSchedule.unchecked(
            own if _is_rounded(table, own) else table, clean if is_own_clean else float(self.clean)
        )
        return replace(self, schedule=schedule, versions=versions, signals={})

    def signal_and_noise(
        self, timesteps: int | Sequence[int] | Tensor, x: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and noise in one shape, and the alpha_t and sigma_t that multiply them, computed in
        float64 and rounded once; a DDIMError refuses levels outside [0, T) that the host sees."""
        try:
            given = timesteps
            if not isinstance(given, Tensor):
                given = torch.tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise wrong_argument(
                "timesteps", "be whole numbers, or a tensor of them", timesteps
            ) from None
        t = given.flatten()
        if t.device.type == "cpu" and not is_compiling() and t.numel():
            _check_whole(t)
            _check_inside(t, len(self.schedule))
        try:
            x, noise = torch.broadcast_tensors(x, noise)  # type: ignore[no-untyped-call]
        except RuntimeError:
            shape = list(x.shape)
            raise wrong_argument("noise", f"have the samples' shape {shape}", noise) from None
        if t.numel() > 1 and x.ndim and x.shape[0] == 1:  # one sample at several levels
            x, noise = (y.expand(t.numel(), *y.shape[1:]) for y in (x, noise))
        key = (torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
        table = self.signals.get(key)
        if table is None:
            alpha_bar = self.schedule.alphas_cumprod
            table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]).to(x.device, key[0])
            if not is_compiling():
                self.signals[key] = table
        alpha, sigma = gather(table, t, x)
        return x, noise, alpha, sigma


def _version(table: Tensor) -> int:
    # Inference tensors count no versions: an edit in place shows when the table is next assigned.
    return -1 if table.is_inference() else table._version


def _is_rounded(given: Tensor, exact: Tensor) -> bool:
    return given.shape == exact.shape and torch.equal(given, exact.float().to(given.dtype))


def gather(columns: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The entries at t of each row of [k, T], shaped to multiply x [B, ...]; reads nothing back to
    the host.

    Raises:
        DDIMError: If t is neither one timestep nor one a sample, or a fraction on the CPU; on a
            device a fraction is cut off, since to look at it would wait for the device.
    """
    if t.dtype != torch.int64:
        if t.device.type == "cpu" and not is_compiling():
            _check_whole(t)
        t = t.long()
    if t.device != x.device:
        if t.device.type == "cpu" and not is_compiling():
            _check_inside(t, columns.shape[1])  # on a device it would be too late to say it
        t = t.to(x.device, non_blocking=True)
    if t.numel() == 1:
        return _select(columns, t.reshape(1)).unbind(0)
    if t.shape != x.shape[:1]:
        wanted = f"one timestep, or one for each of the {x.shape[0]} samples"
        raise DDIMError(f"there must be {wanted}; got shape {list(t.shape)}.")
    return _select(columns, t).reshape(columns.shape[0], -1, *[1] * (x.ndim - 1)).unbind(0)


def _select(columns: Tensor, t: Tensor) -> Tensor:
    if is_compiling():
        return columns.index_select(1, t)
    try:
        return columns.index_select(1, t)
    except (IndexError, RuntimeError):  # looked for afterwards, so that a step waits for nothing
        _check_inside(t, columns.shape[1])
        raise


def _check_inside(t: Tensor, total: int) -> None:
    if t.numel() and (int(t.min()) < 0 or int(t.max()) >= total):
        allowed = f"[0, {total}), the levels the model was trained on"
        raise DDIMError(f"timesteps must lie in {allowed}; got {shown(t.tolist())}.")


def _check_whole(t: Tensor) -> None:
    if t.dtype == torch.bool or t.is_complex():
        raise wrong_argument("timesteps", "be whole numbers", t)
    if t.is_floating_point() and not bool((t.isfinite() & (t == t.round())).all()):
        raise wrong_argument("timesteps", "be whole numbers", t.tolist())
