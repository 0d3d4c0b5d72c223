"""``ddim consistency``: compares the images of one latent under other steps and samplers."""

from ddim.runs.requests import ConsistencyRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Draws and measures, and says where the table is."""
    from ddim.cli.terminal import run_request, say

    outcome = run_request("consistency.ConsistencyJob", request, show_items=True)
    say(
        f"{outcome.made} trajectories of {request.count} latents; the table is "
        f"{outcome.job.folder / 'table.md'}, beside a plot and a sheet."
    )
