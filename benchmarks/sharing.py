"""What sharing a folder costs, with a network that costs nothing: leases a second, memory, and the
share of a shard's time that is not drawing.

    python benchmarks/sharing.py leases --processes 32 --shards 2000
    python benchmarks/sharing.py memory --count 10000
    python benchmarks/sharing.py memory --count 1000000
    python benchmarks/sharing.py overhead
    python benchmarks/sharing.py efficiency
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from ddim.runs.engine import Control, execute
from ddim.runs.leases import Leases
from ddim.runs.requests import SampleRequest
from ddim.runs.sample import SampleJob
from ddim.runs.shards import read_records


class FreeJob(SampleJob):
    """Draws in no time: every picture is one grey square."""

    def prepare(self) -> None:
        """Loads no weights."""

    def start(self) -> None:
        self.size = self.request.batch_size

    def _draw(self, batch):
        return [Image.new("L", (8, 8), 128)] * len(batch), 0.0

    def finish(self, rows) -> None:
        """Makes no grid."""


def draw(folder: str, count: int, size: int, store: str) -> None:
    given = {"count": count, "shard_size": size, "store": store, "batch_size": size}
    execute(FreeJob(SampleRequest(out=folder, steps=1, **given), Control()))


def worker(folder: str, shards: int, taken, begin) -> None:
    """Takes leases and writes records as a run does, and nothing else."""
    leases, mine = Leases(Path(folder)), []
    begin.wait()
    for number in range(shards):
        done = Path(folder, f"{number}.done")
        if done.exists():
            continue
        with leases.held(str(number)) as lease:
            if lease is not None and not done.exists():
                done.touch()
                mine.append((number, lease.stolen))
    taken.put(mine)


def measure_leases(processes: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")  # 32 imports of torch would be most of it
        taken, begin = fork.Queue(), fork.Barrier(processes + 1)
        args = (folder, shards, taken, begin)
        started = [fork.Process(target=worker, args=args) for _ in range(processes)]
        for process in started:
            process.start()
        begin.wait()
        began = time.perf_counter()
        found = [item for _ in started for item in taken.get()]
        took = time.perf_counter() - began
        for process in started:
            process.join()
    counted = Counter(number for number, _ in found)
    print(
        f"{processes} processes, {shards} shards: {shards / took:.0f} leases a second; lost "
        f"{shards - len(counted)}, double {sum(n - 1 for n in counted.values())}, stolen "
        f"{sum(stolen for _, stolen in found)}"
    )


def measure_memory(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        draw(folder, count, 1000, "npz")
        took = time.perf_counter() - began
        shards = len(read_records(Path(folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} images in {shards} shards: peak {peak:.0f} MiB, {count / took:.0f} images/s")


def measure_overhead() -> None:
    """The share of a real run's shards that is not the sampling loop, by their records."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddim", "sample", "--count", "192", "--steps", "10"]
        command += ["--shard-size", "64", "--store", "webdataset", "--out", folder]
        subprocess.run(command, check=True, capture_output=True)
        records = read_records(Path(folder))
        parts = [1 - record.seconds / record.seconds_total for record in records]
    print(json.dumps({"shards": len(records), "not drawing": [round(p, 4) for p in parts]}))


def measure_efficiency(rounds: int) -> None:
    """Images a second of two workers of a thread each, beside one worker of two threads and one of
    one, in turn; by the records of the shards, so without the start of the processes."""
    ways = {"2 workers": ["--workers", "2"], "2 threads": ["--threads", "2"], "1 thread": []}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, words in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "ddim", "sample", "--count", "512", "--steps"]
                command += ["10", "--shard-size", "64", "--store", "npz", "--out", folder, *words]
                subprocess.run(command, check=True, capture_output=True)
                seconds: dict[str, list[float]] = {}
                for record in read_records(Path(folder)):
                    seconds.setdefault(record.worker, []).append(record.seconds_total)
                rates[way].append(sum(64 * len(s) / sum(s) for s in seconds.values()))
    middle = {way: statistics.median(found) for way, found in rates.items()}
    told = ", ".join(f"{way} {rate:.1f} images/s" for way, rate in middle.items())
    of_threads = middle["2 workers"] / middle["2 threads"]
    of_one = middle["2 workers"] / middle["1 thread"]
    print(f"{told}: 2 workers are {of_threads:.2f} of 2 threads, {of_one:.2f} of 1 thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["leases", "memory", "overhead", "efficiency"])
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000)
    given = parser.parse_args()
    if given.what == "leases":
        measure_leases(given.processes, given.shards)
    elif given.what == "memory":
        measure_memory(given.count)
    elif given.what == "overhead":
        measure_overhead()
    else:
        measure_efficiency(given.rounds)


if __name__ == "__main__":
    main()
