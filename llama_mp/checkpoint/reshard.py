"""A checkpoint written anew: from any source to any sink, in a folder that appears once it is whole."""

import hashlib
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_mp.answer import Codec
from llama_mp.checkpoint.compare import compare
from llama_mp.checkpoint.cut import CHUNK_ELEMENTS
from llama_mp.checkpoint.digests import OnProgress
from llama_mp.checkpoint.hf_sink import HFSink
from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.meta_sink import MetaSink
from llama_mp.checkpoint.sink import Sink
from llama_mp.checkpoint.source import Source
from llama_mp.checkpoint.write import FolderWriter
from llama_mp.cores import num_threads
from llama_mp.dtypes import DTYPES, torch_name
from llama_mp.errors import RequestError, RunError, counted
from llama_mp.hf_config import hf_config_of
from llama_mp.locate import Checkpoint, checkpoint_at
from llama_mp.params_json import read_object
from llama_mp.partial import Partial, partial_path
from llama_mp.progress import Progress
from llama_mp.reshard_request import ReshardFlags, request_of
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_export import tokenizer_folder

HASHING_SHARE = 0.5  # of the processors' time, beside reading, cutting and writing (benchmarks/reshard.py)
TOKENIZER_BYTES = 110 * 10**6  # of memory to read it and write it anew: 80 to 90 MB for 49152 tokens in JSON
PROBE_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, and from what. `dtypes`: of each tensor. `small_files`: those beside the weights.
    `request`: what decides every byte of it. `header`: what the manifest begins with. `without_tokenizer`: why the
    output has none."""

    flags: ReshardFlags
    checkpoint: Checkpoint
    source: Source
    sink: Sink
    dtypes: Mapping[str, torch.dtype]
    small_files: Mapping[str, bytes]
    request: Mapping[str, Any]
    header: Mapping[str, Any]
    without_tokenizer: str | None

    @classmethod
    def open(cls, flags: ReshardFlags, checkpoint: Checkpoint) -> "Job":
        """Raises RequestError for an input that is not whole. No weight is read yet."""
        source = open_source(checkpoint)
        dtypes = {name: DTYPES.get(flags.dtype) or source.dtype(name) for name in source.names()}
        tokenizer, files, without_tokenizer = None, {}, None
        try:
            tokenizer = fitting_tokenizer(checkpoint, source.config.vocab_size)
            files = tokenizer_folder(checkpoint.tokenizer, checkpoint.path, hugging_face=flags.format == "hf")
        except RequestError as error:  # the weights are none the worse for it
            without_tokenizer = str(error)
        request = request_of(flags, checkpoint)
        header = request | {"source_path": str(checkpoint.path.absolute())}
        if flags.format == "hf":
            config_json = hugging_face_config(checkpoint, source, dtypes, tokenizer)
            sink: Sink = HFSink(source.config, dtypes, config_json)
        else:
            original = read_object(checkpoint.path / "params.json") if checkpoint.kind == "meta" else None
            config = replace(source.config, embedding_axis=own_embedding_axis(checkpoint, source))
            sink = MetaSink(config, dtypes, mp=flags.mp, original=original)
            header |= sink.cut
        return cls(
            flags=flags,
            checkpoint=checkpoint,
            source=source,
            sink=sink,
            dtypes=dtypes,
            small_files=files | sink.small_files(),
            request=request,
            header=header,
            without_tokenizer=without_tokenizer,
        )

    @property
    def num_bytes(self) -> int:
        return sum(self.sink.sizes.values()) + sum(map(len, self.small_files.values()))

    @property
    def free_bytes(self) -> int:
        """Of the output's disk, with what an interrupted run holds there for this one."""
        folder = partial_path(self.flags.output)
        held = sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0
        return shutil.disk_usage(folder.parent).free + held

    def check_space(self) -> None:
        """Raise RequestError when the disk has no room for the output."""
        if self.num_bytes > self.free_bytes:
            raise RequestError(
                f"--output {self.flags.output} needs {self.num_bytes / 1e9:.2f} GB, and {self.free_bytes / 1e9:.2f} GB "
                "are free on that disk: make room, or give a folder on another one"
            )

    def run(self, on_progress: OnProgress | None = None) -> int:
        """Write the folder, continuing what a run of the same request began; how many tensors were whole already.

        Raises RunError when the disk is full, when a number does not fit the type asked for, and when what was written
        is not what was read."""
        self.check_space()
        with Partial(self.flags.output, self.request, overwrite=self.flags.overwrite) as folder:
            writer = FolderWriter(folder, self.source, self.sink, on_progress)
            writer.write(self.small_files, self.header)
            if self.flags.check:
                self.check(folder.path)
            folder.commit()
        return writer.num_continued

    def check(self, folder: Path) -> None:
        """Read `folder` back and compare all of it with the input. Raises RunError for the first difference."""
        written = open_source(checkpoint_at(folder))
        with Progress("comparing") as progress:
            difference = next(
                compare(written, self.source, dtype_of=self.dtypes.__getitem__, on_progress=progress), None
            )
        if difference is not None:
            raise RunError(
                f"{folder} is not what was read: {difference}; rm -r {shlex.quote(str(folder))}, run the same command "
                "again, and report it"
            )

    # ---- what is said of it ------------------------------------------------------------------------------------

    def description(self) -> str:
        """For --dry_run: what would be written, how large, with how much memory, in what time."""
        input_bytes = sum(file.stat().st_size for file in self.checkpoint.files)
        seconds = self.num_bytes / (hashing_rate() * HASHING_SHARE * num_threads())
        lines = {
            "input": f"{self.checkpoint.path}: {self.checkpoint.kind}, "
            f"{'quantized' if self.is_quantized else self.source.precision}, "
            f"{counted(len(self.checkpoint.files), 'file')}, {input_bytes / 1e9:.2f} GB",
            "output": f"{self.flags.output}: {self.flags.format}, {self.num_bytes / 1e9:.2f} GB; "
            f"{self.free_bytes / 1e9:.2f} GB free on that disk",
            **{name: f"{size} bytes" for name, size in self.sink.sizes.items()},
            **{name: f"{len(content)} bytes" for name, content in self.small_files.items()},
            "memory": f"about {self.memory_bytes / 1e6:.0f} MB beside what torch takes by itself",
            "time": f"about {seconds:.1f} s on {counted(num_threads(), 'core')}, where the disk keeps up",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    @property
    def memory_bytes(self) -> int:
        """A chunk as it is read, in its new type, cut and hashed; dequantizing makes some more of it. And the
        tokenizer, which is most of it."""
        return TOKENIZER_BYTES + CHUNK_ELEMENTS * 4 * (8 if self.is_quantized else 5)

    @property
    def is_quantized(self) -> bool:
        return (
            self.checkpoint.kind == "gguf"
            and self.source.precision != "fp32"
            and torch.float32
            in {self.source.dtype(name) for name in self.source.names() if len(self.source.shape(name)) == 2}
        )

    def notes(self) -> Iterator[str]:
        """What the user may not expect of the output."""
        if self.is_quantized and self.flags.dtype == "keep":
            yield "quantized weights are written in fp32, which holds them exactly; --dtype fp16 or bf16 takes half"
        padded = self.header.get("padded_sizes")
        if padded:
            sizes = ", ".join(f"{name} {getattr(self.source.config, name)} as {size}" for name, size in padded.items())
            yield (
                f"at MP {self.flags.mp}, zeros or copies of KV heads fill up the shards ({sizes}): only llama-mp runs "
                "such a folder; resharded again, it gives back the exact original"
            )
        if self.without_tokenizer:
            yield f"the output has no tokenizer: put one there yourself ({self.without_tokenizer})"

    def summary(self, seconds: float, num_continued: int) -> str:
        """The result in a line."""
        rate = f"{self.num_bytes / 1e9:.2f} GB in {seconds:.1f} s ({self.num_bytes / seconds / 1e9:.2f} GB/s)"
        continued = f"; {num_continued} of {len(self.dtypes)} tensors were there already" if num_continued else ""
        checked = "; equal to the input" if self.flags.check else ""
        return f"{self.flags.output}: {counted(len(self.sink.sizes), 'file')} of weights, {rate}{continued}{checked}"


def hashing_rate() -> float:
    """Bytes per second of SHA-256 on one core of this machine."""
    content = bytes(PROBE_BYTES)
    start = time.perf_counter()
    hashlib.sha256(content)
    return PROBE_BYTES / (time.perf_counter() - start)


def own_embedding_axis(checkpoint: Checkpoint, source: Source) -> int:
    """The axis on which Meta's own files of this model split the embeddings.

    Files of several shards show it, unless their number left no choice."""
    mp = len(checkpoint.files) if checkpoint.kind == "meta" else 1
    has_choice = mp > 1 and source.config.dim % mp == 0
    return source.config.embedding_axis if has_choice else checkpoint.config.embedding_axis


def fitting_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> Tokenizer:
    """The tokenizer that came with the checkpoint. Raises RequestError when there is none, or another model's."""
    if checkpoint.tokenizer is None:
        raise RequestError(f"none was found with {checkpoint.path}")
    codec = Codec(checkpoint)
    codec.check_vocabulary(vocab_size)
    return codec.tokenizer


def hugging_face_config(
    checkpoint: Checkpoint, source: Source, dtypes: Mapping[str, torch.dtype], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The config.json of the output: the input's, where it has one, with the type of the weights."""
    types = {dtypes[name] for name in source.names() if len(source.shape(name)) == 2}
    dtype = torch_name(types.pop() if len(types) == 1 else torch.float32)
    if checkpoint.kind == "hf":
        values = read_object(checkpoint.path / "config.json")
        return values | {"dtype" if "dtype" in values else "torch_dtype": dtype}
    bos_id, eos_ids = (tokenizer.bos_id, tokenizer.eos_ids) if tokenizer else (None, ())
    return hf_config_of(source.config, dtype=dtype, bos_id=bos_id, eos_ids=sorted(eos_ids))
