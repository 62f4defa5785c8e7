"""Hugging Face's folders as an output: safetensors files of bounded size, their index, and `config.json`."""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llama_mp.checkpoint.hf import IN_HALVES, TYPES, hf_name
from llama_mp.checkpoint.sink import Piece
from llama_mp.config import ModelConfig
from llama_mp.files import json_bytes
from llama_mp.layout import Shard, shards
from llama_mp.locate import HF_FILE, HF_INDEX

MAX_FILE_BYTES = 5 * 10**9 - (1 << 20)  # of tensors: with its header a file has 5 GB at most
ALIGNMENT = 64  # bytes: of the data, so that it can be mapped into memory


class HFSink:
    """A folder that `from_pretrained` loads. `dtypes`: of each global tensor. `config_json`: what config.json holds.

    Files have at most `max_file_bytes` of data each, but for a single tensor that has more."""

    def __init__(
        self,
        config: ModelConfig,
        dtypes: Mapping[str, torch.dtype],
        config_json: Mapping[str, Any],
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self.config_json, self.head_dim = config_json, config.head_dim
        groups = in_groups(shards(config, 0, 1), dtypes, max_file_bytes)
        self.headers: dict[str, bytes] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.sizes: dict[str, int] = {}
        for number, group in enumerate(groups, start=1):
            file = HF_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self.add(file, group, dtypes)

    def add(self, file: str, group: Mapping[str, Shard], dtypes: Mapping[str, torch.dtype]) -> None:
        """Place the tensors of one file; wide types first, so that each tensor is aligned to its elements."""
        kinds = {dtype: kind for kind, dtype in TYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name, shard in sorted(group.items(), key=lambda item: -dtypes[item[0]].itemsize):
            start, end = end, end + shard.num_elements * dtypes[name].itemsize
            places[name] = start
            header[hf_name(name)] = {
                "dtype": kinds[dtypes[name]],
                "shape": shard.shape,
                "data_offsets": (start, end),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self.headers[file] = struct.pack("<Q", len(text)) + text
        self.sizes[file] = len(self.headers[file]) + end
        for name, start in places.items():
            piece = Piece(
                file=file,
                name=hf_name(name),
                shard=group[name],
                dtype=dtypes[name],
                offset=len(self.headers[file]) + start,
                halved_heads=self.head_dim if name.endswith(IN_HALVES) else None,
            )
            self.pieces[name] = [piece]

    def frame(self, file: str, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        yield 0, self.headers[file]

    def small_files(self) -> dict[str, bytes]:
        files = {"config.json": json_bytes(self.config_json)}
        if len(self.sizes) > 1:
            pieces = [piece for [piece] in self.pieces.values()]
            total = sum(piece.num_bytes for piece in pieces)
            weight_map = {piece.name: piece.file for piece in pieces}
            files[HF_INDEX] = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
        return files


def in_groups(
    tensors: Mapping[str, Shard], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[dict[str, Shard]]:
    """`tensors` in order, in groups of at most `max_bytes`; a larger tensor is a group by itself."""
    groups: list[dict[str, Shard]] = []
    room = 0
    for name, shard in tensors.items():
        num_bytes = shard.num_elements * dtypes[name].itemsize
        if num_bytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = shard
        room -= num_bytes
    return groups
