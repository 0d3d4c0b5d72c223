"""A simulation of many workers on one folder: leases, static division, and a barrier a round.

Workers draw shards whose times vary, die, and come back. Under ``leases`` each takes the next free
shard, and the shard of a dead one is free after the time of a lease; under ``static`` each worker
has its own share from the start, and goes on with it when it is back; under ``barrier`` all draw
one shard each and wait for the slowest before the next round, as a collective operation does. The
output is the efficiency (the time of useful work, of all the workers' time up to the end) and the
share of the work that was done twice.

    python benchmarks/scale.py
"""

import argparse
import heapq
import math
import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Fleet:
    """What is simulated; times in seconds.

    Attributes:
        workers: How many there are.
        shards: Shards a worker, on average.
        seconds: The median time of a shard.
        spread: The standard deviation of its logarithm.
        slow: The share of workers that are slow.
        slowness: How many times slower these are.
        life: The mean time until a worker dies or is preempted.
        back: The mean time until it is back.
        lease: The time after which a dead worker's shard is free.
        cost: The time that the folder takes to give out a lease, one after the other.
    """

    workers: int
    shards: int = 50
    seconds: float = 60.0
    spread: float = 0.2
    slow: float = 0.02
    slowness: float = 2.0
    life: float = 8 * 3600.0
    back: float = 300.0
    lease: float = 60.0
    cost: float = 0.0005


@dataclass
class Outcome:
    """What came of it: the time at which all was done, and seconds of useful and of lost work."""

    end: float = 0.0
    useful: float = 0.0
    twice: float = 0.0


class Worker:
    """A machine's times: how long a shard takes it, and when it dies."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.fleet, self.chance = fleet, chance
        self.factor = fleet.slowness if chance.random() < fleet.slow else 1.0
        self.dies = chance.expovariate(1 / fleet.life)

    def shard(self) -> float:
        drawn = self.chance.lognormvariate(math.log(self.fleet.seconds), self.fleet.spread)
        return self.factor * drawn

    def work(self, now: float, seconds: float) -> tuple[float, bool]:
        """When it stops working on a shard, and whether the shard is done then."""
        if now + seconds <= self.dies:
            return now + seconds, True
        return self.dies, False

    def revive(self) -> float:
        """When it is back."""
        back = self.dies + self.chance.expovariate(1 / self.fleet.back)
        self.dies = back + self.chance.expovariate(1 / self.fleet.life)
        return back


def leases(fleet: Fleet, seed: int) -> Outcome:
    """Each worker takes the next free shard."""
    chance, outcome = random.Random(seed), Outcome()
    crew = [Worker(fleet, chance) for _ in range(fleet.workers)]
    fresh, gave_up = fleet.workers * fleet.shards, []  # times at which shards of the dead are free
    idle: list[int] = []
    free_at, events = 0.0, [(0.0, n) for n in range(fleet.workers)]
    while events:
        now, n = heapq.heappop(events)
        if gave_up and gave_up[0] <= now:
            heapq.heappop(gave_up)
        elif fresh:
            fresh -= 1
        elif gave_up:  # it waits for the lease of a dead worker to run out
            heapq.heappush(events, (gave_up[0], n))
            continue
        else:  # nothing is left, unless somebody dies
            idle.append(n)
            continue
        free_at = max(free_at, now) + fleet.cost  # the folder serves one after the other
        seconds = crew[n].shard()
        stopped, is_done = crew[n].work(free_at, seconds)
        if is_done:
            outcome.useful += seconds
            outcome.end = max(outcome.end, stopped)
            heapq.heappush(events, (stopped, n))
        else:
            outcome.twice += max(0.0, stopped - free_at)
            free = max(stopped, free_at) + fleet.lease
            heapq.heappush(gave_up, free)
            heapq.heappush(events, (max(crew[n].revive(), free_at), n))
            if idle:
                heapq.heappush(events, (free, idle.pop()))
    return outcome


def static(fleet: Fleet, seed: int) -> Outcome:
    """Each worker draws its own share."""
    chance, outcome = random.Random(seed), Outcome()
    for _ in range(fleet.workers):
        worker, now = Worker(fleet, chance), 0.0
        for _ in range(fleet.shards):
            seconds, is_done = worker.shard(), False
            while not is_done:
                stopped, is_done = worker.work(now, seconds)
                outcome.twice += 0.0 if is_done else max(0.0, stopped - now)
                now = stopped if is_done else worker.revive()
            outcome.useful += seconds
        outcome.end = max(outcome.end, now)
    return outcome


def barrier(fleet: Fleet, seed: int) -> Outcome:
    """All draw one shard each, and wait for the slowest; the work of a round in which a worker dies
    is done again when it is back."""
    chance, outcome = random.Random(seed), Outcome()
    crew = [Worker(fleet, chance) for _ in range(fleet.workers)]
    now, done = 0.0, 0
    while done < fleet.shards:
        drawn = [worker.shard() for worker in crew]
        end = now + max(drawn)
        dead = [worker for worker in crew if worker.dies < end]
        if dead:
            first = min(worker.dies for worker in dead)
            outcome.twice += sum(min(seconds, max(0.0, first - now)) for seconds in drawn)
            gone = [worker for worker in crew if worker.dies <= first]
            now = max(worker.revive() for worker in gone)
            for worker in crew:
                while worker.dies <= now:  # it died while it waited
                    now = max(now, worker.revive())
            if now > 1e4 * fleet.shards * fleet.seconds:
                return replace_end(outcome, math.inf)
            continue
        outcome.useful += sum(drawn)
        now, done = end, done + 1
    return replace_end(outcome, now)


def replace_end(outcome: Outcome, end: float) -> Outcome:
    outcome.end = end
    return outcome


def efficiency(outcome: Outcome, fleet: Fleet) -> float:
    return outcome.useful / (fleet.workers * outcome.end)


def row(fleet: Fleet, seed: int, *, with_barrier: bool) -> str:
    cells = []
    for way in (leases, static, barrier):
        if way is barrier and not with_barrier:
            cells.append("-")
            continue
        found = way(fleet, seed)
        twice = found.twice / (found.useful + found.twice) if found.useful else 1.0
        cells.append(f"{efficiency(found, fleet):.3f} ({100 * twice:.2f} %)")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base = Fleet(10)
    cases = {
        "as it is": {},
        "no deaths, equal machines": {"life": 1e12, "slow": 0.0},
        "one in ten is twice as slow": {"slow": 0.1},
        "preempted every hour": {"life": 3600.0},
        "lease of 600 s": {"lease": 600.0},
        "object store, 50 ms a lease": {"cost": 0.05},
    }
    print("| workers | case | leases | static | barrier |\n|---:|---|---:|---:|---:|")
    for workers in (10, 100, 1000, 10_000):
        for name, changes in cases.items():
            fleet = replace(base, workers=workers, **changes)
            told = row(fleet, given.seed, with_barrier=workers <= 1000)
            print(f"| {workers} | {name} | {told} |")


if __name__ == "__main__":
    main()
