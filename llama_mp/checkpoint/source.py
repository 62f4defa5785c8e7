"""What every checkpoint format looks like to the rest: global tensors, in Meta's names and Meta's row order."""

from typing import Protocol

import torch

from llama_mp.checkpoint.fault import DamagedError, Fault
from llama_mp.config import ModelConfig
from llama_mp.layout import Span, global_shapes
from llama_mp.locate import Checkpoint

MAX_FAULTS_SHOWN = 5


class Source(Protocol):
    """An opened checkpoint. `config` is complete: vocabulary, tied embeddings and rope scaling as the tensors say."""

    config: ModelConfig
    precision: str  # the narrowest --dtype that holds the matrices as the checkpoint has them
    bytes_read: int  # of the checkpoint, by `read`, so far

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The type in which `read` gives this tensor."""

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        """The part rows x cols of a matrix, the part `rows` of a vector. It may be a view of the file: do not write."""


def check_tensors(checkpoint: Checkpoint, source: Source) -> None:
    """Raise DamagedError that lists every tensor which the architecture lacks, or has otherwise."""
    expected = global_shapes(source.config)
    names = source.names()
    wrong = [(name, "is missing") for name in sorted(set(expected) - set(names))]
    wrong += [(name, "is unknown") for name in names if name not in expected]
    wrong += [
        (name, f"has shape {source.shape(name)}, not {expected[name]}")
        for name in names
        if name in expected and source.shape(name) != expected[name]
    ]
    if wrong:
        raise DamagedError(
            f"{checkpoint.path} does not hold the model that its header describes: "
            f"{listed([' '.join(fault) for fault in wrong])}; check that all its files come from one download",
            [Fault(checkpoint.path.name, name, text) for name, text in wrong],
        )


def listed(faults: list[str]) -> str:
    """The faults in one line, the first few by name."""
    more = len(faults) - MAX_FAULTS_SHOWN
    return "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def as_matrix(part: torch.Tensor) -> torch.Tensor:
    """A part as `read` gives it as [rows, columns]: a vector has one column."""
    return part if part.dim() == 2 else part.unsqueeze(1)
