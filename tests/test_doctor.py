"""What of the findings is a fault, what is advised, and how it is told: without any rank."""

import json
from dataclasses import replace
from typing import Any

import pytest

from llama_mp.doctor import Device, DoctorFlags, Fault, Findings, Host, Pair, Sum, failure, faults
from llama_mp.doctor_text import page
from llama_mp.errors import RequestError
from llama_mp.gpus import GIB, MIB
from llama_mp.leftovers import Leftover

HOST = Host(
    name="n1",
    num_ranks=4,
    torch="2.13.0",
    cuda="12.6",
    install_cuda="pip install torch",
    has_nvidia=True,
    driver="550.54.15",
    num_devices=4,
    free_bytes=64 * GIB,
    shm_bytes=32 * GIB,
    memlock_bytes=None,
    has_infiniband=True,
    leftovers=[],
)
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def found(*hosts: Host, **changes: Any) -> Findings:
    """Four healthy ranks of one host with four GPUs, but for `changes`."""
    healthy = Findings(
        wanted="auto",
        hosts=list(hosts) or [HOST],
        places=["n1"] * 4,
        addresses=["10.0.0.1:4000"] * 4,
        device="cuda",
        backend="nccl",
        devices=[Device(rank, "A100", 79 * GIB, 80 * GIB) for rank in range(4)],
        pairs=[Pair(ranks, 20e-6, 20e9) for ranks in PAIRS],
        sums=[Sum(8192, 30e-6)],
    )
    return replace(healthy, **changes)


def two_nodes(**changes: Any) -> Findings:
    hosts = [replace(HOST, num_ranks=2), replace(HOST, name="n2", num_ranks=2)]
    return found(*hosts, **({"places": ["n1", "n1", "n2", "n2"]} | changes))


def with_pair(index: int, **changes: Any) -> list[Pair]:
    return [pair._replace(**changes) if i == index else pair for i, pair in enumerate(found().pairs)]


@pytest.mark.parametrize(
    "healthy",
    [
        found(),
        two_nodes(),
        two_nodes(addresses=["127.0.1.1:1"] * 4),
        found(wanted="cpu", device="cpu", devices=[], pairs=[]),
    ],
)
def test_nothing_is_wrong_with_the_healthy(healthy: Findings) -> None:
    assert faults(healthy) == [] and failure(healthy) is None
    assert page(healthy, coloured=False).endswith("\nhealthy")
    assert healthy.as_json["healthy"] is True


@pytest.mark.parametrize(
    ("ill", "fault", "advice"),
    [
        (found(replace(HOST, cuda=None)), "n1: torch 2.13.0 is a CPU build", "pip install torch"),
        (found(replace(HOST, num_devices=0)), "n1: torch 2.13.0 for CUDA 12.6 finds no GPU", "nvidia-smi"),
        (found(replace(HOST, num_devices=3)), "n1: 4 ranks, but 3 CUDA devices", "start 3 ranks there"),
        (found(replace(HOST, num_devices=0, has_nvidia=False), wanted="cuda"), "finds no GPU", "--gpus all"),
        (found(replace(HOST, free_bytes=GIB)), "n1: 1.0 GiB of main memory are free for 4 ranks", "ps aux"),
        (found(replace(HOST, shm_bytes=64 * MIB)), "n1: /dev/shm has 64 MiB", "--shm-size=1g"),
        (found(replace(HOST, trouble="smi hangs")), "n1: smi hangs", "mend that"),
        (
            two_nodes(hosts=[HOST, replace(HOST, name="n2", memlock_bytes=8 * MIB)]),
            "n2: a process may lock 8.0 MiB, too little for InfiniBand",
            "ulimit -l unlimited",
        ),
        (
            found(replace(HOST, leftovers=[Leftover("process", "7 (infer.py)", GIB, "kill -9 7")])),
            "n1: process 7 (infer.py) was left by an earlier run and holds 1.00 GiB",
            "kill -9 7",
        ),
        (
            found(replace(HOST, leftovers=[Leftover("GPU process", "8 (python)", GIB, "kill 8")])),
            "n1: GPU process 8 (python) computes there and holds 1.00 GiB",
            "kill 8",
        ),
        (
            found(devices=[Device(0, "A100", 20 * GIB, 80 * GIB)]),
            "rank 0 on n1: 20.0 of 80.0 GiB are free on its A100",
            "nvidia-smi",
        ),
        (two_nodes(silent={2: "it hangs (in a step)"}), "rank 2 on n2 does not answer: it hangs (in a step)", "look"),
        (
            two_nodes(addresses=["127.0.1.1:1"] * 4, unreached=[(0, 2, "refused")]),
            "rank 0 on n1 does not reach rank 2 on n2 at 127.0.1.1:1: refused",
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        ),
        (two_nodes(unreached=[(0, 2, "timed out")]), "rank 0 on n1 does not reach rank 2 on n2", "firewall"),
        (found(unreached=[(1, 1, "no port")]), "rank 1 on n1 cannot listen: no port", "GLOO_SOCKET_IFNAME"),
        (
            two_nodes(unreached=[(a, b, "lost") for a in (0, 1) for b in (2, 3)]),
            "rank 0 on n1 does not reach rank 2 on n2 at 10.0.0.1:4000: lost; 3 more like it there",
            "firewall",
        ),
        (found(unreached=[(0, 1, "lost")]), "rank 0 on n1 does not reach rank 1 on n1", "GLOO_SOCKET_IFNAME=lo"),
        (found(troubles=[Fault("a", "b")]), "a", "b"),
        (found(pairs=with_pair(0, trouble="no end")), "between rank 0 on n1 and rank 1 on n1: no end", "NCCL_P2P_DIS"),
        (
            two_nodes(pairs=with_pair(5, trouble="no end")),
            "between rank 2 on n2 and rank 3 on n2",
            "NCCL_P2P_DISABLE=1",
        ),
        (two_nodes(pairs=with_pair(1, trouble="no end")), "between rank 0 on n1 and rank 2", "NCCL_SOCKET_IFNAME"),
        (
            found(pairs=with_pair(3, bytes_per_s=4e9)),
            "are slow: 4.00 GB/s, where 20.00 are usual",
            "NCCL_P2P_DISABLE=1",
        ),
        (found(pairs=with_pair(3, latency_s=2e-3)), "are slow: 2000 us a message, where 20 are usual", "NCCL_P2P"),
        (found(sums=[Sum(8192, trouble="no end")]), "all-reduce of 8192 bytes over nccl: no end", "NCCL_P2P_DISABLE=1"),
        (found(sums=[Sum(8192, trouble="no end")], device="cpu"), "all-reduce of 8192 bytes", "these cores"),
    ],
)
def test_each_fault_is_told_with_its_remedy(ill: Findings, fault: str, advice: str) -> None:
    [told] = faults(ill)
    assert fault in told.fault and advice in told.advice
    assert failure(ill).startswith("1 fault found: ")
    shown = " ".join(page(ill, coloured=False).split())
    assert " ".join(told.fault.split()) in shown and "healthy" not in shown
    assert json.loads(json.dumps(ill.as_json))["faults"] == [{"fault": told.fault, "advice": told.advice}]


def test_pairs_are_slow_by_the_measure_of_their_kind() -> None:
    """Between hosts a tenth of the bandwidth is usual; of two pairs of a kind neither is the usual one."""
    inside, between = (20e-6, 200e9), (60e-6, 10e9)
    pairs = [Pair((a, b), *(inside if a // 2 == b // 2 else between)) for a, b in PAIRS]
    assert faults(two_nodes(pairs=pairs)) == []
    pairs[0] = Pair((0, 1), 5e-3, 1e9)
    assert faults(two_nodes(pairs=pairs)) == []
    pairs[1] = Pair((0, 2), 60e-6, 1e9)
    [slow] = faults(two_nodes(pairs=pairs))
    assert slow.fault.startswith("rank 0 on n1 and rank 2 on n2 are slow: 1.00 GB/s, where 10.00 are usual")


def test_a_pair_that_is_late_by_microseconds_alone_is_not_slow() -> None:
    assert faults(found(pairs=with_pair(0, latency_s=900e-6))) == []


def test_of_many_pairs_the_dead_and_the_slowest_are_shown() -> None:
    pairs = [Pair((0, 1 + i), 20e-6, (100 - i) * 1e9) for i in range(40)]
    pairs[20] = Pair((0, 21), trouble="no end")
    shown = page(found(places=["n1"] * 50, pairs=pairs), coloured=False).splitlines()
    rows = [line for line in shown if line.startswith("0 on n1 and ")]
    assert len(rows) == 28 and "the 28 slowest of 40 pairs" in shown
    assert rows[0].split() == ["0", "on", "n1", "and", "21", "on", "n1", "-", "-"]
    assert rows[1].split()[-1] == "61.00"


def test_colours_are_for_terminals() -> None:
    ill = found(sums=[Sum(8192, trouble="no end")])
    assert "\033[" in page(ill, coloured=True) and "\033[" not in page(ill, coloured=False)


@pytest.mark.parametrize("seconds", [0, 0.5, 601])
def test_a_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(RequestError, match=f"--step_timeout is {seconds}, but must be at"):
        DoctorFlags(step_timeout=seconds)
