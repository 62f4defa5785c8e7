"""From a prompt to ids and from ids to the text that is shown: stop texts, records, prompts that cannot be served."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mp.answer import Answer, Codec, needed_length
from llama_mp.config import ModelConfig, RunConfig, SamplingConfig
from llama_mp.errors import RequestError
from llama_mp.locate import locate
from llama_mp.prompts import Prompt
from llama_mp.request import Request

KEYS = ["id", "prompt", "completion", "tokens", "logprobs", "prompt_logprobs", "finish_reason"]
COUNTS = ["prompt_tokens", "completion_tokens"]


class Pieces:
    """A tokenizer whose id i stands for the i-th of the given bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id]


def answer(*pieces: str | bytes, **sampling) -> Answer:
    """An answer that is going to consist of `pieces`, a token each."""
    config = SamplingConfig(max_gen_len=len(pieces), **sampling)
    encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    request = Request(id="a", prompt=[7, 8], sampling=config)
    return Answer(Prompt(id="a", text="Say it: ", sampling=config), request, Pieces(encoded))


def generate(answer: Answer, end: str = "length") -> list[str]:
    """Let the request gain its tokens one by one, as the engine does, and end for `end`; the texts shown."""
    shown = []
    for token in range(answer.request.sampling.max_gen_len):
        answer.request.tokens.append(token)
        if len(answer.request.tokens) == answer.request.sampling.max_gen_len:
            answer.request.finish_reason = end
        shown.append(answer.advance())
        if answer.is_finished:
            break
    return shown


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["Hel", "lo. U", "se", "r: more", " and more"], ["User:"], "Hello. "),  # over several tokens
        (["User:", " hello"], ["User:"], ""),  # at the start
        (["User", ":"], ["User:"], ""),  # at the start and over two tokens
        (["one STOP two STOP"], ["STOP"], "one "),  # twice in one token
        (["x a", "b", "c"], ["abc", "ab"], "x "),  # one the beginning of the other: the shorter one is met first
        (["a", "ab", "c"], ["aabc", "bd"], ""),  # a beginning in a beginning
        (["aa", "ab"], ["aab"], "a"),  # what was held back is the beginning of nothing, less its first letter
        (["caf\u00e9", "\u2028", "|"], ["\u2028|"], "caf\u00e9"),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_left_out(pieces, stops, text):
    made = answer(*pieces, stop=tuple(stops))
    shown = generate(made)
    assert "".join(shown) == made.text == text
    assert made.request.finish_reason == "stop"


def test_nothing_after_a_stop_text_is_shown():
    torn = answer(b"yes STOP\xf0\x9f", b"\x98\x80", stop=("STOP",))  # the token ends within a character
    assert generate(torn) == ["yes "]
    several = answer("yes ", "STOP", " no", stop=("STOP",))
    several.request.tokens += [0, 1, 2]
    assert several.advance() == several.text == "yes "


def test_what_may_begin_a_stop_text_is_held_back_and_released_at_the_end():
    made = answer("Hello U", "ser", " Use", stop=("User:",))
    assert generate(made) == ["Hello ", "", "User Use"]
    assert made.request.finish_reason == "length"
    made = answer("Hello U", stop=("User:",))
    assert generate(made, end="stop") == ["Hello U"]  # the model's own end


def test_half_a_character_is_shown_only_at_the_end():
    made = answer(b"\xc3", b"\xa9 \xf0\x9f", b"\x98")
    assert generate(made) == ["", "\u00e9 ", "\ufffd"]


@given(
    pieces=st.lists(st.text("ab\u00e9", max_size=4), min_size=1, max_size=12),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3, unique=True),
    cuts=st.lists(st.integers(1, 3), max_size=12),
)
def test_pieces_join_to_the_text_before_the_first_stop(pieces, stops, cuts):
    raw = "".join(pieces).encode()
    edges = sorted({min(sum(cuts[:i]), len(raw)) for i in range(len(cuts) + 1)} | {0, len(raw)})
    tokens = [raw[start:stop] for start, stop in pairwise(edges)] or [b""]
    made = answer(*tokens, stop=tuple(stops))
    shown = generate(made)
    expected = "".join(pieces)
    for end in edges:  # the first token with which a stop text is whole ends the answer
        so_far = raw[:end].decode(errors="ignore")
        if found := [so_far.index(stop) for stop in stops if stop in so_far]:
            expected = so_far[: min(found)]
            assert made.request.finish_reason == "stop"
            break
    else:
        assert made.request.finish_reason == "length"
    assert "".join(shown) == made.text == expected


def test_a_record_has_the_keys_of_the_contract_in_their_order():
    made = answer("Hello", " you")
    generate(made)
    record = made.record()
    assert list(record) == KEYS + COUNTS
    assert record == {
        "id": "a",
        "prompt": "Say it: ",
        "completion": "Hello you",
        "tokens": [0, 1],
        "logprobs": None,
        "prompt_logprobs": None,
        "finish_reason": "length",
        "prompt_tokens": 2,
        "completion_tokens": 2,
    }


def test_logprobs_are_in_the_record_when_asked_for():
    made = answer("Hello", logprobs=True, prompt_logprobs=True)
    made.request.logprobs, made.request.prompt_logprobs = [-0.5], [-0.25]
    generate(made)
    assert (made.record()["logprobs"], made.record()["prompt_logprobs"]) == ([-0.5], [-0.25])


def test_echo_puts_the_prompt_before_the_completion():
    made = answer("Hello", echo=True)
    assert generate(made) == ["Hello"]  # the text shown is the answer alone
    assert made.record()["completion"] == "Say it: Hello"


# ---- prompts to ids ----------------------------------------------------------------------------------------------

CHAT = ({"role": "user", "content": "Hi"},)


@pytest.fixture(scope="module")
def byte_level() -> Codec:
    """SmolLM2's own: no token before a text, and a chat template."""
    return Codec(locate(RunConfig()))


@pytest.fixture(scope="module")
def sentencepiece(tokenizer_file) -> Codec:
    """LLaMA's kind: a token before every text, and no chat template."""
    checkpoint = locate(RunConfig())
    small = replace(checkpoint.config, vocab_size=331)
    return Codec(replace(checkpoint, tokenizer=tokenizer_file, config=small))


def prompt(text: str | None = None, **more) -> Prompt:
    return Prompt(id="p", text=text, sampling=SamplingConfig(max_gen_len=5), **more)


def refused(codec: Codec, prompt: Prompt, max_seq_len: int | None = None) -> str:
    """The error of an answer that is finished before it began."""
    made = codec.answer(prompt, max_seq_len)
    assert made.is_finished and made.request.finish_reason == "error" and made.advance() == ""
    record = made.record()
    assert list(record) == [*KEYS, "error", *COUNTS]
    assert (record["completion"], record["tokens"], record["error"]) == ("", [], made.error)
    return made.error


def test_a_prompt_as_long_as_the_row_is_refused_and_one_token_less_is_not(byte_level):
    count = len(byte_level.encode(prompt("one two three four")))
    assert f"{count} tokens" in refused(byte_level, prompt("one two three four"), count)
    assert "--max_seq_len" in refused(byte_level, prompt("one two three four"), count)
    assert byte_level.answer(prompt("one two three four"), count + 1).error is None


def test_a_prompt_longer_than_the_models_context_is_refused(byte_level):
    limit = byte_level.config.context_length
    assert f"context of {byte_level.config.name} is {limit}" in refused(byte_level, prompt(" a" * limit))


def test_an_empty_prompt_needs_a_token_that_begins_a_text(byte_level, sentencepiece):
    assert "empty" in refused(byte_level, prompt(""))
    assert sentencepiece.encode(prompt("")) == [sentencepiece.tokenizer.bos_id]


def test_a_chat_needs_a_template(byte_level, sentencepiece, tokenizer_file):
    assert "no chat template" in refused(sentencepiece, prompt(messages=CHAT))
    checkpoint = locate(RunConfig())
    small = replace(checkpoint.config, vocab_size=331)
    llama2 = Codec(replace(checkpoint, tokenizer=tokenizer_file, config=small), "llama2")
    assert llama2.encode(prompt(messages=CHAT)) == [1, *llama2.tokenizer.encode("[INST] Hi [/INST]", bos=False)]
    ids = byte_level.encode(prompt(messages=CHAT))
    assert ids[0] == byte_level.tokenizer.special["<|im_start|>"]
    assert byte_level.answer(prompt(messages=CHAT), None).record()["prompt"] == "Hi"


def test_a_tokenizer_of_another_model_is_refused(byte_level):
    checkpoint = locate(RunConfig())
    small = replace(checkpoint, config=replace(checkpoint.config, vocab_size=100))
    with pytest.raises(RequestError, match=r"49152 ids.* 100: .*--tokenizer"):
        Codec(small)
    large = replace(checkpoint, config=replace(checkpoint.config, vocab_size=128256))
    with pytest.raises(RequestError, match=r"49152 ids.* 128256: .*--tokenizer"):
        Codec(large)


# ---- the length of a row -----------------------------------------------------------------------------------------


def test_a_row_holds_the_longest_prompt_and_its_answer():
    config = ModelConfig(name="x", dim=8, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=8, vocab_size=9)
    short, long, failed = (answer(*"x" * count) for count in (5, 50, 500))
    failed.request.finish_reason = "error"
    assert needed_length([short, long, failed], config, None) == 2 + 50
    assert needed_length([short, long], replace(config, context_length=20), None) == 20
    assert needed_length([short], config, 33) == 33
    assert needed_length([failed], config, None) >= 1  # nothing to compute, and still a cache to allocate
