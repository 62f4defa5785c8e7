"""The header of a GGUF file: its metadata and where each tensor lies. Reads no weights, needs no torch.

Format: "GGUF", the specification in ggml's docs/gguf.md, versions 2 and 3, little-endian. The gguf package reads
headers too, at 40 us a string: seconds for a vocabulary, on every rank; its tables and dequantization serve us.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_mp.errors import RequestError

MAGIC = b"GGUF"
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4
# Of the metadata and the tensors' places: 256,000 tokens and their merges have 15 MB and 1.5 million values.
MAX_HEADER_BYTES = 1 << 26
MAX_VALUES = 1 << 22
MAX_ENTRIES = 1 << 17  # tensors, or keys: 10,000 layers have 90,000 tensors
MAX_NAME = 256  # characters of a key or a tensor's name: ggml stops at 64, keys in use are no longer
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor's logical `shape` (rows first), its GGML type, and the place of its bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class Cursor:
    """Reads values one after the other; a read past the end raises struct.error or ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.num_values = 0

    def scalar(self, form: str) -> Any:
        [value] = struct.unpack_from(form, self.data, self.take(struct.calcsize(form), "a number"))
        return value

    def take(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` begin."""
        if num_bytes > self.end - self.at:
            raise ValueError(f"{what} of {num_bytes} bytes at byte {self.at}, and the header may go on to {self.end}")
        self.at += num_bytes
        return self.at - num_bytes

    def count(self, num_values: int) -> None:
        self.num_values += num_values
        if self.num_values > MAX_VALUES:
            raise ValueError(f"an array of {num_values} values")

    def text(self) -> str:
        length = self.scalar("<Q")
        start = self.take(length, "a text")
        return self.data[start : self.at].decode("utf-8", "surrogateescape")

    def name(self) -> str:
        name = self.text()
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"a name of {len(name)} characters, {name[:20]!r}")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == MAX_ARRAY_DEPTH:
            raise ValueError(f"metadata type {kind}")
        item, count = self.scalar("<I"), self.scalar("<Q")
        self.count(count)
        if item in SCALARS:
            return list(self.scalars(SCALARS[item], count))
        return [self.value(item, depth + 1) for _ in range(count)]

    def scalars(self, form: str, count: int) -> tuple[Any, ...]:
        start = self.take(struct.calcsize(form) * count, "an array")
        return struct.unpack_from(f"<{count}{form[1]}", self.data, start)


def read_header(path: Path) -> Header:
    """The header of the GGUF file `path`. Raises RequestError when the file is not a whole GGUF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(data)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError) as error:
        raise RequestError(f"{path} is not a whole GGUF file ({error}); download it again") from error


def parse(data: mmap.mmap) -> Header:
    if data[:4] != MAGIC:
        raise ValueError(f"it begins with {data[:4]!r}")
    cursor = Cursor(data)
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3 are read")
    num_tensors, num_values = cursor.scalar("<Q"), cursor.scalar("<Q")
    if max(num_tensors, num_values) > MAX_ENTRIES:
        raise ValueError(f"{num_tensors} tensors and {num_values} values")
    metadata = {}
    for _ in range(num_values):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"metadata {key} is there twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    infos = [tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} in blocks of {block}")
        num_bytes = prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(data):
            raise ValueError(f"tensor {name} ends at byte {start + offset + num_bytes}, the file at {len(data)}")
        if name in tensors:
            raise ValueError(f"tensor {name} is there twice")
        tensors[name] = TensorInfo(shape=shape, kind=kind, offset=start + offset, num_bytes=num_bytes)
    return Header(metadata=metadata, tensors=tensors)


def tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """(name, shape, type, offset from the start of the data) of the next tensor; GGUF lists the last axis first."""
    name = cursor.name()
    num_dims = cursor.scalar("<I")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} of {num_dims} dimensions")
    shape = tuple(reversed(cursor.scalars("<Q", num_dims)))
    return name, shape, GGMLQuantizationType(cursor.scalar("<I")), cursor.scalar("<Q")
