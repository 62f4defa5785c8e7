"""The terminal of a conversation: lines in, and an interrupt character that ends an answer, not the program.

Ctrl-C as a signal would end torchrun, whose ranks have sessions of their own: here the terminal makes no signal of it,
and it is read as a character. Where standard input is no terminal, lines are read and nothing is changed.
"""

import contextlib
import os
import readline  # gives `input` line editing and history
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPT = "\x03"
DISABLED = b"\x00"  # Linux's _POSIX_VDISABLE: no character has this meaning
LOCAL_FLAGS, CHARACTERS = 3, 6  # places in what tcgetattr gives
ENDING = (signal.SIGTERM, signal.SIGQUIT)  # SIGQUIT: Ctrl-\, the way out when an answer cannot be stopped


def reads_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


@contextlib.contextmanager
def restored_terminal() -> Iterator[None]:
    """Leave the settings of the terminal on standard input, if it is one, as they were."""
    if not reads_terminal():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # a terminal that was closed has no settings
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def leaving_by_exception() -> Iterator[None]:
    """The signals that end a program raise SystemExit inside, so that what is inside can clean up."""
    previous = {number: signal.signal(number, leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def change(flags_off: int, characters: dict[int, bytes | int]) -> None:
    """Switch local flags of the terminal off, and set entries of its control characters."""
    attributes = termios.tcgetattr(sys.stdin)
    attributes[LOCAL_FLAGS] &= ~flags_off
    for place, character in characters.items():
        attributes[CHARACTERS][place] = character
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)


class Terminal:
    """Lines from a person or a pipe. A context manager, at whose end the terminal is as it was."""

    def __enter__(self) -> "Terminal":
        self.is_terminal = reads_terminal()
        self.typed_ahead = ""
        self.restore = contextlib.ExitStack()
        if sys.stdin is not None:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if self.is_terminal:
            self.restore.enter_context(leaving_by_exception())
            self.restore.enter_context(restored_terminal())
            change(0, {termios.VINTR: DISABLED})
            readline.parse_and_bind('"\\C-c": kill-whole-line')
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore.close()

    def ask(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of input. Ctrl-C empties the line that is being typed."""
        if self.is_terminal and sys.stdout.isatty():
            return self.edit(prompt)
        if self.is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = "" if sys.stdin is None else sys.stdin.readline()
        return line.rstrip("\n").rpartition(INTERRUPT)[2] if line else None

    def edit(self, prompt: str) -> str | None:
        """`ask` with line editing, begun with what was typed while the last answer was written."""
        text, self.typed_ahead = self.typed_ahead, ""
        readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        finally:
            readline.set_startup_hook(None)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """While an answer is written: a function that tells whether Ctrl-C was pressed since. Other keys are kept for
        the next line."""
        if not self.is_terminal:
            yield lambda: False
            return
        with restored_terminal():
            change(termios.ICANON | termios.ECHO, {termios.VMIN: 1, termios.VTIME: 0})
            yield self.interrupted

    def interrupted(self) -> bool:
        keys = b""
        while select.select([sys.stdin], [], [], 0)[0] and (read := os.read(sys.stdin.fileno(), 1024)):
            keys += read
        text = keys.decode(errors="ignore")
        _, found, after = text.rpartition(INTERRUPT)
        kept = after if found else self.typed_ahead + text
        self.typed_ahead = "".join(c if c.isprintable() else " " for c in kept)
        return bool(found)
