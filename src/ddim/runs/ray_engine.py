"""Ray as the engine: the same shards, drawn by actors of a cluster.

An actor holds a job with its model, and takes the shards that it is given by the same leases as any
other process, so that the files and the records are the same, and others may work beside the
cluster. Ray restarts an actor that dies, and gives its shard out again. All machines see the folder
under one path, and have this package.
"""

import os
from contextlib import ExitStack
from typing import Any

import torch

from ddim.errors import DDIMError
from ddim.runs.engine import Control, Event, Outcome
from ddim.runs.sharing import SharedJob, close_run, make_shards, open_run

__all__ = ["share_among"]


class _Actor:
    """A process of the cluster, with the model of the run."""

    def __init__(self, kind: Any, request: Any) -> None:
        self.job: SharedJob = kind(request, Control())
        if (threads := request.threads) is not None:
            torch.set_num_threads(threads)

    def make(self, numbers: list[int]) -> tuple[int, float, int]:
        """Makes shards; returns the items that were made, the seconds of sampling, and batches."""
        before = self.job.batches_drawn
        made = list(make_shards(self.job, numbers))
        batches = self.job.batches_drawn - before
        return sum(m.items for m in made), sum(m.seconds for m in made), batches


def share_among(job: SharedJob) -> Outcome:
    """Has a cluster make the shards of a job: that of ``--ray-address``, or an embedded one.

    Raises:
        DDIMError: If Ray is not installed or not reached, or what an actor raises.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a run
    try:
        import ray
        import ray.util
    except ImportError:
        raise DDIMError(
            "--engine ray needs Ray, which is not installed; run: pip install 'ddim[ray]'."
        ) from None
    with ExitStack() as stack:
        opened = open_run(job, stack)
        made, drawn, finished = 0, 0.0, True
        left = [n for n, shard in enumerate(job.shards) if job.left(shard)]
        if left:
            _connect(ray, job.request.ray_address)
            stack.callback(ray.shutdown)
            pool = ray.util.ActorPool(_actors(ray, job, len(left)))
            results = pool.map_unordered(lambda actor, n: actor.make.remote([n]), left)
            try:
                for items, seconds, batches in results:
                    made, drawn = made + items, drawn + seconds
                    job.batches_drawn += batches
                    done = opened.there + made
                    job.control.emit(Event("item", done, opened.total, items=items))
                    if job.control.stopping():
                        finished = False
                        break
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DDIMError):
                    raise DDIMError(str(error.cause)) from None
                raise
            except ray.exceptions.RayActorError as error:
                reason = str(error).strip().splitlines()[0]
                raise DDIMError(f"the cluster lost its actors ({reason}); run again.") from error
        return close_run(job, opened, made, drawn, finished=finished)


def _connect(ray: Any, address: str | None) -> None:
    """Joins a cluster, or starts one in this process."""
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"the cluster at {address}" if address else "an embedded cluster"
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DDIMError(f"{where} cannot be reached ({reason}); check --ray-address.") from error


def _actors(ray: Any, job: SharedJob, shards: int) -> list[Any]:
    """One actor a GPU of the cluster, or one a CPU, but no more than shards or ``--workers``."""
    found = ray.cluster_resources()
    gpus, threads = int(found.get("GPU", 0)), job.protocol.get("threads") or 1
    count = gpus or max(1, int(found.get("CPU", 1)) // threads)
    count = min(count, shards, job.request.workers if job.request.workers > 1 else count)
    needs = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": threads}
    lives: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(**needs, **lives)(_Actor)
    request = job.request_of_one()
    return [actor.remote(type(job), request) for _ in range(count)]
