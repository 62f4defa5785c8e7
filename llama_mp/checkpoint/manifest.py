"""manifest.json: the digests of all that we wrote into a folder, and whether the folder still holds it.

Needs no torch. The writer of a folder takes its names and digests from here too, so that the two cannot disagree.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_mp.checkpoint.digests import OnProgress, Part, digest, digests
from llama_mp.checkpoint.fault import WEIGHT_FILES, Fault, without_path
from llama_mp.errors import RequestError
from llama_mp.files import read_small

MANIFEST = "manifest.json"
HEX_SHA256 = re.compile("[0-9a-f]{64}")


class Range(NamedTuple):
    """A tensor's bytes in its file, and what they should be."""

    offset: int
    num_bytes: int
    sha256: str


class Entry(NamedTuple):
    """A file: its size, its tensors, and the digest of its other bytes; of a file without tensors, of all of them."""

    num_bytes: int
    tensors: dict[str, Range]
    rest_sha256: str

    def parts(self, path: Path) -> dict[str | None, tuple[Part, str]]:
        """What of `path` is digested, and what the digest should be, by tensor; None: the other bytes."""
        ranges = [(r.offset, r.num_bytes) for r in self.tensors.values()]
        parts = {
            name: (Part(path, ((r.offset, r.offset + r.num_bytes),)), r.sha256) for name, r in self.tensors.items()
        }
        return parts | {None: (Part(path, gaps(ranges, self.num_bytes)), self.rest_sha256)}


def digest_range(file: Path, offset: int, num_bytes: int) -> str:
    """Hex SHA-256 of a part of `file`, read in blocks."""
    return digest(Part(file, ((offset, offset + num_bytes),)))


def rest_digest(path: Path, ranges: Iterable[tuple[int, int]]) -> str:
    """Hex SHA-256 of the bytes outside the given (offset, number of bytes), in the file's order."""
    return digest(Part(path, gaps(ranges, path.stat().st_size)))


def gaps(ranges: Iterable[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    """The (start, stop) below `end` that none of the (offset, number of bytes) covers."""
    found, at = [], 0
    for offset, num_bytes in sorted(ranges):
        if offset > at:
            found.append((at, offset))
        at = max(at, offset + num_bytes)
    return (*found, (at, end)) if end > at else tuple(found)


# ---- reading it ------------------------------------------------------------------------------------------------


def read_entries(folder: Path) -> tuple[dict[str, Entry], list[Fault]]:
    """The files that the manifest of `folder` describes, and what is wrong with the manifest itself."""
    try:
        files = json.loads(read_small(folder / MANIFEST))["files"]
        listed = dict(files.items())
    except RequestError as error:
        return {}, [Fault(MANIFEST, None, without_path(error, folder / MANIFEST))]
    except (ValueError, RecursionError) as error:
        return {}, [Fault(MANIFEST, None, f"is not JSON: {error}")]
    except (KeyError, TypeError, AttributeError):
        return {}, [Fault(MANIFEST, None, 'holds no object "files"')]
    entries, faults = {}, []
    for name, value in listed.items():
        try:
            entries[name] = entry_of(name, value)
        except ValueError as error:
            faults.append(Fault(MANIFEST, None, f"{name!r}: {error}"))
    return entries, faults


def entry_of(name: str, value: Any) -> Entry:
    """Raises ValueError with what is wrong about `value`."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError("is not the name of a file beside it")
    fields = checked(value, {"bytes"})
    checked(value, {"tensors", "rest_sha256"} if "tensors" in fields else {"sha256"})
    num_bytes = count_of(fields["bytes"])
    if "tensors" not in fields:
        return Entry(num_bytes, {}, hex_of(fields["sha256"]))
    if not isinstance(fields["tensors"], dict):
        raise ValueError("its tensors are no object")
    tensors = {}
    for tensor, place in fields["tensors"].items():
        place = checked(place, {"offset", "bytes", "sha256"})
        tensors[tensor] = Range(count_of(place["offset"]), count_of(place["bytes"]), hex_of(place["sha256"]))
        end = tensors[tensor].offset + tensors[tensor].num_bytes
        if end > num_bytes:
            raise ValueError(f"{tensor} ends at byte {end}, the file at {num_bytes}")
    return Entry(num_bytes, tensors, hex_of(fields["rest_sha256"]))


def checked(value: Any, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not keys <= set(value):
        raise ValueError(f"is not an object with {', '.join(sorted(keys))}")
    return value


def count_of(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def hex_of(value: Any) -> str:
    if not isinstance(value, str) or not HEX_SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is no SHA-256")
    return value


# ---- checking against it ---------------------------------------------------------------------------------------


def check_manifest(folder: Path, on_progress: OnProgress | None = None) -> list[Fault]:
    """What `folder` holds otherwise than its manifest says: nothing, if it is whole."""
    entries, faults = read_entries(folder)
    faults += unlisted(folder, entries, MANIFEST) if not faults else []
    sizes = {name: size_of(folder / name) for name in entries}
    sound = [name for name, entry in entries.items() if sizes[name] == entry.num_bytes]
    parts = [part for name in sound for part, _ in entries[name].parts(folder / name).values()]
    known = digests(parts, on_progress)
    wrong: dict[str, list[Fault]] = {}
    for name, entry in entries.items():
        size = sizes[name]
        if isinstance(size, str):
            wrong[name] = [Fault(name, None, size)]
        elif size != entry.num_bytes:
            wrong[name] = [Fault(name, None, f"has {size} bytes, not {entry.num_bytes} as {MANIFEST} says")]
        else:
            wrong[name] = differences(name, entry.parts(folder / name), known)
    suspects = {name for name, found in wrong.items() if found and isinstance(sizes[name], int)}
    taken = {name: taken_for(folder / name, sizes[name], entries, known) for name in suspects}
    return faults + with_exchanged(wrong, taken, {name: tuple(entry.tensors) for name, entry in entries.items()})


def unlisted(folder: Path, names: Iterable[str], by: str) -> list[Fault]:
    """The weight files of `folder` that the list `by` does not name."""
    found = {path.name for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    return [Fault(name, None, f"is not in {by}") for name in sorted(found - set(names))]


def size_of(path: Path) -> int | str:
    """The size of a file that can be read, or why it cannot."""
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is not a file"
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def differences(
    file: str, parts: Mapping[str | None, tuple[Part, str]], known: Mapping[Part, str | OSError]
) -> list[Fault]:
    """One fault for each part that differs; a single one where it is another file altogether."""
    faults = []
    for tensor, (part, expected) in parts.items():
        found = known[part]
        if isinstance(found, OSError):
            faults.append(Fault(file, tensor, f"cannot be read: {found.strerror}"))
        elif found != expected:
            what = "SHA-256" if tensor or len(parts) == 1 else "SHA-256 of what lies outside its tensors"
            faults.append(Fault(file, tensor, f"{what} differs from the manifest's"))
    num_tensors, num_wrong = len(parts) - 1, sum(fault.tensor is not None for fault in faults)
    if num_wrong == num_tensors > 1 and not any(isinstance(known[part], OSError) for part, _ in parts.values()):
        text = f"its SHA-256 and those of the {num_wrong - 1} other tensors differ from the manifest's: another file"
        return [Fault(file, faults[0].tensor, text)]
    return faults


def taken_for(path: Path, size: int, entries: Mapping[str, Entry], known: dict[Part, str | OSError]) -> str | None:
    """The other file whose whole content lies at `path`."""

    def is_at_path(part: Part, expected: str) -> bool:
        if part not in known:  # of another layout, and most often the first tensor is enough
            known.update(digests([part], None))
        return known[part] == expected

    for name, entry in entries.items():
        if name == path.name or entry.num_bytes != size:
            continue
        if all(is_at_path(part, expected) for part, expected in entry.parts(path).values()):
            return name
    return None


def with_exchanged(
    wrong: Mapping[str, list[Fault]], taken: Mapping[str, str | None], tensors: Mapping[str, tuple[str, ...]]
) -> list[Fault]:
    """The faults by file, all those of a file that lies in another's place as one, and of two exchanged as one."""
    faults, told = [], set()
    for name, found in wrong.items():
        other = taken.get(name)
        if other is None:
            faults += found
        elif name not in told:
            first, *more = tensors[name] or (None,)
            with_others = f", with {len(more)} other tensors," if more else ""
            exchanged = taken.get(other) == name
            remedy = "the two files are exchanged" if exchanged else f"a copy of {other} lies in its place"
            faults.append(Fault(name, first, f"is{with_others} what {MANIFEST} lists for {other}: {remedy}"))
            told |= {other} if exchanged else set()
    return faults
