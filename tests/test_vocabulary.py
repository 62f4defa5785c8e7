"""GGUF metadata, small enough to see whole, as vocabularies: what each key does, and what is refused."""

import pytest

from llama_mp.errors import RequestError
from llama_mp.tokenizer import SENTINEL
from llama_mp.tokenizer_files import tokenizer_from_gguf
from llama_mp.vocabulary import BYTE_OF_LETTER, CONTROL, NORMAL, USER_DEFINED


def tiny_gpt2(**changes: object) -> dict:
    """Byte-level metadata: the 256 bytes, two merges, three special tokens; `changes` by the end of the key."""
    tokens = [*BYTE_OF_LETTER, "ab", "abc", "<|begin_of_text|>", "<|eot_id|>", "<|im_end|>", "Ġxyz", "a  b"]
    types = [NORMAL] * 258 + [CONTROL, CONTROL, USER_DEFINED, NORMAL, USER_DEFINED]
    short = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": ["a b", "ab c"],
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in short.items() if value is not None}


def test_a_whole_word_in_the_vocabulary_goes_before_merges_in_llama3_only() -> None:
    assert tokenizer_from_gguf(tiny_gpt2(pre="llama-bpe", bos_token_id=258)).encode(" xyz", bos=False) == [261]
    assert len(tokenizer_from_gguf(tiny_gpt2()).encode(" xyz", bos=False)) == 4


def test_bos_and_end_tokens_of_the_gpt2_kind() -> None:
    llama3 = tokenizer_from_gguf(tiny_gpt2(pre="llama-bpe", bos_token_id=258, eos_token_id=257))
    assert llama3.adds_bos and llama3.encode("ab", bos=True) == [258, 256]
    assert llama3.eos_ids == {257, 259, 260}  # eos by its id; <|eot_id|> and the user-defined <|im_end|> by name
    assert not tokenizer_from_gguf(tiny_gpt2(pre="llama-bpe", bos_token_id=258, add_bos_token=False)).adds_bos
    plain = tokenizer_from_gguf(tiny_gpt2(eot_token_id=5))
    assert (plain.bos_id, plain.bos_token, plain.adds_bos, plain.eos_ids) == (None, "", False, {5, 259, 260})


def test_user_defined_tokens_of_the_gpt2_kind_stay_whole_and_literal() -> None:
    tokenizer = tokenizer_from_gguf(tiny_gpt2())
    assert tokenizer.encode("xa  bx", bos=False)[1] == 262
    assert tokenizer.decode(tokenizer.encode("xa  bx", bos=False)) == "xa  bx"


def test_overlapping_special_texts_are_all_broken() -> None:
    tokens = [*BYTE_OF_LETTER, "<a>", "x<a>", "a>a", "€"]
    types = [NORMAL] * 256 + [CONTROL] * 4
    tokenizer = tokenizer_from_gguf(tiny_gpt2(tokens=tokens, token_type=types, merges=[]))
    for content in ("x<a>", "<a>a>a>a", "€€<a>€", "x<a>x<a>"):
        assert not {256, 257, 258, 259} & set(tokenizer.encode_template(tokenizer.protect(content)))
    assert tokenizer.encode_template("x<a>€" + tokenizer.protect(SENTINEL + "b"))[:2] == [257, 259]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"model": "bert"}, "'bert', which is not supported; supported: llama, gpt2"),
        ({"pre": "smolm"}, r"'smolm', which is not supported \(did you mean smollm\?\); supported: default, gpt-2"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a b c"]}, "the merge 'a b c' does not fit the tokens"),
        ({"merges": ["a b", "q q"]}, "the merge 'q q' does not fit"),
        ({"token_type": [1]}, "token_type has 1 entries, but there are 263 tokens"),
        ({"tokens": ["a", "a"]}, "holds 1 tokens twice"),
        ({"tokens": ["a", 5]}, "tokens is missing, or an array of the wrong type"),
        ({"tokens": ["a", "\udc80"]}, "not UTF-8"),
        ({"eos_token_id": 999}, "the id 999 of 263 tokens"),
        ({"bos_token_id": "x"}, "the id 'x' of 263 tokens"),
        ({"add_bos_token": True}, "no bos id"),
        ({"model": "llama"}, "scores is missing"),
        ({"model": "llama", "scores": [0.0] * 263, "bos_token_id": 258}, "sentencepiece refuses"),
        ({"tokens": ["a", "b"], "token_type": [6, 1]}, "'a' is not written <0xNN>"),
        ({"tokens": ["a", "b"], "token_type": [9, 1]}, r"unknown token types \[9\]"),
    ],
)
def test_faulty_metadata_is_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tokenizer_from_gguf(tiny_gpt2(**changes))
    assert "\n" not in str(caught.value)
