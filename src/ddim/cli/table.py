"""``ddim table``: measures a model at every eta and number of steps, as the paper's Table 1."""

from ddim.runs.requests import TableRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Measures the cells that are missing in the folder, and says where the table is."""
    from ddim.cli.terminal import counted, run_request, say

    outcome = run_request("table.TableJob", request, show_items=True)
    job = outcome.job
    if job.timed:
        rounds = request.timing_rounds
        say(f"{job.timed} cells timed in turn, the median of {rounds} each.")
    say(
        f"{counted(outcome.made, outcome.there, 'cell', 'measured')}; the table is "
        f"{job.folder / 'table.md'}."
    )
