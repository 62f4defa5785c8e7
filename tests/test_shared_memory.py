"""Sums and gathers through shared memory: exact, in the order of the ranks, never waiting for ever, leaving nothing."""

import contextlib
import os
from pathlib import Path

import pytest
import shared_jobs as jobs
import torch
from ranks import Ranks

from llama_mp import shared_memory

# One element, a part of a block, more than a block, more than what two steps need, more than a slot.
COUNTS = (1, 1000, 5000, 70_001, 600_001)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mp", [2, 3, 8])
def test_in_the_order_of_the_ranks_to_the_last_bit(ranks: Ranks, mp: int, dtype: str) -> None:
    for results in ranks.run(mp, jobs.sums, dtype=dtype, counts=COUNTS):
        assert results == [(True, True, True)] * len(COUNTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_and_rounded_as_torch_does(ranks: Ranks, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    others = [torch.full_like(every, other) for other in (0.0, 1e-7, 1.0 + 2**-7, 3e4)]
    parts = [torch.cat([every] * len(others)), torch.cat(others)]
    expected = (parts[0].float() + parts[1].float()).to(dtype)
    for found in ranks.run(2, jobs.added, parts=parts):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_tensors_that_are_not_contiguous(ranks: Ranks) -> None:
    assert all(all(correct) for correct in ranks.run(2, jobs.views))


def test_other_operations_and_types_are_refused(ranks: Ranks) -> None:
    for product, integers, then in ranks.run(2, jobs.refusals):
        assert "PRODUCT of torch.float32" in product
        assert "SUM of torch.int64" in integers
        assert then == "2.0"


def test_counts_may_begin_anew(ranks: Ranks) -> None:
    assert ranks.run(3, jobs.sums_after, arrivals=2**32 - 5, num_sums=10) == [[3.0] * 10] * 3


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    said, _ = ranks.run(2, jobs.left_alone, timeout_s=1.0)
    assert said == "timed out: rank 1 did not come for 1 s"


# ---- what is left of it ------------------------------------------------------------------------------------------


def holders(inode: int) -> list[str]:
    """Processes that have the file in memory with this number open or mapped. No two such files share a number."""
    mark = f" {inode} /memfd:llama-mp"
    return [folder.name for folder in Path("/proc").glob("[0-9]*") if mark in " ".join(read(folder / "maps").split())]


def files_in_dev_shm() -> set[str]:
    """Without the semaphores that Python's pools of processes come and go with."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # it has ended


def test_it_has_no_name_and_is_gone_with_its_world(ranks: Ranks) -> None:
    [file, same] = ranks.run(2, jobs.region_of_a_world)
    assert file == same
    assert (file["mode"], file["names"]) == (0o600, 0)
    assert holders(file["inode"]) == []
    opened = []
    for link in [link for process, _ in ranks.workers for link in Path(f"/proc/{process.pid}/fd").iterdir()]:
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            opened.append(os.readlink(link))
    assert opened
    assert not any("memfd:llama-mp" in target for target in opened)


@pytest.mark.parametrize("mp", [2, 4])
def test_the_others_see_that_a_rank_was_killed_and_nothing_is_left(ranks: Ranks, mp: int) -> None:
    before = files_in_dev_shm()
    try:
        *others, killed = ranks.replies(mp, jobs.loses, killed=mp - 1)
        maps = "".join(read(Path(f"/proc/{process.pid}/maps")) for process, _ in ranks.workers)
        inodes = {int(line.split()[4]) for line in maps.splitlines() if "/memfd:llama-mp" in line}
    finally:
        ranks.stop()
    assert killed == (False, "its process has ended")
    for good, (said, seconds) in others:
        assert good
        assert said == f"LostContact: Connection closed: the process of rank {mp - 1} is gone"
        assert seconds < 20  # of 60, the step_timeout
    [inode] = inodes  # the survivors had it until they ended
    assert holders(inode) == []
    assert files_in_dev_shm() <= before


# ---- where there is none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obstacle", "at", "reason"),
    [
        ("no compiler", 0, "rank 0: no C compiler no-such-compiler: install one"),
        ("no compiler", 2, "rank 2: no C compiler no-such-compiler: install one"),
        ("file limit", 0, "rank 0: File too large"),
        ("container", 1, "rank 1: /proc/"),
    ],
)
def test_all_ranks_take_gloo_and_say_why_once(ranks: Ranks, obstacle: str, at: int, reason: str) -> None:
    (backend, said, total), *others = ranks.run(3, jobs.with_obstacle, obstacle=obstacle, at=at)
    assert (backend, total) == ("gloo", 9.0)
    assert said.count("\n") == 1 and reason in said
    assert others == [("gloo", "", 9.0)] * 2


def test_a_rank_that_may_not_write_large_files_can_open_what_rank_0_made(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.with_obstacle, obstacle="file limit", at=1) == [(shared_memory.NAME, "", 6.0)] * 2


def test_between_machines_gloo_is_as_it_should_be(ranks: Ranks) -> None:
    assert ranks.run(3, jobs.with_obstacle, obstacle="machine", at=2) == [("gloo", "", 9.0)] * 3
