"""``ddim status``: how far a run is that processes share."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ddim.cli.terminal import duration, say
from ddim.runs.requests import StatusRequest as Request
from ddim.runs.status import Status, Watch, WorkerStatus

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Prints the state of a folder: once, or on a terminal again and again until all is done."""
    watch = Watch(Path(request.folder))
    status = watch.look()
    if request.json:
        say(json.dumps(asdict(status), indent=2))
        return
    before = 0
    while True:
        lines = [_line(status), *map(_worker_line, status.workers)]
        # Up to the first line of the last look, and all below it cleared.
        again = f"\x1b[{before}A\x1b[J" if before else ""
        say("\n".join(lines), paint=again.__add__)
        before = len(lines)
        is_over = status.is_done or not any(worker.is_present for worker in status.workers)
        if is_over or request.once or not sys.stdout.isatty():
            return
        time.sleep(1)
        status = watch.look()


def _line(status: Status) -> str:
    total = "" if status.total is None else f" of {status.total}"
    rate = "" if status.rate is None else f", {status.rate:.3g} a second"
    left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
    state = "done" if status.is_done else f"{status.in_hand} shards in hand{rate}{left}"
    return f"{status.command}: {status.items}{total} items in {status.shards} shards; {state}"


def _worker_line(worker: WorkerStatus) -> str:
    rate = "" if worker.rate is None else f", {worker.rate:.3g} a second"
    does = f"at {', '.join(worker.in_hand)}" if worker.in_hand else "waiting"
    state = does if worker.is_present else "gone"
    return f"  {worker.name}: {worker.items} items in {worker.shards} shards{rate}; {state}"
