"""``ddim decode``: turns a code file back into images."""

from ddim.runs.requests import DecodeRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Decodes the code, and says where the pictures are."""
    from ddim.cli.terminal import run_request, say

    outcome = run_request("decode.DecodeJob", request)
    out = outcome.job.folder
    say(
        f"{outcome.made} images decoded in {outcome.record.seconds:.1f} s; they are in {out}, "
        f"together in {out / outcome.job.grid}."
    )
