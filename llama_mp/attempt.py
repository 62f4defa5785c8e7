"""Who this run is inside a job of a cluster: which attempt of which job, and which of the prompts are its own."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

ATTEMPT, SHARE = "LLAMA_MP_ATTEMPT", "LLAMA_MP_SHARE"  # in the environment of a job's step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """`name` is no other attempt's, such as "12-0" or, of task 3 of array 12 requeued once, "12_3-1"."""

    name: str
    number: int  # how often the job was requeued before
    share: tuple[int, int] | None  # (3, 8): the prompts whose place in the list is 3 modulo 8; None: all

    @classmethod
    def of_environment(cls) -> "Attempt | None":
        """What the job's step was told; None outside of a job."""
        name = os.environ.get(ATTEMPT)
        return None if name is None else cls.of(name, os.environ.get(SHARE))

    @classmethod
    def of(cls, name: str, share: str | None) -> "Attempt":
        """As the step's environment has them."""
        # Our own supervisor sets both, and the name becomes that of a file.
        assert re.fullmatch(r"[0-9]+(_[0-9]+)?-[0-9]+", name), f"{ATTEMPT} is {name!r}"
        assert share is None or re.fullmatch("[0-9]+/[0-9]+", share), f"{SHARE} is {share!r}"
        index_and_count = tuple(map(int, share.split("/"))) if share else None
        return cls(name=name, number=int(name.split("-")[1]), share=index_and_count)

    @property
    def job(self) -> str:
        """The job's id, for an array's task that of the array."""
        return job_of(self.name)

    def share_of(self, prompts: Sequence[T]) -> Sequence[T]:
        """Those of `prompts` that this attempt answers."""
        index, count = self.share or (0, 1)
        return prompts[index::count]


def job_of(name: str) -> str:
    """The job's id in the name of an attempt, or of its file."""
    return re.split("[-_]", name)[0]
