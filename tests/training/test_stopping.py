"""All processes of a run stop after the same step, whichever of them received the signal."""

import subprocess
import sys

PROCESS = """
import signal, sys
from torch import distributed
from ddim.training.stopping import StopSignals

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
with StopSignals(2) as signals:
    for step in range(1, 100):
        if rank == 1 and step == 7:
            signal.raise_signal(signal.SIGTERM)
        if signals.agreed():
            break
print(step)
distributed.destroy_process_group()
"""


def test_two_processes_stop_after_the_step_in_which_one_received_a_signal(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=300)[0] for process in running]
    assert told == ["7\n", "7\n"]
    assert [process.returncode for process in running] == [0, 0]
