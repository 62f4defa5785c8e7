"""Attempts of a job at the same time: tasks of an array, zombies, and a kill at every step of the end."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from attempts import complete, finish, opened, record, write
from running import ROOT

from llama_mp import attempt_output
from llama_mp.attempt_output import AttemptOutput
from llama_mp.errors import RunError
from llama_mp.status import read_status, status_path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "o"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """A kill takes nothing that was written; hundreds of syncs would take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_shares_are_merged_by_the_last(path):
    assert finish(opened(path, "12_1-0", (1, 3))) == "ad"
    assert finish(opened(path, "12_0-0", (0, 3))) == "be" and not path.exists()
    assert finish(opened(path, "12_7-0", (7, 8))) == "" and not path.exists()  # more tasks than prompts
    assert finish(opened(path, "12_2-0", (2, 3))) == "c" and complete(path)
    assert finish(opened(path, "12_1-1", (1, 3))) == "" and complete(path)


@pytest.mark.parametrize("writes_on", [True, False])
def test_a_zombie_spoils_nothing(path, writes_on):
    zombie = opened(path)
    write(zombie, "ab")
    assert finish(opened(path, "12-1")) == "cde" and complete(path)
    before = path.read_bytes()
    if writes_on:
        write(zombie, "cd")
        zombie.write(record("e", "in other words"))
    zombie.__exit__(None, None, None)
    assert complete(path) and path.read_bytes() == before
    assert read_status(status_path(path, None))["attempt"] == 1


def test_a_zombie_that_ends_first_takes_nothing_from_who_follows(path):
    zombie = opened(path)
    write(zombie, "ab")
    second = opened(path, "12-1")
    write(second, "c")
    assert finish(zombie) == "cde" and complete(path)
    write(second, "de")
    second.__exit__(None, None, None)
    assert complete(path) and read_status(status_path(path, None))["code"] == 0


def test_a_status_that_is_put_among_the_parts_as_they_are_removed_goes_too(path, monkeypatch):
    """By the supervisor of another task, which has ended before."""
    rmdir, late = Path.rmdir, iter([status_path(path, (0, 2))])

    def remove(folder: Path) -> None:
        if status := next(late, None):
            status.write_text("{}")
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", remove)
    finish(opened(path))
    assert complete(path) and next(late, None) is None


def test_nfs_tells_that_another_host_removed_the_part(path, monkeypatch):
    second = opened(path, "12-1")
    finish(opened(path))

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", stale)
        patch.setattr(os, "fsync", stale)
        write(second, "abcde")
        second._close_part()
    second.close()
    assert complete(path)


def test_nfs_tells_that_another_host_replaced_the_output_while_it_was_read(path, monkeypatch):
    outs = [opened(path, f"12_{i}-0", (i, 2)) for i in range(2)]
    for out in outs:
        write(out, "".join(out.left))
        out._close_part()
    read = AttemptOutput._output_records

    def replaced(out: AttemptOutput) -> Iterator[tuple[str, bytes]]:
        if out is outs[0]:
            monkeypatch.undo()
            outs[1].close()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(out)

    monkeypatch.setattr(AttemptOutput, "_output_records", replaced)
    outs[0].close()
    assert complete(path)


@pytest.mark.parametrize("share", [None, (0, 2)])
def test_lines_that_somebody_removed_are_missed(path, share):
    with (
        pytest.raises(RunError, match=rf"{3 if share else 5} lines of .*o\.parts gone"),
        opened(path, share=share) as out,
    ):
        write(out, "".join(out.left))
        out._part.path.unlink()
    assert not path.exists() and read_status(status_path(path, share))["code"] == 1


def test_parts_that_somebody_removes_while_they_are_merged_are_missed(path, monkeypatch):
    out = opened(path)
    write(out, "abcde")
    write_whole = attempt_output.write_whole

    def late(*arguments: object) -> None:
        shutil.rmtree(out.parts.folder, ignore_errors=True)
        write_whole(*arguments)

    monkeypatch.setattr(attempt_output, "write_whole", late)
    with pytest.raises(RunError, match=r"5 lines of .*o\.parts gone"):
        out.__exit__(None, None, None)
    assert not path.exists()


def test_the_folder_removed_as_an_attempt_begins(path, monkeypatch):
    """As one does that finds all done at that moment."""
    mkdir, made = Path.mkdir, []

    def gone_again(folder: Path, **options: bool) -> None:
        mkdir(folder, **options)
        made.append(folder)
        if len(made) in (1, 3):  # for the run file, and for the part
            folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", gone_again)
    finish(opened(path))
    assert complete(path) and len(made) == 4


def test_attempts_that_end_at_the_same_moment(tmp_path):
    for number in range(60):
        path = tmp_path / str(number) / "o"
        path.parent.mkdir()
        outs = [opened(path, f"12_{i}-0", (i, 4)) for i in range(4)]
        outs.append(opened(path, "12_2-1", (2, 4)))  # and one of them is a zombie
        for out in outs:
            write(out, "".join(out.left))
        together(*(partial(out.__exit__, None, None, None) for out in outs))
        assert complete(path)


def test_attempts_that_begin_at_the_same_moment(tmp_path):
    for number in range(60):
        path = tmp_path / str(number) / "o"
        path.parent.mkdir()
        tasks = [("12_0-0", (0, 2)), ("12_1-0", (1, 2)), ("12_0-1", (0, 2))]
        together(*(partial(lambda path, task: finish(opened(path, *task)), path, task) for task in tasks))
        assert complete(path)


def together(*calls: object) -> None:
    """All `calls` at the same time, each in a thread; the first error is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: object) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_killed_before_any_change_the_next_attempt_completes_it(tmp_path):
    command = [sys.executable, ROOT / "tests" / "merged.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["killed"] for report in reports].count(0) == 2 and len(reports) > 40
    for report in reports:
        left = [name for name in report["left"] if not (name.startswith("out.jsonl.status.") and name.endswith(".tmp"))]
        assert left == ["out.jsonl", "out.jsonl.run.json", "out.jsonl.status"], report
        assert report["ids"] == list("012345") and report["finished"] == 0, report
        assert report["killed"] in (0, -9) and report["lines when killed"] in (None, 6), report
    assert {report["lines when killed"] for report in reports} == {None, 6}
