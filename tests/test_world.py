"""What rank 0 of several does while its GPU computes; the others, and the GPU, are played."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from llama_mp import errors, liveness
from llama_mp.errors import LostContact, RunError
from llama_mp.liveness import Pulse, Whereabouts
from llama_mp.runner import History, Leader
from llama_mp.world import World


class Computing:
    """An event that comes at the `count`-th look. Each look takes `seconds` of the clock."""

    def __init__(self, count: float, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.seconds, self.now = count, seconds, time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.let_pass)

    def query(self) -> bool:
        self.count -= 1
        self.let_pass(self.seconds)
        return self.count < 0

    def let_pass(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Rank 0 of two, in step 7, with the other one on the same host and well."""
    monkeypatch.setattr(errors, "_place", None)
    monkeypatch.setattr(liveness, "here", Whereabouts())
    pulse = Pulse(HashStore(), rank=0, size=2, limit_s=5)
    pulse.meeting_is_over()
    here = liveness.here
    here.step = 7
    pulse.known[1] = Whereabouts(host=here.host, pid=os.getpid(), born=here.born, step=7)
    monkeypatch.setattr(pulse, "silent", lambda limit_s: [])
    return World(rank=0, size=2, device=torch.device("cpu"), store=pulse.store, pulse=pulse)


def test_a_gpu_that_computes_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.wait_for_device(Computing(100, 0.04, monkeypatch))


@pytest.mark.parametrize(
    ("step", "says"), [(7, "^the GPUs did not finish step 7 in --step_timeout, 5 s"), (6, "^rank 1 .* to step 7 in")]
)
def test_a_gpu_that_hangs_ends_the_run(world: World, monkeypatch: pytest.MonkeyPatch, step: int, says: str) -> None:
    """This rank is the first to know of it, and says who is behind, if one is."""
    world.pulse.known[1].step = step
    event = Computing(float("inf"), 0.04, monkeypatch)
    began_s = event.now
    with pytest.raises(RunError, match=says) as ended:
        world.wait_for_device(event)
    assert not isinstance(ended.value, LostContact)
    assert event.now - began_s < 7


def test_a_suspended_run_has_not_waited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.wait_for_device(Computing(20, 60, monkeypatch))


def test_a_long_prompt_is_waited_for_pass_by_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them at most are launched and not done."""
    monkeypatch.setattr(History, "pass_on", lambda history, message: None)
    launched, waited = [], []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(of=len(launched), record=lambda: None))
    monkeypatch.setattr(world, "wait_for_device", lambda event: waited.append((len(launched), event.of)))
    played = {"device": torch.device("cuda"), "cache": SimpleNamespace(num_slots=1), "tokens_S": None}
    leader = Leader(SimpleNamespace(**played, prefill=lambda tokens, **_: launched.append(tokens)), world)
    for start in range(4):
        leader.prefill([1], slot=0, start=start, all_logits=False)
    assert waited == [(2, 1), (3, 2), (4, 3)]
