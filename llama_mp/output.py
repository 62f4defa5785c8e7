"""The output file of a run: one JSON line a finished prompt, each exactly once, however often the run was killed.

`F.jsonl` holds the lines and carries the lock; `F.jsonl.run.json` says which run they belong to. The run file is
in place before the first line, so lines without it are somebody else's. An empty output belongs to nobody.
"""

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_mp.errors import RequestError, RunError
from llama_mp.files import json_bytes, lock, write_whole
from llama_mp.prompts import Prompt


def fingerprint(*, model: Mapping[str, Any], flags: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must be equal for a run to continue another's output.

    `model` and `flags` hold JSON values and only what changes results (no batch size, no MP degree); the prompts go
    in as a digest over ids, texts, messages and each one's sampling, in their order.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(asdict(prompt), sort_keys=True).encode() + b"\n")
    return {
        "model": dict(model),
        "flags": dict(flags),
        "prompts": {"count": len(prompts), "sha256": digest.hexdigest()},
    }


class Output:
    """Appends finished records to a JSON-lines file that no other run writes and no other run's lines are in.

    `done` holds the ids that are finished, those of `finish_reason: "error"` among them. Opening raises RequestError,
    and then has changed nothing, when the file is locked, another run's, damaged before its last line, or cannot be
    opened. A last line without its newline was cut by a kill; it is taken off and its prompt is computed again:
    the result is the same, and one rule covers every place at which a line can tear.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.run_path = path.with_name(path.name + ".run.json")
        self.done: set[str] = set()
        is_new = not os.path.exists(path)  # unlike Path.exists, False too for a name that cannot be one
        self._file = _open(path)
        try:
            lock(self._file, path)
            self._adopt(json.loads(json.dumps(fingerprint)))  # as it will be read back: tuples are lists
        except OSError as error:
            if is_new:
                path.unlink()
            os.close(self._file)
            raise _request_error(error, self.run_path) from error
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`, a finished prompt's JSON object with its `id`, as one line that other programs see at once.

        Raises RunError when the file system refuses; what was written of the line is then taken off again.
        """
        assert record["id"] not in self.done, f"id {record['id']!r} was written before"
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        end_bytes = os.fstat(self._file).st_size
        try:
            while line:  # once, unless the disk fills up in the middle of a line
                line = line[os.write(self._file, line) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line then waits for the next run, which repairs it
                os.ftruncate(self._file, end_bytes)
            raise self._run_error(error) from error
        self.done.add(record["id"])

    def close(self) -> None:
        """Sync the file and release its lock. Raises RunError when the file system could not keep what was written."""
        try:
            os.fsync(self._file)  # NFS and quotas report a full disk no sooner
        except OSError as error:
            raise self._run_error(error) from error
        finally:
            os.close(self._file)

    def _adopt(self, wanted: dict[str, Any]) -> None:
        """Take over what the locked file holds: every check first, every change after."""
        if os.fstat(self._file).st_size == 0:
            write_whole(self.run_path, json_bytes(wanted))
            return
        self._check_same_run(wanted)
        end_bytes = self._read_done()
        os.ftruncate(self._file, end_bytes)

    def _check_same_run(self, wanted: dict[str, Any]) -> None:
        remedy = f"give another --output, or delete {shlex.quote(str(self.path))} and its .run.json"
        try:
            found = json.loads(self.run_path.read_bytes())
        except FileNotFoundError as error:
            raise RequestError(
                f"{self.path} holds lines, but {self.run_path.name}, which would say of which run, is missing; "
                f"give another --output, or delete {shlex.quote(str(self.path))}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{self.run_path} is not JSON; {remedy}") from error
        there, here = dict(_leaves(found)), dict(_leaves(wanted))
        for key in here | there:
            if there.get(key) != here.get(key):
                raise RequestError(
                    f"{self.path} is of another run: {key} was {there.get(key, 'absent')} there "
                    f"and is {here.get(key, 'absent')} now; {remedy}"
                )

    def _read_done(self) -> int:
        """Fill `done` from the whole lines; return where they end, in bytes."""
        lines: dict[str, int] = {}
        end_bytes = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                id = _record_id(line)
                if id is None or id in lines:
                    fault = "not a record" if id is None else f"id {id!r} is that of line {lines[id]} too"
                    raise RequestError(f"{self.path}:{number}: {fault}; take the line out, or give another --output")
                lines[id] = number
                end_bytes += len(line)
        self.done = set(lines)
        return end_bytes

    def _run_error(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} cannot be written: {error.strerror}; the {len(self.done)} finished prompts in it are kept: "
            "make room and run the same command again to continue"
        )


def check_place(path: Path) -> None:
    """Raise RequestError unless `path` is a regular file, or the place for one. Nothing is opened or made."""
    if path.is_dir():
        raise RequestError(f"--output {path} is a folder; give a file in it, such as {path / 'out.jsonl'}")
    if path.exists() and not path.is_file():
        raise RequestError(f"--output {path} is not a regular file, so no run could continue it; give a file")
    if not path.parent.is_dir():
        folder = shlex.quote(str(path.parent))
        raise RequestError(f"--output {path}: there is no folder {path.parent}; make it with mkdir -p {folder}")


def _open(path: Path) -> int:
    """A descriptor to read and append; whatever is at `path` keeps its contents."""
    try:
        check_place(path)
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise _request_error(error, path) from error


def _request_error(error: OSError, path: Path) -> RequestError:
    return RequestError(
        f"--output: {error.filename or path} cannot be opened for reading and writing: {error.strerror}; "
        "give another path, or put that right"
    )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """`("flags.seed", "1")` and so on: each JSON value below `value`, long ones shortened but never made equal."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _leaves(below, f"{key}.{name}" if key else name)
        return
    text = json.dumps(value, sort_keys=True)
    if len(text) > 60:
        text = f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"
    yield key, text


def _record_id(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    id = record.get("id") if isinstance(record, dict) else None
    return id if isinstance(id, str) else None
