"""The tokens of a model as its files list them: texts, types, and the ids that have a part to play.

Nothing here encodes or decodes: that is tokenizer.py and the kinds of tokenizer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_mp.errors import RequestError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the same in sentencepiece and in GGUF

# Unicode's White_Space, as the tokenizers library has it: Python's own list is longer.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

BYTE_TEXT = re.compile(r"<0x[0-9A-F]{2}>")

# fmt: off
# Control tokens that end a generation, whatever a file gives as eos; a subset of llama.cpp's list (llama-vocab.cpp).
END_TEXTS = frozenset({
    "</s>", "<eos>", "<EOT>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>",
    "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>",
})
# fmt: on

MAX_TOKEN_CHARS = 1024  # Llama 3's longest has 128; who cuts a token at every place takes the square of it
REMEDY = "; convert the model again, or give another --tokenizer"

Element = TypeVar("Element")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens in the order of their ids, the type of each, and the ids that have a part to play."""

    tokens: Sequence[str]
    types: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    other_end_ids: Sequence[int] = ()
    adds_bos: bool
    # Control tokens that in a template swallow the space before or after them.
    swallow_before: frozenset[str] = frozenset()
    swallow_after: frozenset[str] = frozenset()

    def pattern(self, text: str) -> str:
        """A regular expression for the control token `text` in a template."""
        before = f"[{SPACES}]*" if text in self.swallow_before else ""
        return before + re.escape(text) + (f"[{SPACES}]*" if text in self.swallow_after else "")

    def __post_init__(self) -> None:
        for token_id in (self.bos_id, self.eos_id, *self.other_end_ids):
            if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < len(self.tokens)):
                raise RequestError(
                    f"tokenizer: a special token has the id {token_id!r} of {len(self.tokens)} tokens{REMEDY}"
                )
        if self.adds_bos and self.bos_id is None:
            raise RequestError(f"tokenizer: prompts are to begin with a special token, but no bos id is given{REMEDY}")
        if (longest := max(map(len, self.tokens), default=0)) > MAX_TOKEN_CHARS:
            raise RequestError(f"tokenizer: a token of {longest} characters{REMEDY}")
        if unknown := set(self.types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
            raise RequestError(f"tokenizer: unknown token types {sorted(unknown)}{REMEDY}")
        for text, kind in zip(self.tokens, self.types, strict=True):
            if kind == BYTE and not BYTE_TEXT.fullmatch(text):
                raise RequestError(f"tokenizer: the byte token {text[:40]!r} is not written <0xNN>{REMEDY}")


def settle_types(tokens: Iterable[str], types: Iterable[int]) -> list[int]:
    """`types`, where user-defined tokens that are control tokens by their looks are made so.

    Converters often mark `<|im_end|>` and its like user-defined, which would let a prompt contain them.
    """
    return [
        CONTROL if kind == USER_DEFINED and (text in END_TEXTS or re.fullmatch(r"<\|.+\|>", text)) else kind
        for text, kind in zip(tokens, types, strict=True)
    ]


def gguf_vocabulary(metadata: Mapping[str, Any], default_ids: Mapping[str, int], adds_bos: bool) -> Vocabulary:
    """The vocabulary of a GGUF file's metadata; the defaults are for the keys that it may leave out."""
    tokens = gguf_array(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise RequestError(f"tokenizer.ggml.tokens holds {len(tokens) - len(set(tokens))} tokens twice{REMEDY}")
    if re.search("[\ud800-\udfff]", "".join(tokens)):  # how a reader passes on bytes that are not UTF-8
        raise RequestError(f"tokenizer.ggml.tokens is not UTF-8 text{REMEDY}")
    types = settle_types(tokens, gguf_array(metadata, "token_type", int, len(tokens)))
    ids = {
        role: metadata.get(f"tokenizer.ggml.{role}_token_id", default_ids.get(role))
        for role in ("bos", "eos", "eot", "eom")
    }
    return Vocabulary(
        tokens=tokens,
        types=types,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        other_end_ids=[ids[role] for role in ("eot", "eom") if ids[role] is not None],
        adds_bos=gguf_bool(metadata, "add_bos_token", default=adds_bos),
    )


def gguf_array(
    metadata: Mapping[str, Any], name: str, kind: type[Element] | tuple[type[Element], ...], length: int | None = None
) -> list[Element]:
    """The array `tokenizer.ggml.{name}`; RequestError when it is absent, of another type or of another `length`."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise RequestError(f"tokenizer.ggml.{name} is missing, or an array of the wrong type{REMEDY}")
    if length is not None and len(values) != length:
        raise RequestError(f"tokenizer.ggml.{name} has {len(values)} entries, but there are {length} tokens{REMEDY}")
    return values


def gguf_bool(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise RequestError(f"tokenizer.ggml.{name} is {value!r}, but must be true or false{REMEDY}")
    return value


def byte_alphabet() -> dict[str, int]:
    """The letter that GPT-2's vocabulary uses for each byte, reversed: printable Latin-1 is itself, the rest 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = byte_alphabet()
