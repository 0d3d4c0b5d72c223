"""``ddim encode``: turns images into codes."""

from ddim.runs.requests import EncodeRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Encodes the images, and says how well that went."""
    from ddim.cli.terminal import run_request, say, unsolved_note

    is_divided = request.shard_size is not None
    outcome = run_request(f"encode.{'EncodeFolderJob' if is_divided else 'EncodeJob'}", request)
    job, record = outcome.job, outcome.record
    rows = record.results
    sizes = [row.get("images", 1) for row in rows]
    rms = sum(row["rms"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    residuals = [r.get("residual", r.get("residual_max")) for r in rows]
    solved = [value for value in residuals if value is not None]
    worst = f" The worst step is solved to {max(solved):.1e}." if solved else ""
    there = f" ({outcome.there} of them were there)" if outcome.there else ""
    say(
        f"{sum(sizes)} images encoded{there} by {job.method} in {record.evaluations:.4g} "
        f"evaluations each and {record.seconds:.1f} s; the root mean square of the codes is "
        f"{rms:.2f} (noise: 1).{worst}{unsolved_note(job.unsolved)} The "
        f"{'codes are in' if is_divided else 'code is'} {job.folder}."
    )
