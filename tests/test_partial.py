"""Folders that appear whole or not at all: where they may be, and how they are continued."""

import errno
import os
from pathlib import Path

import pytest
from folders import PARTS, REQUEST, WHOLE, begin, finish, held, names

from llama_mp import partial as module
from llama_mp.errors import RequestError, RunError
from llama_mp.files import FULL
from llama_mp.partial import JOURNAL, Partial, partial_path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "a folder"


@pytest.fixture(params=["plain", "a 0", 'a"=0"', "a'; echo foo", r"a\=", "a\n0", "-a", "Zażółć"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


# ---- whole -----------------------------------------------------------------------------------------------------


def test_it_appears_at_the_end(odd: Path) -> None:
    with Partial(odd, REQUEST, overwrite=False) as folder:
        assert folder.parts == {} and folder.path == odd.with_name(odd.name + ".partial")
        (folder.path / "one").write_text("1")
        assert not odd.exists()
        folder.commit()
    assert held(odd) == {"one": "1"} and names(odd.parent) == [odd.name]


def test_an_empty_folder_is_filled(output: Path) -> None:
    output.mkdir()
    assert finish(output) == [*PARTS]
    assert held(output) == WHOLE and names(output.parent) == [output.name]


@pytest.mark.parametrize("target", ["there", "there/below"])
def test_a_link_leads_where_it_led(tmp_path: Path, target: str) -> None:
    """And what is not whole yet is on the disk that the link leads to."""
    (tmp_path / target).mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    assert partial_path(tmp_path / "link") == (tmp_path / f"{target}.partial")
    finish(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and held(tmp_path / target) == WHOLE
    finish(tmp_path / "link", {"another": 1}, overwrite=True, text="new")
    assert (tmp_path / "link").is_symlink() and held(tmp_path / target)["one"] == "new one"


@pytest.mark.parametrize("given", ["out", "./out", "out/", "below/../out", "out/."])
def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    finish(Path(given))
    assert held(tmp_path / "out") == WHOLE and names(tmp_path) == ["below", "out"]


@pytest.mark.parametrize("given", [".", "..", "../.."])
def test_paths_without_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    here = tmp_path / "out" / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    wanted = Path(os.path.realpath(given))
    assert partial_path(Path(given)) == wanted.with_name(wanted.name + ".partial")
    if given == ".":
        finish(Path(given))
        assert held(wanted) == WHOLE
    else:
        with pytest.raises(RequestError, match="is not empty"):
            finish(Path(given))


def test_everything_is_on_disk_before_it_has_its_name(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    sync, rename = module.sync, Path.rename

    def note_sync(path: Path) -> None:
        done.append(("sync", path.name))
        sync(path)

    def note_rename(path: Path, target: Path) -> Path:
        done.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(module, "sync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    finish(output)
    at = done.index(("rename", "a folder.partial"))
    assert set(done[:at]) == {("sync", name) for name in (*PARTS, JOURNAL, "a folder.partial")}
    assert done[at - 1] == ("sync", "a folder.partial") and done[at + 1 :] == [("sync", output.parent.name)]


# ---- continued -------------------------------------------------------------------------------------------------


def test_a_run_continues_what_another_began(output: Path) -> None:
    begin(output, "one")
    with Partial(output, REQUEST, overwrite=False) as folder:
        assert folder.parts == {"one": ["one", 7]}
    assert finish(output) == ["two", "three"]
    assert held(output) == WHOLE


def test_a_part_written_again_counts_as_it_was_written_last(output: Path) -> None:
    with Partial(output, REQUEST, overwrite=False) as folder:
        folder.record("one", "old")
        folder.record("one", "new")
        assert folder.parts == {"one": "new"}
    with Partial(output, REQUEST, overwrite=False) as folder:
        assert folder.parts == {"one": "new"}


def test_a_journal_torn_at_any_byte(output: Path) -> None:
    path = begin(output, *PARTS)
    journal = (path / JOURNAL).read_bytes()
    lines = journal.splitlines(keepends=True)
    ends = [len(b"".join(lines[: i + 1])) for i in range(len(lines))]
    for size in range(len(journal) + 1):
        (path / JOURNAL).write_bytes(journal[:size])
        if size < ends[0]:
            with pytest.raises(RequestError, match="was begun for another request"):
                Partial(output, REQUEST, overwrite=False)
            assert names(path) == [JOURNAL, *sorted(PARTS)]
            continue
        num_whole = sum(end <= size for end in ends[1:])
        with Partial(output, REQUEST, overwrite=False) as folder:
            assert list(folder.parts) == [*PARTS[:num_whole]]
        assert (path / JOURNAL).read_bytes() == journal[: ends[num_whole]]  # a line may be put at its end
    finish(output)
    assert held(output) == WHOLE


@pytest.mark.parametrize(
    "rest", [b"\0" * 100, b"\xff\xfe\n", b"{", b"7\n", b'["a"]\n', b"[[1],2]\n", b'{"a": 1}\n', b"[" * 99999 + b"\n"]
)
def test_a_journal_that_goes_on_with_garbage(output: Path, rest: bytes) -> None:
    path = begin(output, "one")
    with (path / JOURNAL).open("ab") as file:
        file.write(rest)
    with Partial(output, REQUEST, overwrite=False) as folder:
        assert folder.parts == {"one": ["one", 7]}
    assert finish(output) == ["two", "three"] and held(output) == WHOLE


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"garbage\n", b"7\n[1,2]\n", b'{"mp":2', b'"\\ud800"\n'])
def test_a_journal_of_garbage_is_no_permission(output: Path, content: bytes) -> None:
    path = begin(output, "one")
    (path / JOURNAL).write_bytes(content)
    with pytest.raises(RequestError, match=r"begun for another request.*--overwrite to begin anew, or rm -r"):
        finish(output)
    assert (path / "one").read_text() == WHOLE["one"]
    assert finish(output, overwrite=True) == [*PARTS]
    assert held(output) == WHOLE


def test_another_request_is_refused_and_overwrite_begins_anew(output: Path) -> None:
    path = begin(output, "one", "two")
    (path / "stale").write_text("of a file that the other request does not have")
    before = held(path)
    with pytest.raises(RequestError, match="begun for another request"):
        finish(output, REQUEST | {"mp": 3})
    assert held(path) == before
    assert finish(output, REQUEST | {"mp": 3}, overwrite=True) == [*PARTS]
    assert held(output) == WHOLE and names(output.parent) == [output.name]


def test_a_request_is_compared_as_json_has_it(output: Path) -> None:
    begin(output, "one", request={"shape": (1, 2), "path": None})
    with Partial(output, {"shape": [1, 2], "path": None}, overwrite=False) as folder:
        assert list(folder.parts) == ["one"]


# ---- what is not ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(output: Path, overwrite: bool) -> None:
    path = partial_path(output)
    path.mkdir()
    (path / "precious").write_text("mine")
    with pytest.raises(RequestError, match="holds what this command did not write"):
        finish(output, overwrite=overwrite)
    assert held(path) == {"precious": "mine"}


def test_a_folder_within_it_is_never_removed(output: Path) -> None:
    path = begin(output, "one")
    (path / "below").mkdir()
    with pytest.raises(RequestError, match="holds what this command did not write"):
        finish(output, {"another": 1}, overwrite=True)
    assert names(path) == sorted(["below", JOURNAL, "one"])


def test_a_file_or_a_link_of_that_name(output: Path) -> None:
    partial_path(output).write_text("mine")
    with pytest.raises(RequestError, match="is no folder"):
        finish(output, overwrite=True)
    partial_path(output).unlink()
    (output.parent / "other").mkdir()
    partial_path(output).symlink_to("other")
    with pytest.raises(RequestError, match="is no folder"):
        finish(output)


@pytest.mark.parametrize("begun", [(), ("one",)])
def test_an_output_that_is_not_empty(output: Path, begun: tuple[str, ...]) -> None:
    if begun:
        begin(output, *begun)
    output.mkdir()
    (output / "precious").write_text("mine")
    before = names(output.parent)
    with pytest.raises(RequestError, match="is not empty: give another --output, or --overwrite to replace it"):
        finish(output)
    assert held(output) == {"precious": "mine"} and names(output.parent) == before


def test_an_output_that_was_filled_meanwhile_is_not_lost(output: Path) -> None:
    with pytest.raises(OSError, match="not empty"), Partial(output, REQUEST, overwrite=False) as folder:
        (folder.path / "one").write_text("1")
        output.mkdir()
        (output / "precious").write_text("mine")
        folder.commit()
    assert held(output) == {"precious": "mine"}
    assert names(partial_path(output)) == [JOURNAL, "one"]


# ---- full ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", FULL)
def test_a_full_disk_is_an_error_that_says_how_to_continue(output: Path, code: int) -> None:
    said = f"{os.strerror(code)}; what is whole in it is kept: make room and run"
    with pytest.raises(RunError, match=said), Partial(output, REQUEST, overwrite=False) as folder:
        folder.record("one", 1)
        raise OSError(code, os.strerror(code))
    with Partial(output, REQUEST, overwrite=False) as folder:
        assert folder.parts == {"one": 1}


def test_other_errors_stay_what_they_are(output: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as caught, Partial(output, REQUEST, overwrite=False):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(caught.value, RunError)


def test_a_journal_that_takes_half_a_line(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with pytest.raises(RunError, match="No space left on device"), Partial(output, REQUEST, overwrite=False) as folder:
        folder.record("one", 1)
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[: len(line) // 2]))
        folder.record("two", 2)
    monkeypatch.undo()
    assert folder.parts == {"one": 1}
    assert (folder.path / JOURNAL).read_text().splitlines()[1:] == ['["one",1]']
    with Partial(output, REQUEST, overwrite=False) as folder:
        assert folder.parts == {"one": 1}


def test_a_full_disk_seen_when_all_is_synced(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "sync", full)
        with pytest.raises(RunError, match="No space left on device"):
            finish(output)
    assert not output.exists()
    assert finish(output) == [] and held(output) == WHOLE


# ---- refused by the system -------------------------------------------------------------------------------------


def test_no_folder_to_write_in(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Partial(tmp_path / "nowhere" / "out", REQUEST, overwrite=False)
    assert caught.value.filename == tmp_path / "nowhere" / "out.partial" or str(caught.value.filename).endswith(
        ".partial"
    )
