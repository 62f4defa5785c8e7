"""Ranks: what they tell each other, how they fail together, and what they take of the machine."""

import os
import subprocess
import sys
from collections import namedtuple

import jobs
import pytest
import torch
from ranks import Ranks

from llama_mp import parallel
from llama_mp.errors import RequestError, RunError


@pytest.mark.parametrize("mp", [1, 3])
def test_tell_and_gather(ranks: Ranks, mp: int) -> None:
    values = [{"a": [1, None, "ü"]}, 2.5, "three"]
    for told, gathered in ranks.run(mp, jobs.messages, values=values):
        assert told == values
        assert gathered == values[:mp]


def test_joining_prints_nothing_and_shares_the_cores(ranks: Ranks) -> None:
    results = ranks.run(2, jobs.prints_of_connect)
    assert results == [("", max(1, parallel.cores_at_hand() // 2))] * 2


@pytest.mark.parametrize(
    ("error", "seen"),
    [(RequestError("no"), "RequestError: rank 1: no"), (RunError("broke"), "RunError: rank 1: broke")],
)
def test_one_rank_failing_fails_all_with_its_error(ranks: Ranks, error: Exception, seen: str) -> None:
    assert ranks.run(3, jobs.failing, rank_that_fails=1, error=error) == [seen] * 3


def test_an_error_of_rank_0_is_not_prefixed(ranks: Ranks) -> None:
    assert ranks.run(2, jobs.failing, rank_that_fails=0, error=RequestError("no")) == ["RequestError: no"] * 2


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


# ---- devices and types, decided without them --------------------------------------------------------------------

Gpu = namedtuple("Gpu", "count capability")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A machine that seems to have two older cards."""
    found = Gpu(count=2, capability=(7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found.count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    return found


def test_local_rank_picks_the_device(gpu: Gpu) -> None:
    assert parallel.choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert parallel.choose_device("cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(RequestError, match="3 ranks on this machine, but 2 CUDA devices"):
        parallel.choose_device("auto", 2, 3)


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.choose_device("auto", 0, 8) == torch.device("cpu")
    with pytest.raises(RequestError, match="no CUDA device can be used"):
        parallel.choose_device("cuda", 0, 1)


@pytest.mark.parametrize(
    ("wanted", "precision", "expected"),
    [
        ("auto", "fp16", torch.bfloat16),
        ("auto", "bf16", torch.bfloat16),
        ("auto", "fp32", torch.float32),
        ("fp16", "fp32", torch.float16),
        ("fp32", "bf16", torch.float32),
    ],
)
def test_dtype_on_a_cpu(wanted: str, precision: str, expected: torch.dtype) -> None:
    assert parallel.choose_dtype(wanted, precision, torch.device("cpu")) == expected


def test_tf32_is_for_gpus() -> None:
    with pytest.raises(RequestError, match="use --dtype fp32"):
        parallel.choose_dtype("tf32", "fp32", torch.device("cpu"))


def test_dtype_on_a_card_without_bf16(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    assert parallel.choose_dtype("auto", "bf16", card) == torch.float16
    assert parallel.choose_dtype("auto", "fp16", card) == torch.float16
    assert parallel.choose_dtype("tf32", "fp32", card) == torch.float32
    assert torch.backends.cuda.matmul.allow_tf32
    parallel.choose_dtype("fp32", "fp32", card)
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(RequestError, match="RTX 2080 computes no bf16: use --dtype fp16"):
        parallel.choose_dtype("bf16", "bf16", card)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores_at_hand", lambda: 6)
    assert [parallel.threads_per_rank(n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setenv("LLAMA_MP_THREADS", "5")
    assert parallel.threads_per_rank(4) == 5
    monkeypatch.setenv("LLAMA_MP_THREADS", "many")
    with pytest.raises(RequestError, match="LLAMA_MP_THREADS is 'many'"):
        parallel.threads_per_rank(1)
