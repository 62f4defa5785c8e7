"""Meta's folders: `consolidated.NN.pth`, one file per rank of the degree at which they were written."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_mp.checkpoint.fault import DamagedError, Fault
from llama_mp.checkpoint.source import listed
from llama_mp.checkpoint.torch_file import read_pickle
from llama_mp.config import ModelConfig
from llama_mp.dtypes import narrowest
from llama_mp.errors import RequestError
from llama_mp.layout import Span, cover, global_shapes, joined_shape, matrix_shape, shards, split_of
from llama_mp.locate import Checkpoint

ZIP_MAGIC = b"PK\x03\x04"
# What torch.load raises for files that are cut or altered.
DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError)
ONE_DOWNLOAD = "check that params.json and all shards come from one download"
IGNORED = ("rope.freqs",)  # LLaMA 1 keeps its rotation frequencies in each shard; they follow from the config


class MetaSource:
    """Reads slices of global tensors from the memory-mapped shards."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = [open_shard(file) for file in checkpoint.files]
        self.files = checkpoint.files
        self.check_same_names()
        self.config = complete(checkpoint.config, self.tensors)
        held = self.match_layout(checkpoint)
        self.held = {name: [part[name] for part in held] for name in held[0]}
        self.shapes = {n: s for n, s in global_shapes(self.config).items() if n in self.tensors[0]}
        self.precision = narrowest({t.dtype for t in self.tensors[0].values() if t.dim() == 2})
        self.bytes_read = 0

    def names(self) -> list[str]:
        return list(self.tensors[0])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name, tuple(self.tensors[0][name].shape))

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[0][name].dtype

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        parts = []
        for rank, p in cover(self.held[name], rows, cols):
            tensor = self.tensors[rank][name]
            slices = (slice(p.row, p.row + len(p.rows)), slice(p.col, p.col + len(p.cols)))
            parts.append((p, tensor[slices[: tensor.dim()]]))
        self.bytes_read += sum(part.numel() * part.element_size() for _, part in parts)
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(len(rows), len(cols), dtype=self.dtype(name))
        for p, part in parts:
            row, col = p.rows.start - rows.start, p.cols.start - cols.start
            whole[row : row + len(p.rows), col : col + len(p.cols)] = part
        return whole

    def check_same_names(self) -> None:
        """Raise DamagedError when a shard holds other tensors than the first."""
        first, first_file = set(self.tensors[0]), self.files[0].name
        for file, tensors in zip(self.files, self.tensors, strict=True):
            differ = sorted(first ^ set(tensors))
            if differ:
                raise DamagedError(
                    f"{file} and {first_file} hold different tensors ({differ[0]}): {ONE_DOWNLOAD}",
                    [
                        Fault(
                            file.name, name, f"is {'not' if name in tensors else 'missing here, but'} in {first_file}"
                        )
                        for name in differ
                    ],
                )

    def match_layout(self, checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
        """The layout of every file, its shapes equal to the tensors'. Raises DamagedError that lists the others."""
        mp = len(self.files)
        axis = self.config.embedding_axis
        hint = self.degree_hint()
        try:
            held = [shards(self.config, rank, mp, embedding_axis=axis) for rank in range(mp)]
        except RequestError as error:  # no layout has so many shards
            raise RequestError(f"{checkpoint.path}: {hint + ONE_DOWNLOAD if hint else error}") from error
        faults = [
            Fault(file.name, name, f"has shape {tuple(tensor.shape)}, not {held[rank][name].shape}")
            for rank, file in enumerate(self.files)
            for name, tensor in self.tensors[rank].items()
            if name in held[rank] and tuple(tensor.shape) != held[rank][name].shape
        ]
        if faults:
            shown = listed([f"{file}: {name} {text}" for file, name, text in faults])
            raise DamagedError(
                f"{checkpoint.path} at MP {mp}: {shown}; {hint}{ONE_DOWNLOAD}",
                [Fault(checkpoint.path.name, None, hint + ONE_DOWNLOAD)] if hint else faults,
            )
        return held

    def degree_hint(self) -> str:
        """What the shapes say about the number of shards there should be."""
        name = "layers.0.feed_forward.w1.weight"
        gate = self.tensors[0].get(name)
        axis, _ = split_of(name, 0)
        if gate is None or not gate.shape[axis]:
            return ""
        hidden_dim, num_rows, found = self.config.hidden_dim, gate.shape[axis], len(self.files)
        degree = -(-hidden_dim // num_rows)
        if -(-hidden_dim // degree) != num_rows:  # no number of shards, the last one padded, has so many rows
            return ""
        return f"the tensors are those of {degree} shards, and {found} are here: " if degree != found else ""


def open_shard(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, memory-mapped. Raises RequestError for a file that is not whole, or runs code."""
    try:
        with file.open("rb") as opened:
            head = opened.read(len(ZIP_MAGIC))
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    if head != ZIP_MAGIC:
        raise RequestError(
            f"{file} is no file of torch.save as of torch 1.6 or later (it begins with {head!r}): download it again, "
            "or load an older file that you trust and save it anew"
        )
    read_pickle(file)
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{file} would run code when loaded, or is no torch file: refused ({reason(error)}); "
            "get it from a source that you trust"
        ) from error
    except DAMAGED as error:
        raise RequestError(f"{file} is not a whole torch file ({reason(error)}); copy it again") from error
    if not isinstance(loaded, dict):
        raise RequestError(f"{file} holds a {type(loaded).__name__}, not a dictionary of tensors: not a LLaMA shard")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.dim() not in (1, 2):
            raise RequestError(f"{file}: {name} is neither a vector nor a matrix: not a LLaMA shard")
        if name not in IGNORED and not is_plain(value):
            raise RequestError(f"{file}: {name} is not stored as plain numbers: not a LLaMA shard")
    return {name: tensor for name, tensor in loaded.items() if name not in IGNORED}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether all elements are floats of the file: not fewer that strides repeat, nor none on the meta device."""
    return (
        tensor.dtype.is_floating_point
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def reason(error: Exception) -> str:
    """The first sentence of torch's message that says something about the file."""
    text = str(error)
    culprit = re.search("unsupported (global|operand|class)", text, re.IGNORECASE)
    text = text[culprit.start() :] if culprit else text
    return text.strip().split("\n")[0].split(". ")[0][:120]


def complete(config: ModelConfig, tensors: list[dict[str, torch.Tensor]]) -> ModelConfig:
    """`config` with what only the tensors tell: vocabulary, tied embeddings, and the axis of the embeddings."""
    embeddings = "tok_embeddings.weight"
    if embeddings not in tensors[0]:
        return config  # the check of names says so
    tied = "output.weight" not in tensors[0]
    axis = 0 if matrix_shape(tuple(tensors[0][embeddings].shape))[1] == config.dim else 1
    name = embeddings if tied else "output.weight"
    num_rows, *_ = joined_shape(name, [tuple(part[name].shape) for part in tensors], axis)
    return replace(config, vocab_size=config.vocab_size or num_rows, tied_embeddings=tied, embedding_axis=axis)
