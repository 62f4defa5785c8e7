"""launch/infer.py with something wrong with one rank: FAULT is its number, when, and what, as in "1 step-7 SIGSTOP"."""

import errno
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

INFER = str(Path(__file__).resolve().parents[1] / "launch" / "infer.py")


def fail(what: str) -> None:
    Path(os.environ["FAULT_MARK"]).touch()  # its time is that of the fault
    if what == "raise":
        raise ZeroDivisionError("made to fail")
    if what == "hang":
        time.sleep(600)
    if what == "memory":
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here, here))
        import torch

        torch.ones(1 << 28)
    os.kill(os.getpid(), getattr(signal, what))


def at_load(what: str) -> None:
    from llama_mp import loading

    original = loading.load_shards

    def failing(*arguments, **named):
        fail(what)
        return original(*arguments, **named)

    loading.load_shards = failing


def at_write(what: str) -> None:
    """No room is left for the fourth line."""
    from llama_mp import lines

    def write(file, line):
        if Path(os.environ["FAULT_OUTPUT"]).read_bytes().count(b"\n") < 3:
            return os.write(file, line)
        Path(os.environ["FAULT_MARK"]).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines.os = SimpleNamespace(**{**vars(os), "write": write})


def at_step(number: int, what: str) -> None:
    """In the model's first layer, between two collectives."""
    from llama_mp import liveness, model

    original = model.Block.forward

    def failing(*arguments, **named):
        if liveness.here.step == number:
            fail(what)
        return original(*arguments, **named)

    model.Block.forward = failing


rank, when, what = os.environ["FAULT"].split()
if "FAULT_GLOO" in os.environ and "RANK" in os.environ:
    from llama_mp import shared_memory

    shared_memory.prepare = lambda *arguments: "this test is of gloo"
if os.environ.get("RANK") == rank:
    number = when.removeprefix("step-")
    at_step(int(number), what) if number.isdigit() else {"load": at_load, "write": at_write}[when](what)
exec(compile(Path(INFER).read_text(), INFER, "exec"))  # runpy would put its name into sys.argv, which is run again
