"""The tests above are worth something: a bug that is planted in a copy of the source makes them
fail."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import ddim

TESTS = pathlib.Path(__file__).parent
MUTATIONS = {
    "a wrong sign in the conversion": (
        "core/prediction.py",
        "-sigma / determinant, -p",
        "sigma / determinant, -p",
        "core/test_prediction.py",
    ),
    "a stride instead of a neighbour": (
        "core/timesteps.py",
        "zip(levels, [*levels[1:], end], strict=True)",
        "zip(levels, [t - 1000 // len(levels) for t in levels], strict=True)",
        "core/test_timesteps.py",
    ),
    "alpha instead of alpha-bar": (
        "core/schedule.py",
        "(1 - _as_betas(betas)).cumprod(0)",
        "1 - _as_betas(betas)",
        "core/test_schedule.py",
    ),
    "eta on the variance": (
        "core/step.py",
        "variance = scale**2 *",
        "variance = scale *",
        "core/test_step.py",
    ),
    "no clamp of the direction term": (
        "core/step.py",
        "remainder.clamp(min=0).sqrt()",
        "remainder.sqrt()",
        "core/test_step.py",
    ),
    "noise in the last step of sigma-hat": (
        "core/step.py",
        "torch.where(alpha_bar_s < 1, added, 0.0) if eta == SIGMA_HAT",
        "added if eta == SIGMA_HAT",
        "core/test_step.py",
    ),
    "sigma-hat in the direction term": (
        "core/step.py",
        "remainder = 1 - alpha_bar_s - variance",
        "remainder = 1 - alpha_bar_s - added",
        "core/test_step.py",
    ),
    "the cast before the difference": (
        "core/schedule.py",
        "as_factor((1 - alpha_bar).sqrt(), x0) * noise",
        "(1 - as_factor(alpha_bar, x0)).sqrt() * noise",
        "core/test_schedule.py",
    ),
    "eps not derived again": (
        "core/denoiser.py",
        "if self.clip.rederive_eps else",
        "if not self.clip.rederive_eps else",
        "core/test_sampler.py",
    ),
    "another weight in O-BELM": (
        "inversion/reversible.py",
        "-(1 + rho) * delta[:-1] / here",
        "-(1 + rho**2) * delta[:-1] / here",
        "inversion/test_encoding.py",
    ),
    "a decoder that starts elsewhere": (
        "inversion/codes.py",
        "return (first, *(t for t in asked[1:] if t < first))",
        "return tuple(asked)",
        "inversion/test_encoding.py",
    ),
    "samples solved as a batch": (
        "inversion/ddim.py",
        "lowest > tolerance",
        "lowest > -1",
        "inversion/test_encoding.py",
    ),
    "the two predictions of guidance changed over": (
        "core/guidance.py",
        "_combine(output[count:], output[:count]",
        "_combine(output[:count], output[count:]",
        "core/test_guidance.py",
    ),
    "the rescale to the other prediction": (
        "core/guidance.py",
        "inverse = _inverse_std(conditional)",
        "inverse = _inverse_std(unconditional)",
        "core/test_guidance.py",
    ),
    "a rescale that divides by nothing": (
        "core/guidance.py",
        "x.numel() // size, 1, SMALLEST_STD**2",
        "x.numel() // size, 1, 0.0",
        "core/test_guidance.py",
    ),
    "a path of one length": (
        "core/interpolation.py",
        "((1 - weight) * lengths[0] + weight * lengths[1])",
        "lengths[0]",
        "core/test_interpolation.py",
    ),
}
QUICK = {"alpha instead of alpha-bar"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MUTATIONS]
)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, sound, broken, tests = MUTATIONS[name]
    source, package = pathlib.Path(ddim.__file__).parent, tmp_path / "src" / "ddim"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    text = (package / file).read_text()
    assert text.count(sound) == 1, f"the line to break is not in {file} once"
    (package / file).write_text(text.replace(sound, broken))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"],
        str(TESTS / tests),
    ]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert result.returncode == 1, result.stdout[-2000:]
    assert "failed" in result.stdout
