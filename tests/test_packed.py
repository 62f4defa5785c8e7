"""The file of blocks: whole or not there, written by one run at a time, on a disk that has the room."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_mp import packed
from llama_mp.errors import RequestError, RunError
from llama_mp.packed import BlockFile

BLOCKS = [os.urandom(10_000) for _ in range(3)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a block, the last one shorter."""
    monkeypatch.setattr(packed, "CHUNK_BYTES", 4096)


def open_file(folder: Path) -> BlockFile:
    return BlockFile(folder, len(BLOCKS), len(BLOCKS[0]))


def write(file: BlockFile) -> None:
    for number, block in enumerate(BLOCKS):
        file.write(number, memoryview(block))
    file.finish({"any": "thing"})


def read(file: BlockFile, number: int) -> bytes:
    target = bytearray(len(BLOCKS[0]))
    file.read(number, memoryview(target))
    return bytes(target)


def test_what_was_written_is_read_at_once_and_later(tmp_path: Path) -> None:
    file = open_file(tmp_path / "deep" / "folder")
    assert file.told is None
    write(file)
    again = open_file(file.folder)
    for opened in (file, again):
        assert opened.told == {"any": "thing"}
        assert [read(opened, number) for number in (2, 0, 1, 2)] == [BLOCKS[2], *BLOCKS]
        opened.close()
    assert {path.name for path in file.folder.iterdir()} == {"blocks", "index.json", "lock"}
    assert file.folder.stat().st_mode & 0o777 == 0o700


def test_a_run_that_ended_before_the_end_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    file.write(0, memoryview(BLOCKS[0]))
    file.close()
    file = open_file(tmp_path)
    assert file.told is None
    write(file)
    file.close()
    for num_blocks, block_bytes in ((3, 9_000), (2, 10_000), (3, 50_000)):  # of another shape
        other = BlockFile(tmp_path, num_blocks, block_bytes)
        assert other.told is None
        other.close()
        file = open_file(tmp_path)
        write(file)
        file.close()


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"told": 1, "block_bytes": 10000, "checksums": 5}'])
def test_an_index_that_says_nothing_is_none(tmp_path: Path, index: str) -> None:
    file = open_file(tmp_path)
    write(file)
    file.close()
    (tmp_path / "index.json").write_text(index)
    file = open_file(tmp_path)
    assert file.told is None
    file.close()


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    with pytest.raises(RequestError, match=f"another run is writing {tmp_path}/blocks for --offload disk: wait"):
        open_file(tmp_path)
    write(file)
    found = open_file(tmp_path)
    assert found.told
    found.close()
    file.close()


def test_a_disk_without_room_is_said_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda folder: SimpleNamespace(free=36_000))
    with pytest.raises(RequestError, match=r"writes 0\.00 GB of blocks to .*, and 0\.00 GB are free: make room there"):
        open_file(tmp_path)


def test_a_disk_that_fills_up_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_file(tmp_path)
    monkeypatch.setattr(packed.os, "pwrite", full)
    with pytest.raises(RequestError, match="blocks cannot be written: No space left on device; make room there"):
        write(file)
    file.close()
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def full(*_: object) -> int:
    raise OSError(28, "No space left on device")


def broken(*_: object) -> int:
    raise OSError(5, "Input/output error")


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_file(tmp_path)
    write(file)
    monkeypatch.setattr(packed.os, "preadv", broken)
    with pytest.raises(RunError, match=f"{tmp_path}/blocks cannot be read: Input/output error"):
        read(file, 0)
    file.close()


@pytest.mark.parametrize("at", [0, 4095, 4096, 9_999])
def test_each_byte_is_checked_once(tmp_path: Path, at: int) -> None:
    file = open_file(tmp_path)
    write(file)
    file.close()
    with (tmp_path / "blocks").open("r+b") as opened:
        opened.seek(file.stride + at)
        opened.write(bytes([BLOCKS[1][at] ^ 128]))
    file = open_file(tmp_path)
    assert read(file, 0) == BLOCKS[0]
    with pytest.raises(RunError, match=r"blocks was damaged in block 1: run again, and it is written anew"):
        read(file, 1)
    file.close()
    file = open_file(tmp_path)
    assert file.told is None
    write(file)
    assert read(file, 1) == BLOCKS[1]
    file.close()


def test_a_file_cut_short_under_a_run_is_found_out(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    write(file)
    assert read(file, 2) == BLOCKS[2]
    os.truncate(tmp_path / "blocks", 2 * file.stride + 100)
    with pytest.raises(RunError, match="damaged in block 2"):
        read(file, 2)
    file.close()


def test_other_files_of_a_checkpoint_have_another_name(tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pth"
    file.write_bytes(b"x")
    names = {packed.identity([file], "bf16", 0, 1), packed.identity([file], "fp32", 0, 1)}
    names.add(packed.identity([file], "bf16", 1, 2))
    os.utime(file, ns=(5, 5))
    names.add(packed.identity([file], "bf16", 0, 1))
    file.write_bytes(b"xy")
    os.utime(file, ns=(5, 5))
    names.add(packed.identity([file], "bf16", 0, 1))
    assert len(names) == 5
    assert packed.identity([file], "bf16", 0, 1) in names
