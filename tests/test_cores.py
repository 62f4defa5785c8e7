"""Cores as a process may use them: by affinity, by its container's quota, or as it is told."""

import os
from pathlib import Path

import pytest

from llama_mp import cores
from llama_mp.cores import MAX_THREADS, cores_at_hand, num_threads, threads_asked
from llama_mp.errors import RequestError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 16 cores, LLAMA_MP_THREADS unset; the file with its quota, which is not there."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(cores, "Path", lambda path: quota if path == "/sys/fs/cgroup/cpu.max" else Path(path))
    monkeypatch.delenv("LLAMA_MP_THREADS", raising=False)
    return quota


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (None, 16),
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("6400000 100000\n", 16),
        ("100000 25000\n", 4),
    ],
)
def test_the_quota_of_a_container_bounds_them(machine: Path, quota: str | None, expected: int) -> None:
    if quota is not None:
        machine.write_text(quota)
    assert cores_at_hand() == expected


def test_threads_are_as_many_as_cores_but_no_more_than_a_disk_serves(machine: Path) -> None:
    assert num_threads() == MAX_THREADS < 16
    machine.write_text("300000 100000")
    assert num_threads() == 3


def test_threads_are_as_many_as_asked(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("1", 1), ("3", 3), ("64", 64), ("", MAX_THREADS)):
        monkeypatch.setenv("LLAMA_MP_THREADS", given)
        assert num_threads() == expected
    assert threads_asked() is None


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "all", " 2", "²", "0x2"])
def test_what_is_no_number_of_threads(machine: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("LLAMA_MP_THREADS", given)
    with pytest.raises(RequestError, match=f"LLAMA_MP_THREADS is '{given}', but must be a whole number above 0"):
        num_threads()


def test_this_machine_has_some() -> None:
    assert 1 <= cores_at_hand() <= os.cpu_count()
