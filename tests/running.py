"""Commands of this project in processes of their own, as a user starts them: always with a time limit."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
INFER = str(ROOT / "launch" / "infer.py")
CHAT = str(ROOT / "launch" / "chat.py")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
# What torchrun tells its ranks, and what a developer may have set: a command must not inherit it.
INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_", "LLAMA_MP_")
MARK = "RUNNING_TESTS_MARK"


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a failed command says, without `error: `."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        return lines[0].removeprefix("error: ")

    @property
    def refusal(self) -> str:
        """The error line of a request refused before anything else was said."""
        assert self.code == 2 and self.stdout == "" and self.stderr.count("\n") == 1, self
        return self.error


class Started:
    """A running command. Its processes, the ranks in sessions of their own among them, are known by a mark."""

    def __init__(self, command: Sequence[str], stdin: int | None, env: dict[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(self.mark, env),
            encoding="utf-8",
        )

    def first_byte(self) -> str:
        """Wait for the first byte on its stdout, and take it from what `wait` returns."""
        return os.read(self.process.stdout.fileno(), 1).decode()

    def wait(self, text: str | None = None, timeout: float = 120) -> Done:
        """Its exit code and all that it printed; past the time limit all its processes are killed."""
        try:
            stdout, stderr = self.process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            for pid in self.living():
                os.kill(pid, signal.SIGKILL)
            stdout, stderr = self.process.communicate()
            raise AssertionError(f"no end after {timeout} s; stdout: {stdout} stderr: {stderr}") from None
        return Done(self.process.returncode, stdout, stderr)

    def living(self) -> list[int]:
        """Processes of this command that have not ended."""
        return marked(self.mark)


class Talk:
    """A command at a pseudo-terminal, started by a shell that stays: when the leader of a terminal's session ends, the
    kernel resets the terminal's settings, and whether the command restored them could not be seen."""

    SHELL = '"$@"; echo "[ended $?]"; read line'

    def __init__(self, *command: str | Path, **env: str) -> None:
        self.mark = uuid.uuid4().hex
        self.terminal, other_end = pty.openpty()
        self.before = termios.tcgetattr(self.terminal)
        self.shown, self.position = "", 0
        self.process = subprocess.Popen(
            ["sh", "-c", self.SHELL, "sh", *map(str, command)],
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            env=environment(self.mark, {"TERM": "xterm"} | env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other_end)

    def __enter__(self) -> "Talk":
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.terminal)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def expect(self, text: str, timeout: float = 60) -> str:
        """Wait until `text` is shown after what was expected before; what came between the two."""
        deadline = time.monotonic() + timeout
        while (found := self.shown.find(text, self.position)) < 0:
            ready, _, _ = select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come in {timeout} s; shown: {self.shown}"
            self.shown += os.read(self.terminal, 4096).decode(errors="replace")
        between, self.position = self.shown[self.position : found], found + len(text)
        return between

    def end(self) -> int:
        """The command's exit code. Its processes must be gone, and the terminal be as it was."""
        self.expect("[ended ")
        code = int(self.expect("]"))
        assert termios.tcgetattr(self.terminal) == self.before
        assert marked(self.mark) == [self.process.pid]
        return code


def environment(mark: str, env: dict[str, str]) -> dict[str, str]:
    """What a command inherits: `mark`, by which its processes are known, and nothing of another run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    return clean | {"LLAMA_MP_THREADS": "1", MARK: mark} | env


def marked(mark: str) -> list[int]:
    """Processes with `mark` that have not ended."""
    wanted = f"{MARK}={mark}".encode()
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if wanted in environment_of(folder)]


def environment_of(process: Path) -> list[bytes]:
    """The environment of a folder of /proc; nothing for a process that has ended, or is another user's."""
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def start(*command: str | Path, stdin: int | None = subprocess.DEVNULL, **env: str) -> Started:
    return Started([str(part) for part in command], stdin, env)


def run(*command: str | Path, text: str | None = None, timeout: float = 120, **env: str) -> Done:
    """A command run to its end; `text`: what is piped into it, default /dev/null."""
    stdin = subprocess.DEVNULL if text is None else subprocess.PIPE
    return start(*command, stdin=stdin, **env).wait(text, timeout)


def infer(*flags: str | Path, text: str | None = None, **env: str) -> Done:
    return run(sys.executable, INFER, *flags, text=text, **env)


def torchrun(num_ranks: int, *script: str | Path, text: str | None = None, **env: str) -> Done:
    """`script`: a file and its arguments."""
    return run(TORCHRUN, "--standalone", "--nproc_per_node", str(num_ranks), *script, text=text, **env)
