"""Files locked by one, written whole or not at all, and told apart by a digest of samples."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_mp import files
from llama_mp.errors import RequestError
from llama_mp.files import (
    DIGEST_BLOCK_BYTES,
    DIGEST_SAMPLES,
    is_locked,
    json_bytes,
    lock,
    read_small,
    sample_digest,
    write_whole,
)

# ---- lock ------------------------------------------------------------------------------------------------------

LOCK = """
import os, sys
from pathlib import Path
from llama_mp.errors import RequestError
from llama_mp.files import lock
try:
    lock(os.open(sys.argv[1], os.O_RDWR), Path(sys.argv[1]))
except RequestError as error:
    sys.exit(str(error))
"""


def test_one_process_holds_it_until_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    held = os.open(path, os.O_RDWR | os.O_CREAT)
    lock(held, path)

    def other() -> str:
        command = [sys.executable, "-c", LOCK, path]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr

    assert other() == f"another run is writing {path}; wait for its end, or give another --output\n"
    os.close(held)
    assert other() == ""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with (tmp_path / "f").open("wb") as file, pytest.raises(RequestError, match="f: this file system has no locks"):
        lock(file.fileno(), tmp_path / "f")


def test_whether_it_is_held_is_seen_without_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    assert not is_locked(path)
    with path.open("wb") as file:
        assert not is_locked(path)
        lock(file.fileno(), path)
        assert is_locked(path)
    assert not is_locked(path)

    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    assert not is_locked(path)


# ---- whole -----------------------------------------------------------------------------------------------------


def test_content_is_there_alone_and_replaces_what_was(tmp_path: Path) -> None:
    for content in (b"first, the longer one", b"", b"second"):
        write_whole(tmp_path / "f", content)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": content}


def test_it_is_synced_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def note_replace(old: Path, new: Path) -> None:
        done.append(f"{old.name} to {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_whole(tmp_path / "f", b"content")
    assert re.fullmatch(r".*/f\.[0-9a-f]{8}\.tmp", done[0])
    assert done[1:] == [f"{Path(done[0]).name} to f", str(tmp_path)]


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def slow() -> Iterator[bytes]:
        yield b"one, "
        write_whole(tmp_path / "f", b"another", folder)
        assert len(list(folder.iterdir())) == 1  # the first one's
        yield b"two"

    write_whole(tmp_path / "f", slow(), folder)
    assert (tmp_path / "f").read_bytes() == b"one, two" and list(folder.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_whole(tmp_path / "f", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "f", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


def test_json_reads_back_and_ends_its_line() -> None:
    value = {"a": [1, None, "ż"], "b": {"c": 0.1}}
    assert json.loads(json_bytes(value)) == value and json_bytes(value).endswith(b"}\n")


# ---- digest ----------------------------------------------------------------------------------------------------


def test_a_copy_has_the_same_digest_and_a_change_of_a_sample_another(tmp_path: Path) -> None:
    size = DIGEST_SAMPLES * DIGEST_BLOCK_BYTES * 3
    content = bytearray(os.urandom(size))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    found = {sample_digest(tmp_path / "a")}
    assert sample_digest(tmp_path / "b") in found
    for sample in range(DIGEST_SAMPLES):
        for offset in (0, DIGEST_BLOCK_BYTES - 1):
            content[size * sample // DIGEST_SAMPLES + offset] ^= 1
            (tmp_path / "b").write_bytes(content)
            found.add(sample_digest(tmp_path / "b"))
    assert len(found) == 1 + 2 * DIGEST_SAMPLES
    assert all(len(digest) == 32 for digest in found)


def test_every_byte_of_a_small_file_counts_and_its_size(tmp_path: Path) -> None:
    found = set()
    for content in (b"", b"\0", b"\0\0", b"abc", b"abd", b"bbc"):
        (tmp_path / "f").write_bytes(content)
        found.add(sample_digest(tmp_path / "f"))
    assert len(found) == 6


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """10 TB take no time, for they are not there: and only as long as no more than samples are read."""
    with (tmp_path / "f").open("wb") as file:
        file.truncate(10**13)
    assert sample_digest(tmp_path / "f") != sample_digest_of_zeros(tmp_path, 10**13 - 1)


def sample_digest_of_zeros(folder: Path, size: int) -> str:
    with (folder / "g").open("wb") as file:
        file.truncate(size)
    return sample_digest(folder / "g")


def test_codes_of_a_full_disk() -> None:
    """A quota and a limit of the file system on one file are full disks to who writes."""
    assert {os.strerror(code) for code in files.FULL} == {
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
    }


# ---- small files -----------------------------------------------------------------------------------------------


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"x" * 100)
    assert read_small(file, 100) == b"x" * 100
    with pytest.raises(RequestError, match="has 100 bytes, but no such file has more than 99"):
        read_small(file, 99)
    os.truncate(file, 1 << 42)  # a hole
    with pytest.raises(RequestError, match=f"has {1 << 42} bytes"):
        read_small(file)


def test_what_might_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    for name, words in [
        ("pipe", "is a pipe or a device, not a file"),
        ("zeros", "is a pipe or a device, not a file"),
        (".", "is a folder, not a file"),
        ("circle", "cannot be read: Too many levels of symbolic links"),
        ("missing", "cannot be read: No such file or directory"),
    ]:
        with pytest.raises(RequestError, match=words):
            read_small(tmp_path / name)
