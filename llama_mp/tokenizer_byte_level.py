"""GPT-2's and Llama 3's kind of tokenizer: byte-pair encoding of the bytes of words."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from llama_mp.errors import RequestError, did_you_mean
from llama_mp.tokenizer import Tokenizer
from llama_mp.vocabulary import (
    BYTE_OF_LETTER,
    CONTROL,
    REMEDY,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    gguf_array,
    gguf_vocabulary,
)

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


class ByteLevelTokenizer(Tokenizer):
    """GPT-2's kind: bytes written as printable characters, words split by patterns, merges within a word.

    `merges`: pairs of tokens, the first to be merged first. `ignore_merges`: a word that is a token is taken as it is.
    A byte that the vocabulary lacks is dropped, as llama.cpp and Hugging Face do.
    """

    def __init__(
        self, vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], patterns: Sequence[str], ignore_merges: bool
    ) -> None:
        super().__init__(vocabulary)
        # Control tokens are left out of the library's vocabulary: then no text can become one.
        types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
        text_ids = {t: i for i, t in enumerate(vocabulary.tokens) if types[t] not in (CONTROL, UNKNOWN)}
        check_merges(merges, text_ids.keys())
        self._library = tokenizers.Tokenizer(models.BPE(vocab=text_ids, merges=merges, ignore_merges=ignore_merges))
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        user_defined = [text for text, kind in types.items() if kind == USER_DEFINED]
        self._library.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in user_defined])
        self._user_defined = frozenset(user_defined)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _text_bytes(self, text: str) -> bytes:
        if text in self._user_defined:  # written as it is, not in the byte alphabet
            return text.encode()
        return letters_to_bytes(text)

    def pipeline(self) -> dict[str, Any]:
        """The object of a tokenizer.json, as far as it has to do with texts: without the control tokens."""
        return json.loads(self._library.to_str())


def letters_to_bytes(text: str) -> bytes:
    """The bytes that `text` writes in the byte alphabet; one that is not written in it stands for itself."""
    try:
        return bytes(BYTE_OF_LETTER[letter] for letter in text)
    except KeyError:
        return text.encode()


def check_merges(merges: Sequence[tuple[str, str]], known: Collection[str]) -> None:
    """Raise RequestError unless the halves of each merge and what they make are `known` (the library panics)."""
    for left, right in merges:
        if left not in known or right not in known or left + right not in known:
            raise RequestError(f"tokenizer: the merge {f'{left} {right}'[:80]!r} does not fit the tokens{REMEDY}")


def gguf_byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")  # llama.cpp's reading of files older than the key
    if name not in WORD_PATTERNS:
        raise RequestError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported{did_you_mean(str(name), WORD_PATTERNS)}; "
            f"supported: {', '.join(WORD_PATTERNS)}"
        )
    is_llama3 = name in LLAMA3_NAMES
    vocabulary = gguf_vocabulary(metadata, {}, adds_bos=is_llama3)
    merges = [
        (left, right) for left, _, right in (merge.partition(" ") for merge in gguf_array(metadata, "merges", str))
    ]
    return ByteLevelTokenizer(vocabulary, merges, WORD_PATTERNS[name], ignore_merges=is_llama3)
