"""Llama 3's tokenizer.model: its special tokens, beside Meta's order, and damaged files."""

import base64
from pathlib import Path

import pytest
from kinds import LLAMA3_SPECIAL, Kind

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_files import load_tokenizer

BYTES = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.fixture
def tokenizer(kinds: dict[str, Kind]) -> Tokenizer:
    return kinds["tiktoken"].tokenizer


def load(folder: Path, content: bytes) -> Tokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(content)
    return load_tokenizer(path)


def test_special_tokens_follow_the_ranks_in_meta_s_order(tokenizer: Tokenizer) -> None:
    num_ranks = tokenizer.vocab_size - 256
    assert len(tokenizer.special) == 256
    assert set(tokenizer.special.values()) == set(range(num_ranks, num_ranks + 256))
    for offset, text in LLAMA3_SPECIAL.items():
        assert tokenizer.special[text] == num_ranks + offset
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.adds_bos) == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        True,
    )
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # Meta's stop tokens
    assert tokenizer.eos_ids == {tokenizer.special[text] for text in ends}


def test_a_word_that_is_a_token_is_taken_whole(tmp_path: Path) -> None:
    """No merge leads to it: tiktoken looks for the word first."""
    tokenizer = load(tmp_path, BYTES + base64.b64encode(b"xyz") + b" 256\n")
    assert tokenizer.encode("xyz", bos=False) == [256]
    assert tokenizer.encode("xyzz", bos=False) == [*b"xyzz"]


def test_the_order_of_the_lines_is_no_matter(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, b"".join(reversed(BYTES.splitlines(keepends=True))))
    assert tokenizer.encode("é\n", bos=True) == [256, *"é\n".encode()]


def test_a_very_long_word_is_encoded(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a" * 300_000, bos=False)
    assert tokenizer.decode(ids) == "a" * 300_000


def test_files_beside_name_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(tmp_path, BYTES).eos_ids == {7, 257, 264, 265}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BYTES + b"YWI= 257\n", "257 lines hold 257 tokens and 257 ranks"),
        (BYTES + b"YWI= 255\n", "257 lines hold 256 tokens and 256 ranks"),
        (BYTES + b"YQ== 256\n", "257 lines hold 256 tokens and 257 ranks"),
        (BYTES + b"YWI= 2", "257 lines hold 256 tokens and 256 ranks"),
        (BYTES + b"YWI=", "line 257 is not a token in base64 and its rank"),
        (BYTES + b"YW*= 256\n", "line 257 is not a token"),
        (BYTES + b"<html>\n", "line 257 is not a token"),
        (b"YQ== 0\nYg== 1\n", "254 of the 256 single bytes are missing"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(f"tokenizer {tmp_path / 'tokenizer.model'}: ")
