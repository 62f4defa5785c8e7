"""The output of a job's attempt: a part of its own, and, with the last prompt of all, the output made of all parts.

`F.jsonl` is not there, or as an earlier run left it, until it is complete. No lock is needed for that: several attempts
may make it, at the same time or one after the other, and each makes the same.
"""

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_mp.attempt import Attempt
from llama_mp.errors import DONE, RequestError, RunError, counted, exit_code
from llama_mp.files import REMOVED, is_locked, json_bytes, write_whole
from llama_mp.lines import Lines, checked_records
from llama_mp.output import check_place, request_error
from llama_mp.parts import Parts, size_bytes
from llama_mp.run_file import as_read_back, check_same_run, run_path
from llama_mp.status import Reporter, status_path


class AttemptOutput:
    """What `attempt` writes of the output at `path`, for prompts with `ids`, in this order; the share is taken of them.

    `done` holds the ids that are finished, by whatever attempt. Opening raises RequestError, and then has changed
    nothing, for the reasons that Output has; another job that writes is one, other attempts of this job are none.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], ids: Sequence[str], attempt: Attempt) -> None:
        self.path, self.ids, self.attempt = path, ids, attempt
        self.own = set(attempt.share_of(ids))
        self.parts = Parts(path)
        self.done: set[str] = set()
        self._part: Lines | None = None
        check_place(path)
        try:
            self._begin(as_read_back(fingerprint))
        except BaseException as error:
            self._close_part()
            if isinstance(error, OSError):
                raise request_error(error, path) from error
            raise

    def __enter__(self) -> "AttemptOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
            else:
                self._close_part()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                self._reporter.end(exit_code(error))

    @property
    def left(self) -> set[str]:
        """The ids that this attempt has to finish yet."""
        return self.own - self.done

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`, a finished prompt's JSON object with its `id`, to the part. Raises what Lines raises."""
        assert record["id"] not in self.done, f"id {record['id']!r} was written before"
        with unless_removed():
            self._part.write(record)
        self.done.add(record["id"])
        self._reporter.count(record)

    def close(self) -> None:
        """Sync and close the part; when nothing is left to do in it, make the output if all parts are complete.

        Raises RunError when the file system could not keep what was written."""
        # Closed before the others are read: NFS promises who opens a file what was in it when it was closed, and no
        # more. Of two attempts that end together the later then sees all lines, whichever it is.
        self._close_part()
        if self.left:
            self._reporter.end(None)
            return
        if self.attempt.share:
            self._reporter.end(DONE)  # before the merge: a status put among the parts after it would stay there
        try:
            found = self._merge()
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}; the finished prompts are kept in "
                f"{self.parts.folder}: make room and run the same command again"
            ) from error
        if lost := len(self.own - found):
            raise RunError(f"{counted(lost, 'line')} of {self.parts.folder} gone; run the same command again")
        if found >= set(self.ids):
            self._reporter.tell_of_all(status_path(self.path, None), len(self.ids))

    def _begin(self, wanted: dict[str, Any]) -> None:
        self._refuse_others()
        has_lines = self.parts.hold_lines() or size_bytes(self.path) > 0
        if has_lines:
            self._check_same_run(wanted)
        self.done |= {id for id, _ in self.parts.records()}
        self.done |= {id for id, _ in self._output_records()}
        if self.left:
            if not has_lines:
                self._write_run_file(wanted)
            self._part = self.parts.begin(self.attempt.name)
            # Another job may have begun at the same moment: its part is there to be seen now, or ours is for it.
            self._refuse_others()
            self._check_same_run(wanted)
        status = status_path(self.path, self.attempt.share)
        self._reporter = Reporter(status, self.attempt, len(self.own), len(self.own & self.done))

    def _write_run_file(self, wanted: dict[str, Any]) -> None:
        while True:
            self.parts.folder.mkdir(exist_ok=True)
            try:
                return write_whole(run_path(self.path), json_bytes(wanted), self.parts.folder)
            except FileNotFoundError:  # another attempt has just removed the folder
                continue

    def _refuse_others(self) -> None:
        if is_locked(self.path):
            raise RequestError(f"another run is writing {self.path}; wait for its end, or give another --output")
        self.parts.refuse_others(self.attempt.job)

    def _check_same_run(self, wanted: dict[str, Any]) -> None:
        check_same_run(self.path, wanted, [self.parts.folder])

    def _output_records(self) -> Iterator[tuple[str, bytes]]:
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            yield from checked_records(file, self.path)

    def _close_part(self) -> None:
        """Close the part, if it is open, and remove it when there is nothing in it."""
        part, self._part = self._part, None
        if part is not None:
            with unless_removed():
                part.close()
            if not part.done:
                part.path.unlink(missing_ok=True)

    def _merge(self) -> set[str]:
        """The ids that are finished; where these are all, make the output, in the order of the prompts, of the parts.

        All lines are in memory for that: 100,000 of 5 kB are half a gigabyte."""
        while True:
            in_parts = dict(self.parts.records())
            try:
                in_output = dict(self._output_records())  # read after the parts: see there
                lines = in_parts | in_output
                if not lines.keys() >= set(self.ids):
                    return set(lines)
                if not in_output.keys() >= set(self.ids):
                    write_whole(self.path, [lines[id] for id in self.ids], self.parts.folder)
            except OSError as error:
                if error.errno not in REMOVED:
                    raise
                continue  # another attempt was faster: it has replaced the output that was read, or removed the folder
            self.parts.remove()
            return set(lines)


@contextlib.contextmanager
def unless_removed() -> Iterator[None]:
    """Let pass that the part is gone, as NFS says where another host removed it: an attempt that was thought dead had
    all prompts answered, and has made the output. Whether it has is looked up at the end."""
    try:
        yield
    except RunError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ESTALE:
            raise
