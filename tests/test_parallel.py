"""Ranks: what they tell each other, how they fail together, and what they take of the machine."""

import os
import subprocess
import sys

import jobs
import pytest
from ranks import Ranks

from llama_mp import machine
from llama_mp.errors import RequestError, RunError


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
    assert seen.startswith("LostContact: rank 0 lost contact with another rank")


def test_a_slow_rank_is_waited_for_within_the_step_timeout(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.silent_rank, step_timeout=30.0, silence=1.0) == ["2.0", "2.0"]


def test_the_others_wait_for_rank_0_however_long_it_takes(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.slow_leader, step_timeout=0.5, pause=1.5) == [["hello", 7]] * 2


def test_the_others_wait_as_long_as_the_heart_of_rank_0_beats(ranks: Ranks) -> None:
    assert ranks.run(3, jobs.patient, patience=1.2, pause=3.6, heart_stops=False) == ["hello"] * 3


def test_the_others_leave_when_the_heart_of_rank_0_stands_still(ranks: Ranks) -> None:
    told = ranks.run(3, jobs.patient, patience=1.2, pause=3.6, heart_stops=True)
    assert told[0] == "hello"
    for rank in (1, 2):
        assert told[rank].startswith(f"LostContact: rank {rank} has heard nothing of rank 0 for ")


def test_one_model_at_a_time() -> None:
    script = """
from llama_mp import LLM
from llama_mp.errors import RequestError
def refusal(**flags):
    try:
        LLM(**flags)
    except RequestError as error:
        return str(error)
print(refusal(device="cpu", dtype="tf32"))
with LLM(device="cpu") as first:
    print(refusal(device="cpu"))
try:
    with LLM(device="cpu") as second:
        second.generate(["a"], bogus=1)
except RequestError as error:
    print(error)
with LLM(device="cpu") as third:
    print(third.generate(["The capital of France is"], temperature=0, max_gen_len=1)[0]["completion"])
"""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert "use --dtype fp32" in lines[0]
    assert "close it first" in lines[1]
    assert "bogus" in lines[2]
    assert lines[3].strip() == "Paris"


def test_one_rank_listens_on_no_port() -> None:
    script = """
import os, socket
from llama_mp.config import RunConfig
from llama_mp.parallel import connect
world = connect(RunConfig(device="cpu"))
inodes = {os.readlink(f"/proc/self/fd/{fd}")[8:-1] for fd in os.listdir("/proc/self/fd")
          if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")}
listening = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
print([entry[1] for entry in listening if entry[3] == "0A" and entry[9] in inodes])
world.close()
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
