"""The tokenizer in a file or in a GGUF file's metadata, its kind found by content."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_byte_level import gguf_byte_level
from llama_mp.tokenizer_sentencepiece import gguf_sentencepiece, tokenizer_from_sentencepiece


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, whose kind is found by its content: so far sentencepiece's `tokenizer.model`."""
    needed = "a sentencepiece tokenizer.model is needed"
    if not path.is_file():
        raise RequestError(f"tokenizer {path}: {'a folder' if path.is_dir() else 'no such file'}; {needed}")
    with path.open("rb") as file:
        looks = other_format(file.read(4096))
    if looks:
        raise RequestError(f"tokenizer {path}: looks like {looks}; {needed}")
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise RequestError(f"tokenizer {path}: not a sentencepiece model, or cut short; {needed}") from error
    if not model.pieces:
        raise RequestError(f"tokenizer {path}: not a sentencepiece model, it has no pieces; {needed}")
    return tokenizer_from_sentencepiece(model)


def other_format(head: bytes) -> str:
    """What a file that begins with `head` is when it is plainly no sentencepiece model, else an empty string."""
    text = head.lstrip().lower()
    if not text:
        return "an empty file"
    looks_by_start = {
        b"gguf": "a GGUF file, whose own tokenizer serves only when it is the checkpoint",
        b"pk\x03\x04": "a zip archive, such as a torch checkpoint",
        b"version https://git-lfs": "a git-lfs pointer, in place of the file it stands for",
        b"<": "an HTML page, left by a failed download",
        b"{": "JSON, not supported yet",
    }
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return "tiktoken format, not supported yet"
    return next((looks for start, looks in looks_by_start.items() if text.startswith(start)), "")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` keys (arrays as lists)."""
    kinds = {"llama": gguf_sentencepiece, "gpt2": gguf_byte_level}
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise RequestError("the GGUF file holds no tokenizer (no tokenizer.ggml.model); give one with --tokenizer")
    if kind not in kinds:
        raise RequestError(f"tokenizer.ggml.model is {kind!r}, which is not supported; supported: {', '.join(kinds)}")
    return kinds[kind](metadata)
