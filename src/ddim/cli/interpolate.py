"""``ddim interpolate``: draws the path between two images or seeds, or the grid between four."""

from ddim.runs.requests import InterpolateRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Draws the path, and says where it is and how the latents on it compare with noise."""
    from ddim.cli.terminal import run_request, say, unsolved_note

    outcome = run_request("interpolate.InterpolateJob", request)
    job = outcome.job
    say(
        f"{len(job.rms)} pictures in {outcome.record.seconds:.1f} s; they are in "
        f"{job.folder / job.items[0]}; the root mean square of the latents is {min(job.rms):.2f} "
        f"to {max(job.rms):.2f} (noise: 1).{unsolved_note(len(job.unsolved))}"
    )
