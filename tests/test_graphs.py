"""Recorded decode steps: what is recorded when, and that they compute what the steps themselves would have."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jobs
import pytest
import tape
import torch
from factory import MODELS, hugging_face, meta_tensors, write_meta
from fake_streams import Gpu
from ranks import Ranks

from llama_mp import compiled, fused, graphs, kernels, shared_memory
from llama_mp.cache import KVCache
from llama_mp.config import SamplingConfig
from llama_mp.graphs import GraphRunner, Steps, length_for, num_rows_for
from llama_mp.request import Request
from llama_mp.runner import Leader, Runner, follow
from llama_mp.world import World

PROMPTS = [[1, 5, 9], list(range(2, 40)), [7], [300, 200, 100, 50, 25, 12], list(range(100, 120)), [8, 8], [9]]
CACHED = (compiled.load_library, kernels.load_kernels, kernels.load_many_rows, fused.load_steps)
LENGTHS = [12, 3, 7, 1, 9, 30, 14]  # slots come free at different times


def test_few_numbers_of_rows_and_not_many_too_many() -> None:
    for num_slots in (1, 3, 8, 13, 128, 200):
        found = [num_rows_for(count, num_slots) for count in range(1, num_slots + 1)]
        assert all(count <= rows <= min(num_slots, max(8, 1.5 * count)) for count, rows in enumerate(found, 1))
        assert found[-1] == num_slots and len(set(found)) <= 4 + 2 * max(0, num_slots.bit_length() - 3)
    assert [num_rows_for(count, 100) for count in (1, 2, 3, 5, 9, 13, 17, 25, 49, 65, 97)] == [
        1, 2, 4, 8, 12, 16, 24, 32, 64, 96, 100,
    ]  # fmt: skip


def test_lengths_are_powers_of_two_within_the_cache() -> None:
    assert [length_for(n, 5000) for n in (1, 256, 257, 1024, 1025, 4097, 5000)] == [
        256,
        256,
        512,
        1024,
        2048,
        5000,
        5000,
    ]
    assert length_for(3, 100) == 100


class Told:
    """In place of a Recorder: what it was asked for. `failing`: the calls of `record` that fail, by number."""

    def __init__(self, failing: int | None = None) -> None:
        self.calls: list[str] = []
        self.failing = failing

    def warm_up(self, launch: graphs.Launch) -> None:
        self.calls.append("warm")
        launch()

    def record(self, launch: graphs.Launch) -> graphs.Launch:
        self.calls.append("record")
        if self.calls.count("record") == self.failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return lambda: self.calls.append("replay")

    def close(self) -> None:
        self.calls.append("close")


def test_the_second_step_of_a_key_is_recorded() -> None:
    told = Told()
    steps = Steps(told)
    for key in "aabaab":
        steps.run(key, lambda key=key: told.calls.append(key))
    assert " ".join(told.calls) == "warm a record replay warm b replay replay record replay"
    steps.close()
    steps.close()
    assert told.calls.count("close") == 1


def test_steps_go_on_where_nothing_can_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """None of the graphs is used any more, nor another one tried."""
    told = Told(failing=2)
    steps = Steps(told)
    for key in "aabbaab":
        steps.run(key, lambda key=key: told.calls.append(key))
    assert " ".join(told.calls) == "warm a record replay warm b record close b a a b"
    assert capsys.readouterr().err.count("no CUDA graphs (operation not permitted when stream is capturing):") == 1


def answers(kind: str, folder: Path, tokenizer: Path) -> tuple[list[Request], Any] | None:
    """In a rank: the prompts' answers over 6 slots, and the keys of the steps that were recorded."""
    with patch.object(shared_memory, "prepare", lambda *_: "a test wants gloo"):  # whose sums a tape hears of
        world = jobs.connect(jobs.RunConfig(device="cpu"))
    with without_own_kernels(), patch.object(graphs, "LEAST_LENGTH", 16):
        llm = jobs.load(world, folder, tokenizer)
        shape = {"num_slots": 6, "max_seq_len": 64, "dtype": llm.dtype, "device": world.device}
        cache = KVCache.allocate(llm.config, world.size, **shape)
        if kind == "graphs":
            runner = GraphRunner(llm.config, llm.model, cache, tape.Recorder())
        else:
            runner = Runner(llm.config, llm.model, cache)
        done = finish(runner, world, depth=int(kind == "graphs"))
        assert runner.uses_graphs == (kind == "graphs")
    world.close()
    return done and (done, sorted(runner.steps.recorded) if kind == "graphs" else None)


@contextlib.contextmanager
def without_own_kernels() -> Iterator[None]:
    """A tape hears of torch's own operations alone."""
    with patch.object(compiled, "library_of", side_effect=OSError("not in this test")):
        for cached in CACHED:
            cached.cache_clear()
        yield
    for cached in CACHED:
        cached.cache_clear()


def finish(runner: Runner, world: World, depth: int) -> list[Request] | None:
    if not world.is_leader:
        return follow(runner)
    leader = Leader(runner, world)
    samplings = [
        SamplingConfig(max_gen_len=n, logprobs=True, temperature=0.8 * (n % 2), repetition_penalty=1 + n % 3 / 10)
        for n in LENGTHS
    ]
    requests = jobs.complete(leader, PROMPTS, samplings, depth=depth)
    leader.stop()
    return requests


@pytest.mark.parametrize("mp", [1, 2])
def test_recorded_steps_give_the_answers_of_others(ranks: Ranks, tmp_path: Path, tokenizer_file: Path, mp: int) -> None:
    """Rows that end at different times, slots filled anew, rows beyond those asked for, lengths that grow."""
    config = MODELS["gqa"]
    folder = write_meta(tmp_path, config, meta_tensors(hugging_face(config)), 2)
    expected, _ = ranks.run(mp, answers, kind="plain", folder=folder, tokenizer=tokenizer_file)[0]
    found, keys = ranks.run(mp, answers, kind="graphs", folder=folder, tokenizer=tokenizer_file)[0]
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert {rows for rows, _ in keys} >= {2, 4, 6} and {length for _, length in keys} >= {32, 64}


# ---- order on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Iterator[Gpu]]:
    """Which do what streams have to do at different moments."""

    def made(seed: int) -> Gpu:
        gpu = Gpu(seed)
        gpu.patch(monkeypatch)
        graphs.capture_stream.cache_clear()
        return gpu

    yield map(made, range(20))
    graphs.capture_stream.cache_clear()


@pytest.mark.parametrize("fails", [False, True])
def test_each_step_reads_what_lay_there_before_it(gpus: Iterator[Gpu], fails: bool) -> None:
    """Steps between an upload and what follows: warmed up, recorded or not, and launched. Graphs end
    when all is done, and the current stream is the old one, whatever failed."""
    for gpu in gpus:
        steps, outside = Steps(graphs.Recorder(torch.device("cuda"))), gpu.current_stream()
        held, seen, expected = [1], [], [1]

        def write(change: Callable[[int], int], held: list[int] = held) -> None:
            held[0] = change(held[0])

        def launch(gpu: Gpu = gpu, write: Callable = write) -> None:
            gpu.enqueue(partial(write, lambda x: 2 * x))
            gpu.enqueue(partial(write, lambda x: x + 3))
            if fails and gpu.captured is not None:
                raise RuntimeError("operation not permitted when stream is capturing")

        for number in range(5):
            gpu.enqueue(partial(write, lambda x, number=number: x + number + 1))
            steps.run("a key", launch)
            gpu.enqueue(lambda seen=seen, held=held: seen.append(held[0]))
            expected.append(2 * (expected[-1] + number + 1) + 3)
            for _ in range(gpu.random.randrange(8)):
                gpu.advance()
        assert gpu.current_stream() is outside and bool(steps.recorded) is not fails
        steps.close()
        gpu.synchronize()
        assert seen == expected[1:]
