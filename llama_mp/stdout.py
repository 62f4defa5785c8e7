"""What is done about a standard output that cannot be written: its reader has left, or its disk is full."""

import os
import select
import sys

from llama_mp.errors import RunError


def is_broken_stdout(error: BaseException) -> bool:
    """Whether `error` says that the reader of stdout (`| head -1`) has left, and not that of another pipe.

    Common tools then die of SIGPIPE: silently, and not with 0, so that a script can tell cut output from whole.
    We say 1 for it: 141 is not in the commands' contract, and rank 0 failing is what makes torchrun end the others.
    """
    if not isinstance(error, BrokenPipeError) or sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors and hang-ups are always reported
    return bool(poll.poll(0))


def naming_stdout(error: BaseException) -> BaseException:
    """`error`, or one that names stdout when that cannot be written: the text still in it tells."""
    try:
        print(end="", flush=True)
    except OSError as again:
        if isinstance(error, OSError) and error.filename is None and again.errno == error.errno:
            return RunError(f"standard output: {error.strerror}; make room there, or send it elsewhere")
    return error


def drop_unwritable_output() -> None:
    """Let what stdout still holds, when it cannot be written, go nowhere: at exit the interpreter would complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
