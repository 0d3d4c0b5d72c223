"""``ddim encode``: turns images into a code file."""

from ddim.runs.requests import EncodeRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Encodes the images, and says how well that went."""
    from ddim.cli.terminal import run_request, say, unsolved_note

    outcome = run_request("codes.EncodeJob", request)
    job, record = outcome.job, outcome.record
    rms = [row["rms"] for row in record.results]
    residuals = [row["residual"] for row in record.results if "residual" in row]
    worst = f" The worst step is solved to {max(residuals):.1e}." if residuals else ""
    say(
        f"{len(rms)} images encoded by {job.method} in {record.evaluations:.4g} evaluations "
        f"each and {record.seconds:.1f} s; the root mean square of the codes is "
        f"{sum(rms) / len(rms):.2f} (noise: 1).{worst}{unsolved_note(job.unsolved)} The code is "
        f"{job.folder}."
    )
