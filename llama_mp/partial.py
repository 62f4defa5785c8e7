"""A folder that appears whole or not at all: written as `DIR.partial`, continued after a kill, renamed at the end.

The journal in it says for which request, and which parts are whole; it carries the lock. What it says is only believed
once the bytes it speaks of are found to be there: a machine that lost power may have kept the journal and not the data.
"""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_mp.errors import RequestError, RunError
from llama_mp.files import FULL, lock, sync

JOURNAL = ".llama-mp.journal"  # no name that anybody else gives
REPLACED = ""  # the part of the journal that says that a folder was put aside


def partial_path(output: Path) -> Path:
    """Where `output` is while it is not whole."""
    return output.with_name(output.name + ".partial")


def replaced_path(output: Path) -> Path:
    """Where what was at `output` waits until its successor is there."""
    return output.with_name(output.name + ".replaced")


def finished(output: Path) -> Any:
    """The request whose folder has just taken its name, where a kill came before all was tidied up; else None.

    Tidies up."""
    journal = output / JOURNAL
    if not journal.is_file():
        return None
    request, *parts = entries(journal.read_bytes())[0] or [None]
    if request is not None:
        if REPLACED in dict(parts):
            shutil.rmtree(replaced_path(output), ignore_errors=True)
        journal.unlink(missing_ok=True)
    return request


class Partial:
    """The folder that becomes `output`. `parts`: what the journal says of each part that is whole.

    Opening raises RequestError, and then has changed nothing, when another run writes it, or when it was begun for
    another `request` (JSON values) and `overwrite` does not allow to throw that away."""

    def __init__(self, output: Path, request: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output, self.path = output, partial_path(output)
        self.request = json.loads(json.dumps(request))  # as it will be read back
        self.overwrite = overwrite
        self.parts: dict[str, Any] = {}
        self.path.mkdir(exist_ok=True)
        self._journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            lock(self._journal, self.path)
            self._check_still_there()
            self._adopt()
        except BaseException:
            os.close(self._journal)
            raise

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._journal)
        if isinstance(error, OSError) and error.errno in FULL:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}; what is whole in it is kept: make room and run the "
                "same command again to continue"
            ) from error

    def record(self, part: str, value: Any) -> None:
        """Note that `part` is whole."""
        self._append([part, value])
        self.parts[part] = value

    def commit(self) -> None:
        """Let the folder take its name, in one step, once all that is in it is on disk. What was there goes last."""
        for path in (*self.path.iterdir(), self.path):
            sync(path)
        if self.overwrite and self.output.exists() and any(self.output.iterdir()):
            self.record(REPLACED, True)
            self.output.rename(replaced_path(self.output))
        self.path.rename(self.output)  # refused by the kernel where a folder came to be that is not empty
        sync(self.output.parent)
        # The journal goes last, under the new name: until here nobody else could begin in a folder of the old one.
        finished(self.output)

    def _check_still_there(self) -> None:
        """Raise RequestError when another run renamed the folder while this one was opening its journal."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path / JOURNAL), os.fstat(self._journal)):
                return
        raise RequestError(f"another run has just finished {self.output}: look at it, or run the same command again")

    def _adopt(self) -> None:
        """Take over what was begun, or begin."""
        found, end = entries(os.pread(self._journal, os.fstat(self._journal).st_size, 0))
        os.ftruncate(self._journal, end)
        begun, *parts = found or [None]
        if begun == self.request:
            self.parts = dict(parts)
            return
        others = [file for file in self.path.iterdir() if file.name != JOURNAL]
        if others and not self.overwrite:
            if begun is None:
                (self.path / JOURNAL).unlink()
            raise RequestError(
                f"{self.path} was begun for another request: finish that with its own command, give --overwrite to "
                f"begin anew, or rm -r {shlex.quote(str(self.path))}"
            )
        for file in others:
            file.unlink()
        os.ftruncate(self._journal, 0)
        self._append(self.request)

    def _append(self, value: Any) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        start = os.fstat(self._journal).st_size
        if os.write(self._journal, line) < len(line):
            os.ftruncate(self._journal, start)
            raise OSError(FULL[0], os.strerror(FULL[0]), str(self.path / JOURNAL))


def entries(journal: bytes) -> tuple[list[Any], int]:
    """The journal's lines, and where they end: what a kill or a power cut left of the last ones does not count."""
    found, end = [], 0
    for line in journal.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line if line.endswith(b"\n") else b""))
            end += len(line)
            continue
        break
    return found, end
