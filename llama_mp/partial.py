"""A folder that appears whole or not at all: written as `DIR.partial`, continued after a kill, renamed at the end.

The journal in it says for which request, and which parts are whole; it carries the lock. What it says is only believed
once the bytes it speaks of are found to be there: a machine that lost power may have kept the journal and not the data.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_mp.errors import RequestError, RunError
from llama_mp.files import FULL, lock, sync

JOURNAL = ".llama-mp.journal"  # no name that anybody else gives
REPLACED = ""  # the part of the journal that says that a folder was put aside


def partial_path(output: Path) -> Path:
    """Where `output` is while it is not whole: beside the folder itself, where `output` is a link to one."""
    return beside(output, ".partial")


def replaced_path(output: Path) -> Path:
    """Where what `output` held is put aside, until the new folder has its name."""
    return beside(output, ".replaced")


def beside(output: Path, suffix: str) -> Path:
    real = Path(os.path.realpath(output))  # `.` and `..` have names then
    return real.with_name(real.name + suffix)


class Partial:
    """The folder that becomes `output`. `parts`: what the journal says of each part that is whole.

    Opening raises RequestError, and then has changed nothing, when another run writes it, or when it was begun for
    another `request` (JSON values) and `overwrite` does not allow to throw that away."""

    def __init__(self, output: Path, request: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output, self.path = Path(os.path.realpath(output)), partial_path(output)
        self.replaced = replaced_path(output)
        self.request = json.loads(json.dumps(request))  # as it will be read back
        self.overwrite = overwrite
        self.parts: dict[str, Any] = {}
        self._check_output()
        self.path.mkdir(exist_ok=True)
        is_ours = (self.path / JOURNAL).exists()
        try:
            self._journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except FileNotFoundError as error:
            raise self._just_finished() from error
        try:
            lock(self._journal, self.path)
            if not is_at(self.path / JOURNAL, self._journal):
                raise self._just_finished()
            self._adopt(is_ours)
        except BaseException:
            os.close(self._journal)
            raise

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._journal)
        if isinstance(error, KeyboardInterrupt):
            print(f"{self.path} is kept: the same command continues", file=sys.stderr)
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
        if self.overwrite and is_filled(self.output):
            self.record(REPLACED, True)
            os.fsync(self._journal)
            self.output.rename(self.replaced)
        self.path.rename(self.output)  # refused by the kernel where a folder came to be that is not empty
        sync(self.output.parent)
        clean_up(self.output, self.parts)

    def _check_output(self) -> None:
        """Raise RequestError when the folder could not take its name in the end."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise RequestError(f"{self.path} is no folder, and is where this command writes at first: move it away")
        if not is_filled(self.output):
            return
        if not self.overwrite:
            raise RequestError(f"{self.output} is not empty: give another --output, or --overwrite to replace it")
        clean_up_after_kill(self.output)
        if os.path.lexists(self.replaced):
            raise RequestError(
                f"{self.replaced} is in the way, where what is replaced waits for its end: look at it, move it or "
                f"rm -r {shlex.quote(str(self.replaced))}"
            )

    def _just_finished(self) -> RequestError:
        return RequestError(f"another run has just finished {self.output}: look at it, or run the same command again")

    def _adopt(self, is_ours: bool) -> None:
        """Take over what was begun, or begin."""
        begun, parts = entries(self._journal)
        if begun == self.request:
            self.parts = parts
            return
        others = [file for file in self.path.iterdir() if file.name != JOURNAL]
        if others and (not is_ours or any(file.is_dir() and not file.is_symlink() for file in others)):
            if not is_ours:
                (self.path / JOURNAL).unlink()
            raise RequestError(
                f"{self.path} holds what this command did not write, and is where it would write: move it away, or "
                "give another --output"
            )
        if others and not self.overwrite:
            raise RequestError(
                f"{self.path} was begun for another request: finish that with its own command, give --overwrite to "
                f"begin anew, or rm -r {shlex.quote(str(self.path))}"
            )
        for file in others:
            file.unlink()
        os.ftruncate(self._journal, 0)
        self._append(self.request)
        if REPLACED in parts:  # it is still aside, and goes when this run ends
            self.record(REPLACED, True)

    def _append(self, value: Any) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        start = os.fstat(self._journal).st_size
        if os.write(self._journal, line) < len(line):
            os.ftruncate(self._journal, start)
            raise OSError(FULL[0], os.strerror(FULL[0]), str(self.path / JOURNAL))


def is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def is_at(path: Path, file: int) -> bool:
    """Whether the open `file` lies at `path` still: another run may have renamed its folder before it was locked."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def clean_up(output: Path, parts: Mapping[str, Any]) -> None:
    """What is left to do once the folder has its name; `parts`: of its journal."""
    if REPLACED in parts:
        shutil.rmtree(replaced_path(output), ignore_errors=True)
    # Last, and under the new name: until here nobody else could begin in a folder of the old one.
    (output / JOURNAL).unlink()


def clean_up_after_kill(output: Path) -> Any:
    """Do what a run that was killed right after the last rename left to do. Raises RequestError if it still runs.

    The request of that run; None when nothing was left to do."""
    request = None
    with contextlib.suppress(FileNotFoundError):
        journal = os.open(output / JOURNAL, os.O_RDWR)
        try:
            lock(journal, output)
            if is_at(output / JOURNAL, journal):
                request, parts = entries(journal)
                clean_up(output, parts)
        finally:
            os.close(journal)
    return request


def entries(journal: int) -> tuple[Any, dict[str, Any]]:
    """(request, parts) as an open journal says; what a kill or a power cut left of the last lines is taken off."""
    request, parts, end = None, {}, 0
    for line in os.pread(journal, os.fstat(journal).st_size, 0).splitlines(keepends=True):
        try:
            value = json.loads(line if line.endswith(b"\n") else b"")
            if end == 0:
                request = value
            else:
                part, what = value
                parts[part] = what
        except (ValueError, TypeError, RecursionError):
            break
        end += len(line)
    os.ftruncate(journal, end)
    return request, parts
