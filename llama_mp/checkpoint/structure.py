"""What a checkpoint says about itself: shapes as its architecture wants them, copies that agree, finite values.

This is all that can be checked where no digest was left: a flipped bit mostly makes another finite number.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_mp.checkpoint import hf, meta
from llama_mp.checkpoint.digests import OnProgress, in_threads
from llama_mp.checkpoint.fault import DamagedError, Fault, without_path
from llama_mp.checkpoint.gguf import ROPE_FACTORS, meta_name
from llama_mp.checkpoint.load import is_finite, open_source
from llama_mp.checkpoint.scan import Tally, chunks
from llama_mp.checkpoint.source import Source, as_matrix
from llama_mp.errors import RequestError
from llama_mp.gguf_header import read_header
from llama_mp.layout import Placement, Shard, Span, matrix_shape
from llama_mp.locate import Checkpoint

# The part rows x cols of a global tensor.
Region = tuple[str, Span, Span]


class Stored(NamedTuple):
    """A tensor as its file has it. `shard`: what a Meta folder's layout puts into it."""

    file: str
    name: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[Span], torch.Tensor]  # of rows
    shard: Shard | None = None


class Copy(NamedTuple):
    """What one file holds of a region that others hold too."""

    region: Region
    file: str
    sha256: str


def check_structure(checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> list[Fault]:
    """What is wrong with `checkpoint` as far as it tells itself, each tensor read once."""
    faults = unreadable(checkpoint)
    if faults:
        return faults
    try:
        source = open_source(checkpoint)
    except DamagedError as error:
        return [in_its_file(fault, checkpoint) for fault in error.faults]
    except RequestError as error:
        return [Fault(checkpoint.path.name, None, without_path(error, checkpoint.path))]
    tensors = stored_tensors(checkpoint, source)
    shared = shared_regions(tensor.shard for tensor in tensors if tensor.shard)
    copies: list[Copy] = []
    done, total = 0, sum(tensor.num_bytes for tensor in tensors)
    for tensor, (found, held) in zip(tensors, in_threads(lambda t: scan(t, shared), tensors), strict=True):
        faults += found
        copies += held
        done += tensor.num_bytes
        if on_progress:
            on_progress(done, total)
    return faults + unequal(copies)


def count_tensors(checkpoint: Checkpoint) -> int:
    """Global tensors of a checkpoint that can be opened."""
    return len(open_source(checkpoint).names())


# ---- opening ---------------------------------------------------------------------------------------------------

OPENERS: dict[str, Callable[[Path], Any]] = {"meta": meta.open_shard, "hf": hf.open_file, "gguf": read_header}


def unreadable(checkpoint: Checkpoint) -> list[Fault]:
    """The files that cannot be opened, all of them."""
    faults = []
    for file in checkpoint.files:
        try:
            OPENERS[checkpoint.kind](file)
        except RequestError as error:
            faults.append(Fault(file.name, None, without_path(error, file)))
        except OSError as error:
            faults.append(Fault(file.name, None, f"cannot be read: {error.strerror}"))
    return faults


def in_its_file(fault: Fault, checkpoint: Checkpoint) -> Fault:
    """`fault` with the file and the name that the tensor has in it, where it is in one of several."""
    if checkpoint.kind == "hf":
        for file in checkpoint.files:
            for name in hf.open_file(file):
                if hf.meta_name(name) == fault.tensor:
                    return Fault(file.name, name, fault.text)
    return fault


def stored_tensors(checkpoint: Checkpoint, source: Source) -> list[Stored]:
    if isinstance(source, meta.MetaSource):
        return [
            of_tensor(file.name, name, tensor, source.held[name][rank])
            for rank, file in enumerate(checkpoint.files)
            for name, tensor in source.tensors[rank].items()
        ]
    if checkpoint.kind == "hf":
        return [
            of_tensor(file.name, name, tensor)
            for file in checkpoint.files
            for name, tensor in hf.open_file(file).items()
        ]
    [file] = checkpoint.files
    infos = read_header(file).tensors
    return [
        Stored(file.name, name, info.shape, info.num_bytes, reader(source, meta_name(name)))
        for name, info in infos.items()
        if name != ROPE_FACTORS
    ]


def of_tensor(file: str, name: str, tensor: torch.Tensor, shard: Shard | None = None) -> Stored:
    return Stored(file, name, tuple(tensor.shape), tensor.nbytes, lambda rows: tensor[slice(*rows)], shard)


def reader(source: Source, name: str) -> Callable[[Span], torch.Tensor]:
    cols = Span(0, matrix_shape(source.shape(name))[1])
    return lambda rows: source.read(name, rows, cols)


# ---- values ----------------------------------------------------------------------------------------------------


def scan(tensor: Stored, shared: set[Region]) -> tuple[list[Fault], list[Copy]]:
    """One pass over a tensor: values that are not finite, padding that is not zero; digests of its shared parts."""
    placements = tensor.shard.placements if tensor.shard else ()
    is_padded = tensor.shard is not None and tensor.shard.is_padded
    hashers = {p: hashlib.sha256() for p in placements if region_of(p) in shared}
    odd, filled, value = Tally(tensor.shape), Tally(tensor.shape), 0.0
    try:
        for rows in chunks(tensor.shape):
            chunk = as_matrix(tensor.read(rows))
            if not is_finite(chunk) and odd.add(~chunk.isfinite(), rows.start):
                value = chunk[odd.first[0] - rows.start, odd.first[1]].item()
            if is_padded:
                filled.add(padding(chunk, rows, placements) != 0, rows.start)
            for p, hasher in hashers.items():
                hasher.update(bytes_of(part_of(chunk, rows, p)))
    except RequestError as error:  # a kind of GGUF block that cannot be read
        return [Fault(tensor.file, tensor.name, str(error))], []
    faults = []
    if odd.count:
        faults.append(f"{odd.count} not finite, the first at {odd.place}: {value}")
    if filled.count:
        faults.append(f"{filled.count} not zero in the padding, the first at {filled.place}")
    copies = [Copy(region_of(p), tensor.file, hasher.hexdigest()) for p, hasher in hashers.items()]
    return [Fault(tensor.file, tensor.name, text) for text in faults], copies


def part_of(chunk: torch.Tensor, rows: Span, p: Placement) -> torch.Tensor:
    """The part of `chunk`, which is rows of a shard's tensor, that `p` fills: empty where it fills other rows."""
    start, stop = max(p.row, rows.start), min(p.row + len(p.rows), rows.stop)
    return chunk[start - rows.start : max(start, stop) - rows.start, p.col : p.col + len(p.cols)]


def padding(chunk: torch.Tensor, rows: Span, placements: Sequence[Placement]) -> torch.Tensor:
    """`chunk` with zeros where a placement fills it."""
    rest = chunk.clone()
    for p in placements:
        part_of(rest, rows, p).zero_()
    return rest


def bytes_of(part: torch.Tensor) -> Any:
    return part.contiguous().flatten().view(torch.uint8).numpy()


# ---- copies ----------------------------------------------------------------------------------------------------


def region_of(placement: Placement) -> Region:
    return placement.source, placement.rows, placement.cols


def shared_regions(shards: Iterator[Shard]) -> set[Region]:
    """The regions that several files hold: vectors, and KV heads where they are fewer than the shards.

    The layout gives either the same region twice or regions without a common element."""
    held = Counter(region_of(p) for shard in shards for p in shard.placements)
    return {region for region, count in held.items() if count > 1}


def unequal(copies: Sequence[Copy]) -> list[Fault]:
    """The copies that differ from what most files hold, or from the first where no content has a majority."""
    faults = []
    by_region: dict[Region, list[Copy]] = {}
    for copy in copies:
        by_region.setdefault(copy.region, []).append(copy)
    for (name, rows, _), held in by_region.items():
        [(usual, _)] = Counter(copy.sha256 for copy in held).most_common(1)
        [example, *_] = (copy.file for copy in held if copy.sha256 == usual)
        for copy in held:
            if copy.sha256 != usual:
                text = f"rows {rows.start} to {rows.stop - 1} of the whole tensor differ from those in {example}"
                faults.append(Fault(copy.file, name, text))
    return faults
