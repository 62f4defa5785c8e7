"""Text to token ids and back, one interface over every kind of tokenizer.

The kind is chosen by content: a sentencepiece file, or the two kinds that a GGUF file carries, `llama`
(sentencepiece) and `gpt2` (byte-level BPE). The libraries sentencepiece and tokenizers do the work;
what differs between them, special tokens, bytes of a token, streaming, is settled here.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from tokenizers import models, pre_tokenizers

from llama_mp.errors import RequestError, did_you_mean
from llama_mp.vocabulary import (
    BYTE,
    BYTE_OF_LETTER,
    CONTROL,
    END_TEXTS,
    REMEDY,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    gguf_array,
    gguf_vocabulary,
    settle_types,
)

# A Unicode noncharacter: no text that is meant for interchange holds it.
SENTINEL = "\ufdd0"

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")
# `tokenizer.ggml.pre` -> patterns applied one after the other, each within the pieces that the one before left
# (llama.cpp's table; the patterns are those of the families' own tokenizer.json).
WORD_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
} | dict.fromkeys(LLAMA3_NAMES, (LLAMA3_WORDS,))


class Tokenizer(ABC):
    """What every kind offers.

    vocab_size: number of ids the tokenizer knows (a model's embedding may have more rows).
    bos_id, eos_id: None where the model has none; bos_token, eos_token: their texts, or "".
    eos_ids: every id that ends a generation, eos_id among them.
    adds_bos: a prompt begins with bos_id. special: the control tokens' ids by their text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.adds_bos = vocabulary.bos_id, vocabulary.eos_id, vocabulary.adds_bos
        self.bos_token = "" if self.bos_id is None else self._tokens[self.bos_id]
        self.eos_token = "" if self.eos_id is None else self._tokens[self.eos_id]
        self.special = {self._tokens[i]: i for i, kind in enumerate(self._types) if kind == CONTROL}
        ends = {self.eos_id, *vocabulary.other_end_ids, *(self.special.get(text) for text in END_TEXTS)}
        self.eos_ids: frozenset[int] = frozenset(ends - {None})
        longest_first = sorted(map(re.escape, self.special), key=len, reverse=True)
        any_special = "|".join(longest_first) or r"(?!)"
        self._special_pattern = re.compile(f"({any_special})(?!{SENTINEL})")
        self._special_start_pattern = re.compile(f"(?s)(?={any_special})(.)")

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, none of which is a control token."""

    @abstractmethod
    def _text_bytes(self, text: str) -> bytes:
        """The bytes that a normal or user-defined token of this text stands for."""

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of a user's text: a special token's text in it stays text. `bos` puts bos_id before them."""
        assert not bos or self.bos_id is not None
        return ([self.bos_id] if bos else []) + self._encode_plain(check_text(text))

    def protect(self, content: str) -> str:
        """User content made safe for a chat template: encode_template will find no special token in it.

        A sentinel follows the first character of every special token's text, also where two of them
        overlap; sentinels that the content holds already are dropped.
        """
        return self._special_start_pattern.sub(rf"\1{SENTINEL}", content.replace(SENTINEL, ""))

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered chat template, special tokens recognised, with bos_id first, once, if adds_bos.

        Each stretch between special tokens is encoded by itself, as llama.cpp and Meta's own code do: a
        sentencepiece model begins each of them with its dummy space.
        """
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern.split(check_text(text))):
            if index % 2:
                ids.append(self.special[part])
            elif plain := part.replace(SENTINEL, ""):
                ids += self._encode_plain(plain)
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: none for a control token, or for an id beyond vocab_size."""
        assert token_id >= 0
        if token_id >= self.vocab_size:
            return b""
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == CONTROL:
            return b""
        if kind == UNKNOWN:
            return "\ufffd".encode()
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        return self._text_bytes(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` as the continuation of a prompt (a leading space stays); torn UTF-8 is U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class TextStream:
    """Ids one at a time into text as it becomes certain: the pieces joined equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none: never a part of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What the last tokens left unfinished, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, vocabulary: Vocabulary, model: ModelProto) -> None:
        super().__init__(vocabulary)
        for piece, kind in zip(model.pieces, vocabulary.types, strict=True):
            if piece.type != kind:
                piece.type = kind
        try:
            self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        except RuntimeError as error:
            raise RequestError(f"tokenizer: sentencepiece refuses the vocabulary: {error}{REMEDY}") from error

    def _encode_plain(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _text_bytes(self, text: str) -> bytes:
        return text.replace("▁", " ").encode()


class ByteLevelTokenizer(Tokenizer):
    """GPT-2's kind: bytes written as printable characters, words split by patterns, merges within a word.

    A byte that the vocabulary lacks is dropped, as llama.cpp and Hugging Face do.
    """

    def __init__(self, vocabulary: Vocabulary, merges: Sequence[str], patterns: Sequence[str], ignore_merges: bool):
        super().__init__(vocabulary)
        # Control tokens are left out of the library's vocabulary: then no text can become one.
        types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
        text_ids = {t: i for i, t in enumerate(vocabulary.tokens) if types[t] not in (CONTROL, UNKNOWN)}
        pairs = [merge_pair(merge, text_ids) for merge in merges]
        self._library = tokenizers.Tokenizer(models.BPE(vocab=text_ids, merges=pairs, ignore_merges=ignore_merges))
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        user_defined = [text for text, kind in types.items() if kind == USER_DEFINED]
        self._library.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in user_defined])
        self._user_defined = frozenset(user_defined)

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _text_bytes(self, text: str) -> bytes:
        if text in self._user_defined:  # written as it is, not in the byte alphabet
            return text.encode()
        try:
            return bytes(BYTE_OF_LETTER[letter] for letter in text)
        except KeyError:
            return text.encode()


def merge_pair(merge: str, known: Mapping[str, int]) -> tuple[str, str]:
    """The halves of `"left right"`; RequestError unless they and what they make are `known` (the library panics)."""
    left, space, right = merge.partition(" ")
    if not space or not {left, right, left + right} <= known.keys():
        raise RequestError(f"tokenizer: the merge {merge[:80]!r} does not fit the tokens{REMEDY}")
    return left, right


def check_text(text: str) -> str:
    """`text` itself; RequestError when it cannot be written as UTF-8 (a command line with broken bytes gives such)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode at character {error.start}; give it as UTF-8") from error
    return text


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


def tokenizer_from_sentencepiece(model: ModelProto) -> Tokenizer:
    tokens, types = [p.piece for p in model.pieces], [p.type for p in model.pieces]
    by_text = dict(zip(tokens, range(len(tokens)), strict=True))
    bos_id, eos_id = by_text.get(model.trainer_spec.bos_piece), by_text.get(model.trainer_spec.eos_piece)
    vocabulary = Vocabulary(
        tokens=tokens, types=settle_types(tokens, types), bos_id=bos_id, eos_id=eos_id, adds_bos=bos_id is not None
    )
    return SentencePieceTokenizer(vocabulary, model)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` keys (arrays as lists)."""
    kinds = {"llama": gguf_sentencepiece, "gpt2": gguf_byte_level}
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise RequestError("the GGUF file holds no tokenizer (no tokenizer.ggml.model); give one with --tokenizer")
    if kind not in kinds:
        raise RequestError(f"tokenizer.ggml.model is {kind!r}, which is not supported; supported: {', '.join(kinds)}")
    return kinds[kind](metadata)


def gguf_sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """A sentencepiece model composed from the metadata, so that the real library does the work."""
    vocabulary = gguf_vocabulary(metadata, {"bos": 1, "eos": 2}, adds_bos=True)
    scores = gguf_array(metadata, "scores", (float, int), len(vocabulary.tokens))
    model = ModelProto(
        trainer_spec=TrainerSpec(model_type=TrainerSpec.BPE, byte_fallback=BYTE in vocabulary.types),
        normalizer_spec=NormalizerSpec(
            name="identity",
            add_dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
            remove_extra_whitespaces=False,
            escape_whitespaces=True,
        ),
    )
    for text, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    return SentencePieceTokenizer(vocabulary, model)


def gguf_byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")  # llama.cpp's reading of files older than the key
    if name not in WORD_PATTERNS:
        raise RequestError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported{did_you_mean(str(name), WORD_PATTERNS)}; "
            f"supported: {', '.join(WORD_PATTERNS)}"
        )
    is_llama3 = name in LLAMA3_NAMES
    vocabulary = gguf_vocabulary(metadata, {}, adds_bos=is_llama3)
    merges = gguf_array(metadata, "merges", str)
    return ByteLevelTokenizer(vocabulary, merges, WORD_PATTERNS[name], ignore_merges=is_llama3)
