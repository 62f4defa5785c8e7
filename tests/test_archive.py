"""Archives laid out before they are written: zipfile and torch find every entry where it was said to be."""

import io
import os
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mp.checkpoint.archive import ALIGNMENT, Archive
from llama_mp.checkpoint.meta_sink import Stored, pickled

GIB = 1 << 30


def assembled(archive: Archive, contents: dict[str, bytes]) -> bytes:
    """The archive's bytes, each of which must be written exactly once."""
    checksums = {name: zlib.crc32(content) for name, content in contents.items()}
    parts = list(archive.frame(checksums))
    parts += [(archive.entries[name].offset, content) for name, content in contents.items()]
    whole = io.BytesIO()
    for offset, content in sorted(part for part in parts if part[1]):
        assert offset == whole.tell(), f"byte {offset} is written after byte {whole.tell()}"
        whole.write(content)
    assert whole.tell() == archive.num_bytes
    return whole.getvalue()


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]) | st.sampled_from("/._- "), min_size=1, max_size=80)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.binary(max_size=500), max_size=12))
def test_any_entries_make_a_proper_archive(contents: dict[str, bytes]) -> None:
    archive = Archive({name: len(content) for name, content in contents.items()})
    whole = assembled(archive, contents)
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert opened.testzip() is None
        assert {name: opened.read(name) for name in opened.namelist()} == contents
        assert opened.namelist() == list(contents)
        assert [info.header_offset for info in opened.infolist()] == [e.start for e in archive.entries.values()]
    for name, entry in archive.entries.items():
        assert entry.offset % ALIGNMENT == 0
        assert whole[entry.offset : entry.offset + entry.num_bytes] == contents[name]


def test_a_wrong_checksum_is_seen() -> None:
    archive = Archive({"a": 3})
    contents = {"a": b"abc"}
    whole = assembled(archive, contents).replace(b"abc", b"abd")
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert opened.testzip() == "a"


def test_equal_contents_make_equal_archives() -> None:
    contents = {"a/data.pkl": b"x" * 100, "a/version": b"3\n"}
    one, other = (assembled(Archive({n: len(c) for n, c in contents.items()}), contents) for _ in range(2))
    assert one == other


def test_more_entries_than_a_plain_archive_counts() -> None:
    contents = {"a/version": b"3\n"} | {f"a/{number}": b"%d" % number for number in range(65_536)}
    whole = io.BytesIO(assembled(Archive({name: len(content) for name, content in contents.items()}), contents))
    with zipfile.ZipFile(whole) as opened:
        assert len(opened.namelist()) == 65_537
        for name in ("a/0", "a/40000", "a/65535"):
            assert opened.read(name) == contents[name]
    whole.seek(0)
    reader = torch._C.PyTorchFileReader(whole)
    assert reader.get_record("65535") == b"65535" and len(reader.get_all_records()) == 65_537


# ---- beyond 4 GiB ----------------------------------------------------------------------------------------------


def write_sparse(path: Path, archive: Archive, small: dict[str, bytes]) -> Path:
    """The archive with the contents `small`; the other entries are holes, and their checksums are not computed."""
    with path.open("wb") as file:
        for offset, content in archive.frame({name: zlib.crc32(small.get(name, b"")) for name in archive.entries}):
            os.pwrite(file.fileno(), content, offset)
        for name, content in small.items():
            os.pwrite(file.fileno(), content, archive.entries[name].offset)
    assert path.stat().st_size == archive.num_bytes
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Archive, dict[str, bytes]]:
    """A .pth of 5 GiB and a little, which takes no room: a large tensor, and two small ones after it."""
    stored = {
        "large": Stored("0", (5, GIB // 4), torch.float32),
        "after": Stored("1", (16,), torch.float32),
        "vector": Stored("2", (3,), torch.bfloat16),
    }
    after, vector = torch.arange(16.0), torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16)
    small = {
        "a/data.pkl": pickled(stored),
        "a/byteorder": b"little",
        "a/version": b"3\n",
        "a/data/1": after.numpy().tobytes(),
        "a/data/2": vector.view(torch.uint8).numpy().tobytes(),
    }
    sizes = {name: len(small[name]) for name in list(small)[:3]} | {"a/data/0": 5 * GIB, "a/data/1": 64, "a/data/2": 6}
    archive = Archive(sizes)
    return write_sparse(tmp_path_factory.mktemp("large") / "a.pth", archive, small), archive, small


def test_it_takes_no_room(large: tuple[Path, Archive, dict[str, bytes]]) -> None:
    assert large[0].stat().st_blocks * 512 < 1 << 20


def test_zipfile_reads_what_lies_behind_4_gib(large: tuple[Path, Archive, dict[str, bytes]]) -> None:
    path, archive, small = large
    with zipfile.ZipFile(path) as opened:
        assert {info.filename: info.file_size for info in opened.infolist()} == {
            name: entry.num_bytes for name, entry in archive.entries.items()
        }
        assert {info.filename: info.header_offset for info in opened.infolist()} == {
            name: entry.start for name, entry in archive.entries.items()
        }
        for name, content in small.items():
            assert opened.read(name) == content
        with opened.open("a/data/0") as entry:  # its local header is read, of its data only the first bytes
            assert entry.read(8) == bytes(8)
    assert archive.entries["a/data/1"].offset > 5 * GIB


def test_torch_finds_the_same_places(large: tuple[Path, Archive, dict[str, bytes]]) -> None:
    path, archive, _ = large
    reader = torch._C.PyTorchFileReader(str(path))
    for name, entry in archive.entries.items():
        assert reader.get_record_offset(name.removeprefix("a/")) == entry.offset


def test_torch_loads_it_lazily(large: tuple[Path, Archive, dict[str, bytes]]) -> None:
    tensors = torch.load(large[0], mmap=True, weights_only=True)
    assert tensors["large"].shape == (5, GIB // 4) and tensors["large"][4, -1] == 0
    assert torch.equal(tensors["after"], torch.arange(16.0))
    assert tensors["vector"].tolist() == [1.5, -2.0, 3.0]


@pytest.mark.parametrize("num_bytes", [2**32 - 2, 2**32 - 1, 2**32])
def test_the_last_size_that_is_plain_and_the_first_that_is_not(tmp_path: Path, num_bytes: int) -> None:
    archive = Archive({"first": num_bytes, "last": 4})
    assert archive.entries["first"].is_large == (num_bytes >= 2**32 - 1)
    path = write_sparse(tmp_path / "a.zip", archive, {"last": b"data"})
    with zipfile.ZipFile(path) as opened:
        assert [info.file_size for info in opened.infolist()] == [num_bytes, 4]
        assert opened.read("last") == b"data"


@pytest.mark.parametrize("start", [2**32 - 2, 2**32 - 1, 2**32])
def test_a_directory_that_begins_at_the_limit(tmp_path: Path, start: int) -> None:
    num_bytes = start - Archive({"a": 0}).entries["a"].offset
    archive = Archive({"a": num_bytes})
    assert archive.data_end == start
    path = write_sparse(tmp_path / "a.zip", archive, {})
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("a").file_size == num_bytes


def test_an_archive_of_nothing() -> None:
    archive = Archive({})
    with zipfile.ZipFile(io.BytesIO(assembled(archive, {}))) as opened:
        assert opened.namelist() == []
