"""Ranks: what they tell each other, how they fail together, and what they take of the machine."""

import os
from pathlib import Path

import jobs
import pytest
from ranks import Ranks, alone

from llama_mp import LLM, machine
from llama_mp.config import RunConfig
from llama_mp.errors import RequestError, RunError
from llama_mp.parallel import connect


@pytest.mark.parametrize("mp", [1, 3])
def test_tell_and_gather(ranks: Ranks, mp: int) -> None:
    values = [{"a": [1, None, "ü"]}, 2.5, "three"]
    for told, gathered in ranks.run(mp, jobs.messages, values=values):
        assert told == values
        assert gathered == values[:mp]


def test_joining_prints_nothing_and_shares_the_cores(ranks: Ranks) -> None:
    results = ranks.run(2, jobs.prints_of_connect)
    assert results == [("", max(1, machine.cores_at_hand() // 2))] * 2


@pytest.mark.parametrize(
    ("error", "seen"),
    [(RequestError("no"), "RequestError: rank 1: no"), (RunError("broke"), "RunError: rank 1: broke")],
)
def test_one_rank_failing_fails_all_with_its_error(ranks: Ranks, error: Exception, seen: str) -> None:
    assert ranks.run(3, jobs.failing, rank_that_fails=1, error=error) == [seen] * 3


def test_an_error_of_rank_0_is_not_prefixed(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.failing, rank_that_fails=0, error=RequestError("no")) == ["RequestError: no"] * 2


def test_a_second_world_hears_nothing_of_the_first(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.two_worlds, value="world") == [["world 0", "world 1"]] * 2


def test_a_rank_that_is_silent_for_longer_than_the_step_timeout_is_lost(ranks: Ranks) -> None:
    seen = ranks.run(2, jobs.silent_rank, step_timeout=1.0, silence=3.0)[0]
    assert seen.startswith("RunError: rank 1 on ")
    assert "did not come to set-up, all-reduce 1 in --step_timeout, 1 s" in seen


def test_a_slow_rank_is_waited_for_within_the_step_timeout(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.silent_rank, step_timeout=30.0, silence=1.0) == ["2.0", "2.0"]


def test_the_others_wait_for_rank_0_however_long_it_takes(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.slow_leader, step_timeout=0.5, pause=1.5) == [["hello", 7]] * 2


def test_the_others_wait_as_long_as_the_heart_of_rank_0_beats(ranks: Ranks) -> None:
    assert ranks.run(3, jobs.patient, limit=1.2, pause=3.0, heart_stops=False) == ["hello"] * 3


def test_the_others_leave_when_the_heart_of_rank_0_stands_still(ranks: Ranks) -> None:
    """And end it, so that torchrun need not wait for it."""
    silent, *others = ranks.replies(3, jobs.patient, limit=1.2, pause=10.0, heart_stops=True)
    ranks.stop()
    assert silent == (False, "its process has ended")
    assert all(good and ": rank 0 on " in told for good, told in others)
    assert any("did not answer for" in told for _, told in others)  # for the second it may be one that died


def test_ranks_that_were_suspended_together_do_not_take_each_other_for_lost(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.suspended, limit=1.5, seconds=5.0) == [["hello"]] * 2


def test_ranks_that_hear_different_tokens_are_named_with_the_step(ranks: Ranks, tiny: Path) -> None:
    seen = ranks.run(3, jobs.misheard, path=tiny, tokenizer=tiny / "tokenizer.model")
    assert all(
        said.startswith("RunError: the ranks disagree on the tokens at step 3: rank 2 has others") for said in seen
    )


def test_one_model_at_a_time(tiny: Path) -> None:
    with pytest.raises(RequestError, match="use --dtype fp32"):
        LLM(tiny, device="cpu", dtype="tf32")  # which leaves nothing behind
    with LLM(tiny, device="cpu"), pytest.raises(RequestError, match="close it first"):
        LLM(tiny, device="cpu")
    with pytest.raises(RequestError, match="bogus"), LLM(tiny, device="cpu") as second:
        second.generate(["a"], bogus=1)
    with LLM(tiny, device="cpu") as third:
        assert len(third.generate(["a"], temperature=0, max_gen_len=1)) == 1


def listening() -> list[str]:
    """In a process of one rank: the addresses at which it listens."""
    world = connect(RunConfig(device="cpu"))
    folder = "/proc/self/fd"
    links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder) if os.path.exists(f"{folder}/{fd}")]
    inodes = {link[8:-1] for link in links if link.startswith("socket:")}
    lines = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    world.close()
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


def test_one_rank_listens_on_no_port() -> None:
    assert alone(listening) == []
