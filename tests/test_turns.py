"""The turns of a conversation compute what is new, and answer as if they had computed everything."""

import contextlib
import gc
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, write_meta
from ranks import Ranks
from test_activations import allocated

from launch.chat import main
from llama_mp import llm as llm_module
from llama_mp.answer import Answer
from llama_mp.cache import KVCache
from llama_mp.chat import Chat, ChatFlags
from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError
from llama_mp.fit import Room
from llama_mp.llm import LLM
from llama_mp.locate import locate
from llama_mp.memory import RankMemory
from llama_mp.parallel import connect
from llama_mp.request import Request

SYSTEM = "Be kind."
STOPPED = 3  # tokens of the answer that Ctrl-C ends
# The third answer is stopped; the last question does not fit into the model's 256 positions with all that was said.
LINES = [
    "one",
    "two",
    "three",
    "four",
    "/save",
    "/reset",
    "five",
    "six",
    "/load",
    "seven",
    "eight",
    "nine",
    "ten " * 12,
]
GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 0.9, "repetition_penalty": 1.3, "seed": 2}  # of seed 1 a token hangs on the last bits


class Turn(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    num_prefilled: int
    num_positions: int  # of the cache
    num_planned: int  # positions of the largest cache so far, as planned


class Keyboard:
    """In place of the terminal: Ctrl-C comes after the third question's `STOPPED`th token."""

    def __init__(self) -> None:
        self.num_asked = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        self.num_asked += 1
        looks = itertools.count(1)
        yield lambda: self.num_asked == 3 and next(looks) == STOPPED


def talk(folder: Path, file: Path, *, reuse: bool, lines: list[str] = LINES, **flags: object) -> list[Turn] | None:
    """In a rank: a conversation, whose turns are served with `reuse` or computed anew."""
    how = {"dtype": "fp32", "device": "cpu", "chat_format": "llama2", "system": SYSTEM, "max_gen_len": 12}
    run = ChatFlags(ckpt_dir=folder, **how, **flags)
    checkpoint, world, turns = locate(run), connect(run), []
    chat = Chat(run, checkpoint) if world.is_leader else None
    with LLM.of_checkpoint(run, checkpoint, world, codec=chat and chat.codec) as llm:

        def stream(answers: list[Answer]) -> Iterator[tuple[Answer, str]]:
            before, [answer] = llm.stats.prefilled_tokens, answers
            yield from llm.stream(answers, reuse=reuse)
            request, num_prefilled = answer.request, llm.stats.prefilled_tokens - before
            num_positions = llm.runner.cache.max_seq_len
            num_planned = llm.planned.kv_cache_bytes * num_positions // llm.runner.cache.num_bytes
            turns.append(Turn(request.prompt, request.tokens, num_prefilled, num_positions, num_planned))

        if chat is None:
            return llm.follow_to_end()
        keyboard = Keyboard()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for line in lines:
                if line.startswith("/"):
                    chat.obey(line, "" if line == "/reset" else str(file))
                    continue
                with contextlib.suppress(RequestError):
                    chat.answer(line, stream, keyboard)
        llm.dismiss()
    return turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    config = MODELS["gqa"]
    folder = write_meta(tmp_path_factory.mktemp("turns"), config, meta_tensors(hugging_face(config)), 2)
    (folder / "tokenizer.model").symlink_to(tokenizer_file)
    return folder


def num_shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


@pytest.mark.parametrize("drawing", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_turn_computes_what_is_new(ranks: Ranks, folder: Path, tmp_path: Path, drawing: dict) -> None:
    asked = {"folder": folder, "file": tmp_path / "talk.json", **drawing}
    whole = ranks.run(1, talk, reuse=False, **asked)[0]
    assert all(turn.num_prefilled == len(turn.prompt) for turn in whole)
    assert len(whole[2].tokens) == STOPPED < len(whole[1].tokens)
    assert num_shared(whole[-2].prompt, whole[-1].prompt) < 45  # turns were dropped
    for mp in (1, 2):
        turns = ranks.run(mp, talk, reuse=True, **asked)[0]
        assert [turn.tokens for turn in turns] == [turn.tokens for turn in whole]
        for before, turn in itertools.pairwise(turns):
            known = num_shared((before.prompt + before.tokens)[:-1], turn.prompt)
            assert turn.num_prefilled == len(turn.prompt) - known
        # The system message stays, and what was said since the last /reset or /load.
        num_known = [len(turn.prompt) - turn.num_prefilled for turn in turns]
        assert num_known[0] == 0 and min(num_known[1:]) > 25
        assert all(num_known[i] >= len(turns[i - 1].prompt) for i in (1, 2, 3, 5, 7, 8))
        lengths = {turn.num_positions: None for turn in turns}  # few turns have to make the cache grow
        assert len(lengths) <= 5 and list(lengths) == sorted(lengths) and max(lengths) == 256


def test_each_prompt_is_computed_whole_where_bits_count(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    for flags in ({"reuse": True, "deterministic": True}, {"reuse": False}):
        turns = ranks.run(1, talk, folder=folder, file=tmp_path, lines=["one", "two"], **flags, **GREEDY)[0]
        assert [turn.num_prefilled for turn in turns] == [len(turn.prompt) for turn in turns]


@pytest.mark.parametrize("flags", [{"quant": "int8"}, {"offload": "cpu"}], ids=["quantized", "offloaded"])
def test_however_the_weights_are_held(ranks: Ranks, folder: Path, tmp_path: Path, flags: dict) -> None:
    asked = {"folder": folder, "file": tmp_path, "lines": LINES[:3], **GREEDY, **flags}
    whole, turns = (ranks.run(1, talk, reuse=reuse, **asked)[0] for reuse in (False, True))
    assert [turn.tokens for turn in turns] == [turn.tokens for turn in whole]
    assert turns[2].num_prefilled < 40 < whole[2].num_prefilled == len(turns[2].prompt)


def talk_in_little_room(limit: int, **asked: object) -> list[Turn] | None:
    """In a rank: the same where the last rank has no room for a cache of more positions than `limit`."""
    check_fits = LLM.check_fits

    def check(llm: LLM, shape: Sequence[int], freed_bytes: int = 0) -> RankMemory:
        if llm.world.rank == llm.world.size - 1 and shape[1] > limit:
            raise RequestError("no room")
        return check_fits(llm, shape, freed_bytes)

    with patch.object(LLM, "check_fits", check):
        return talk(**asked)


@pytest.mark.parametrize("mp", [1, 2])
def test_a_conversation_goes_on_when_its_cache_finds_no_room(
    ranks: Ranks, folder: Path, tmp_path: Path, mp: int
) -> None:
    """On no rank, if not on each. The question that got no answer was not said."""
    lines = ["one", "two", "three", "four", "/save", "/reset", "five"]
    asked = {"folder": folder, "file": tmp_path / "talk.json", "lines": lines, **GREEDY}
    turns = ranks.run(mp, talk_in_little_room, limit=120, reuse=True, **asked)[0]
    assert [turn.num_positions for turn in turns] == [57, 86, len(turns[2].prompt) + 12, 59]
    assert [turn.num_planned for turn in turns] == [57, 86, *[turns[2].num_positions] * 2]
    assert turns[3].num_prefilled == len(turns[3].prompt)
    said = json.loads((tmp_path / "talk.json").read_text())
    assert [message["content"] for message in said if message["role"] == "user"] == ["one", "two", "three"]
    assert said[-1]["role"] == "assistant"


def test_a_question_without_room_leaves_all_that_was_said(folder: Path) -> None:
    """The turns that would have been dropped for it, too."""
    run = ChatFlags(ckpt_dir=folder, device="cpu", chat_format="llama2", max_gen_len=12)
    chat = Chat(run, locate(run))
    for answered in ("word " * 30, "and more"):
        chat.conversation.ask(answered, chat.encode, chat.room)
        chat.conversation.answer("Yes.")
    before = chat.conversation.messages

    def refuse(answers: list[Answer]) -> Iterator[tuple[Answer, str]]:
        assert len(answers) == 1 and len(chat.conversation.messages) < len(before)
        raise RequestError("no room: give more")

    with pytest.raises(RequestError, match="no room: give more; or /reset"):
        chat.answer("ten " * 40, refuse, Keyboard())
    assert chat.conversation.messages == before


def num_caches_left(**asked: object) -> int:
    """In a rank: after `talk_in_little_room`, where Python has not looked for cycles."""
    gc.collect()
    gc.disable()
    try:
        talk_in_little_room(**asked)
        return sum(type(thing) is KVCache for thing in gc.get_objects())
    finally:
        gc.enable()


def test_a_cache_that_found_no_room_to_grow_is_gone(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    """At once, on the rank without room too: the next one needs the memory that it took."""
    asked = {"folder": folder, "file": tmp_path, "lines": ["one", "two", "three", "four"], **GREEDY}
    assert ranks.run(2, num_caches_left, limit=120, reuse=True, **asked) == [0, 0]


# ---- one model here ------------------------------------------------------------------------------------------------

PROMPT = list(range(7, 37))


@pytest.fixture
def llm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setenv("LLAMA_MP_THREADS", "1")
    with LLM(folder, device="cpu", dtype="fp32") as opened:
        yield opened


def serve(llm: LLM, prompt: list[int], max_seq_len: int, **flags: bool) -> tuple[list[int], int]:
    """Four greedy tokens, and how many of the prompt were computed."""
    before = llm.stats.prefilled_tokens
    request = Request(id="0", prompt=prompt, sampling=SamplingConfig(temperature=0, max_gen_len=4))
    for _ in llm.serve([request], (1, max_seq_len), frozenset(), **flags):
        pass
    return request.tokens, llm.stats.prefilled_tokens - before


def test_generate_computes_each_prompt_whole(llm: LLM) -> None:
    for _ in range(2):
        before = llm.stats.prefilled_tokens
        [result] = llm.generate(["Once upon a time"], max_gen_len=2)
        assert llm.stats.prefilled_tokens - before == result["prompt_tokens"]


def test_nothing_is_known_of_a_request_that_was_given_up(llm: LLM) -> None:
    tokens, num_prefilled = serve(llm, PROMPT, 64, reuse=True)
    assert serve(llm, PROMPT, 64, reuse=True) == (tokens, 1) and num_prefilled == len(PROMPT)
    given_up = Request(id="0", prompt=PROMPT[::-1], sampling=SamplingConfig(max_gen_len=4))
    with contextlib.closing(llm.serve([given_up], (1, 64), frozenset(), reuse=True)) as moved:
        next(moved)
    assert serve(llm, PROMPT, 64, reuse=True) == (tokens, len(PROMPT))


def test_nothing_is_known_of_another_cache(llm: LLM) -> None:
    tokens, _ = serve(llm, PROMPT, 64, reuse=True)
    assert serve(llm, PROMPT, 80, reuse=True) == (tokens, 1)
    assert serve(llm, PROMPT, 128)[1] == len(PROMPT)  # made anew
    llm.prepare((2, 64))
    assert serve(llm, PROMPT, 64, reuse=True) == (tokens, len(PROMPT))


def test_the_command_is_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, stream = [], LLM.stream
    monkeypatch.setenv("LLAMA_MP_THREADS", "1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    monkeypatch.setattr(LLM, "stream", lambda llm, answers, **how: asked.append(how) or stream(llm, answers, **how))
    assert main(ChatFlags(ckpt_dir=folder, device="cpu", chat_format="llama2", max_gen_len=2)) == 0
    assert asked == [{"reuse": True}] * 2


@pytest.mark.parametrize(("room", "expected"), [(96, 96), (95, 70), (70, 70), (69, None)])
def test_a_cache_grows_by_what_fits(llm: LLM, monkeypatch: pytest.MonkeyPatch, room: int, expected: int | None) -> None:
    """By half where there is `room`, in positions, for a cache so long and one tensor of the old one, which goes away
    else; at least by what is needed, or the request is refused, and what needs no more can still be asked."""
    tokens, _ = serve(llm, PROMPT, 64, reuse=True)
    tensor_bytes = llm.runner.cache.keys[0].nbytes
    per_position = llm.runner.cache.num_bytes // 64
    free_bytes = room * per_position + tensor_bytes - llm.runner.cache.num_bytes
    monkeypatch.setattr(llm_module, "free_room", lambda *_: Room(free_bytes, "here", is_shared=True))
    if expected:
        assert serve(llm, PROMPT, 70, reuse=True) == (tokens, 1)
        assert llm.runner.cache.max_seq_len == llm.shape[1] == expected
    else:
        with pytest.raises(RequestError, match=r"of cache for 1 x 70 tokens, and .* GB are free here"):
            serve(llm, PROMPT, 70, reuse=True)
        monkeypatch.undo()
        assert serve(llm, PROMPT, 64, reuse=True) == (tokens, len(PROMPT))


def test_a_grown_cache_holds_what_it_held() -> None:
    """And is never there twice."""
    shape, cpu = {"num_slots": 2, "max_seq_len": 3000}, torch.device("cpu")
    before = []

    def make_and_grow() -> KVCache:
        cache = KVCache.allocate(MODELS["gqa"], 1, **shape, dtype=torch.float32, device=cpu)
        for number, held in enumerate((*cache.keys, *cache.values), 1):
            before.append((held.fill_(number).nbytes, held.shape))
        cache.grow(5000)
        return cache

    most, cache = allocated(make_and_grow)
    assert (cache.num_slots, cache.max_seq_len) == (2, 5000)
    for number, held in enumerate((*cache.keys, *cache.values), 1):
        assert held[:, :3000].eq(number).all() and held[:, 3000:].eq(0).all()
    [(tensor_bytes, _)] = set(before)
    assert most <= cache.num_bytes + tensor_bytes
