"""Folders that replace others: killed at any step nothing is lost, and a second process is refused until the end."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import PARTS, REQUEST, WHOLE, begin, finish, held, names

from llama_mp import partial as module
from llama_mp.errors import RequestError
from llama_mp.partial import JOURNAL, Partial, clean_up_after_kill, partial_path, replaced_path


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "a folder"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill takes nothing that was written; hundreds of syncs would take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# ---- replaced --------------------------------------------------------------------------------------------------


def test_what_is_replaced_goes_last(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(output, {"old": 1}, text="old")
    removed = []
    rmtree = shutil.rmtree

    def note(path: Path, **options: bool) -> None:
        removed.append((held(path), held(output).keys() >= WHOLE.keys()))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", note)
    finish(output, overwrite=True)
    assert removed == [({name: f"old {name}" for name in PARTS}, True)]
    assert held(output) == WHOLE and names(output.parent) == [output.name]


def test_overwrite_of_nothing(output: Path) -> None:
    finish(output, overwrite=True)
    assert held(output) == WHOLE and names(output.parent) == [output.name]


def test_a_folder_in_the_way_of_what_is_replaced_is_seen_before_the_work(output: Path) -> None:
    finish(output, {"old": 1}, text="old")
    replaced_path(output).mkdir()
    (replaced_path(output) / "precious").write_text("mine")
    with pytest.raises(RequestError, match=r"replaced is in the way.*rm -r '.*replaced'"):
        finish(output, overwrite=True)
    assert held(replaced_path(output)) == {"precious": "mine"} and held(output)["one"] == "old one"
    assert not partial_path(output).exists()


def steps(monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> Callable[[], int]:
    """Let the process end at the `at`th call that changes something, before or `after` it; how many there were."""
    count = 0

    def ending(call: Callable) -> Callable:
        def wrapped(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            is_last = count == at
            if is_last and not after:
                raise Killed
            result = call(*args, **options)
            if is_last:
                raise Killed
            return result

        return wrapped

    for place, name in (
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (module, "sync"),
        (os, "write"),
        (os, "ftruncate"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(place, name, ending(getattr(place, name)))
    return lambda: count


def kills(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prepare: Callable[[], None], run: Callable[[], object]
) -> Iterator[int]:
    """`run` ended before and after each of its steps in turn, each time from what `prepare` made of an empty folder."""
    at, after = 1, False
    while True:
        for path in folder.iterdir():
            shutil.rmtree(path)
        prepare()
        with monkeypatch.context() as patch:
            count = steps(patch, at, after=after)
            try:
                run()
            except Killed:
                pass
            else:
                assert count() < at > 8
                return
        yield at
        at, after = at + after, not after


def whole_copies(folder: Path, text: str) -> list[str]:
    wanted = {name: f"{text} {name}" for name in PARTS}
    return [path.name for path in folder.iterdir() if {k: v for k, v in held(path).items() if k != JOURNAL} == wanted]


def test_killed_at_any_step_nothing_is_lost_and_the_next_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def old() -> None:
        finish(output, {"old": 1}, text="old")

    for step in kills(monkeypatch, tmp_path, old, lambda: finish(output, overwrite=True)):
        new = whole_copies(tmp_path, "content of")
        assert "out" in new or whole_copies(tmp_path, "old"), f"step {step}: {names(tmp_path)}"
        if not output.exists():
            assert new == ["out.partial"] and whole_copies(tmp_path, "old") == ["out.replaced"]
        finish(output, overwrite=True)
        assert held(output) == WHOLE and names(tmp_path) == ["out"], f"step {step}"


def test_killed_at_any_step_of_a_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    for step in kills(monkeypatch, tmp_path, lambda: None, lambda: finish(output)):
        if output.exists():  # whole: what is left of the run is cleaned up
            assert whole_copies(tmp_path, "content of") == ["out"]
            clean_up_after_kill(output)
        else:
            finish(output)
        assert held(output) == WHOLE and names(tmp_path) == ["out"], f"step {step}"


def test_killed_at_any_step_and_then_asked_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was put aside goes with the run that replaces it, whichever that is."""
    output = tmp_path / "out"

    def old() -> None:
        finish(output, {"old": 1}, text="old")

    for step in kills(monkeypatch, tmp_path, old, lambda: finish(output, overwrite=True)):
        finish(output, {"other": 2}, overwrite=True, text="other")
        assert held(output) == {name: f"other {name}" for name in PARTS} and names(tmp_path) == ["out"], f"step {step}"


def test_a_run_begun_anew_after_a_kill_between_the_renames_and_killed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def between() -> None:
        finish(output, {"old": 1}, text="old")
        rename = Path.rename
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda path, to: rename(path, to) if path == output else fail())
            with pytest.raises(Killed):
                finish(output, overwrite=True)
        assert names(tmp_path) == ["out.partial", "out.replaced"]

    def fail() -> None:
        raise Killed

    for step in kills(monkeypatch, tmp_path, between, lambda: finish(output, {"other": 2}, overwrite=True)):
        assert "out" in names(tmp_path) or "out.replaced" in names(tmp_path), f"step {step}"
        finish(output, {"other": 2}, overwrite=True)
        assert held(output) == WHOLE
        assert names(tmp_path) in (["out"], ["out", "out.replaced"]), f"step {step}"


def test_cleaning_up_leaves_a_folder_alone_that_has_nothing_to_clean(output: Path) -> None:
    finish(output)
    clean_up_after_kill(output)
    clean_up_after_kill(output.parent / "nowhere")
    assert held(output) == WHOLE


# ---- locked ----------------------------------------------------------------------------------------------------

SECOND = """
import json, sys
from pathlib import Path
from llama_mp.errors import report
from llama_mp.partial import Partial, clean_up_after_kill
try:
    if sys.argv[2] == "clean":
        clean_up_after_kill(Path(sys.argv[1]))
    else:
        with Partial(Path(sys.argv[1]), json.loads(sys.argv[2]), overwrite=sys.argv[3] == "True") as folder:
            print(sorted(folder.parts))
except Exception as error:
    raise SystemExit(report(error))
"""


def second(output: Path, request: dict | str = REQUEST, overwrite: bool = False) -> subprocess.CompletedProcess:
    asked = request if isinstance(request, str) else json.dumps(request)
    command = [sys.executable, "-c", SECOND, output, asked, str(overwrite)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_second_process_is_refused_while_the_first_is_at_work(output: Path, overwrite: bool) -> None:
    with Partial(output, REQUEST, overwrite=False) as folder:
        (folder.path / "one").write_text("1")
        folder.record("one", 1)
        before = held(folder.path)
        for request in (REQUEST, {"another": 1}):
            done = second(output, request, overwrite)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith(f"error: another run is writing {folder.path}; wait for its end")
        assert held(folder.path) == before
    assert second(output).stdout == "['one']\n"  # the lock went with the first


def test_a_second_process_is_refused_to_the_last_moment(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(output, {"old": 1})
    told = []
    rmtree = shutil.rmtree

    def asked(path: Path, **options: bool) -> None:
        told.append(second(output, overwrite=True))
        told.append(second(output, "clean"))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", asked)
    finish(output, overwrite=True)
    assert [done.returncode for done in told] == [2, 2]
    assert all(f"another run is writing {output}" in done.stderr for done in told)
    assert held(output) == WHOLE and names(output.parent) == [output.name]


def opened_before(monkeypatch: pytest.MonkeyPatch, when: Callable[[], None]) -> None:
    """Let `when` happen once the next journal is open and not yet locked."""
    lock = module.lock

    def late(file: int, path: Path) -> None:
        monkeypatch.setattr(module, "lock", lock)
        when()
        lock(file, path)

    monkeypatch.setattr(module, "lock", late)


@pytest.mark.parametrize("then", ["nothing", "begun again"])
def test_one_that_opened_the_journal_before_it_was_renamed(
    output: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    first = Partial(output, REQUEST, overwrite=True)
    (first.path / "one").write_text("1")

    def end() -> None:
        with first:
            first.commit()
        if then == "begun again":
            shutil.rmtree(output)
            begin(output, "two")

    opened_before(monkeypatch, end)
    with pytest.raises(RequestError, match="another run has just finished"):
        Partial(output, REQUEST, overwrite=True)
    left = output if then == "nothing" else partial_path(output)
    assert "one" in names(left) if then == "nothing" else held(left)["two"] == WHOLE["two"]


def test_cleaning_up_after_one_that_ended_meanwhile_takes_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third run may have put something aside since."""
    finish(output, {"old": 1})
    (output / JOURNAL).write_text(f'{json.dumps(REQUEST)}\n["",true]\n')

    def end() -> None:
        (output / JOURNAL).unlink()
        output.rename(replaced_path(output))
        shutil.copytree(replaced_path(output), output)

    opened_before(monkeypatch, end)
    clean_up_after_kill(output)
    assert held(replaced_path(output)) == WHOLE == held(output)


def test_one_that_found_the_folder_before_it_was_renamed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Partial(output, REQUEST, overwrite=False)
    mkdir = Path.mkdir

    def late(path: Path, **options: bool) -> None:
        mkdir(path, **options)
        with first:
            first.commit()

    monkeypatch.setattr(Path, "mkdir", late)
    with pytest.raises(RequestError, match="another run has just finished"):
        Partial(output, REQUEST, overwrite=False)
    assert names(output.parent) == [output.name]


def test_a_refused_run_lets_go_of_the_lock(output: Path) -> None:
    begin(output, "one")
    with pytest.raises(RequestError):
        Partial(output, {"another": 1}, overwrite=False)
    assert finish(output) == ["two", "three"]
