"""Attempts of a job that write one output, and what they leave: for the tests of attempt_output.py."""

import json
import os
from pathlib import Path

import pytest

from llama_mp.attempt import Attempt
from llama_mp.attempt_output import AttemptOutput
from llama_mp.errors import RequestError
from llama_mp.output import Output

RUN = {"model": {"name": "tiny"}, "flags": {"stop": ("a", "b")}}
IDS = ["e", "d", "c", "b", "a"]  # the order of the prompts, and no other


def attempt(name: str, share: tuple[int, int] | None = None) -> Attempt:
    return Attempt(name=name, number=int(name.split("-")[1]), share=share)


def opened(path: Path, name: str = "12-0", share: tuple[int, int] | None = None, run: dict = RUN) -> AttemptOutput:
    return AttemptOutput(path, run, IDS, attempt(name, share))


def record(id: str, text: str = "café\u2028") -> dict:
    return {"id": id, "completion": f"{id} {text}", "completion_tokens": 3}


def write(out: AttemptOutput | Output, ids: str) -> None:
    for id in ids:
        out.write(record(id))


def finish(out: AttemptOutput) -> str:
    """Answer what is left; its ids, sorted."""
    todo = "".join(sorted(out.left))
    with out:
        write(out, todo)
    return todo


def kill(out: AttemptOutput, torn: bytes = b'{"id": "a", "comp') -> Path:
    """End `out` as SIGKILL ends it, in the middle of a line; its part."""
    path = out._part.path
    os.write(out._part._file, torn)
    os.close(out._part._file)
    return path


def complete(path: Path) -> bool:
    """Whether the output holds each prompt once, in order, and nothing else is left but what belongs there."""
    names = {file.name.removeprefix(path.name) for file in path.parent.iterdir()}
    ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()] if path.exists() else []
    return ids == IDS and names == {"", ".run.json", ".status"}


def parts(path: Path) -> list[str]:
    return sorted(file.name for file in path.with_name(f"{path.name}.parts").iterdir())


def refused(match: str, *args: object, **named: object) -> None:
    """Opening fails with one line that matches, and changes nothing."""
    path = args[0]
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    with pytest.raises(RequestError, match=match):
        opened(*args, **named)
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


def kill_after(path: Path, name: str, share: tuple[int, int] | None, ids: str) -> None:
    out = opened(path, name, share)
    write(out, ids)
    kill(out)
