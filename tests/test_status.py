"""OUTPUT.status: what is told, when, by whom, and who does not overwrite whom."""

import errno
import json
import os
from pathlib import Path

import pytest

from llama_mp import status
from llama_mp.attempt import Attempt
from llama_mp.attempt_output import AttemptOutput
from llama_mp.errors import RequestError, RunError
from llama_mp.status import UPDATE_S, read_status, status_path, write_status

IDS = [str(i) for i in range(6)]


class Clock:
    """time.time, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(status, "time", clock)
    return clock


def opened(path: Path, name: str = "12-0", share: tuple[int, int] | None = None) -> AttemptOutput:
    attempt = Attempt(name=name, number=int(name.split("-")[1]), share=share)
    return AttemptOutput(path, {"run": 1}, IDS, attempt)


def write(out: AttemptOutput, ids: str) -> None:
    for id in ids:
        out.write({"id": id, "completion_tokens": 30})


def found(path: Path, share: tuple[int, int] | None = None) -> dict:
    return read_status(status_path(path, share))


def test_the_life_of_an_attempt(tmp_path, clock):
    path = tmp_path / "o"
    with opened(path) as out:
        begun = found(path)
        assert begun == {
            "job": "12",
            "attempt": 0,
            "code": None,
            "done": 0,
            "all": 6,
            "done_before": 0,
            "tokens": 0,
            "tokens_per_s": 0.0,
            "started": 1000.0,
            "updated": 1000.0,
            "restarts": 0,
            "error": None,
        }
        clock.now += UPDATE_S - 0.01
        write(out, "01")
        assert found(path) == begun  # no more often than that
        clock.now = 1012
        write(out, "2")
        told = {"done": 3, "tokens": 90, "tokens_per_s": 7.5, "updated": 1012.0}
        assert found(path) == begun | told
        clock.now = 1013
        write(out, "345")
        assert found(path) == begun | told
    assert found(path) == begun | {"done": 6, "tokens": 180, "tokens_per_s": 13.85, "updated": 1013.0, "code": 0}


def test_the_next_attempt_counts_what_was_done_before(tmp_path, clock):
    path = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt), opened(path) as out:
        write(out, "01")
        raise KeyboardInterrupt
    assert (found(path)["code"], found(path)["done"]) == (130, 2)
    write_status(status_path(path, None), found(path) | {"restarts": 2, "error": "rank 3 was killed"})
    clock.now += 60
    with opened(path, "12-1") as out:
        told = found(path)
        assert (told["attempt"], told["code"], told["done"], told["done_before"]) == (1, None, 2, 2)
        assert (told["restarts"], told["error"]) == (2, None)
        assert (told["started"], told["tokens"]) == (1060.0, 0)
        write(out, "2345")
    assert (found(path)["code"], found(path)["done"], found(path)["tokens"]) == (0, 6, 120)
    assert opened(path, "13-0") and found(path)["restarts"] == 0  # those of another job


def test_what_the_supervisor_says_meanwhile_is_kept(tmp_path):
    path = tmp_path / "o"
    with pytest.raises(RunError), opened(path) as out:
        write_status(status_path(path, None), found(path) | {"restarts": 1, "error": "node n2 is gone"})
        write(out, "0")
        raise RunError("of it")
    assert (found(path)["code"], found(path)["restarts"], found(path)["error"]) == (1, 1, "node n2 is gone")


@pytest.mark.parametrize(("error", "code"), [(RequestError("a"), 2), (RunError("b"), 1), (ValueError("c"), 1)])
def test_the_code_of_a_failure(tmp_path, error, code):
    path = tmp_path / "o"
    with pytest.raises(type(error)), opened(path):
        raise error
    assert found(path)["code"] == code


def test_a_disk_that_fails_in_the_end(tmp_path, monkeypatch):
    path = tmp_path / "o"
    out = opened(path)
    write(out, "012345")
    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(os, "fsync", fail_for_parts)
        out.__exit__(None, None, None)
    assert found(path)["code"] == 1


def fail_for_parts(file: int) -> None:
    if os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl"):
        raise OSError(errno.EIO, "Input/output error")


def test_no_answer_is_lost_with_the_status(tmp_path, clock, monkeypatch):
    path = tmp_path / "o"
    with opened(path) as out:
        status_path(path, None).unlink()
        status_path(path, None).mkdir()
        clock.now += UPDATE_S
        write(out, "012345")
    assert path.read_bytes().count(b"\n") == 6


def test_tasks_of_an_array_tell_of_their_shares_and_the_last_of_all(tmp_path):
    path = tmp_path / "o"
    shares = [(0, 2), (1, 2)]
    with opened(path, "12_1-0", shares[1]) as out:
        write(out, "13")
        kept = found(path, shares[1])
        assert (kept["job"], kept["done"], kept["all"]) == ("12", 0, 3)
        write(out, "5")
    assert (found(path, shares[1])["done"], found(path, shares[1])["code"]) == (3, 0)
    assert found(path) is None
    assert status_path(path, shares[1]) == tmp_path / "o.parts" / "1-of-2.status"
    with opened(path, "12_0-0", shares[0]) as out:
        write(out, "024")
    assert [found(path, share) for share in shares] == [None, None]
    assert (found(path)["done"], found(path)["all"], found(path)["code"]) == (6, 6, 0)
    write_status(status_path(path, shares[0]), kept)  # a supervisor that comes late
    assert not (tmp_path / "o.parts").exists()


@pytest.mark.parametrize(
    ("there", "new", "wins"),
    [
        ({"job": "12", "attempt": 1, "started": 5}, {"job": "12", "attempt": 0, "started": 9}, False),
        ({"job": "12", "attempt": 1, "started": 9}, {"job": "12", "attempt": 2, "started": 5}, True),
        ({"job": "12", "attempt": 1, "started": 9}, {"job": "12", "attempt": 1, "started": 9, "code": 1}, True),
        ({"job": "12", "attempt": 0, "started": 9}, {"job": "13", "attempt": 0, "started": 5}, False),
        ({"job": "90", "attempt": 3, "started": 5}, {"job": "13", "attempt": 0, "started": 9}, True),
        (None, {"job": "12", "attempt": 0, "started": 5}, True),
    ],
)
def test_an_earlier_attempt_does_not_overwrite_a_later_ones(tmp_path, there, new, wins):
    path = tmp_path / "o.status"
    if there:
        write_status(path, there)
    write_status(path, new)
    assert read_status(path) == (new if wins else there)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 99999])
def test_what_is_no_status_is_none_and_gives_way(tmp_path, content):
    path = tmp_path / "o.status"
    assert read_status(path) is None
    path.write_bytes(content)
    assert read_status(path) is None
    write_status(path, {"job": "1", "attempt": 0})
    assert json.loads(path.read_text()) == {"job": "1", "attempt": 0}
