"""A job's last attempt, killed before each of its changes to the disk, and the next one: run as a command, since a
process that forks must be young.

Argument: an empty folder. Prints a JSON object for each kill.
"""

import itertools
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from kills import in_child, kill_at, with_changes_counted

from llama_mp.attempt import Attempt
from llama_mp.attempt_output import AttemptOutput

IDS = [str(i) for i in range(6)]


def answer(output: Path, name: str, share: tuple[int, int] | None, num: int = len(IDS)) -> int:
    """What an attempt does, up to `num` prompts of it; how many it answered."""
    attempt = Attempt(name=name, number=int(name[-1]), share=share)
    with AttemptOutput(output, {"run": 1}, IDS, attempt) as out:
        todo = [id for id in IDS if id in out.left][:num]
        for id in todo:
            out.write({"id": id, "completion": id * 9, "completion_tokens": 1})
    return len(todo)


def prepare(output: Path, share: tuple[int, int] | None) -> None:
    """What was before the last attempt: of an array all other tasks are done, and of this one an attempt was killed."""
    shutil.rmtree(output.parent)
    output.parent.mkdir()
    if share is not None:
        answer(output, "12_0-0", (0, 2))
    answer(output, "12_1-0" if share else "12-0", share, num=1)
    with next(output.parent.glob("*.parts/12*-0.jsonl")).open("ab") as part:
        part.write(b'{"id": "5", "comp')


def report(output: Path, share: tuple[int, int] | None, moment: int) -> dict[str, object]:
    """How the attempt killed at `moment` and the one after it ended, and what they left."""
    name = "12_1" if share else "12"
    prepare(output, share)
    killed, _ = in_child(partial(with_changes_counted, partial(answer, output, f"{name}-1", share), kill_at(moment)))
    num_lines = output.read_bytes().count(b"\n") if output.exists() else None
    code, _ = in_child(partial(answer, output, f"{name}-2", share))
    return {
        "killed": killed,
        "lines when killed": num_lines,
        "finished": code,
        "ids": [json.loads(line)["id"] for line in output.read_bytes().splitlines()],
        "left": sorted(path.name for path in output.parent.iterdir()),
    }


def main(output: Path) -> None:
    os.fsync = lambda _: None  # a kill takes nothing that was written, and syncs take long
    output.parent.mkdir(exist_ok=True)
    for share in (None, (1, 2)):
        for moment in itertools.count(1):
            found = report(output, share, moment)
            print(json.dumps({"share": share, "moment": moment, **found}), flush=True)
            if found["killed"] == 0:  # it came to its end before that moment
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "job" / "out.jsonl")
