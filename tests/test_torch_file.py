"""What torch.save writes is looked through; archives and pickles that mean ill are refused before torch sees them."""

import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutations_packed import Runs

from llama_mp.checkpoint.archive import Archive
from llama_mp.checkpoint.meta import open_shard
from llama_mp.checkpoint.torch_file import MAX_DIRECTORY_BYTES, MAX_RECORD_BYTES, read_pickle
from llama_mp.errors import RequestError

GIB = 1 << 30
TENSORS = {"norm.weight": torch.arange(5.0), "output.weight": torch.ones(4, 5, dtype=torch.bfloat16)}


def saved(tensors: dict[str, torch.Tensor] = TENSORS) -> dict[str, bytes]:
    """The entries of a file of torch.save."""
    whole = io.BytesIO()
    torch.save(tensors, whole)
    with zipfile.ZipFile(whole) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pickle_name(entries: dict[str, bytes]) -> str:
    [name] = [name for name in entries if name.endswith("/data.pkl")]
    return name


def zipped(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def with_pickle(path: Path, content: bytes) -> Path:
    entries = saved()
    return zipped(path, list((entries | {pickle_name(entries): content}).items()))


def refusal(file: Path) -> str:
    """What is said of `file`, by the look through it and by the whole opening; neither takes memory."""
    tracemalloc.start()
    said = []
    for read in (read_pickle, open_shard):
        with pytest.raises(RequestError) as caught:
            read(file)
        said.append(str(caught.value))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said[0] == said[1] and said[0].startswith(f"{file} ") and "\n" not in said[0]
    assert peak_bytes < 4 * MAX_RECORD_BYTES
    return said[0]


# ---- whole files -----------------------------------------------------------------------------------------------


def test_the_pickle_is_found_whoever_wrote_the_archive(tmp_path: Path) -> None:
    entries = saved()
    content = entries[pickle_name(entries)]
    torch.save(TENSORS, tmp_path / "torch.pth")
    zipped(tmp_path / "zipfile.pth", list(entries.items()))
    archive = Archive({name: len(value) for name, value in entries.items()})
    with (tmp_path / "own.pth").open("wb") as file:
        for offset, frame in archive.frame({name: zlib.crc32(value) for name, value in entries.items()}):
            os.pwrite(file.fileno(), frame, offset)
        for name, value in entries.items():
            os.pwrite(file.fileno(), value, archive.entries[name].offset)
    for name in ("torch", "zipfile", "own"):
        assert read_pickle(tmp_path / f"{name}.pth") == content
        assert set(open_shard(tmp_path / f"{name}.pth")) == set(TENSORS)


def test_entries_beyond_4_gib_and_more_than_65535(tmp_path: Path) -> None:
    file = tmp_path / "large.pth"
    entries = saved({f"t{number}": torch.ones(1) for number in range(10)})
    name = pickle_name(entries)
    sizes = {name: len(entries[name]), "archive/data/0": 5 * GIB}
    sizes |= {f"archive/data/{number}": 1 for number in range(1, 66_000)}
    archive = Archive(sizes)
    with file.open("wb") as opened:
        for offset, frame in archive.frame(dict.fromkeys(sizes, 0)):
            os.pwrite(opened.fileno(), frame, offset)
        os.pwrite(opened.fileno(), entries[name], archive.entries[name].offset)
    assert read_pickle(file) == entries[name]


# ---- archives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_entry_that_inflates(tmp_path: Path, compression: int) -> None:
    entries = saved()
    bomb = list((entries | {pickle_name(entries): bytes(40 << 20)}).items())
    assert "is not as torch.save stores it" in refusal(zipped(tmp_path / "a.pth", bomb, compression))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["{}/data.pkl", "{}/DATA.PKL", "{}/data/0", "{}/constants.pkl"])
def test_entries_of_one_name_or_of_another_kind_of_file(tmp_path: Path, name: str) -> None:
    entries = saved()
    folder = pickle_name(entries).partition("/")[0]
    file = zipped(tmp_path / "a.pth", [*entries.items(), (name.format(folder), b"")])
    assert "its entries are not those of torch.save" in refusal(file)


def test_two_pickles_or_none(tmp_path: Path) -> None:
    entries = saved()
    file = zipped(tmp_path / "two.pth", [*entries.items(), ("other/data.pkl", b"")])
    assert "it holds 2 pickles" in refusal(file)
    entries.pop(pickle_name(entries))
    assert "it holds 0 pickles" in refusal(zipped(tmp_path / "none.pth", list(entries.items())))


def test_a_record_that_is_a_hole_of_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    entries = saved()
    name = pickle_name(entries)
    sizes = {name: len(entries[name]), "archive/byteorder": 6 * GIB}
    archive = Archive(sizes)
    with file.open("wb") as opened:
        for offset, frame in archive.frame(dict.fromkeys(sizes, 0)):
            os.pwrite(opened.fileno(), frame, offset)
        os.pwrite(opened.fileno(), entries[name], archive.entries[name].offset)
    assert f"its entry 'archive/byteorder' has {6 * GIB} bytes" in refusal(file)


def directory_changed(path: Path, change: Callable[[bytearray, list[int]], None]) -> Path:
    """An archive whose directory is changed; `change` gets its bytes and where its records begin."""
    entries = saved()
    content = bytearray(zipped(path, list(entries.items())).read_bytes())
    at, starts = content.find(b"PK\1\2"), []
    while at >= 0:
        starts.append(at)
        at = content.find(b"PK\1\2", at + 1)
    change(content, starts)
    path.write_bytes(content)
    return path


def place_all_at_the_first(content: bytearray, starts: list[int]) -> None:
    for start in starts:
        content[start + 42 : start + 46] = bytes(4)


def reach_into_the_directory(content: bytearray, starts: list[int]) -> None:
    for field in (20, 24):  # the size, packed and not
        content[starts[-1] + field : starts[-1] + field + 4] = struct.pack("<I", starts[0])


def claim_gigabytes(content: bytearray, starts: list[int]) -> None:
    content[-10:-6] = struct.pack("<I", 2**32 - 2)


def begin_within_itself(content: bytearray, starts: list[int]) -> None:
    content[-6:-2] = struct.pack("<I", len(content) - 30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (place_all_at_the_first, "lies within another one"),
        (reach_into_the_directory, "ends beyond the data"),
        (claim_gigabytes, f"its directory of {2**32 - 2} bytes lies at"),
        (begin_within_itself, "its directory of "),
        (lambda content, _: content.extend(b"a comment"), "its directory is missing"),
    ],
)
def test_directories_that_lie(tmp_path: Path, change: Callable[[bytearray, list[int]], None], words: str) -> None:
    assert words in refusal(directory_changed(tmp_path / "a.pth", change))


def test_a_directory_of_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"PK\3\4")
    os.truncate(file, 3 * GIB)
    with file.open("ab") as opened:
        opened.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 3 * GIB - 4, 4, 0))
    assert 3 * GIB > MAX_DIRECTORY_BYTES
    assert "its directory of " in refusal(file)


# ---- pickles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        Runs(bytearray, 10**13),
        Runs(torch.Tensor, 10**12),
        Runs(torch.Size, [2**62] * 9),
        Runs(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40, 8), (8, 1), False),
        Runs(os.mkdir, "canary"),
        Runs(eval, "1"),
    ],
    ids=lambda call: call.call[0].__name__,
)
def test_a_pickle_that_calls_more_than_tensors_need(tmp_path: Path, call: Runs) -> None:
    said = refusal(with_pickle(tmp_path / "a.pth", pickle.dumps({"norm.weight": call}, protocol=2)))
    assert re.search(rf"refused \(it names [\w.]+ {call.call[0].__name__}\); get it from a source", said)
    assert not Path("canary").exists()


def test_a_pickle_without_end(tmp_path: Path) -> None:
    assert "is not a whole torch file" in refusal(with_pickle(tmp_path / "a.pth", b"\x80\x02(((("))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(2**40),  # a tensor of terabytes from four bytes
        torch.ones(3).expand(2**30, 3),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.bool),
    ],
)
def test_tensors_that_are_no_plain_floats(tmp_path: Path, tensor: torch.Tensor) -> None:
    file = tmp_path / "a.pth"
    torch.save({"norm.weight": tensor}, file)
    with pytest.raises(RequestError, match=r"not stored as plain numbers|refused .it names torch LongStorage|BoolSto"):
        open_shard(file)


def test_views_of_a_larger_storage_and_transposed_ones_are_plain(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    torch.save(
        {"output.weight": whole[1:3, :5], "norm.weight": whole[0], "tok_embeddings.weight": whole.T}, tmp_path / "a"
    )
    held = open_shard(tmp_path / "a")
    assert torch.equal(held["output.weight"], whole[1:3, :5]) and torch.equal(held["tok_embeddings.weight"], whole.T)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    torch.save({7: torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(RequestError, match="7 is neither a vector nor a matrix"):
        open_shard(tmp_path / "a.pth")
