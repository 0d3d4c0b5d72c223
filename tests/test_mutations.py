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
        "prediction.py",
        "-sigma / determinant, -p",
        "sigma / determinant, -p",
        "test_prediction.py",
    ),
    "a stride instead of a neighbour": (
        "timesteps.py",
        "zip(levels, [*levels[1:], end], strict=True)",
        "zip(levels, [t - 1000 // len(levels) for t in levels], strict=True)",
        "test_timesteps.py",
    ),
    "alpha instead of alpha-bar": (
        "schedule.py",
        "(1 - given).cumprod(0)",
        "1 - given",
        "test_schedule.py",
    ),
    "eta on the variance": (
        "step.py",
        "variance = scale**2 *",
        "variance = scale *",
        "test_step.py",
    ),
    "no clamp of the direction term": (
        "step.py",
        "remainder.clamp(min=0).sqrt()",
        "remainder.sqrt()",
        "test_step.py",
    ),
    "sigma-hat in the direction term": (
        "step.py",
        "remainder = 1 - alpha_bar_s - variance",
        "remainder = 1 - alpha_bar_s - added",
        "test_step.py",
    ),
    "the cast before the difference": (
        "schedule.py",
        "match((1 - alpha_bar).sqrt(), x0) * noise",
        "(1 - match(alpha_bar, x0)).sqrt() * noise",
        "test_schedule.py",
    ),
    "eps not derived again": (
        "denoiser.py",
        "if self.clip.rederive_eps else",
        "if not self.clip.rederive_eps else",
        "test_sampler.py",
    ),
    "another weight in O-BELM": (
        "reversible.py",
        "-(1 + rho) * delta[:-1] / here",
        "-(1 + rho**2) * delta[:-1] / here",
        "test_encoding.py",
    ),
    "a decoder that starts elsewhere": (
        "encoding.py",
        "return (first, *(t for t in asked[1:] if t < first))",
        "return tuple(asked)",
        "test_encoding.py",
    ),
    "samples solved as a batch": (
        "inversion.py",
        "take = (residual < lowest) & (lowest > tolerance)",
        "take = residual < lowest",
        "test_encoding.py",
    ),
    "the two predictions of guidance changed over": (
        "guidance.py",
        "without, under = network_output",
        "under, without = network_output",
        "test_guidance.py",
    ),
    "the rescale to the other prediction": (
        "guidance.py",
        "_inverse_std(combined), _inverse_std(conditional)",
        "_inverse_std(combined), _inverse_std(unconditional)",
        "test_guidance.py",
    ),
    "a rescale that divides by nothing": (
        "guidance.py",
        "SMALLEST_STD**2)[2]",
        "0.0)[2]",
        "test_guidance.py",
    ),
    "a path of one length": (
        "interpolation.py",
        "((1 - weight) * lengths[0] + weight * lengths[1])",
        "lengths[0]",
        "test_interpolation.py",
    ),
}
QUICK = {
    "a wrong sign in the conversion",
    "a stride instead of a neighbour",
    "alpha instead of alpha-bar",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MUTATIONS]
)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, sound, broken, tests = MUTATIONS[name]
    package = tmp_path / "src" / "ddim"
    package.mkdir(parents=True)
    for path in pathlib.Path(ddim.__file__).parent.glob("*.py"):
        shutil.copy(path, package)
    text = (package / file).read_text()
    assert text.count(sound) == 1, f"the line to break is not in {file} once"
    (package / file).write_text(text.replace(sound, broken))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TESTS / tests),
    ]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert result.returncode == 1, result.stdout[-2000:]
    assert "failed" in result.stdout
