"""What the kernel tells of processes: read from its own files, and from some made up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from llama_mp import deaths
from llama_mp.liveness import Pulse


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_process_is_known_by_when_it_began(sleeper):
    when = deaths.born(sleeper.pid)
    assert when and deaths.is_here(sleeper.pid, when)
    assert not deaths.is_here(sleeper.pid, "1")
    deaths.end(sleeper.pid, "1", signal.SIGKILL)  # one of its number that began at another time
    assert deaths.is_here(sleeper.pid, when)
    deaths.end(sleeper.pid, when, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while deaths.is_here(sleeper.pid, when) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not deaths.is_here(sleeper.pid, when), "what its parent has not fetched yet is gone too"


def test_why_a_process_does_not_answer(sleeper):
    assert deaths.why_still(sleeper.pid) == "it hangs"
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(0.1)
    assert "SIGSTOP" in deaths.why_still(sleeper.pid)
    assert deaths.why_still(2**22 + 1) == "it is gone"


def kernel(folder: Path, killed_here: int, killed_on_the_machine: int) -> None:
    files = {
        "proc/self/cgroup": "0::/job\n",
        "proc/vmstat": f"nr_free_pages 5\noom_kill {killed_on_the_machine}\n",
        "cgroup/job/memory.events": f"low 0\noom_kill {killed_here}\noom_group_kill 0\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_processes_that_the_kernel_killed_for_memory_are_counted_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(deaths, "PROC", tmp_path / "proc")
    monkeypatch.setattr(deaths, "CGROUPS", tmp_path / "cgroup")
    kernel(tmp_path, 3, 0)
    assert deaths.num_oom_kills() == 3
    pulse = Pulse(HashStore(), rank=0, size=1, limit_s=60)
    assert "memory ran out" not in pulse.of_memory()
    kernel(tmp_path, 4, 0)
    assert "the kernel killed 1 process because memory ran out; start more ranks" in pulse.of_memory()
    pulse.start()
    pulse.stop()
