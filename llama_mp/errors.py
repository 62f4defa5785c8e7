"""The two kinds of expected failure, and the one line each of them prints.

A failure that the user can do something about is an exception of this module whose text says what,
where and what to do. Whatever else reaches `report` is our own fault and is said to be.
"""

import contextlib
import difflib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

DONE, RUN_FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130
SPEAK_GRACE_S = 5.0
MAX_LINE = 3000  # characters of an error's line, about; more than any of ours has
OUT_OF_MEMORY = "not enough memory"
NODES = "LLAMA_MP_NODES"  # in the environment of a job's step: its nodes in order, with commas
LAUNCHED = "LLAMA_MP_LAUNCHED"  # in the environment of ranks that our launcher started: a file for what one has said


class RequestError(ValueError):
    """The request was wrong: a flag, a path, a value, or something that does not fit. Exit code 2."""

    exit_code = BAD_REQUEST


class RunError(RuntimeError):
    """A correct request that failed while it ran. Exit code 1."""

    exit_code = RUN_FAILED


class LostContact(RunError):
    """Another rank has died or fell silent in the middle of a step: a consequence, never the first cause."""


def one_line(error: BaseException) -> str:
    """`error` as the text after `error: `: a single line, with the remedy."""
    if isinstance(error, RequestError | RunError):
        text = str(error)
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; check the path and who may read it"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        text = (
            f"{OUT_OF_MEMORY} ({str(error).split('. ')[0]}): start more ranks, or lower --max_batch_size, --max_seq_len"
        )
    else:
        text = (
            f"unexpected {type(error).__name__}: {error}; set LLAMA_MP_DEBUG=1 for the traceback, and please report it"
        )
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """`text` for a terminal: names that come from files may hold commands to it, and be of any length."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def rank_zero_speaks() -> bool:
    """Before the ranks know each other: torchrun's rank 0, or a process without ranks, is the one to speak; of those on
    several nodes of a job, the first."""
    node = os.environ.get("SLURM_NODEID", "0") if NODES in os.environ else "0"
    return os.environ.get("RANK", node) == "0"


_may_speak = rank_zero_speaks
_place: Callable[[], str] | None = None
_is_json = False


def set_speaker(may_speak: Callable[[], bool]) -> None:
    """Let `may_speak` decide, once an error has come, whether this rank is the one that prints it. It is asked once."""
    global _may_speak
    _may_speak = functools.cache(may_speak)


def log_as_json(is_json: bool) -> None:
    """Whether `say` writes JSON from here on."""
    global _is_json
    _is_json = is_json


def shows_progress() -> bool:
    """Whether stderr is for a person who watches."""
    return sys.stderr is not None and sys.stderr.isatty() and not _is_json


def say(text: str, kind: str = "note") -> None:
    """Tell `text` on stderr, one that is an "error" as such; with --log_json as an object with the time in seconds
    since 1970, the rank (null: what starts the ranks), the kind and the text."""
    if _is_json:
        rank = os.environ.get("RANK")
        told = {"time": time.time(), "rank": rank and int(rank), "kind": kind, "text": text}
        text = json.dumps(told, ensure_ascii=False)
    elif kind == "error":
        text = f"error: {text}"
    print(text, file=sys.stderr, flush=True)


def set_place(place: Callable[[], str]) -> None:
    """Let unexpected errors begin with what `place` then says: which of several ranks this is, and how far it is."""
    global _place
    _place = place


def may_speak() -> bool:
    """Whether this rank is the one to print an error. No other will be from here on."""
    return _may_speak()


def this_process() -> str:
    """`"rank 3"`; in a job's step `"rank 3 on n2"`, or `"node n2"` for what starts the ranks there."""
    node = os.environ.get("SLURMD_NODENAME") if NODES in os.environ else None
    if "RANK" not in os.environ:
        return f"node {node}"
    return f"rank {os.environ['RANK']}" + (f" on {node}" if node else "")


def report(error: BaseException) -> int:
    """Print `error: ...` on stderr if this rank is the one to speak, and return the exit code.

    The other ranks wait a little: the first to exit makes torchrun end them all, the speaker's line unsaid. One that is
    not ended by then was alone with its error, and says it. A rank that only lost another waits too where our launcher
    knows the cause and is about to say it."""
    if isinstance(error, KeyboardInterrupt):
        return exit_code(error)
    if os.environ.get("LLAMA_MP_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, LostContact) and LAUNCHED in os.environ:
        time.sleep(SPEAK_GRACE_S)
    text = one_line(error)
    is_first = _may_speak()
    if not is_first:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(SPEAK_GRACE_S)
    if _place is not None and not isinstance(error, RequestError | RunError):
        text = f"{_place()}: {text}"
    elif not is_first or (NODES in os.environ and isinstance(error, RunError) and not text.startswith("rank ")):
        text = f"{this_process()}: {text}"
    say(text, "error")
    if LAUNCHED in os.environ:
        with contextlib.suppress(OSError), open(os.environ[LAUNCHED], "a") as said:
            said.write(f"{text}\n")
    return exit_code(error)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    wrong_path = isinstance(error, OSError) and error.filename is not None
    return getattr(error, "exit_code", BAD_REQUEST if wrong_path else RUN_FAILED)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean X?)"` for the nearest of `known`, case aside, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""


_is_abandoned = False


def abandon() -> None:
    """Let this process end without tearing down what it shares with others, who may be gone."""
    global _is_abandoned
    _is_abandoned = True


def leave(code: int | str | None) -> NoReturn:
    """End the process as sys.exit does."""
    if _is_abandoned and isinstance(code, int):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def counted(number: int, noun: str) -> str:
    """`"1 file"`, `"2 files"`, `"0 files"`: for a regular noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
