"""Sums and gathers through shared memory: exact, in the order of the ranks, and never waiting for ever."""

import os
from pathlib import Path

import jobs
import pytest
from ranks import Ranks

# One element, a part of a block, more than a block, more than what two steps need, more than a slot.
COUNTS = (1, 1000, 5000, 70_001, 600_001)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mp", [2, 3, 8])
def test_sums_in_the_order_of_the_ranks_and_gathers(ranks: Ranks, mp: int, dtype: str) -> None:
    for results in ranks.run(mp, jobs.sums, dtype=dtype, counts=COUNTS):
        assert results == [("shared_memory", True, True)] * len(COUNTS)


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    said, _ = ranks.run(2, jobs.left_alone, timeout_s=1.0)
    assert said == "timed out: rank 1 did not come for 1 s"


def test_nothing_is_left_of_it(ranks: Ranks) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks.run(2, jobs.sums, dtype="fp32", counts=[10])
    assert set(os.listdir("/dev/shm")) <= before
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process, _ in ranks.workers]
    assert not any("memfd:llama-mp" in text for text in maps)
