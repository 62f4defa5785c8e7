"""What every kind of tokenizer does alike, each beside the library that is its oracle (kinds.py)."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Kind
from strings import strings

from llama_mp.errors import RequestError
from llama_mp.tokenizer import SENTINEL, TextStream, Tokenizer

NAMES = [
    "sentencepiece",
    "gguf llama",
    "gguf gpt2",
    "tiktoken",
    "json bytes",
    "json legacy",
    "json metaspace",
]


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest, kinds: dict[str, Kind]) -> Kind:
    assert list(kinds) == NAMES
    return kinds[request.param]


@pytest.fixture
def llama(kinds: dict[str, Kind]) -> Tokenizer:
    return kinds["sentencepiece"].tokenizer


@pytest.fixture
def smollm2(kinds: dict[str, Kind]) -> Tokenizer:
    return kinds["gguf gpt2"].tokenizer


def test_ids_are_the_oracle_s(kind: Kind) -> None:
    special, differing = set(kind.tokenizer.special.values()), 0
    for text in strings(2000):
        ids, expected = kind.tokenizer.encode(text, bos=False), kind.encode(text)
        if special & set(expected):  # merged from a text: the library lets that pass, we do not
            assert not special & set(ids)
            differing += 1
        else:
            assert ids == expected, text
    assert differing < 20


def test_texts_are_the_oracle_s(kind: Kind) -> None:
    num_equal = 0
    for text in strings(2000):
        ids = kind.encode(text)
        if kind.decode(ids) == text and not set(kind.tokenizer.special.values()) & set(ids):
            num_equal += 1
            assert kind.tokenizer.decode(ids) == (kind.prefix + text if text else "")
    assert num_equal > 1700


def test_user_text_never_becomes_a_special_token(kind: Kind) -> None:
    tokenizer, rng = kind.tokenizer, random.Random(1)
    special_ids = set(tokenizer.special.values())
    pieces = [*tokenizer.special, *"<|>[]/s x", SENTINEL, "<|im_", "end|>", "</", " ", "\n"]
    for _ in range(400):
        content = "".join(rng.choices(pieces, k=rng.randrange(1, 8)))
        assert not special_ids & set(tokenizer.encode(content, bos=False))
        protected = tokenizer.encode_template(tokenizer.protect(content))
        assert not special_ids & set(protected[tokenizer.adds_bos :])
        visible = content.replace(SENTINEL, "")
        assert protected == tokenizer.encode(visible, bos=tokenizer.adds_bos)  # the sentinels leave no trace


def test_every_special_token_comes_from_a_template(kind: Kind) -> None:
    tokenizer = kind.tokenizer
    assert len(tokenizer.special) >= 4
    for text, token_id in tokenizer.special.items():
        ids = tokenizer.encode_template(f"a{text}b")
        assert ids[tokenizer.adds_bos :].count(token_id) == 1
        assert tokenizer.token_bytes(token_id) == b""


def test_template_has_bos_once(llama: Tokenizer, smollm2: Tokenizer) -> None:
    hello = llama.encode("[X] hello", bos=False)
    assert llama.encode_template("[X] hello") == [1, *hello]
    assert llama.encode_template("<s>[X] hello</s><s>[X] hello") == [1, *hello, 2, 1, *hello]
    assert smollm2.encode_template("<|im_start|>x")[0] == 1
    assert smollm2.encode_template("x")[0] != 1


def test_bytes_of_tokens(smollm2: Tokenizer, llama: Tokenizer) -> None:
    assert smollm2.token_bytes(2) == b"" == llama.token_bytes(1)
    assert llama.token_bytes(0) == "\ufffd".encode()
    newline = llama.encode("\n", bos=False)[-1]
    assert llama.token_bytes(newline) == b"\n"
    assert smollm2.token_bytes(smollm2.vocab_size + 7) == b""
    [paris] = smollm2.encode(" Paris", bos=False)
    assert smollm2.decode([paris]) == " Paris"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stream_pieces_joined_equal_decode(kinds: dict[str, Kind], data: st.DataObject) -> None:
    for kind in kinds.values():
        tokenizer = kind.tokenizer
        # The first few hundred ids are the special tokens and most of the single bytes, halves of characters.
        ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, tokenizer.vocab_size - 1), max_size=20))
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_stream_never_shows_half_a_character(smollm2: Tokenizer) -> None:
    text = "a 👩‍👩‍👧‍👦 敏捷 é  b"
    stream = TextStream(smollm2)
    pieces = [stream.push(token_id) for token_id in smollm2.encode(text, bos=False)]
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces) and "".join(pieces) == text
    assert stream.flush() == ""
    torn = TextStream(smollm2)
    assert torn.push(smollm2.encode("👍", bos=False)[0]) + torn.flush() == "\ufffd"


def test_text_that_is_not_unicode_is_refused(kind: Kind) -> None:
    for encode in (lambda text: kind.tokenizer.encode(text, bos=False), kind.tokenizer.encode_template):
        with pytest.raises(RequestError, match="not valid Unicode at character 2"):
            encode("ab\udcff")
