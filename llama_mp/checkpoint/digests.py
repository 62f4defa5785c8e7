"""Digests of parts of files, in bounded memory and on all cores. Needs no torch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from llama_mp.cores import num_threads

BLOCK_BYTES = 1 << 20

# Called with (bytes done, bytes in all) as work goes on.
OnProgress = Callable[[int, int], None]
Item, Result = TypeVar("Item"), TypeVar("Result")


class Part(NamedTuple):
    """The bytes of `path` from start to stop, for each (start, stop) of `spans` in order."""

    path: Path
    spans: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for start, stop in self.spans)


def digest(part: Part, algorithm: str = "sha256") -> str:
    """Hex digest. Bytes that the file no longer has are left out: its digest is then another."""
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    buffer = memoryview(bytearray(min(BLOCK_BYTES, part.num_bytes)))
    with part.path.open("rb", buffering=0) as file:
        for start, stop in part.spans:
            file.seek(start)
            while start < stop and (num_read := file.readinto(buffer[: stop - start])):
                hasher.update(buffer[:num_read])  # without the GIL, as is the reading
                start += num_read
    return hasher.hexdigest()


def digests(
    parts: Sequence[Part], on_progress: OnProgress | None, algorithm: str = "sha256"
) -> dict[Part, str | OSError]:
    """The digest of each part, or what kept it from being read."""

    def digest_or_error(part: Part) -> str | OSError:
        try:
            return digest(part, algorithm)
        except OSError as error:
            return error

    result, done, total = {}, 0, sum(part.num_bytes for part in parts)
    for part, found in zip(parts, in_threads(digest_or_error, parts), strict=True):
        result[part] = found
        done += part.num_bytes
        if on_progress:
            on_progress(done, total)
    return result


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in order, on as many threads as there are cores at hand."""
    with ThreadPoolExecutor(num_threads()) as pool:
        yield from pool.map(work, items)
