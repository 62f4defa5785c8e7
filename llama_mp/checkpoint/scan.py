"""Passes over tensors a few rows at a time, on several threads: what is counted, and where it was first seen."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama_mp.layout import Span, matrix_shape, row_chunks

# Of one tensor, in one thread: a few such chunks, 1 MiB each in fp32, are all that a pass holds. Comparing two
# checkpoints of 0.8 GB took 12 MiB in 2 threads; four times as many elements took 50 MiB and saved no time.
CHUNK_ELEMENTS = 1 << 18
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Tally:
    """Elements of a tensor of `shape` that are marked: how many, and the first of them."""

    shape: tuple[int, ...]
    count: int = 0
    first: tuple[int, int] = (0, 0)  # row, column

    def add(self, marked: torch.Tensor, first_row: int) -> bool:
        """Count those of the rows from `first_row` on, given as a matrix. Returns whether they hold the first."""
        num_marked = int(marked.count_nonzero())
        is_first = num_marked > 0 and self.count == 0
        if is_first:
            row, col = divmod(int(marked.flatten().to(torch.uint8).argmax()), marked.shape[1])
            self.first = (first_row + row, col)
        self.count += num_marked
        return is_first

    @property
    def place(self) -> str:
        row, col = self.first
        return f"[{row}, {col}]" if len(self.shape) == 2 else f"[{row}]"


def chunks(shape: tuple[int, ...]) -> Iterator[Span]:
    """All rows of a tensor of `shape`, a few at a time."""
    num_rows, num_cols = matrix_shape(shape)
    return row_chunks(Span(0, num_rows), num_cols, CHUNK_ELEMENTS)


def bits(part: torch.Tensor) -> torch.Tensor:
    """The elements as integers, of which two are equal when their bytes are: NaN too."""
    return part.view(INTEGERS[part.element_size()])
