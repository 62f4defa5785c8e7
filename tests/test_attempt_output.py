"""Attempts of a job: each id once, in order, through kills and full disks; lines of two runs are never mixed."""

import errno
import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
from attempts import IDS, RUN, complete, finish, kill, kill_after, opened, parts, record, refused, write

from llama_mp import lines, status
from llama_mp.attempt_output import AttemptOutput
from llama_mp.errors import RequestError, RunError
from llama_mp.lines import Lines
from llama_mp.output import Output
from llama_mp.parts import Parts
from llama_mp.status import read_status, status_path


@pytest.fixture(params=["out.jsonl", 'a\'; echo [*]"x".jsonl', "\u00e9\n0"])
def path(request, tmp_path) -> Path:
    return tmp_path / "job" / request.param


@pytest.fixture(autouse=True)
def job_folder(tmp_path) -> None:
    (tmp_path / "job").mkdir()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """A kill takes nothing that was written; hundreds of syncs would take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# ---- attempts, one after the other -------------------------------------------------------------------------------


def test_the_output_appears_when_it_is_complete(path):
    with opened(path) as out:
        write(out, "abcd")
        assert not path.exists() and parts(path) == ["12-0.jsonl"]
        write(out, "e")
        assert not path.exists()
    assert complete(path)
    first = '{"id":"e","completion":"e caf\u00e9\u2028","completion_tokens":3}\n'
    assert path.read_text(encoding="utf-8").startswith(first)


def test_a_second_attempt_continues_after_a_kill(path):
    out = opened(path)
    write(out, "db")
    part = kill(out)
    before = part.read_bytes()
    second = opened(path, "12-1")
    assert second.done == {"b", "d"}  # the torn line's prompt is computed again
    assert finish_but_one(second) and part.read_bytes() == before  # another's part is not even repaired
    assert finish(opened(path, "12-2")) == "e"
    assert complete(path)


def finish_but_one(out: AttemptOutput) -> bool:
    with out:
        write(out, "ac")
    return not out.path.exists()


@pytest.mark.parametrize(
    "noise", [b"\0\0\0\n", b"not json\n", b"[1]\n", b'\n{"id": 3}\n', b'{"id": "\xff"}\n', b"\0" * 99]
)
def test_what_cannot_be_read_of_a_part_is_computed_again(tmp_path, noise):
    path = tmp_path / "job" / "o"
    out = opened(path)
    write(out, "a")
    os.write(out._part._file, noise)
    write(out, "b")
    kill(out)
    second = opened(path, "12-1")
    assert {"a"} <= second.done <= {"a", "b"}
    finish(second)
    assert complete(path)


def test_an_attempt_with_nothing_left_makes_the_output(tmp_path):
    """One before it died between its last line and the end."""
    path = tmp_path / "job" / "o"
    out = opened(path)
    write(out, "abcde")
    kill(out)
    assert not path.exists() and finish(opened(path, "12-1")) == "" and complete(path)
    before = path.stat().st_mtime_ns
    assert finish(opened(path, "12-2")) == "" and complete(path) and path.stat().st_mtime_ns == before


def test_one_that_only_looks_leaves_no_part_and_no_code(tmp_path):
    path = tmp_path / "job" / "o"
    for _ in range(2):
        with opened(path) as out:
            assert out.left == set(IDS)
        assert parts(path) == [] and read_status(status_path(path, None))["code"] is None
    out = opened(path)
    write(out, "a")
    kill(out)
    finish(opened(path))  # the same attempt again
    assert complete(path)


def test_the_same_attempt_twice_has_two_parts(tmp_path):
    path = tmp_path / "job" / "o"
    kill(opened(path))
    out = opened(path)
    write(out, "a")
    assert parts(path) == ["12-0.1.jsonl", "12-0.jsonl"]
    finish(out)
    assert complete(path)


def test_a_plain_output_is_continued(tmp_path):
    path = tmp_path / "job" / "o"
    with Output(path, RUN) as plain:
        write(plain, "ca")
        refused("another run is writing .*/o; wait", path)
    with path.open("ab") as file:
        file.write(b'{"id": "b"')
    assert finish(opened(path)) == "bde"
    assert complete(path)


def test_a_plain_run_takes_the_parts_over(tmp_path):
    path = tmp_path / "job" / "o"
    kill_after(path, "12_0-0", (0, 2), "ec")
    kill_after(path, "12_1-0", (1, 2), "d")
    with Output(path, RUN) as plain:
        assert plain.done == set("cde") and not path.with_name("o.parts").exists()
        write(plain, "ab")
    with Output(path, RUN) as plain:
        assert plain.done == set(IDS)


def test_a_plain_run_killed_while_it_takes_over(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    kill_after(path, "12-0", None, "edc")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            Output(path, RUN)
    with Output(path, RUN) as plain:
        assert plain.done == set("cde") and not path.with_name("o.parts").exists()
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == list("edc")


def test_a_plain_run_is_refused_while_a_part_is_written(tmp_path):
    path = tmp_path / "job" / "o"
    with opened(path) as out:
        with pytest.raises(
            RequestError, match=r"job 12 is writing .*/o too; wait for its end or stop it with scancel 12"
        ):
            Output(path, RUN)
        assert not path.exists()
        write(out, "a")
        with pytest.raises(RequestError, match="job 12 is writing"):
            Output(path, RUN)
        assert not path.exists()


# ---- other runs --------------------------------------------------------------------------------------------------


def test_another_job_is_refused_while_it_lives(tmp_path):
    path = tmp_path / "job" / "o"
    out = opened(path, "12_3-1", (0, 2))
    write(out, "c")
    refused(
        "job 12 is writing .*/o too; wait for its end or stop it with scancel 12, or give another --output",
        path,
        "13-0",
    )
    kill(out)
    assert finish(opened(path, "13-0")) == "abde"
    assert complete(path)


def test_another_job_that_begins_at_the_same_moment_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    begin = AttemptOutput._refuse_others
    others = []

    def looked(out: AttemptOutput) -> None:
        begin(out)
        if not others:  # nobody is there yet: now the other one begins
            others.append(None)
            others.append(opened(path, "13-0"))

    monkeypatch.setattr(AttemptOutput, "_refuse_others", looked)
    with pytest.raises(RequestError, match="job 13 is writing"):
        opened(path, "12-0")
    assert parts(path) == ["13-0.jsonl"]
    finish(others[1])
    assert complete(path)


def test_another_run_that_begins_at_the_same_moment_is_seen_without_locks(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    begin = Parts.begin

    def slow(parts: Parts, name: str) -> Lines:
        if name == "12-0":
            opened(path, "13-0", run={"another": 1})
        return begin(parts, name)

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(Parts, "begin", slow)
    with pytest.raises(RequestError, match="is of another run"):
        opened(path, "12-0")
    assert parts(path) == ["13-0.jsonl"]


def none(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_there_are_no_locks_attempts_go_without(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / "job" / "o"
    first = opened(path)
    write(first, "a")
    assert finish(opened(path, "12-1")) == "bcde" and complete(path)
    with pytest.raises(RequestError, match="no locks"):
        Output(path, RUN)


def test_lines_of_another_run_are_not_mixed_in(path):
    kill_after(path, "12-0", None, "a")
    refused(
        "flags.stop was .* there and is absent now; give another --output, or delete ",
        path,
        run={"model": RUN["model"]},
    )
    with pytest.raises(RequestError, match=r"\.parts.? and its .run.json"):
        Output(path, {"model": RUN["model"]})
    assert not path.exists()
    path.with_name(f"{path.name}.run.json").unlink()
    refused("(?s)holds lines, but .* is missing", path)
    with pytest.raises(RequestError, match=r"(?s)holds lines, but .* is missing"):
        Output(path, RUN)


def test_a_run_without_a_line_belongs_to_nobody(tmp_path):
    path = tmp_path / "job" / "o"
    kill(opened(path, run={"another": 1}), torn=b"")
    finish(opened(path, "13-0"))
    assert complete(path)
    refused("is of another run", path, "14-0", run={"another": 1})


def test_places_that_hold_no_output(tmp_path):
    refused("is a folder; give a file in it", tmp_path / "job")
    with pytest.raises(RequestError, match=r"there is no folder .*/no; make it with mkdir -p"):
        opened(tmp_path / "no" / "o")
    (tmp_path / "job" / "o.parts").write_text("in the way")
    refused("o.parts cannot be opened for reading and writing: Not a directory", tmp_path / "job" / "o")
    with Output(tmp_path / "job" / "p", RUN) as plain:
        write(plain, "a")
    with (tmp_path / "job" / "p").open("ab") as file:
        file.write(b"not json\n")
    refused("p:2: not a record; take the line out", tmp_path / "job" / "p")


# ---- the disk ----------------------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_the_output_is_made(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    out = opened(path)
    write(out, "abcde")
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match="No space left on device; the finished prompts are kept in"),
    ):
        patch.setattr(os, "replace", full)
        out.__exit__(None, None, None)
    assert parts(path) == ["12-0.jsonl"]
    assert finish(opened(path, "12-1")) == "" and complete(path)


def test_a_full_disk_while_a_line_is_written(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    with (
        pytest.raises(RunError, match=r"12-0.jsonl cannot be written: No space left on device; the 1 finished"),
        opened(path) as out,
    ):
        write(out, "a")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            out.write(record("b"))
    assert read_status(status_path(path, None))["code"] == 1
    assert finish(opened(path, "12-1")) == "bcde" and complete(path)


def test_a_full_disk_at_the_beginning(tmp_path, monkeypatch):
    path = tmp_path / "job" / "o"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused("No space left on device; give another path", path)
    finish(opened(path))
    assert complete(path)


@pytest.mark.parametrize("kind", [Output, None])
def test_lines_are_synced_at_an_interval(tmp_path, monkeypatch, kind):
    clock, synced = [0.0], []
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock[0])
    path = tmp_path / "job" / "o"
    with Output(path, RUN) if kind else opened(path) as out:
        monkeypatch.setattr(lines.os, "fsync", lambda _: synced.append(clock[0]))
        monkeypatch.setattr(status, "UPDATE_S", 1e9)
        for now, id in ((1, "a"), (9.9, "b"), (10, "c"), (19.9, "d"), (35, "e")):
            clock[0] = now
            out.write(record(id))
        assert synced == [10, 35] and lines.SYNC_S == 10
    assert len(synced) > 2
