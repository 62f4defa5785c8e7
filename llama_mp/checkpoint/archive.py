"""Zip archives whose every byte has its place before any of them is written, as `torch.save` lays them out.

The entries' sizes fix all offsets. So data may be written in any order and by many hands, a run that was interrupted
finds its place again, and nothing of the archive's frame is written before the checksums are known. Entries are stored,
not compressed, and their data is aligned, so that it can be mapped into memory (APPNOTE.TXT 6.3, sections 4.3 to 4.5).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: what torch.save gives its storages
LIMIT = 0xFFFFFFFF  # sizes and offsets from here on stand in a ZIP64 field
VERSION, ZIP64_VERSION = 20, 45
DATE = 0x21  # 1 January 1980, the first day there is: equal contents make equal archives

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
ZIP64_END = struct.Struct("<4sQ2H2I4Q")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
FIELD = struct.Struct("<2H")  # kind and length of an extra field
ZIP64_FIELD, PADDING_FIELD = 0x0001, 0x4246  # the second is the one that torch.save pads with


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its header begins at `start`, its data at `offset`."""

    name: str
    num_bytes: int
    start: int
    offset: int

    @property
    def is_large(self) -> bool:
        return self.num_bytes >= LIMIT


class Archive:
    """The places of all entries of an archive with the given sizes, in order."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.entries: dict[str, Entry] = {}
        end = 0
        for name, num_bytes in sizes.items():
            smallest = end + LOCAL.size + len(name.encode()) + len(zip64_field(num_bytes, num_bytes)) + FIELD.size
            offset = -(-smallest // ALIGNMENT) * ALIGNMENT
            self.entries[name] = Entry(name, num_bytes, end, offset)
            end = offset + num_bytes
        self.data_end = end
        self.num_bytes = end + len(self.directory(dict.fromkeys(sizes, 0)))

    def frame(self, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """All bytes that are no entry's data, as (offset, bytes). `checksums`: the CRC-32 of each entry."""
        for name, entry in self.entries.items():
            yield entry.start, local_header(entry, checksums[name])
        yield self.data_end, self.directory(checksums)

    def directory(self, checksums: Mapping[str, int]) -> bytes:
        """The end of the archive: one record for each entry, then where the records are."""
        records = b"".join(central_record(entry, checksums[name]) for name, entry in self.entries.items())
        count, start = len(self.entries), self.data_end
        zip64 = b""
        if count >= 0xFFFF or start + len(records) >= LIMIT:
            zip64 = ZIP64_END.pack(
                b"PK\6\6", ZIP64_END.size - 12, ZIP64_VERSION, ZIP64_VERSION, 0, 0, count, count, len(records), start
            ) + ZIP64_LOCATOR.pack(b"PK\6\7", 0, start + len(records), 1)
        count, size, start = min(count, 0xFFFF), min(len(records), LIMIT), min(start, LIMIT)
        return records + zip64 + END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)


def zip64_field(*values: int) -> bytes:
    """The extra field for those of `values` that are too large for their own place."""
    large = [value for value in values if value >= LIMIT]
    return struct.pack(f"<2H{len(large)}Q", ZIP64_FIELD, 8 * len(large), *large) if large else b""


def local_header(entry: Entry, checksum: int) -> bytes:
    """What stands before the data of `entry`, padded so that the data is aligned."""
    name, size = entry.name.encode(), min(entry.num_bytes, LIMIT)
    extra = zip64_field(entry.num_bytes, entry.num_bytes)
    padding = entry.offset - entry.start - LOCAL.size - len(name) - len(extra) - FIELD.size
    extra += FIELD.pack(PADDING_FIELD, padding) + b"Z" * padding
    version = ZIP64_VERSION if entry.is_large else VERSION
    return LOCAL.pack(b"PK\3\4", version, 0, 0, 0, DATE, checksum, size, size, len(name), len(extra)) + name + extra


def central_record(entry: Entry, checksum: int) -> bytes:
    """The entry in the directory."""
    name, size = entry.name.encode(), min(entry.num_bytes, LIMIT)
    extra = zip64_field(entry.num_bytes, entry.num_bytes, entry.start)
    version = ZIP64_VERSION if extra else VERSION
    lengths = (len(name), len(extra), 0, 0, 0)
    head = CENTRAL.pack(
        b"PK\1\2", version, version, 0, 0, 0, DATE, checksum, size, size, *lengths, 0, min(entry.start, LIMIT)
    )
    return head + name + extra
