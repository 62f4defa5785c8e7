"""Reshard, killed at random moments and finished again: run as a command, since a process that forks must be young.

Arguments: the input, an empty folder, the number of kills. Prints a JSON object for each.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llama_mp.checkpoint.reshard import Job
from llama_mp.partial import JOURNAL
from llama_mp.reshard_request import ReshardFlags, check_request, is_finished

# All by which a run changes what is on disk.
CHANGES = ("pwrite", "write", "rename", "replace", "fsync", "ftruncate", "mkdir", "unlink")


def reshard(source: Path, output: Path, overwrite: bool) -> int:
    """What the command does; how many tensors were whole before."""
    flags = ReshardFlags(input=source, output=output, mp=3, overwrite=overwrite)
    checkpoint = check_request(flags)
    return -1 if is_finished(flags, checkpoint) else Job.open(flags, checkpoint).run()


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


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def main(source: Path, folder: Path, num_kills: int) -> None:
    for overwrite in (False, True):
        killed_and_finished(source, folder, overwrite, num_kills // 2)


def killed_and_finished(source: Path, folder: Path, overwrite: bool, num_kills: int) -> None:
    output, generator = folder / "out", random.Random(0)

    def work() -> int:
        return reshard(source, output, overwrite)

    begin(source, output, overwrite)
    _, num_changes = in_child(lambda: with_changes_counted(work, lambda count: None))
    expected = hashes(output)
    # The last changes are those of the renames: half of the kills belong there.
    last = list(range(num_changes, num_changes - num_kills // 2, -1))
    for moment in [*last, *generator.sample(range(1, num_changes - len(last)), num_kills - len(last))]:
        begin(source, output, overwrite)
        killed, _ = in_child(partial(with_changes_counted, work, kill_at(moment)))
        recorded = recorded_tensors(folder / "out.partial" / JOURNAL)
        code, num_whole = in_child(work)
        report = {
            "moment": f"{moment} of {num_changes}",
            "killed": killed,
            "recorded": recorded,
            "finished": code,
            "whole": num_whole,
            "equal": hashes(output) == expected,
            "left": sorted(path.name for path in folder.iterdir()),
        }
        print(json.dumps(report), flush=True)


def recorded_tensors(journal: Path) -> int:
    """How many whole lines about a tensor there are; -1: there is no journal any more."""
    return len(re.findall(rb'\["\S+weight",.*\n', journal.read_bytes())) if journal.exists() else -1


def begin(source: Path, output: Path, overwrite: bool) -> None:
    """Nothing at `output`, or another checkpoint."""
    shutil.rmtree(output, ignore_errors=True)
    if overwrite:
        shutil.copytree(source, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
