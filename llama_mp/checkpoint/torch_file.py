"""What torch.save wrote, looked through before torch loads it: the archive's directory, and what its pickle calls.

torch's own weights_only refuses foreign functions. It does not refuse to allocate what a few bytes ask for: an entry
that inflates, a `bytearray` of terabytes, a directory of gigabytes. Needs no torch.
"""

import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama_mp.checkpoint.archive import CENTRAL, END, FIELD, LIMIT, LOCAL, ZIP64_END, ZIP64_FIELD, ZIP64_LOCATOR, Entry
from llama_mp.errors import RequestError

MAX_DIRECTORY_BYTES = 1 << 24
MAX_RECORD_BYTES = 1 << 22  # of all that is no tensor: a pickle of 10,000 tensors has 1.5 MB
# What the pickle of a dictionary of tensors names. torch's list is longer: a few of it allocate at will.
CALLS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Float|Half|BFloat16|Double)Storage"
)


def read_pickle(file: Path) -> bytes:
    """The pickle of `file`, which names every tensor, and is not unpickled here.

    Raises RequestError for an archive that is not as torch.save writes it, and for a pickle that calls other functions
    than those that make tensors."""
    try:
        with file.open("rb") as opened:
            content = read_archive(opened, file.stat().st_size)
        named = [str(argument) for op, argument, _ in pickletools.genops(content) if op.name == "GLOBAL"]
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:  # pickletools raises nothing else for nonsense
        fault = " ".join(str(error).split())[:120]
        raise RequestError(f"{file} is not a whole torch file ({fault}); copy it again") from error
    foreign = [name for name in named if not CALLS.fullmatch(name)]
    if foreign:
        raise RequestError(
            f"{file} would run code when loaded, or holds more than weights: refused (it names {foreign[0][:80]}); "
            "get it from a source that you trust"
        )
    return content


def read_archive(opened: BinaryIO, size: int) -> bytes:
    """The content of the one data.pkl. Raises ValueError or struct.error for an archive with a fault."""
    entries = read_directory(opened, size)
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start < end:
            raise ValueError(f"its entry {entry.name!r} lies within another one")
        end = entry.start + LOCAL.size + entry.num_bytes
        if "/data/" not in entry.name and entry.num_bytes > MAX_RECORD_BYTES:
            raise ValueError(f"its entry {entry.name!r} has {entry.num_bytes} bytes")
    names = [entry.name.lower() for entry in entries]  # torch finds an entry whatever the case
    if len(set(names)) < len(names) or any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("its entries are not those of torch.save")
    pickles = [entry for entry in entries if entry.name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} pickles")
    [entry] = pickles
    lengths = LOCAL.unpack(read_at(opened, entry.start, LOCAL.size))[-2:]  # of the name and the extra field
    return read_at(opened, entry.start + LOCAL.size + sum(lengths), entry.num_bytes)


def read_directory(opened: BinaryIO, size: int) -> list[Entry]:
    """The entries of the archive: stored as they are, each within the `size` bytes of the file."""
    end = size - END.size
    magic, *_, num_bytes, start, _ = END.unpack(read_at(opened, end, END.size))
    if magic != b"PK\5\6":
        raise ValueError("its directory is missing")
    if end >= ZIP64_LOCATOR.size:
        magic, _, at, _ = ZIP64_LOCATOR.unpack(read_at(opened, end - ZIP64_LOCATOR.size, ZIP64_LOCATOR.size))
        if magic == b"PK\6\7":
            end = at
            *_, num_bytes, start = ZIP64_END.unpack(read_at(opened, at, ZIP64_END.size))
    if start + num_bytes != end or num_bytes > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory of {num_bytes} bytes lies at {start}")
    content, entries, at = read_at(opened, start, num_bytes), [], 0
    while at < num_bytes:
        entry, at = read_entry(content, at)
        if entry.start + LOCAL.size + entry.num_bytes > start:
            raise ValueError(f"its entry {entry.name!r} ends beyond the data")
        entries.append(entry)
    return entries


def read_entry(directory: bytes, at: int) -> tuple[Entry, int]:
    """The entry whose record begins at `at`, and where the next one does. Its `offset` is not known here."""
    magic, *_, method, _, _, _, packed, size, name, extra, comment, _, _, _, start = CENTRAL.unpack_from(directory, at)
    at += CENTRAL.size
    text = directory[at : at + name].decode()
    at += name
    wide = wide_values(directory[at : at + extra])
    size, packed, start = (next(wide, LIMIT) if value == LIMIT else value for value in (size, packed, start))
    if magic != b"PK\1\2" or method != 0 or packed != size or not text.isprintable():
        raise ValueError(f"its entry {text[:80]!r} is not as torch.save stores it")
    return Entry(text, size, start, offset=0), at + extra + comment


def wide_values(extra: bytes) -> Iterator[int]:
    """The numbers of the ZIP64 field, if there is one."""
    at = 0
    while at + FIELD.size <= len(extra):
        kind, length = FIELD.unpack_from(extra, at)
        if kind == ZIP64_FIELD:
            yield from struct.unpack_from(f"<{length // 8}Q", extra, at + FIELD.size)
        at += FIELD.size + length


def read_at(opened: BinaryIO, offset: int, num_bytes: int) -> bytes:
    if offset < 0:
        raise ValueError("it is too short")
    opened.seek(offset)
    return opened.read(num_bytes)
