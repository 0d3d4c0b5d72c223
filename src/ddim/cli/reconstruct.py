"""``ddim reconstruct``: measures how images come back from their codes, as the paper's Table 2."""

from ddim.runs.requests import ReconstructRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Measures what is missing in the folder, and says where the table is."""
    from ddim.cli.terminal import counted, run_request, say

    outcome = run_request("reconstruct.ReconstructJob", request, show_items=True)
    there = outcome.there + outcome.beside
    say(
        f"{counted(outcome.made, there, 'cell', 'measured')}; the table is "
        f"{outcome.job.folder / 'table.md'}, beside a plot and a sheet."
    )
