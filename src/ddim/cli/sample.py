"""``ddim sample``: draws images from a model."""

from ddim.errors import plural
from ddim.runs.requests import SampleRequest as Request

__all__ = ["Request", "run", "savings"]


def run(request: Request) -> None:
    """Draws what is missing in the folder, and says where the images are."""
    from ddim.cli.terminal import counted, run_request, say

    outcome = run_request("sample.SampleJob", request)
    job, out = outcome.job, outcome.job.folder
    others = "seeds" if job.text is None else "seeds or prompts"
    beside = f" {outcome.beside} of other {others} are there too, and not in the grid."
    say(
        f"{counted(outcome.made, outcome.there, 'image', 'drawn')}; they are in {out}, together in "
        f"{out / job.grid}.{beside if outcome.beside else ''}"
    )
    if outcome.made:
        steps, seconds, total = len(job.route), outcome.seconds, len(job.plan.noise_schedule)
        batches = job.batches_drawn
        each = "" if batches == 1 else f"in each of {batches} batches "
        more = savings(seconds, steps=steps, total=total) if request.image is None else ""
        say(
            f"{plural(steps, 'step')} {each}took {seconds:.1f} s, "
            f"{1000 * seconds / batches / steps:.1f} ms a step{more}."
        )


def savings(seconds: float, *, steps: int, total: int) -> str:
    """What all steps would have taken, if that is 10 seconds more at least, and twice the time."""
    whole = seconds / steps * total
    is_worth_it = 2 * steps <= total and whole >= seconds + 10
    return f"; all {total} steps would have taken {whole:.0f} s" if is_worth_it else ""
