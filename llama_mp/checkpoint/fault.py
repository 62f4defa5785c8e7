"""What is wrong with a checkpoint, in terms of its files and tensors. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_mp.errors import RequestError

# Weights by their file's name: those that no list mentions are a fault too.
WEIGHT_FILES = ("consolidated.*.pth", "*.safetensors")


class Fault(NamedTuple):
    """`file`: its name, or that of the folder where no one file is to blame. `tensor`: its name in that file."""

    file: str
    tensor: str | None
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class Difference(NamedTuple):
    """In what a checkpoint differs from another. `tensor`: in Meta's names, None where it is not one tensor."""

    tensor: str | None
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class DamagedError(RequestError):
    """A checkpoint that cannot be opened: one line for those who want to use it, `faults` for those who check it."""

    def __init__(self, text: str, faults: Sequence[Fault]) -> None:
        super().__init__(text)
        self.faults = tuple(faults)


def without_path(error: RequestError, path: Path) -> str:
    """The error's text after the `path` that it begins with: a fault names the file itself."""
    return str(error).removeprefix(str(path)).lstrip("/: ")
