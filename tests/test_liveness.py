"""A run in which one rank is lost ends soon, says which and why in one line, and leaves nothing behind.

Ranks that torchrun starts sum over gloo here, those of --mp through shared memory.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from running import INFER, ROOT, TORCHRUN, Done, start

FAULTY = str(ROOT / "tests" / "faulty.py")
TIMEOUT_S = 5
LIMIT_S = 15  # from the fault to the end of the command


class Fault(NamedTuple):
    what: str  # which rank, when, what
    ranks: int
    by_torchrun: bool
    says: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.what}, MP {self.ranks}, {'torchrun' if self.by_torchrun else '--mp'}"


def both(what: str, *says: str, ranks: int = 2) -> list[Fault]:
    return [Fault(what, ranks, by_torchrun, says) for by_torchrun in (False, True)]


FAULTS = [
    *both("1 step-7 SIGKILL", "rank 1", "died in step 7|killed by SIGKILL"),
    both("1 step-7 SIGSTOP", "rank 1 on ", "step 7", "did not answer for", r"stopped \(SIGSTOP\)")[False],
    both("1 load raise", "rank 1: unexpected ZeroDivisionError: made to fail")[False],
    both("1 step-7 raise", "rank 1 on .*, in step 7: unexpected ZeroDivisionError: made to fail")[False],
    both("1 step-7 hang", "rank 1 on .* did not come to step 7, all-reduce")[True],
    both("0 write full", "out.jsonl cannot be written: No space left on device; the 3 finished prompts in it are kept")[
        0
    ],
    both("1 step-7 memory", "rank 1 on .*, in step 7: not enough memory")[False],
]
SLOW = [
    both("0 step-7 SIGSTOP", "rank 0 on ", "step 7", r"stopped \(SIGSTOP\)")[True],
    both("1 load SIGSTOP", "rank 1 on ", "set-up", r"stopped \(SIGSTOP\)")[False],
    both("1 step-7 SIGSTOP", "rank 1 on ", "step 7", "did not answer for", r"stopped \(SIGSTOP\)")[True],
    *both("3 step-7 SIGKILL", "rank 3", "died|killed by SIGKILL", ranks=4),
    *both("2 step-7 SIGSTOP", "rank 2 on ", "step 7", "stopped \\(SIGSTOP\\)", ranks=4),
]


class Ended(NamedTuple):
    done: Done
    seconds: float  # since the fault
    output: bytes
    living: list[int]
    shared: list[str]  # files of shared memory that were not there before


def shared_files() -> set[str]:
    """But for the semaphores of the tests' own pools."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


def run_with(fault: Fault, model: Path, folder: Path) -> Ended:
    mark, output, before = folder / "mark", folder / "out.jsonl", shared_files()
    (folder / "prompts.txt").write_text("a\n" * 6)
    words = [FAULTY, "--ckpt_dir", model, "--prompts_file", folder / "prompts.txt", "--output", output]
    words += ["--max_gen_len", "30", "--max_batch_size", "1", "--device", "cpu", "--step_timeout", str(TIMEOUT_S)]
    ranks, backend = str(fault.ranks), {"FAULT_GLOO": "1"} if fault.by_torchrun else {}
    begin = [TORCHRUN, "--standalone", "--nproc_per_node", ranks] if fault.by_torchrun else [sys.executable]
    own = [] if fault.by_torchrun else ["--mp", ranks]
    started = start(*begin, *words, *own, FAULT=fault.what, FAULT_MARK=str(mark), FAULT_OUTPUT=str(output), **backend)
    done = started.wait(timeout=120)
    seconds = time.time() - mark.stat().st_mtime
    return Ended(done, seconds, output.read_bytes(), started.living(), sorted(shared_files() - before))


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[dict]:
    """The faults that are asked for, two at a time: most of it is an interpreter starting."""
    name = test_a_lost_rank_ends_the_run_with_one_line.__name__
    chosen = [item.callspec.params["fault"] for item in request.session.items if item.originalname == name]
    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(run_with, fault, tiny, tmp_path_factory.mktemp("fault")) for fault in chosen}


@pytest.mark.parametrize(
    "fault",
    [*(pytest.param(f, id=f.id) for f in FAULTS), *(pytest.param(f, id=f.id, marks=pytest.mark.slow) for f in SLOW)],
)
def test_a_lost_rank_ends_the_run_with_one_line(fault: Fault, ended: dict) -> None:
    done, seconds, output, living, shared = ended[fault].result()
    assert done.code == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for said in fault.says:
        assert re.search(said, error), error
    assert (living, shared) == ([], [])
    assert output == b"" or output.endswith(b"\n")
    assert seconds < LIMIT_S


# ---- what comes from outside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_ranks_do_not_outlive_who_started_them(by_torchrun: bool) -> None:
    begin = [TORCHRUN, "--standalone", "--nproc_per_node", "2"] if by_torchrun else [sys.executable]
    flags = ["--prompt", "Once upon a time", "--max_gen_len", "4000", *([] if by_torchrun else ["--mp", "2"])]
    before = shared_files()
    started = start(*begin, INFER, *flags)
    assert started.first_byte()
    assert len(started.living()) == 3
    started.process.kill()
    started.process.wait()
    deadline = time.monotonic() + 5
    while started.living() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (started.living(), shared_files() - before) == ([], set())


def test_a_reader_that_leaves_ends_all_ranks() -> None:
    started = start(sys.executable, INFER, "--mp", "2", "--prompt", "Once upon a time", "--max_gen_len", "4000")
    assert started.first_byte()
    started.process.stdout.close()
    assert started.process.wait(LIMIT_S) == 1
    assert "error: " not in started.process.stderr.read()
    assert started.living() == []


def test_ctrl_c_twice_ends_at_once() -> None:
    """A rank is stopped, which cannot end by itself: the first Ctrl-C waits for it."""
    started = start(sys.executable, INFER, "--mp", "2", "--prompt", "Once upon a time", "--max_gen_len", "4000")
    assert started.first_byte()
    (rank, _) = sorted(set(started.living()) - {started.process.pid})
    os.kill(rank, signal.SIGSTOP)
    os.kill(started.process.pid, signal.SIGINT)
    time.sleep(0.5)
    begin = time.monotonic()
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait(timeout=60).code == 130
    assert time.monotonic() - begin < 5
    time.sleep(0.2)
    assert started.living() == []
