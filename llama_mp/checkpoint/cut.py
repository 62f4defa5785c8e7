"""Tensors from a source into files: each read once, in chunks of rows, and cut for all its pieces by the layout.

Tensors are independent, so each is one thread's from its first row to its last. What is hashed is in the cache from
being read, and is written from there.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import groupby
from typing import NamedTuple

import torch

from llama_mp.checkpoint.hf import rows_in_halves
from llama_mp.checkpoint.load import is_finite
from llama_mp.checkpoint.sink import Piece
from llama_mp.checkpoint.source import Source, as_matrix
from llama_mp.errors import RunError
from llama_mp.layout import Placement, Span, matrix_shape, row_chunks

CHUNK_ELEMENTS = 1 << 21  # read at a time, by all threads together: still in the cache when hashed and written
PADDING_ELEMENTS = 1 << 16
BLOCK_BYTES = 1 << 18  # hashed and written at a time

OnBytes = Callable[[int], None]


class Digest(NamedTuple):
    """Of one piece: CRC-32 for the archive that it is in, SHA-256 for the manifest."""

    crc32: int
    sha256: str


class Held(NamedTuple):
    """The rows `span` of a global tensor, as far as `placement` puts them into a piece, at its row `row`."""

    row: int
    span: Span
    placement: Placement


def cut_tensors(
    names: Sequence[str],
    source: Source,
    pieces: Mapping[str, Sequence[Piece]],
    files: Mapping[str, int],
    *,
    num_threads: int,
    on_bytes: OnBytes,
) -> Iterator[tuple[str, list[Digest]]]:
    """Write the pieces of the tensors `names` into `files`, open by name; each tensor's digests as it is whole."""
    stopped = threading.Event()

    def cut(name: str) -> list[Digest]:
        writers = [Writer(piece, files[piece.file], on_bytes) for piece in pieces[name]]
        for rows, part in chunks(source, name, pieces[name][0], CHUNK_ELEMENTS // num_threads):
            if stopped.is_set():
                raise InterruptedError
            for writer in writers:
                writer.take(rows, part)
        return [writer.finish() for writer in writers]

    pool, torch_threads = ThreadPoolExecutor(num_threads), torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors share the cores among themselves
    try:
        running: dict[Future[list[Digest]], str] = {pool.submit(cut, name): name for name in names}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:  # the first fault, or Ctrl-C, ends the others too
        stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def chunks(source: Source, name: str, piece: Piece, max_elements: int) -> Iterator[tuple[Span, torch.Tensor]]:
    """The global tensor in order, whole heads at a time where the piece reorders them, in the piece's type."""
    num_rows, num_cols = matrix_shape(source.shape(name))
    for rows in row_chunks(Span(0, num_rows), num_cols, max_elements, unit=piece.halved_heads or 1):
        part = source.read(name, rows, Span(0, num_cols))
        yield rows, converted(name, as_matrix(part), piece.dtype)


def converted(name: str, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`part` in `dtype`. Raises RunError where a number becomes infinite."""
    result = part.to(dtype)
    if part.dtype != dtype and not is_finite(result) and (beyond := part[result.isinf() & part.isfinite()]).numel():
        raise RunError(
            f"{name} holds {beyond.abs().max().item():.6g}, which is beyond the range of {str(dtype).split('.')[-1]} "
            f"(at most {torch.finfo(dtype).max:.6g}): use another --dtype, and --overwrite"
        )
    return result


class Writer:
    """One piece of a tensor, written from its first byte to its last as the rows of the tensor come by."""

    def __init__(self, piece: Piece, file: int, on_bytes: OnBytes) -> None:
        self.piece, self.file, self.on_bytes = piece, file, on_bytes
        self.num_rows, self.num_cols = matrix_shape(piece.shard.shape)
        self.row, self.offset = 0, piece.offset
        self.num_placed = 0  # elements
        self.crc32, self.sha256 = 0, hashlib.sha256()

    def take(self, rows: Span, part: torch.Tensor) -> None:
        """Write what belongs here of `part`, the given rows of the tensor over all columns."""
        held = [found for p in self.piece.shard.placements if (found := meet(p, rows))]
        for row, side_by_side in groupby(held, key=lambda found: found.row):
            self.pad(row)
            self.write(self.block(list(side_by_side), rows.start, part))
        self.num_placed += sum(len(found.span) * len(found.placement.cols) for found in held)

    def block(self, side_by_side: Sequence[Held], first_row: int, part: torch.Tensor) -> torch.Tensor:
        """Whole rows of this piece: a view of `part` where one placement fills them; zeros where none does."""
        span = side_by_side[0].span
        part = part[span.start - first_row : span.stop - first_row]
        assert len(part) == len(span), f"{self.piece.name}: {len(part)} rows of {span}"
        if len(side_by_side[0].placement.cols) == self.num_cols:
            block = part[:, slice(*side_by_side[0].placement.cols)]
        else:
            block = torch.zeros(len(span), self.num_cols, dtype=part.dtype)
            for _, _, p in side_by_side:
                block[:, p.col : p.col + len(p.cols)] = part[:, slice(*p.cols)]
        if self.piece.halved_heads is None:
            return block
        halved = torch.empty_like(block)
        halved[rows_in_halves(Span(0, len(span)), self.piece.halved_heads)] = block
        return halved

    def pad(self, row: int) -> None:
        """Zeros up to `row`."""
        while self.row < row:
            num_rows = min(row - self.row, max(1, PADDING_ELEMENTS // self.num_cols))
            self.write(torch.zeros(num_rows, self.num_cols, dtype=self.piece.dtype))

    def write(self, block: torch.Tensor) -> None:
        """Append rows."""
        content = memoryview(block.contiguous().flatten().view(torch.uint8).numpy())
        for start in range(0, len(content), BLOCK_BYTES):
            some = content[start : start + BLOCK_BYTES]
            self.crc32 = zlib.crc32(some, self.crc32)
            self.sha256.update(some)
            write_at(self.file, some, self.offset)
            self.offset += len(some)
        self.row += len(block)
        self.on_bytes(len(content))

    def finish(self) -> Digest:
        self.pad(self.num_rows)
        # As when weights are loaded: zeros stand where no placement is, and nowhere else.
        assert self.num_placed == self.piece.shard.num_placed, f"{self.piece.name}: {self.num_placed} elements"
        assert self.offset == self.piece.offset + self.piece.num_bytes, f"{self.piece.name}: {self.offset}"
        # Linux starts to write such a range to disk, and does not wait for it: less is left for the sync at the end.
        os.posix_fadvise(self.file, self.piece.offset, self.piece.num_bytes, os.POSIX_FADV_DONTNEED)
        return Digest(self.crc32, self.sha256.hexdigest())


def meet(placement: Placement, rows: Span) -> Held | None:
    """What `placement` holds of the given rows of its tensor."""
    span = Span(max(placement.rows.start, rows.start), min(placement.rows.stop, rows.stop))
    if span.start >= span.stop:
        return None
    return Held(placement.row + span.start - placement.rows.start, span, placement)


def write_at(file: int, content: memoryview, offset: int) -> None:
    """All of `content`, which one call may write in part."""
    while content:
        num_written = os.pwrite(file, content, offset)
        content, offset = content[num_written:], offset + num_written
