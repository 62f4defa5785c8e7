"""LLaMA's tokenizer.model and GGUF's llama kind: what the library's ids (test_tokenizer.py) do not show."""

import random
import time
from pathlib import Path

import pytest
from kinds import Kind, gguf_of_sentencepiece
from strings import strings

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_files import load_tokenizer, tokenizer_from_gguf
from llama_mp.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN


@pytest.fixture
def tokenizer(kinds: dict[str, Kind]) -> Tokenizer:
    return kinds["sentencepiece"].tokenizer


def test_what_a_file_tells(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.adds_bos, tokenizer.bos_id) == (1200, True, 1)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", {2})
    assert tokenizer.encode("x", bos=True) == [1, *tokenizer.encode("x", bos=False)]
    assert tokenizer.special == {"<s>": 1, "</s>": 2, "[CTRL]": 3, "<|odd|>": 5}


def test_gguf_without_space_prefix(sentencepiece_file: Path) -> None:
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = tokenizer_from_gguf(gguf_of_sentencepiece(sentencepiece_file) | changes)
    assert not tokenizer.adds_bos
    for text in strings(200):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text.replace("▁", " ")


def test_user_defined_tokens_stay_whole(tokenizer: Tokenizer) -> None:
    assert 4 in tokenizer.encode("a<tool>b", bos=False)
    assert 5 not in tokenizer.encode("a<|odd|>b", bos=False)  # looks like a control token, and is one
    assert 5 in tokenizer.encode_template("a<|odd|>b")


def test_files_beside_name_the_roles(sentencepiece_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(sentencepiece_file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "<tool>", "add_bos_token": false}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    tokenizer = load_tokenizer(model)
    assert (tokenizer.eos_token, tokenizer.eos_ids) == ("<tool>", {2, 4})
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, False)
    assert 4 not in tokenizer.encode("<tool>", bos=False), "the end of a text comes from no text"
    config.write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(RequestError, match=r"no token '<\|im_end\|>', which .* eos_token; give the model's own"):
        load_tokenizer(model)


def test_large_vocabularies_load_in_under_a_second(smollm2_metadata: dict) -> None:
    rng = random.Random(2)
    words = sorted({"▁" * (i % 2) + "".join(rng.choices("abcdefghijklmnop", k=6)) for i in range(31000)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
    }
    for case in (smollm2_metadata, metadata):
        start = time.perf_counter()
        tokenizer_from_gguf(case)
        assert time.perf_counter() - start < 1
