"""Hugging Face's tokenizer.json, done by the library that wrote it: byte-pair encoding of bytes, or of pieces.

How characters are normalized, a text is split and what is merged: all that is in the file, and the library does it.
Only the control tokens are taken from it, because they are recognised in templates alone (tokenizer.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import tokenizers

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_byte_level import letters_to_bytes
from llama_mp.tokenizer_sentencepiece import piece_to_bytes
from llama_mp.tokenizer_settings import Settings
from llama_mp.vocabulary import (
    BYTE,
    BYTE_TEXT,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    settle_types,
)

Json = dict[str, Any]

MAX_IDS = 2**22  # far beyond any model: a damaged id must not make us list billions of tokens


class JsonTokenizer(Tokenizer):
    def __init__(self, vocabulary: Vocabulary, pipeline: Json, to_bytes: Callable[[str], bytes]) -> None:
        super().__init__(vocabulary)
        self._to_bytes = to_bytes
        kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
        self._literal = frozenset(text for text, kind in kinds.items() if kind == USER_DEFINED)
        hidden = {text for text, kind in kinds.items() if kind in (CONTROL, UNKNOWN)}
        plain = without_control(pipeline, hidden, keep=hidden - self.special.keys())
        later = without_prefix(plain)
        self._library = make_library(plain)
        self._library_for_later = self._library if later == plain else make_library(later)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        library = self._library if at_start else self._library_for_later
        return library.encode(text, add_special_tokens=False).ids

    def _text_bytes(self, text: str) -> bytes:
        return text.encode() if text in self._literal else self._to_bytes(text)


def tokenizer_from_json(content: bytes, settings: Settings) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises RequestError for damaged content, and for a kind of tokenizer that no
    model of LLaMA's architecture comes with."""
    try:
        pipeline = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON, or cut short: {error}; download it again") from error
    model = pipeline.get("model")
    if not isinstance(model, dict):
        raise RequestError("JSON, but no tokenizer.json: it has no `model`; give the tokenizer.json of the model")
    try:
        kind = model.get("type", "BPE")  # files of the first versions leave it out
        if kind != "BPE":
            raise RequestError(f"its model is of type {kind}, but only BPE is supported")
        vocabulary = read_vocabulary(pipeline, settings)
        return JsonTokenizer(vocabulary, pipeline, bytes_of_kind(pipeline))
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"not a whole tokenizer.json: {type(error).__name__} {error}; download it again") from error


def read_vocabulary(pipeline: Json, settings: Settings) -> Vocabulary:
    model, added = pipeline["model"], pipeline.get("added_tokens") or []
    ids: dict[str, int] = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    count = max(ids.values(), default=-1) + 1
    if not 0 < count <= MAX_IDS or min(ids.values()) < 0:
        raise RequestError(f"its ids go from {min(ids.values(), default=0)} to {count - 1}; download it again")
    first = leading_token(pipeline.get("post_processor"))
    bos_id, eos_id = settings.token_ids(ids, bos=first, eos=None)
    tokens, types = [""] * count, [UNUSED] * count
    for text, token_id in ids.items():
        is_byte = model.get("byte_fallback") and BYTE_TEXT.fullmatch(text)
        tokens[token_id], types[token_id] = text, BYTE if is_byte else NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    for token_id in {bos_id, eos_id} - {None}:
        types[token_id] = CONTROL
    return Vocabulary(
        tokens=tokens,
        types=settle_types(tokens, types),
        bos_id=bos_id,
        eos_id=eos_id,
        other_end_ids=settings.end_ids,
        adds_bos=bos_id is not None and (first is not None if settings.adds_bos is None else settings.adds_bos),
        swallow_before=frozenset(token["content"] for token in added if token.get("lstrip")),
        swallow_after=frozenset(token["content"] for token in added if token.get("rstrip")),
    )


def leading_token(post_processor: Json | None) -> str | None:
    """The special token that the file's own post-processing puts before every text."""
    for part in parts(post_processor):
        if part.get("type") == "TemplateProcessing":
            return part["single"][0].get("SpecialToken", {}).get("id")
    return None


def parts(node: Any) -> Iterator[Json]:
    """Every object in a normalizer, pre-tokenizer, post-processor or decoder, which may be sequences of others."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from parts(value)


def bytes_of_kind(pipeline: Json) -> Callable[[str], bytes]:
    """What the texts of tokens are written in: the byte alphabet, or plain text with `▁` for a space."""
    steps = [pipeline.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    if any(part.get("type") == "ByteLevel" for part in parts(steps)):
        return letters_to_bytes
    if "▁" in json.dumps(steps, ensure_ascii=False):
        return piece_to_bytes
    raise RequestError(
        "its tokens are written neither in bytes (ByteLevel) nor with ▁ for a space (Metaspace, Replace)"
    )


def without_control(pipeline: Json, hidden: Set[str], keep: Set[str]) -> Json:
    """`pipeline` in which no text becomes one of the `hidden` tokens. Those to `keep` stay in the vocabulary: the one
    for what is unknown. Whatever does more than give the ids of a text, or gives them by chance, is taken out too."""
    model = pipeline["model"]
    added = [token for token in pipeline.get("added_tokens") or [] if token["content"] not in hidden]
    ids = {text: i for text, i in model["vocab"].items() if text not in hidden or text in keep}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model = model | {
        "type": "BPE",
        "vocab": ids | {token["content"]: token["id"] for token in added},
        "merges": [merge for merge in merges if not {*merge, "".join(merge)} & hidden],
        "unk_token": model.get("unk_token") if model.get("unk_token") in keep else None,
        "dropout": None,
    }
    rest = {"added_tokens": added, "model": model, "post_processor": None, "truncation": None, "padding": None}
    return pipeline | rest


def without_prefix(pipeline: Json) -> Json:
    """`pipeline` for a stretch after a special token, where a space that goes before the `first` one is not put."""

    def changed(node: Any) -> Any:
        if isinstance(node, Mapping):
            never = {"prepend_scheme": "never"} if node.get("prepend_scheme") == "first" else {}
            return {name: changed(value) for name, value in node.items()} | never
        return [changed(value) for value in node] if isinstance(node, list) else node

    return pipeline | {"pre_tokenizer": changed(pipeline.get("pre_tokenizer"))}


def make_library(pipeline: Json) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    except Exception as error:  # the library raises no other class, whatever the fault
        raise RequestError(f"the tokenizers library refuses it: {error}; download it again") from error
