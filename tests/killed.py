"""Reshard, killed at random moments and finished again: run as a command, since a process that forks must be young.

Arguments: the input, an empty folder, the number of kills. Prints a JSON object for each.
"""

import hashlib
import json
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

from kills import in_child, kill_at, with_changes_counted

from llama_mp.checkpoint.reshard import Job
from llama_mp.partial import JOURNAL
from llama_mp.reshard_request import ReshardFlags, check_request, is_finished


def reshard(source: Path, output: Path, overwrite: bool) -> int:
    """What the command does; how many tensors were whole before."""
    flags = ReshardFlags(input=source, output=output, mp=3, overwrite=overwrite)
    checkpoint = check_request(flags)
    return -1 if is_finished(flags, checkpoint) else Job.open(flags, checkpoint).run()


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
