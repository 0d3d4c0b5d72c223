"""``ddim evaluate``: measures images, or a model's, against real ones."""

from ddim.runs.requests import EvaluateRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Measures, and prints the numbers."""
    from ddim.cli.terminal import run_request, say
    from ddim.evaluation.protocol import Result
    from ddim.evaluation.report import spread_text, text_table, value_text

    outcome = run_request("evaluate.EvaluateJob", request)
    job = outcome.job
    rows = [["metric", "value", "spread", "real images"]]
    for row in outcome.record.results:
        result = Result(**row)
        numbers = [value_text(result), spread_text(result), f"{result.floor:.4g}"]
        rows.append([result.metric, *numbers])
    say(text_table(rows), end="")
    say(
        f"{job.count} images against {len(job.real)} of {request.reference} "
        f"({request.split}); the record is in {job.folder / 'run.json'}."
    )
