"""An output folder's files: the weights by way of cut.py, what stands around them, and the manifest of it all."""

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from llama_mp.checkpoint.cut import Digest, cut_tensors, write_at
from llama_mp.checkpoint.digests import OnProgress, in_threads
from llama_mp.checkpoint.manifest import MANIFEST, digest_range, rest_digest
from llama_mp.checkpoint.sink import Piece, Sink
from llama_mp.checkpoint.source import Source
from llama_mp.cores import num_threads
from llama_mp.files import json_bytes, write_whole
from llama_mp.partial import Partial


class FolderWriter:
    """Writes `source` by `sink` into `folder`, continuing what is whole in it; `on_progress` is told of that too."""

    def __init__(self, folder: Partial, source: Source, sink: Sink, on_progress: OnProgress | None) -> None:
        self.folder, self.source, self.sink, self.on_progress = folder, source, sink, on_progress
        self.num_continued = 0  # tensors that were whole already
        self.done_bytes, self.total_bytes = 0, sum(map(self.tensor_bytes, sink.pieces))
        self.lock = threading.Lock()

    def count(self, num_bytes: int) -> None:
        """Note progress; any thread may."""
        with self.lock:
            self.done_bytes += num_bytes
            if self.on_progress:
                self.on_progress(self.done_bytes, self.total_bytes)

    def write(self, small_files: Mapping[str, bytes], header: Mapping[str, Any]) -> None:
        """Everything that belongs into the folder. `header`: what the manifest begins with."""
        files = self.finish_files(self.write_tensors())
        for name, content in small_files.items():
            write_whole(self.folder.path / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(self.folder.path / MANIFEST, json_bytes({**header, "files": files}))

    def write_tensors(self) -> dict[str, list[Digest]]:
        """All tensors into their files: the digests of the pieces of each."""
        with ExitStack() as stack:
            files = {}
            for name, size in self.sink.sizes.items():
                files[name] = os.open(self.folder.path / name, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, files[name])
                os.ftruncate(files[name], size)
            digests = self.whole_tensors()
            self.num_continued = len(digests)
            # The largest first, so that no thread is left alone with one at the end.
            left = sorted(set(self.sink.pieces) - set(digests), key=self.tensor_bytes, reverse=True)
            cut = cut_tensors(
                left, self.source, self.sink.pieces, files, num_threads=num_threads(), on_bytes=self.count
            )
            with closing(cut):
                for name, found in cut:
                    self.folder.record(name, found)
                    digests[name] = found
        return digests

    def tensor_bytes(self, name: str) -> int:
        return sum(piece.num_bytes for piece in self.sink.pieces[name])

    def whole_tensors(self) -> dict[str, list[Digest]]:
        """What an earlier run finished, as far as the bytes are still those that it wrote."""

        def is_whole(name: str) -> bool:
            return [digest.sha256 for digest in recorded[name]] == [
                digest_range(self.folder.path / piece.file, piece.offset, piece.num_bytes)
                for piece in self.sink.pieces[name]
            ]

        parts = self.folder.parts
        recorded = {name: [Digest(*digest) for digest in parts[name]] for name in self.sink.pieces if name in parts}
        whole = {}
        for (name, digests), is_there in zip(recorded.items(), in_threads(is_whole, recorded), strict=True):
            if is_there:
                whole[name] = digests
                self.count(self.tensor_bytes(name))
        return whole

    def finish_files(self, digests: Mapping[str, Sequence[Digest]]) -> dict[str, Any]:
        """Write what stands around the tensors; what the manifest says of each file."""
        held: dict[str, dict[Piece, Digest]] = {file: {} for file in self.sink.sizes}
        for name, found in digests.items():
            for piece, digest in zip(self.sink.pieces[name], found, strict=True):
                held[piece.file][piece] = digest
        return {file: self.finish_file(self.folder.path / file, found) for file, found in held.items()}

    def finish_file(self, path: Path, held: Mapping[Piece, Digest]) -> dict[str, Any]:
        checksums = {piece.name: digest.crc32 for piece, digest in held.items()}
        with path.open("r+b") as opened:
            for offset, content in self.sink.frame(path.name, checksums):
                write_at(opened.fileno(), memoryview(content), offset)
        tensors = {
            piece.name: {"offset": piece.offset, "bytes": piece.num_bytes, "sha256": held[piece].sha256}
            for piece in sorted(held, key=lambda piece: piece.offset)
        }
        rest = rest_digest(path, [(piece.offset, piece.num_bytes) for piece in held])
        return {"bytes": self.sink.sizes[path.name], "tensors": tensors, "rest_sha256": rest}
