"""The output file of a run: one JSON line a finished prompt, each exactly once, however often the run was killed.

`F.jsonl` holds the lines and carries the lock; `F.jsonl.run.json` says which run they belong to. The run file is
in place before the first line, so lines without it are somebody else's. An empty output belongs to nobody.
Attempts of a job do not write it: see attempt_output.py.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_mp.errors import RequestError
from llama_mp.files import json_bytes, lock, write_whole
from llama_mp.lines import Lines, checked_records
from llama_mp.parts import Parts
from llama_mp.run_file import as_read_back, check_same_run, run_path


class Output(Lines):
    """Appends finished records to a JSON-lines file that no other run writes and no other run's lines are in.

    `done` holds the ids that are finished, those of `finish_reason: "error"` among them. Parts that a job left are
    taken over into the file. Opening raises RequestError, and then has changed nothing, when the file is locked, or a
    part is, when it is another run's, damaged before its last line, or cannot be opened.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        check_place(path)
        is_new = not path.exists()
        super().__init__(path, _open(path))
        try:
            lock(self._file, path)
            try:
                self._adopt(as_read_back(fingerprint))
            except BaseException:
                if is_new and os.fstat(self._file).st_size == 0:
                    path.unlink()
                raise
        except OSError as error:
            os.close(self._file)
            raise request_error(error, run_path(path)) from error
        except BaseException:
            os.close(self._file)
            raise

    def _adopt(self, wanted: dict[str, Any]) -> None:
        """Take over what the locked file and the parts hold: every check first, every change after."""
        parts = Parts(self.path)
        parts.refuse_others(None)
        in_parts, end_bytes = parts.hold_lines(), 0
        if os.fstat(self._file).st_size == 0 and not in_parts:
            write_whole(run_path(self.path), json_bytes(wanted))
        else:
            check_same_run(self.path, wanted, [parts.folder] if in_parts else [])
            with open(self._file, "rb", closefd=False) as file:
                for id, line in checked_records(file, self.path):
                    self.done.add(id)
                    end_bytes += len(line)
        os.ftruncate(self._file, end_bytes)
        self._fold(parts)

    def _fold(self, parts: Parts) -> None:
        """Bring the lines of `parts` here, and remove them once they are on disk."""
        for id, line in parts.records():
            if id not in self.done:
                self.append(id, line)
        self._sync()
        parts.remove()


def check_place(path: Path) -> None:
    """Raise RequestError where no output can be: at a folder, a device, or in a folder that is not there."""
    try:
        if path.is_dir():
            raise RequestError(f"--output {path} is a folder; give a file in it, such as {path / 'out.jsonl'}")
        if path.exists() and not path.is_file():
            raise RequestError(f"--output {path} is not a regular file, so no run could continue it; give a file")
        if not path.parent.is_dir():
            folder = shlex.quote(str(path.parent))
            raise RequestError(f"--output {path}: there is no folder {path.parent}; make it with mkdir -p {folder}")
    except OSError as error:
        raise request_error(error, path) from error


def request_error(error: OSError, path: Path) -> RequestError:
    return RequestError(
        f"--output: {error.filename or path} cannot be opened for reading and writing: {error.strerror}; "
        "give another path, or put that right"
    )


def _open(path: Path) -> int:
    """A descriptor to read and append; whatever is at `path` keeps its contents."""
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise request_error(error, path) from error
