"""The word patterns of GGUF's gpt2 kind, with merging written out: what `tokenizer.ggml.pre` stands for."""

from itertools import pairwise

import pytest
import regex
from strings import strings

from llama_mp.tokenizer_files import tokenizer_from_gguf
from llama_mp.vocabulary import BYTE_OF_LETTER, CONTROL


def split_words(text: str, patterns: list[str]) -> list[str]:
    """`text` cut by each pattern in turn into its matches and what lies between them."""
    words = [text]
    for pattern in patterns:
        words = [w for word in words for w in regex.split(f"({pattern})", word, flags=regex.V0) if w]
    return words


def merge_bytes(word: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int], whole_first: bool) -> list[int]:
    """Byte-pair encoding as its paper has it: the lowest-ranked pair is merged, again and again."""
    letter_of_byte = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    parts = [letter_of_byte[byte] for byte in word.encode()]
    if whole_first and "".join(parts) in vocab:
        return [vocab["".join(parts)]]
    while pairs := {pair: ranks[pair] for pair in pairwise(parts) if pair in ranks}:
        best, merged, at = min(pairs, key=pairs.get), [], 0
        while at < len(parts):
            joined = tuple(parts[at : at + 2]) == best
            merged.append("".join(parts[at : at + 1 + joined]))
            at += 1 + joined
        parts = merged
    return [vocab[part] for part in parts if part in vocab]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "patterns"),
    [
        ("smollm", [r"\p{N}", GPT2]),
        ("gpt-2", [GPT2]),
        ("llama-bpe", [LLAMA3]),
        ("llama3", [LLAMA3]),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    ],
)
def test_word_patterns_against_plain_byte_pair_encoding(smollm2_metadata: dict, pre: str, patterns: list[str]) -> None:
    """llama.cpp's patterns (its form of them), in the regex package, with merging written out."""
    is_llama3 = patterns == [LLAMA3]
    tokenizer = tokenizer_from_gguf(
        smollm2_metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    )
    tokens, types = smollm2_metadata["tokenizer.ggml.tokens"], smollm2_metadata["tokenizer.ggml.token_type"]
    vocab = {text: i for i, text in enumerate(tokens) if types[i] != CONTROL}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(smollm2_metadata["tokenizer.ggml.merges"])}
    for text in strings(250):
        words = split_words(text, patterns)
        assert "".join(words) == text
        expected = [i for word in words for i in merge_bytes(word, vocab, ranks, whole_first=is_llama3)]
        assert tokenizer.encode(text, bos=False) == expected, text
