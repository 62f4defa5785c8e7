"""Scheduling: rows of different lengths together, refilled slots, ends of every kind, and how little it depends on."""

from dataclasses import dataclass, field
from pathlib import Path

import jobs
import pytest
import torch
from factory import MODELS, VOCAB_SIZE, hugging_face, meta_tensors, write_meta
from ranks import Ranks

from llama_mp import runner as runner_module
from llama_mp.config import SamplingConfig
from llama_mp.engine import Engine
from llama_mp.errors import RunError
from llama_mp.request import Request

PROMPTS = [[1, 5, 9], list(range(2, 40)), [7], [300, 200, 100, 50, 25, 12], list(range(100, 120))]
GREEDY = SamplingConfig(temperature=0, max_gen_len=12, logprobs=True, prompt_logprobs=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MODELS["gqa"]
    return write_meta(tmp_path_factory.mktemp("engine"), config, meta_tensors(hugging_face(config)), 2)


def halves(requests: list[Request]) -> list[tuple[Request, Request]]:
    """(computed in the batch, computed alone) for each prompt."""
    return list(zip(requests[: len(PROMPTS)], requests[len(PROMPTS) :], strict=True))


@pytest.mark.parametrize(("mp", "num_slots"), [(1, 5), (1, 2), (2, 3)])
def test_batch_equals_single(ranks: Ranks, folder: Path, tokenizer_file: Path, mp: int, num_slots: int) -> None:
    lengths = [12, 3, 7, 1, 9]  # slots come free at different times
    samplings = [SamplingConfig(temperature=0, max_gen_len=n, logprobs=True, prompt_logprobs=True) for n in lengths]
    arguments = {"prompts": PROMPTS, "samplings": samplings, "num_slots": num_slots}
    done = ranks.run(mp, jobs.batch, path=folder, tokenizer=tokenizer_file, **arguments)[0]
    for together, alone in halves(done):
        assert together.tokens == alone.tokens
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert together.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-4)
        assert len(together.tokens) == together.sampling.max_gen_len
        assert together.finish_reason == "length"


def test_sampled_text_depends_on_seed_and_id_alone(ranks: Ranks, folder: Path, tokenizer_file: Path) -> None:
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, max_gen_len=10, repetition_penalty=1.2, seed=3)
    arguments = {"prompts": PROMPTS, "samplings": [sampling] * len(PROMPTS), "num_slots": 2}
    runs = [
        ranks.run(mp, jobs.batch, path=folder, tokenizer=tokenizer_file, **arguments)[0][: len(PROMPTS)]
        for mp in (1, 2, 4)
    ]
    texts = [[request.tokens for request in run] for run in runs]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(tokens) for tokens in texts[0]}) == len(PROMPTS)


def test_logprobs_are_hugging_faces(ranks: Ranks, folder: Path, tokenizer_file: Path) -> None:
    arguments = {"prompts": PROMPTS, "samplings": [GREEDY] * len(PROMPTS), "num_slots": 5}
    done = ranks.run(1, jobs.batch, path=folder, tokenizer=tokenizer_file, **arguments)[0][: len(PROMPTS)]
    model = hugging_face(MODELS["gqa"])
    for request in done:
        ids = torch.tensor(request.prompt + request.tokens)
        with torch.inference_mode():
            expected = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        assert request.prompt_logprobs + request.logprobs == pytest.approx(expected, abs=1e-4)


def prefill_in_chunks(folder: Path, tokenizer: Path, chunk: int) -> torch.Tensor | None:
    """Runs in a rank: the logits after a prompt that was prefilled `chunk` tokens at a time."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    leader = jobs.Leader(jobs.load(world, folder, tokenizer).prepare([2, 64]), world)
    prompt = PROMPTS[1]
    for start in range(0, len(prompt), chunk):
        logits = leader.prefill(prompt[start : start + chunk], slot=1, start=start, all_logits=False)
    world.close()
    return logits.clone()


def test_chunks_of_a_prompt_equal_the_whole(ranks: Ranks, folder: Path, tokenizer_file: Path) -> None:
    found = [
        ranks.run(1, prefill_in_chunks, folder=folder, tokenizer=tokenizer_file, chunk=chunk)[0] for chunk in (64, 7, 1)
    ]
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=1e-4)


# ---- the scheduler alone, over a runner that computes nothing ----------------------------------------------------


class Slots:
    def __init__(self, num_slots: int, max_seq_len: int) -> None:
        self.num_slots, self.max_seq_len = num_slots, max_seq_len


@dataclass
class Recorder:
    """In place of a Leader: each slot remembers the ids it was given; the next token is the sum of them, modulo V.

    A row whose cache was mixed up, moved wrongly or decoded at a wrong position goes on with other tokens."""

    cache: Slots
    seen: dict[int, list[int]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    prefill_chunk: int = 512
    spoilt: list[int] | None = None  # ids after which the logits are NaN

    def __post_init__(self) -> None:
        self.tokens_S = torch.zeros(self.cache.num_slots, dtype=torch.int64)

    def next_logits(self, slot: int) -> torch.Tensor:
        logits = torch.zeros(VOCAB_SIZE)
        logits[sum(self.seen[slot]) % VOCAB_SIZE] = torch.nan if self.seen[slot] == self.spoilt else 1.0
        return logits

    def prefill(self, tokens: list[int], *, slot: int, start: int, all_logits: bool) -> torch.Tensor:
        self.seen[slot] = ([] if start == 0 else self.seen[slot][:start]) + list(tokens)
        self.calls.append(f"prefill {len(tokens)} into {slot}")
        return self.next_logits(slot)[None]

    def decode(self, positions: list[int]) -> torch.Tensor:
        for slot, position in enumerate(positions):
            assert len(self.seen[slot]) == position, f"slot {slot}: position {position} after {len(self.seen[slot])}"
            self.seen[slot].append(self.tokens_S[slot].item())
        self.calls.append(f"decode {len(positions)}")
        return torch.stack([self.next_logits(slot) for slot in range(len(positions))])

    def wait_for(self, event: torch.cuda.Event) -> None:
        raise AssertionError("nothing here is on a GPU")

    def move(self, source: int, target: int, length: int) -> None:
        assert len(self.seen[source]) == length
        self.seen[target] = self.seen[source][:length]
        self.tokens_S[target] = self.tokens_S[source]
        self.calls.append(f"move {source} to {target}")


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(ids) % VOCAB_SIZE)
    return ids[len(prompt) :]


def run(recorder: Recorder, requests: list[Request], eos_ids: frozenset[int] = frozenset(), depth: int = 0) -> Engine:
    engine = Engine(recorder, eos_ids=eos_ids, depth=depth)
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        moved = engine.step()
        assert moved or depth, "a step in which nothing moved"
        assert len(set(moved)) == len(moved)
    return engine


def request(index: int, prompt: list[int], max_gen_len: int) -> Request:
    return Request(id=str(index), prompt=prompt, sampling=SamplingConfig(temperature=0, max_gen_len=max_gen_len))


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 20])
def test_every_request_sees_its_own_cache(num_slots: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(num_slots)
    lengths = torch.randint(1, 9, (20, 2), generator=generator).tolist()
    requests = [request(i, list(range(1 + i, 1 + i + size)), count) for i, (size, count) in enumerate(lengths)]
    run(Recorder(Slots(num_slots, 64)), requests, depth=depth)
    for done in requests:
        assert done.tokens == expected_tokens(done.prompt, done.sampling.max_gen_len)


def test_a_free_slot_is_refilled_in_place() -> None:
    recorder = Recorder(Slots(2, 64))
    run(recorder, [request(0, [1], 2), request(1, [2], 6), request(2, [3, 4], 2)])
    assert recorder.calls[:4] == ["prefill 1 into 0", "prefill 1 into 1", "decode 2", "prefill 2 into 0"]
    assert recorder.calls.count("move 1 to 0") == 1  # when the queue is empty and row 0 ends before row 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_end_of_sequence_is_no_token(depth: int) -> None:
    """Nor are those that were in the air when it came; who gets the slot next begins anew."""
    second = expected_tokens([5, 6], 2)[1]
    done, other, third = requests = [request(0, [5, 6], 10), request(1, [9], 7), request(2, [8, 8], 3)]
    run(Recorder(Slots(2, 64)), requests, eos_ids=frozenset({second}), depth=depth)
    assert done.tokens == expected_tokens([5, 6], 1)
    assert done.finish_reason == "stop"
    assert other.tokens == expected_tokens([9], 7) and third.tokens == expected_tokens([8, 8], 3)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_only_a_token_that_somebody_waits_for_has_to_be_one(depth: int) -> None:
    """What a row still gets that has ended may be anything; before that it ends the run."""
    second = expected_tokens([5, 6], 2)[1]
    for eos_ids in (frozenset({second}), frozenset()):
        recorder = Recorder(Slots(1, 64))
        recorder.spoilt = [5, 6, *expected_tokens([5, 6], 2)]
        requests = [request(0, [5, 6], 10), request(1, [8], 3)]
        if eos_ids:
            run(recorder, requests, eos_ids=eos_ids, depth=depth)
            assert [len(done.tokens) for done in requests] == [1, 3]
        else:
            with pytest.raises(RunError, match="not finite"):
                run(recorder, requests, depth=depth)


def test_steps_ahead_of_the_host() -> None:
    """`depth` steps are launched before the tokens of an earlier one are looked at, and none where nothing is left."""
    recorder = Recorder(Slots(1, 64))
    engine = Engine(recorder, eos_ids=frozenset(), depth=1)
    engine.submit(request(0, [3], 4))
    [done] = engine.step()
    assert len(done.tokens) == 1  # the first token is not kept waiting
    known = []
    while engine.has_work:
        engine.step()
        known.append((recorder.calls.count("decode 1"), len(done.tokens)))
    assert known == [(2, 2), (3, 3), (3, 4)]
    assert done.tokens == expected_tokens([3], 4)


def test_a_prompt_waits_for_what_is_in_the_air() -> None:
    """So that whoever reads the tokens sees each before the next, and can end a row."""
    recorder = Recorder(Slots(2, 64))
    engine = Engine(recorder, eos_ids=frozenset(), depth=1)
    first, second = request(0, [3], 50), request(1, [4], 2)
    engine.submit(first)
    engine.step()
    engine.step()
    engine.submit(second)
    lengths = []
    while not second.tokens:
        engine.step()
        lengths.append(len(first.tokens))
    assert lengths == [3, 3]


def test_a_full_row_ends() -> None:
    [done] = requests = [request(0, [5, 6, 7], 100)]
    run(Recorder(Slots(1, 10)), requests)
    assert len(done.prompt) + len(done.tokens) == 10
    assert done.finish_reason == "length"


@pytest.mark.parametrize(("depth", "num_known"), [(0, 1), (0, 3), (1, 1), (1, 3)])
def test_a_request_ended_from_outside_frees_its_slot(depth: int, num_known: int) -> None:
    recorder = Recorder(Slots(1, 64))
    engine = Engine(recorder, eos_ids=frozenset(), depth=depth)
    first, second = request(0, [1, 2], 50), request(1, [3], 2)
    engine.submit(first)
    engine.submit(second)
    while len(first.tokens) < num_known:
        engine.step()
    first.finish_reason = "stop"
    while engine.has_work:
        engine.step()
    assert len(first.tokens) == num_known
    assert second.tokens == expected_tokens([3], 2)


@pytest.mark.parametrize(
    ("prompt", "num_new"), [([1, 2, 3, 9, 9], 2), ([1, 2, 3, 4], 1), ([1, 2], 1), ([7, 2, 3], 3), ([1, 2, 3, 4, 5], 1)]
)
def test_a_beginning_that_the_slot_has_is_not_computed(prompt: list[int], num_new: int) -> None:
    """By the first prompt alone: whoever comes to the slot next begins anew."""
    recorder = Recorder(Slots(1, 64), seen={0: [1, 2, 3, 4, 8, 8]})
    engine = Engine(recorder, eos_ids=frozenset(), held=[1, 2, 3, 4])
    first, second = request(0, prompt, 3), request(1, prompt, 2)
    engine.submit(first)
    engine.submit(second)
    while engine.has_work:
        engine.step()
    assert [call for call in recorder.calls if "prefill" in call] == [
        f"prefill {num_new} into 0",
        f"prefill {len(prompt)} into 0",
    ]
    assert first.tokens == expected_tokens(prompt, 3) and second.tokens == first.tokens[:2]
    assert engine.stats.prefilled_tokens == num_new + len(prompt)


def test_a_scored_prompt_is_computed_whole() -> None:
    engine = Engine(Recorder(Slots(1, 64)), eos_ids=frozenset(), held=[1, 2, 3])
    scored = Request(id="0", prompt=[1, 2, 3, 4], sampling=GREEDY)
    assert engine.num_held(scored, 0) == 0
    assert engine.num_held(request(0, scored.prompt, 1), 1) == 0  # nor one in another slot
    assert engine.num_held(request(0, scored.prompt, 1), 0) == 3


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("end", ["stop", "length", "outside", "moved"])
def test_what_slot_0_holds_in_the_end(end: str, depth: int) -> None:
    """All that has been computed of what was said, however it ended: never an id more."""
    prompt = [5, 6]
    known = expected_tokens(prompt, 20)
    recorder = Recorder(Slots(2, 64))
    engine = Engine(recorder, eos_ids=frozenset({known[4]} if end == "stop" else ()), depth=depth)
    asked = request(0, prompt, 4 if end == "length" else 20)
    if end == "moved":
        engine.submit(request(1, [9], 2))
    engine.submit(asked)
    while engine.has_work:
        engine.step()
        if end == "outside" and len(asked.tokens) == 4:
            asked.finish_reason = "stop"
    held = engine.ids_in_slot_0()
    assert recorder.seen[0][: len(held)] == held == (prompt + asked.tokens)[: len(held)]
    num_missing = 0 if end == "stop" or (end == "outside" and depth) else 1  # a step would have made it
    assert len(held) == len(prompt + asked.tokens) - num_missing


def test_stats_count_what_was_computed() -> None:
    engine = run(Recorder(Slots(2, 64)), [request(0, [1, 2, 3], 3), request(1, [4], 2)])
    stats = engine.stats
    assert (stats.decoded_tokens, stats.decode_steps) == (3, 2)
    assert stats.first_token_s is not None


def test_a_message_has_room_for_every_step() -> None:
    for num_slots in (1, 8, 1000):
        message = runner_module.blank_message(Slots(num_slots, 64))
        assert len(message) >= 5 + 2 * num_slots
