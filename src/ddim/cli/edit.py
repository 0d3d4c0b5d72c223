"""``ddim edit``: edits a picture by words, through its code."""

from ddim.runs.requests import EditRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Draws the picture before and after, and says where they are."""
    from ddim.cli.terminal import run_request, say

    outcome = run_request("edit.EditJob", request)
    job = outcome.job
    say(
        f"Edited in {outcome.record.seconds:.1f} s, in codes by {job.method}: "
        f"{', '.join(str(job.folder / name) for name in job.items)}."
    )
