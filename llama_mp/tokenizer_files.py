"""The tokenizer and the chat template of a checkpoint, from files whose kind is found by content."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mp.chat_format import built_in_template
from llama_mp.errors import RequestError
from llama_mp.files import read_small
from llama_mp.gguf_header import read_header
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_byte_level import gguf_byte_level
from llama_mp.tokenizer_json import tokenizer_from_json
from llama_mp.tokenizer_sentencepiece import gguf_sentencepiece, tokenizer_from_sentencepiece
from llama_mp.tokenizer_settings import Settings, read_settings
from llama_mp.tokenizer_tiktoken import tokenizer_from_tiktoken

Kind = Literal["gguf", "tiktoken", "json", "sentencepiece"]

MAX_TOKENIZER_BYTES = 1 << 26  # Llama 3's tokenizer.json has 17 MB
NEEDED = "a tokenizer.model, a tokenizer.json or a .gguf file is needed"


def read_tokenizer(
    path: Path, checkpoint: Path | None = None, chat_format: str = "auto"
) -> tuple[Tokenizer, str | None]:
    """The tokenizer in the file `path`, and the chat template; None for a model that comes without one.

    A GGUF file holds both. Else the template is looked for beside the tokenizer, then beside the `checkpoint`; Meta's
    Llama 3 has its own. A `chat_format` other than auto goes before all of them. Raises RequestError."""
    kind = kind_of(path)
    if kind == "gguf":
        metadata = read_header(path).metadata
        tokenizer, template = tokenizer_from_gguf(metadata), gguf_template(metadata)
    else:
        settings = read_settings(folders_of_settings(path, checkpoint))
        tokenizer, template = load_tokenizer(path, settings), settings.template
        if template is None and kind == "tiktoken":
            template = built_in_template("llama3", tokenizer)
    return tokenizer, template if chat_format == "auto" else built_in_template(chat_format, tokenizer)


def folders_of_settings(path: Path, checkpoint: Path | None) -> list[Path]:
    """Where the small files that go with the tokenizer `path` are looked for, the first place first."""
    return [path.parent] + ([checkpoint] if checkpoint and checkpoint.is_dir() else [])


def load_tokenizer(path: Path, settings: Settings | None = None) -> Tokenizer:
    """The tokenizer in a file; `settings` are what the files beside it say, read here unless given."""
    kind = kind_of(path)
    if kind == "gguf":
        return tokenizer_from_gguf(read_header(path).metadata)
    settings = settings or read_settings([path.parent])
    read = {"tiktoken": tokenizer_from_tiktoken, "json": tokenizer_from_json, "sentencepiece": parse_sentencepiece}
    try:
        return read[kind](read_small(path, MAX_TOKENIZER_BYTES), settings)
    except RequestError as error:
        raise RequestError(f"tokenizer {path}: {str(error).removeprefix('tokenizer: ')}") from error


def kind_of(path: Path) -> Kind:
    """What the content looks like. Raises RequestError for what is plainly no tokenizer."""
    if not path.is_file():
        raise RequestError(f"tokenizer {path}: {'a folder' if path.is_dir() else 'no such file'}; {NEEDED}")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise RequestError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    text = head.lstrip().lower()
    looks_by_start = {
        b"pk\x03\x04": "a zip archive, such as a torch checkpoint",
        b"version https://git-lfs": "a git-lfs pointer, in place of the file it stands for",
        b"<": "an HTML page, left by a failed download",
    }
    looks = [looks for start, looks in looks_by_start.items() if text.startswith(start)]
    if not text or looks:
        raise RequestError(f"tokenizer {path}: looks like {looks[0] if text else 'an empty file'}; {NEEDED}")
    if head.startswith(b"GGUF"):
        return "gguf"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return "tiktoken"
    return "json" if text.startswith(b"{") else "sentencepiece"


def parse_sentencepiece(content: bytes, settings: Settings) -> Tokenizer:
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise RequestError(f"not a sentencepiece model, or cut short; {NEEDED}") from error
    if not model.pieces:
        raise RequestError(f"not a sentencepiece model, it has no pieces; {NEEDED}")
    # The parser gives bytes for what is not UTF-8, and the library has something to say of null characters.
    if not all(isinstance(piece.piece, str) and "\0" not in piece.piece for piece in model.pieces):
        raise RequestError("a sentencepiece model with pieces that are no texts; download it again")
    return tokenizer_from_sentencepiece(model, settings)


def gguf_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None) or re.search("[\ud800-\udfff]", template or ""):
        raise RequestError("tokenizer.chat_template of the GGUF file is not UTF-8 text; download it again")
    return template


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` keys (arrays as lists)."""
    kinds = {"llama": gguf_sentencepiece, "gpt2": gguf_byte_level}
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise RequestError("the GGUF file holds no tokenizer (no tokenizer.ggml.model); give one with --tokenizer")
    if kind not in kinds:
        raise RequestError(f"tokenizer.ggml.model is {kind!r}, which is not supported; supported: {', '.join(kinds)}")
    return kinds[kind](metadata)
