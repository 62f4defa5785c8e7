"""A rank's blocks in one file of the cache folder, as they lie in memory: written on first use, found again later.

A folder holds `blocks`, one flat buffer after the other, each from a page's beginning, and `index.json`, which says
what is in them and appears last: without it there is no file. Each chunk has a checksum, which is held against what is
read the first time in a run, so that a damaged file never becomes weights.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from llama_mp.errors import RequestError, RunError
from llama_mp.files import FULL, json_bytes, sync, write_whole
from llama_mp.layout import Span, padded
from llama_mp.version import VERSION

FORMAT = 2  # of the blocks: another one where their bytes mean another thing
PAGE_BYTES = 4096
CHUNK_BYTES = 4 << 20  # read by one call, and known by one checksum
READERS = 8  # calls at once: what a disk needs to have enough to do
REMEDY = "make room there, or name a folder on a larger disk in XDG_CACHE_HOME"


def identity(files: Sequence[Path], *loaded_as: str | int) -> str:
    """A name for the blocks of a checkpoint of `files`: other files, and files written anew, have another."""
    stated = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([FORMAT, VERSION, stated, loaded_as]).encode()).hexdigest()[:32]


class BlockFile:
    """The blocks in `folder`. `told` is what `finish` was told when they were written; None: they are not there.

    The first to open a folder without them writes them: `write` each, then `finish`. Until then it holds a lock."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int) -> None:
        """Raises RequestError where another run is writing, and where the disk has no room for them."""
        self.folder, self.path = folder, folder / "blocks"
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.file: IO[bytes] | None = None
        self.pool = ThreadPoolExecutor(READERS, "read blocks")
        self.lock: IO[str] | None = None
        self.checksums: list[list[int]] = []
        self.unchecked = set(range(num_blocks))
        self.told = self.find()
        if self.told is None:
            self.begin()

    # ---- what is there ---------------------------------------------------------------------------------------------

    def find(self) -> dict[str, Any] | None:
        """What `finish` was told, of a file that is there as it was left, opened; else None."""
        try:
            index = json.loads((self.folder / "index.json").read_bytes())
            told, block_bytes, self.checksums = index["told"], index["block_bytes"], index["checksums"]
            shape = [len(self.checksums), *{len(block) for block in self.checksums}]
            file = self.path.open("rb", buffering=0)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sizes = block_bytes, os.fstat(file.fileno()).st_size
        if shape != [self.num_blocks, self.num_chunks] or sizes != (self.block_bytes, self.file_bytes):
            file.close()
            return None
        self.file = file
        return told

    @property
    def num_chunks(self) -> int:
        """Of a block."""
        return -(-self.block_bytes // CHUNK_BYTES)

    @property
    def stride(self) -> int:
        return padded(self.block_bytes, PAGE_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.num_blocks * self.stride

    def chunks(self) -> Iterator[Span]:
        for start in range(0, self.block_bytes, CHUNK_BYTES):
            yield Span(start, min(start + CHUNK_BYTES, self.block_bytes))

    # ---- writing ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"another run is writing {self.path} for --offload disk: wait for its end") from error
        for old in ("index.json", "blocks", "blocks.tmp"):
            (self.folder / old).unlink(missing_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < self.file_bytes:
            raise RequestError(
                f"--offload disk writes {self.file_bytes / 1e9:.2f} GB of blocks to {self.folder}, and "
                f"{free / 1e9:.2f} GB are free: {REMEDY}"
            )
        self.file = (self.folder / "blocks.tmp").open("w+b", buffering=0)
        self.checksums = [[] for _ in range(self.num_blocks)]

    def write(self, block: int, content: memoryview) -> None:
        """Raises RequestError when the disk is full."""
        assert len(content) == self.block_bytes, f"{len(content)} bytes for a block of {self.block_bytes}"
        self.checksums[block] = [zlib.crc32(content[start:stop]) for start, stop in self.chunks()]
        try:
            for start, stop in self.chunks():
                while start < stop:
                    start += os.pwrite(self.file.fileno(), content[start:stop], block * self.stride + start)
            os.ftruncate(self.file.fileno(), self.file_bytes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.file.close()
            (self.folder / "blocks.tmp").unlink()
            raise RequestError(f"{self.path} cannot be written: {error.strerror}; {REMEDY}") from error

    def finish(self, told: dict[str, Any]) -> None:
        """All blocks are written; `told` is kept for later runs."""
        assert all(len(block) == self.num_chunks for block in self.checksums), "a block is missing"
        os.fsync(self.file.fileno())
        os.replace(self.folder / "blocks.tmp", self.path)
        sync(self.folder)
        index = {"told": told, "block_bytes": self.block_bytes, "checksums": self.checksums}
        write_whole(self.folder / "index.json", json_bytes(index))
        self.told = told
        self.unlock()

    def unlock(self) -> None:
        if self.lock:
            self.lock.close()
            self.lock = None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, block: int, target: memoryview) -> None:
        """Fill `target` with a block, its chunks read at once. Raises RunError when they are not what was written."""
        must_check = block in self.unchecked

        def read_chunk(number: int, span: Span) -> bool | OSError:
            start, stop = span
            try:
                while start < stop and (count := os.preadv(self.file.fileno(), [target[start:stop]], offset + start)):
                    start += count
            except OSError as error:
                return error  # raised once no other chunk is on its way to `target`
            checksum = zlib.crc32(target[span.start : stop]) if must_check else self.checksums[block][number]
            return start == stop and checksum == self.checksums[block][number]

        offset = block * self.stride
        found = list(self.pool.map(read_chunk, range(self.num_chunks), self.chunks()))
        for error in found:
            if isinstance(error, OSError):
                raise RunError(f"{self.path} cannot be read: {error.strerror}; see to the disk it is on") from error
        if not all(found):
            self.forget()
            raise RunError(f"{self.path} was damaged in block {block}: run again, and it is written anew")
        self.unchecked.discard(block)

    def forget(self) -> None:
        """Have the next run write the blocks anew."""
        (self.folder / "index.json").unlink(missing_ok=True)

    def close(self) -> None:
        """No read may be going on."""
        self.pool.shutdown()
        self.unlock()
        if self.file:
            self.file.close()
