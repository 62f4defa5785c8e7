"""Files of finished prompts, a JSON object with an `id` a line: appended to, and read back after a kill.

A last line without its newline was cut off by a kill, and its prompt is computed again: the result is the same, and
one rule covers every place at which a line can tear.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llama_mp.errors import RequestError, RunError

SYNC_S = 10.0


class Lines:
    """Appends records to the file that is open at `path`; `done` holds the ids of those that are in it.

    A line is seen by other programs at once. It outlasts the machine once it is synced: as it is written where the
    last sync is SYNC_S ago, else with a later line or at the end."""

    def __init__(self, path: Path, file: int) -> None:
        """`file`: a descriptor, which this object closes in the end."""
        self.path = path
        self.done: set[str] = set()
        self._file = file
        self._synced_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`, a finished prompt's JSON object with its `id`.

        Raises RunError when the file system refuses; what was written of the line is then taken off again.
        """
        assert record["id"] not in self.done, f"id {record['id']!r} was written before"
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self.append(record["id"], line)

    def append(self, id: str, line: bytes) -> None:
        """Append the line of `id`, as `write` does."""
        end_bytes = os.fstat(self._file).st_size
        try:
            while line:  # once, unless the disk fills up in the middle of a line
                line = line[os.write(self._file, line) :]
            if time.monotonic() - self._synced_s >= SYNC_S:
                self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line then waits for the next run, which repairs it
                os.ftruncate(self._file, end_bytes)
            raise self._run_error(error) from error
        self.done.add(id)

    def close(self) -> None:
        """Sync the file and release its lock. Raises RunError when the file system could not keep what was written."""
        try:
            self._sync()  # NFS and quotas report a full disk no sooner
        except OSError as error:
            raise self._run_error(error) from error
        finally:
            os.close(self._file)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced_s = time.monotonic()

    def _run_error(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} cannot be written: {error.strerror}; the {len(self.done)} finished prompts in it are kept: "
            "make room and run the same command again to continue"
        )


def checked_records(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, bytes]]:
    """The id and the line of each whole line of `file`, the output at `path`.

    Raises RequestError for a line that is no record, or whose id another line has."""
    numbers: dict[str, int] = {}
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        id = record_id(line)
        if id is None or id in numbers:
            fault = "not a record" if id is None else f"id {id!r} is that of line {numbers[id]} too"
            raise RequestError(f"{path}:{number}: {fault}; take the line out, or give another --output")
        numbers[id] = number
        yield id, line


def readable_records(file: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The id and the line of each line of `file` that is a record, whatever stands between them."""
    for line in file:
        if line.endswith(b"\n") and (id := record_id(line)) is not None:
            yield id, line


def record_id(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    id = record.get("id") if isinstance(record, dict) else None
    return id if isinstance(id, str) else None
