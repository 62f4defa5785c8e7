"""Ranks that are examined: what is measured of healthy ones, and who is named when one is not."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import examined
import pytest
from ranks import Ranks
from running import ROOT, run, start

from llama_mp import leftovers
from llama_mp.examine import host

DOCTOR = str(ROOT / "launch" / "doctor.py")
FAULTY = str(ROOT / "tests" / "faulty_doctor.py")


@pytest.mark.parametrize("mp", [2, 3])
def test_healthy_ranks_are_measured_pair_by_pair_and_together(ranks: Ranks, mp: int) -> None:
    found, *others = ranks.run(mp, examined.healthy)
    assert list(found["pairs"][0]) == ["ranks", "latency_s", "bytes_per_s", "trouble"]
    assert all(other["pairs"] == found["pairs"] for other in others)
    assert [pair["ranks"] for pair in found["pairs"]] == {2: [[0, 1]], 3: [[0, 1], [0, 2], [1, 2]]}[mp]
    assert all(0 < pair["latency_s"] < 5 and pair["bytes_per_s"] > 1e6 for pair in found["pairs"])
    assert [one["num_bytes"] for one in found["sums"]] == [8192, 65536, 1 << 20, 8 << 20]
    assert all(0 < one["seconds"] < 5 and one["trouble"] is None for one in found["sums"])
    assert (found["device"], found["backend"], len(found["addresses"])) == ("cpu", "shared_memory", mp)
    [machine] = found["hosts"]
    assert machine["num_ranks"] == mp and machine["free_bytes"] > 0 and machine["torch"].startswith("2.")
    assert (found["unreached"], found["troubles"], found["silent"], found["left_out"]) == ([], [], [], None)


@pytest.fixture
def mortal() -> Iterator[Ranks]:
    """A pool of its own: its processes do not survive their examination."""
    pool = Ranks()
    pool.start()
    yield pool
    pool.stop()


@pytest.mark.parametrize(("signal", "why"), [("SIGSTOP", r"it is stopped \(SIGSTOP\)"), ("SIGKILL", "was killed")])
def test_a_rank_that_falls_silent_is_named(mortal: Ranks, signal: str, why: str) -> None:
    start = time.monotonic()
    first, lost, third = mortal.replies(3, examined.wrong, rank=1, what=signal, step_timeout=1.0)
    assert time.monotonic() - start < 15
    assert lost == (False, "its process has ended")
    for good, found in (first, third):
        assert good, found
        [silent] = found["silent"]
        assert silent["rank"] == 1 and re.search(f"{why}.*in messages between ranks 0 and 1", silent["why"])
        assert found["faults"][0]["fault"].startswith("rank 1 on ") and not found["healthy"]
        assert found["left_out"] == "what follows messages between ranks 0 and 1"
        assert found["pairs"] == [] and len(found["hosts"]) == 1


def test_a_pair_that_hangs_is_named_and_the_others_are_measured(mortal: Ranks) -> None:
    found, *_ = mortal.run(3, examined.wrong, rank=1, what="hang", step_timeout=2.0)
    assert [pair["trouble"] for pair in found["pairs"]] == [None, None, "no end after 2 s"]
    [fault] = [fault["fault"] for fault in found["faults"] if "no end" in fault["fault"]]
    assert re.fullmatch(r"between rank 1 on \S+ and rank 2 on \S+: no end after 2 s", fault)
    assert len(found["sums"]) == 4


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("changed", r"between rank 0 on \S+ and rank 1 on \S+: 1024 bytes arrive changed"),
        (
            "wrong sum",
            r"all-reduce of 8192 bytes over \S+: rank 1 on .*: the sum is wrong, 4 to 4 where it is 3",
        ),
        ("cut off", r"rank 1 on \S+ does not reach rank 0 on \S+ at \S+:\d+: Connection refused"),
        ("no gloo", r"the ranks do not connect over gloo; rank \d on .*"),
    ],
)
def test_what_is_wrong_between_ranks_is_told_with_a_remedy(mortal: Ranks, what: str, fault: str) -> None:
    found = mortal.run(2, examined.wrong, rank=1, what=what, step_timeout=1.0)[0]
    assert [one for one in found["faults"] if re.fullmatch(fault, one["fault"])], found["faults"]
    assert all(one["advice"] for one in found["faults"])


def test_a_driver_that_hangs_is_a_fault_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(leftovers, "SMI_TIMEOUT_S", 0.2)
    assert host("n1", 1).trouble.startswith("nvidia-smi did not answer")


def test_the_command_tells_what_it_found_and_ends_the_silent_rank() -> None:
    """Of healthy ranks docs/doctor.md shows what it tells."""
    started = start(sys.executable, FAULTY, "--mp", "2", "--json", "--step_timeout", "1", FAULT="1 SIGSTOP")
    done = started.wait()
    found = json.loads(done.stdout)
    assert done.code == 1 and not found["healthy"]
    assert re.search(r"\d faults? found: rank 1 on \S+ does not answer: it is stopped \(SIGSTOP\)", done.error)
    assert list(found) == [
        *("healthy", "faults", "wanted", "hosts", "places", "addresses", "device", "backend", "devices"),
        *("unreached", "pairs", "sums", "troubles", "silent", "left_out"),
    ]
    assert started.living() == []


def test_the_command_refuses_before_any_rank_starts() -> None:
    done = run(sys.executable, DOCTOR, "--mp", "2", "--step_timeout", "0")
    assert "--step_timeout is 0.0, but must be at least 1" in done.refusal
