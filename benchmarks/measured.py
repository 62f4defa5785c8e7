"""A script in a process of its own: how long it takes, with and without what every process with torch does, and in what
memory.

Run as a program it is that process: `import torch` comes first, then the script, as `python SCRIPT ...` has it.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from llama_mp.errors import RunError

SAMPLE_S = 0.02


class Measured(NamedTuple):
    """Seconds of the whole process, and of the script alone: without the start of the interpreter, `import torch`, and
    the interpreter's end, which takes half a second with torch; the most private anonymous memory that it had beyond
    what `import torch` takes."""

    whole_s: float
    work_s: float
    memory_bytes: int


def measure(script: Path, *arguments: str | Path) -> Measured:
    """Raises RunError when the script fails, with the last line that it printed."""
    receiver, sender = os.pipe()
    with tempfile.TemporaryFile("w+") as printed, os.fdopen(receiver) as messages:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, __file__, str(sender), str(script), *map(str, arguments)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=(sender,),
        )
        os.close(sender)
        most, ended = [0], threading.Event()
        threading.Thread(target=watch, args=(process.pid, most, ended)).start()
        try:
            process.wait()
            end = time.monotonic()
        finally:
            ended.set()
        printed.seek(0)
        if process.returncode:
            said = printed.read().splitlines() or [f"exit code {process.returncode}"]
            raise RunError(f"{script} failed: {said[-1]}")
        begun, memory_bytes, ended_script = json.loads(messages.read())
    return Measured(end - start, ended_script - begun, most[0] - memory_bytes)


def watch(pid: int, most: list[int], ended: threading.Event) -> None:
    """Keep the most that process `pid` holds in `most`, until it has `ended`."""
    while not ended.wait(SAMPLE_S):
        most[0] = max(most[0], anonymous_bytes(pid))


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, as proc(5) has it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def run_script() -> None:
    """Be `python SCRIPT ...`, and tell the parent when the script began and ended, and what memory torch took."""
    import torch  # noqa: F401

    sender, *sys.argv = sys.argv[1:]
    begun, memory_bytes = time.monotonic(), anonymous_bytes(os.getpid())  # of one clock for all processes
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:  # as a rule by sys.exit
        with os.fdopen(int(sender), "w") as message:
            json.dump([begun, memory_bytes, time.monotonic()], message)


if __name__ == "__main__":
    run_script()
