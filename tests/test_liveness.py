"""A run in which one rank is lost ends soon, says which and why in one line, and leaves nothing behind."""

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from running import ROOT, TORCHRUN, Done, start

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
    *both("1 step-7 SIGSTOP", "rank 1 on ", "step 7", "did not answer for", r"stopped \(SIGSTOP\)"),
    both("0 step-7 SIGSTOP", "rank 0 on ", "step 7", r"stopped \(SIGSTOP\)")[True],
    both("1 load SIGSTOP", "rank 1 on ", "set-up", r"stopped \(SIGSTOP\)")[False],
    both("1 load raise", "rank 1: unexpected ZeroDivisionError: made to fail")[False],
    both("1 step-7 raise", "rank 1 on .*, in step 7: unexpected ZeroDivisionError: made to fail")[False],
    both("1 step-7 hang", "rank 1 on .* did not come to step 7, all-reduce")[True],
    both("1 step-7 memory", "rank 1 on .*, in step 7: not enough memory")[False],
]
SLOW = [
    *both("3 step-7 SIGKILL", "rank 3", "died|killed by SIGKILL", ranks=4),
    *both("2 step-7 SIGSTOP", "rank 2 on ", "step 7", "stopped \\(SIGSTOP\\)", ranks=4),
]


class Ended(NamedTuple):
    done: Done
    seconds: float  # since the fault
    living: list[int]
    shared: list[str]  # files of shared memory that were not there before


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def run_with(fault: Fault, model: Path, folder: Path) -> Ended:
    mark, before = folder / "mark", shared_files()
    words = [FAULTY, "--ckpt_dir", model, "--prompt", "a", "--max_gen_len", "100", "--temperature", "0"]
    words += ["--device", "cpu", "--step_timeout", str(TIMEOUT_S)]
    ranks = str(fault.ranks)
    begin = [TORCHRUN, "--standalone", "--nproc_per_node", ranks] if fault.by_torchrun else [sys.executable]
    own = [] if fault.by_torchrun else ["--mp", ranks]
    started = start(*begin, *words, *own, FAULT=fault.what, FAULT_MARK=str(mark))
    done = started.wait(timeout=120)
    seconds = time.time() - mark.stat().st_mtime
    return Ended(done, seconds, started.living(), sorted(shared_files() - before))


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
    done, seconds, living, shared = ended[fault].result()
    assert done.code == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for said in fault.says:
        assert re.search(said, error), error
    assert (living, shared) == ([], [])
    assert seconds < LIMIT_S
