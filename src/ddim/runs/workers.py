"""Processes on this machine that share the work of one run, as any others might from elsewhere."""

import multiprocessing
import os
import signal
import threading
from contextlib import ExitStack
from multiprocessing import connection
from typing import Any

from ddim.errors import DDIMError
from ddim.runs.engine import Control, Event, Outcome
from ddim.runs.sharing import SharedJob, close_run, open_run, share

__all__ = ["share_among"]

_POLL = 0.2
"""Seconds between two looks at whether the run is to stop."""


def share_among(job: SharedJob) -> Outcome:
    """Starts as many processes as the request says, and waits for them. A process that dies leaves
    its shard to the others.

    Raises:
        DDIMError: What a process raises, or that all have died before the work was done.
    """
    with ExitStack() as stack:
        opened = open_run(job, stack)
        made, drawn, errors, finished = 0, 0.0, list[str](), True
        if opened.there < opened.total:
            spawn, request = multiprocessing.get_context("spawn"), job.request_of_one()
            readers: list[Any] = []
            processes: list[Any] = []
            for place in range(job.request.workers):
                receiving, writer = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_work, args=(type(job), request, place, writer))
                process.start()
                writer.close()
                readers.append(receiving)
                processes.append(process)
            waiting: list[Any] = list(readers)
            try:
                while waiting:
                    for ready in connection.wait(waiting, _POLL):
                        reader: Any = ready
                        try:
                            kind, told = reader.recv()
                        except EOFError:
                            waiting.remove(reader)
                            continue
                        if kind == "made":
                            made += told[1]
                            done = opened.there + made
                            job.control.emit(Event("item", done, opened.total, *told[:1]))
                        elif kind == "ended":
                            drawn += told[0]
                            job.batches_drawn += told[1]
                        else:
                            errors.append(told)
                    if job.control.stopping():
                        finished = False
                        break
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.join()
            _tell(job, errors, [process.exitcode for process in processes], finished=finished)
        return close_run(job, opened, made, drawn, finished=finished)


def _tell(job: SharedJob, errors: list[str], codes: list[int | None], *, finished: bool) -> None:
    """Says what became of processes that ended before their time.

    Raises:
        DDIMError: If work is left, and none was asked to stop.
    """
    is_left = finished and any(job.left(shard) for shard in job.shards)
    if is_left:
        raise DDIMError(
            errors[0]
            if errors
            else f"all {len(codes)} processes ended before the work was done, perhaps for want of "
            "memory; what is done is kept, so run again with fewer --workers."
        )
    died = [code for code in codes if code not in (0, -signal.SIGTERM)]
    if finished and died:
        job.control.note(
            f"{len(died)} of {len(codes)} processes ended before their time (exit codes "
            f"{', '.join(map(str, died))}); the others did their work."
        )


def _work(kind: Any, request: Any, place: int, writer: Any) -> None:
    """A process: takes shards until none is left, and ends when the run ends in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's process answers, and ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    ended = [parent.sentinel]
    threading.Thread(target=lambda: connection.wait(ended) and os._exit(1), daemon=True).start()
    os.environ["LOCAL_RANK"] = str(place)

    def emit(event: Event) -> None:
        if event.state == "item":
            writer.send(("made", (event.item, event.items)))

    try:
        job = kind(request, Control(emit=emit))
        outcome = share(job)
        writer.send(("ended", (outcome.seconds, job.batches_drawn)))
    except DDIMError as error:
        writer.send(("error", str(error)))
        raise SystemExit(2) from None
