"""What every output format looks like to the resharder: where in which file each slice of each global tensor goes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llama_mp.layout import Shard


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of an output file: the `shard` of a global tensor, row by row from byte `offset` on."""

    file: str
    name: str  # in that file
    shard: Shard
    dtype: torch.dtype
    offset: int
    halved_heads: int | None = None  # head dimension where rows are in Hugging Face's order: halves, not pairs

    @property
    def num_bytes(self) -> int:
        return self.shard.num_elements * self.dtype.itemsize


class Sink(Protocol):
    """An output whose every byte has its place before any is written."""

    sizes: Mapping[str, int]  # bytes of each weight file
    pieces: Mapping[str, list[Piece]]  # by global tensor

    def frame(self, file: str, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """All bytes of `file` that belong to no piece, as (offset, bytes). `checksums`: CRC-32 by piece's name."""

    def small_files(self) -> Mapping[str, bytes]:
        """The files beside the weights, but for tokenizer and manifest."""
