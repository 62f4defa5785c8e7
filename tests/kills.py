"""Work killed before each of its changes to what is on disk: for scripts, since a process that forks must be young."""

import os
import signal
from collections.abc import Callable

# All by which a run changes what is on disk.
CHANGES = ("pwrite", "write", "rename", "replace", "fsync", "ftruncate", "mkdir", "unlink", "rmdir")


def in_child(work: Callable[[], int]) -> tuple[int, int]:
    """(exit code or minus the signal, what `work` returned) of a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        result = work()
        os.write(writing, str(result).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


def with_changes_counted(work: Callable[[], int], at_count: Callable[[int], None]) -> int:
    """`work`, its changes counted; how many there were."""
    count = 0

    def counting(name: str, function: Callable) -> Callable:
        def counted(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            at_count(count)
            if name == "pwrite":  # a kill may well leave the half of a block
                file, content, offset = arguments
                function(file, content[: len(content) // 2], offset)
                at_count(count)
            return function(*arguments, **named)

        return counted

    for name in CHANGES:
        setattr(os, name, counting(name, getattr(os, name)))
    work()  # its result is of no interest
    return count


def kill_at(moment: int) -> Callable[[int], None]:
    return lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == moment else None
