"""Leases: one holder at a time, and those of workers that are gone are taken over once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ddim.errors import OutputError
from ddim.runs.leases import Leases

HOLD = """
import sys, time
from pathlib import Path
from ddim.runs.leases import Leases
with Leases(Path(sys.argv[1]), seconds=float(sys.argv[2])).held("a") as lease:
    print("held" if lease else "not", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lease ``a``, which changes twelve times in two seconds."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def taken_at_once(folder):
    """What sixteen who ask for the lease ``a`` at the same time get of it."""
    barrier, got = threading.Barrier(16), []

    def ask():
        leases = Leases(folder, seconds=3600)
        barrier.wait()
        got.append(leases.take("a"))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 16
    return [lease for lease in got if lease is not None]


def test_a_lease_has_one_holder_and_is_given_back(tmp_path):
    leases = Leases(tmp_path)
    with leases.held("a") as mine, leases.held("b") as another:
        assert mine is not None
        assert another is not None
        assert not mine.stolen
        assert Leases(tmp_path).take("a") is None
        assert leases.others() == []
        assert len(Leases(tmp_path).others()) == 2
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_ask_at_once_one_gets_it(tmp_path):
    assert len(taken_at_once(tmp_path)) == 1


def test_a_killed_worker_on_this_machine_is_known_at_once(other, tmp_path):
    leases = Leases(tmp_path, seconds=3600)
    assert leases.take("a") is None
    other.kill()
    other.wait()
    taken = leases.take("a")
    assert taken is not None
    assert taken.stolen
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_it_gone_one_takes_it_over(other, tmp_path):
    other.kill()
    other.wait()
    assert len(taken_at_once(tmp_path)) == 1


def test_a_stopped_worker_is_taken_over_after_the_time_of_the_observer_and_takes_nothing_back(
    other, tmp_path
):
    leases = Leases(tmp_path, seconds=1.0)
    began = time.monotonic()
    while time.monotonic() < began + 2.0:  # it lives: its lease changes
        assert leases.take("a") is None
        time.sleep(0.1)
    other.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    assert leases.take("a") is None
    stopped = time.monotonic()
    while (taken := leases.take("a")) is None:
        assert time.monotonic() < stopped + 30
        time.sleep(0.05)
    assert time.monotonic() - stopped >= 0.9
    assert taken.stolen
    other.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert taken.is_held()
    assert Leases(tmp_path, seconds=3600).take("a") is None
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_of_another_machine_is_taken_over_by_time_alone_whatever_its_clock(tmp_path):
    path = tmp_path / "a.lease"
    path.write_text('{"worker": "elsewhere-1", "machine": "another", "beats": "000000000001"}')
    for clock in (0, time.time() + 3600, time.time() - 3600):
        os.utime(path, (clock, clock))
        leases = Leases(tmp_path, seconds=0.3)
        assert leases.holder(path) == "elsewhere-1"
        assert leases.take("a") is None
        time.sleep(0.1)
        path.write_text(path.read_text().replace("1", "2"))  # it lives
        time.sleep(0.25)
        assert leases.take("a") is None
        time.sleep(0.35)
        taken = leases.take("a")
        assert taken is not None
        taken.release()
        path.write_text('{"worker": "elsewhere-1", "machine": "another", "beats": "000000000001"}')


def test_a_lease_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "a.lease").mkdir()
    with pytest.raises(OutputError, match=r"a\.lease cannot be read .*delete it\.$"):
        Leases(tmp_path).take("a")
    os.mkfifo(tmp_path / "pipe.lease")  # which would be read without end
    with pytest.raises(OutputError, match="it is no regular file"):
        Leases(tmp_path).take("pipe")
    (tmp_path / "b.lease").write_bytes(b"\xff\x00 damaged")
    leases = Leases(tmp_path, seconds=0.2)
    assert leases.take("b") is None
    time.sleep(0.3)
    assert leases.take("b") is not None
    assert leases.holder(tmp_path / "missing") == "?"
