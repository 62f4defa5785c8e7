"""Text to token ids and back: what every kind of tokenizer offers.

Special tokens, bytes of a token and streaming are settled here, once; the kinds (tokenizer_*.py) encode plain text with
the library that knows how. tokenizer_files.py chooses among them.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from llama_mp.errors import RequestError
from llama_mp.vocabulary import BYTE, CONTROL, END_TEXTS, SPACES, UNKNOWN, Vocabulary

# A Unicode noncharacter: no text that is meant for interchange holds it.
SENTINEL = "\ufdd0"


class Tokenizer(ABC):
    """What every kind offers.

    tokens, types: by id, as vocabulary.py has them.
    vocab_size: number of ids the tokenizer knows (a model's embedding may have more rows).
    bos_id, eos_id: None where the model has none; bos_token, eos_token: their texts, or "".
    eos_ids: every id that ends a generation, eos_id among them.
    adds_bos: a prompt begins with bos_id. special: the control tokens' ids by their text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.types = vocabulary.tokens, vocabulary.types
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.adds_bos = vocabulary.bos_id, vocabulary.eos_id, vocabulary.adds_bos
        self.bos_token = "" if self.bos_id is None else self.tokens[self.bos_id]
        self.eos_token = "" if self.eos_id is None else self.tokens[self.eos_id]
        self.special = {self.tokens[i]: i for i, kind in enumerate(self.types) if kind == CONTROL}
        ends = {self.eos_id, *vocabulary.other_end_ids, *(self.special.get(text) for text in END_TEXTS)}
        self.eos_ids: frozenset[int] = frozenset(ends - {None})
        longest_first = sorted(self.special, key=len, reverse=True)
        any_special = "|".join(map(re.escape, longest_first)) or r"(?!)"
        with_space = "|".join(map(vocabulary.pattern, longest_first)) or r"(?!)"
        self._special_pattern = re.compile(f"({with_space})(?!{SENTINEL})")
        self._special_start_pattern = re.compile(f"(?s)(?={any_special})(.)")

    @abstractmethod
    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        """Ids of `text`, none of which is a control token. `at_start`: nothing but bos_id is before it."""

    @abstractmethod
    def _text_bytes(self, text: str) -> bytes:
        """The bytes that a normal or user-defined token of this text stands for."""

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of a user's text: a special token's text in it stays text. `bos` puts bos_id before them."""
        assert not bos or self.bos_id is not None
        return ([self.bos_id] if bos else []) + self._encode_plain(check_text(text), at_start=True)

    def protect(self, content: str) -> str:
        """User content made safe for a chat template: encode_template will find no special token in it.

        A sentinel follows the first character of every special token's text, also where two of them
        overlap; sentinels that the content holds already are dropped.
        """
        return self._special_start_pattern.sub(rf"\1{SENTINEL}", content.replace(SENTINEL, ""))

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered chat template, special tokens recognised, with bos_id first, once, if adds_bos.

        Each stretch between special tokens is encoded by itself, as llama.cpp, Hugging Face and Meta's own code do: a
        sentencepiece model begins each of them with its dummy space.
        """
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern.split(check_text(text))):
            if index % 2:
                ids.append(self.special[part if part in self.special else part.strip(SPACES)])
            elif plain := part.replace(SENTINEL, ""):
                ids += self._encode_plain(plain, at_start=index == 0)
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: none for a control token, or for an id beyond vocab_size."""
        assert token_id >= 0
        if token_id >= self.vocab_size:
            return b""
        text, kind = self.tokens[token_id], self.types[token_id]
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


def check_text(text: str) -> str:
    """`text` itself; RequestError when it cannot be written as UTF-8 (a command line with broken bytes gives such)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode at character {error.start}; give it as UTF-8") from error
    return text
