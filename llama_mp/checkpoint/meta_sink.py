"""Meta's folders as an output: `consolidated.NN.pth`, archives as `torch.save` writes them, and `params.json`."""

import io
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_mp.checkpoint.archive import Archive
from llama_mp.checkpoint.sink import Piece
from llama_mp.config import ModelConfig
from llama_mp.files import json_bytes
from llama_mp.layout import Shard, shards
from llama_mp.params_json import OWN_KEY, SHARDS_KEY, params_of

STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}


class MetaSink:
    """A folder of `mp` shards. `config.embedding_axis` holds where `mp` divides the model dimension, else axis 0.

    `dtypes`: of each global tensor. `original`: the source's params.json, if it has one."""

    def __init__(
        self, config: ModelConfig, dtypes: Mapping[str, torch.dtype], *, mp: int, original: Mapping[str, Any] | None
    ) -> None:
        axis = config.embedding_axis if config.dim % mp == 0 else 0
        held = [shards(config, rank, mp, embedding_axis=axis) for rank in range(mp)]
        self.params = params_of(config, mp=mp, embedding_axis=axis, original=original)
        self.cut = self.params[OWN_KEY][SHARDS_KEY]
        self.shards = [ShardFile(rank, of_rank, dtypes) for rank, of_rank in enumerate(held)]
        self.pieces = {name: [shard.piece(name) for shard in self.shards] for name in dtypes}
        self.sizes = {shard.file: shard.archive.num_bytes for shard in self.shards}

    def frame(self, file: str, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        [shard] = [shard for shard in self.shards if shard.file == file]
        return shard.frame(checksums)

    def small_files(self) -> dict[str, bytes]:
        return {"params.json": json_bytes(self.params)}


class ShardFile:
    """The places in one `consolidated.NN.pth`."""

    def __init__(self, rank: int, held: Mapping[str, Shard], dtypes: Mapping[str, torch.dtype]) -> None:
        self.file = f"consolidated.{rank:02d}.pth"
        self.held = held
        self.folder = Path(self.file).stem  # of all entries, as torch.save names it
        self.stored = {
            name: Stored(str(number), shard.shape, dtypes[name]) for number, (name, shard) in enumerate(held.items())
        }
        self.plain = {"data.pkl": pickled(self.stored), "byteorder": b"little", "version": b"3\n"}
        sizes = {self.entry(name): len(content) for name, content in self.plain.items()}
        sizes |= {self.data_entry(name): held[name].num_elements * dtypes[name].itemsize for name in held}
        self.archive = Archive(sizes)

    def entry(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def data_entry(self, name: str) -> str:
        return self.entry(f"data/{self.stored[name].key}")

    def piece(self, name: str) -> Piece:
        offset = self.archive.entries[self.data_entry(name)].offset
        return Piece(file=self.file, name=name, shard=self.held[name], dtype=self.stored[name].dtype, offset=offset)

    def frame(self, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Headers, directory, and the entries that are no tensors. `checksums`: CRC-32 by tensor."""
        of_entries = {self.data_entry(name): checksum for name, checksum in checksums.items()}
        for name, content in self.plain.items():
            of_entries[self.entry(name)] = zlib.crc32(content)
            yield self.archive.entries[self.entry(name)].offset, content
        yield from self.archive.frame(of_entries)


class Stored(NamedTuple):
    """A tensor that stands in the archive's entry data/`key`: what the pickle says of it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class StorageOf(NamedTuple):
    """The storage of a stored tensor, which the pickle names but does not hold."""

    stored: Stored


class ShardPickler(pickle.Pickler):
    """Writes stored tensors as torch.save writes tensors; `torch.load(weights_only=True)` admits nothing else."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return NotImplemented
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (StorageOf(value), 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, StorageOf):
            return None
        key, shape, dtype = value.stored
        return "storage", STORAGES[dtype], key, "cpu", torch.Size(shape).numel()


def pickled(tensors: Mapping[str, Stored]) -> bytes:
    """The data.pkl of a dictionary of `tensors`."""
    content = io.BytesIO()
    ShardPickler(content, protocol=2).dump(dict(tensors))
    return content.getvalue()
