"""The parts of an output: each attempt of a job writes finished prompts to a file of its own, in a folder beside it.

So an attempt on a node that is thought lost, and still writes, spoils nothing: no other touches its file. Lines go from
the parts to the output and never back, and a part is removed when its lines are in the output: who reads the parts
first, and the output then, misses none.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_mp.attempt import job_of
from llama_mp.errors import RequestError
from llama_mp.files import REMOVED, is_locked, lock, sync
from llama_mp.lines import Lines, readable_records

REMOVALS = 3  # a task of an array may put its status there meanwhile; NFS keeps what is open under another name


def parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


class Parts:
    """The parts of `output`, none at first."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = parts_folder(output)

    def files(self) -> list[Path]:
        try:  # not Path.glob, which looks for the folder first: it may go at any moment
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in sorted(names) if name.endswith(".jsonl")]

    def hold_lines(self) -> bool:
        """Whether anything was ever written to them."""
        return any(size_bytes(file) > 0 for file in self.files())

    def refuse_others(self, own_job: str | None) -> None:
        """Raise RequestError while an attempt of another job than `own_job` writes its part."""
        for file in self.files():
            job = job_of(file.name.split(".")[0])
            if job != own_job and is_locked(file):
                raise RequestError(
                    f"job {job} is writing {self.output} too; wait for its end or stop it with scancel {job}, "
                    "or give another --output"
                )

    def records(self) -> Iterator[tuple[str, bytes]]:
        """The id and the line of each record in any of them, some twice.

        The last line of one whose attempt was killed may be cut off, and of one that is being written anything may be
        missing on another host: what cannot be read is as if it were not there."""
        yield from self.records_in(self.files())

    def ids_of(self, name: str) -> set[str]:
        """What the attempt `name` has finished."""
        own = (path for path in self.files() if path.name.split(".")[0] == name)
        return {id for id, _ in self.records_in(own)}

    def records_in(self, files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
        for path in files:
            try:
                with path.open("rb") as file:
                    yield from readable_records(file)
            except OSError as error:
                if error.errno not in REMOVED:
                    raise

    def begin(self, name: str) -> Lines:
        """A new part, for the attempt `name`; a number follows the name where that attempt has begun one before."""
        for count in itertools.count():
            path = self.folder / (f"{name}.{count}.jsonl" if count else f"{name}.jsonl")
            self.folder.mkdir(exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except (FileExistsError, FileNotFoundError):  # the second: another attempt has just removed the folder
                continue
            with contextlib.suppress(RequestError):  # the lock is for others to see; a file system may have none
                lock(file, path)
            with contextlib.suppress(FileNotFoundError):  # removed again, and the part with it: the output is complete
                sync(self.folder)
            return Lines(path, file)
        raise AssertionError("itertools.count ended")

    def remove(self) -> None:
        """Remove all of them, and the folder, once their lines are in the output."""
        for _ in range(REMOVALS):
            try:
                for path in self.folder.iterdir():
                    path.unlink(missing_ok=True)
                return self.folder.rmdir()
            except OSError as error:  # another removes it at the same time, or has just put something there
                if error.errno not in (*REMOVED, errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self.files():  # of an attempt that begins, and will remove it in its turn
                return


def size_bytes(path: Path) -> int:
    """The size of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
