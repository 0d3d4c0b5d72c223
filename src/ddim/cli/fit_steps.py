"""``ddim fit-steps``: fits the timesteps of a few steps to a model."""

from ddim.runs.requests import FitStepsRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Fits, prints the comparison, and says how to draw with the result."""
    from ddim.cli.terminal import run_request, say

    outcome = run_request("fit_steps.FitStepsJob", request)
    job, fit, out = outcome.job, outcome.job.fit, outcome.job.folder
    say(f"{'timesteps':10s} {'ODE error':>10s}   {fit.name} / this one, with its 95 % interval")
    for row in outcome.record.results:
        error, ratio = row["ode_error"]["mean"], row["ratio"]
        interval = f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        say(f"{row['name']:10s} {error:10.2e}   {interval}")
    say(
        f"The best of them, {fit.name}, is in {out}: {', '.join(map(str, fit.timesteps))}; found "
        f"in {outcome.record.seconds:.0f} s."
    )
    more = "" if job.text is None else " --prompt PROMPT"
    order = job.protocol["order"]
    say(f"Draw with them: ddim sample {request.model} --order {order} --timesteps {out}{more}")
