"""What needs a CUDA device: `pytest -m gpu` is the whole check to run when there is one."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jobs
import pytest
import torch
import torch.distributed as dist
from factory import MODELS, hugging_face, meta_tensors, write_meta
from ranks import Ranks

from llama_mp import LLM, cuda
from llama_mp.config import RunConfig, SamplingConfig, load_size
from llama_mp.engine import Engine
from llama_mp.graphs import GraphRunner, Launch, Recorder, Steps
from llama_mp.locate import random_checkpoint
from llama_mp.parallel import connect
from llama_mp.request import Request
from llama_mp.runner import Leader, Runner
from llama_mp.sampling import Row, sample
from llama_mp.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers"),
]
DEVICE = "cuda"
PROMPT = [1, 17, 300, 4, 250, 99, 42]
PROMPTS = [[1, 5, 9], list(range(2, 40)), [7], [300, 200, 100, 50, 25, 12], list(range(100, 120)), [8, 8], [9]]
LENGTHS = [12, 3, 7, 1, 9, 20, 14]  # of their answers: slots come free at different times
SAMPLINGS = [
    SamplingConfig(temperature=0, max_gen_len=24),
    SamplingConfig(temperature=0.8, max_gen_len=24),
    SamplingConfig(temperature=1.0, top_p=0.7, repetition_penalty=1.2, max_gen_len=24),
    SamplingConfig(temperature=1.0, top_k=20, min_p=0.02, logprobs=True, max_gen_len=24),
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MODELS[request.param]
    return write_meta(tmp_path_factory.mktemp("gpu"), config, meta_tensors(hugging_face(config)), 2)


def logits_on(device: str, folder: Path, tokenizer: Path, **flags: object) -> torch.Tensor:
    """Of a prompt prefilled in two chunks, and then of one decode step."""
    with LLM(folder, tokenizer=tokenizer, device=device, **flags) as llm:
        leader = Leader(llm.prepare([2, 32]), llm.world)
        chunks = [leader.prefill(PROMPT[:4], slot=0, start=0, all_logits=True)]
        chunks += [leader.prefill(PROMPT[4:], slot=0, start=4, all_logits=True)]
        leader.prefill(PROMPT[:2], slot=1, start=0, all_logits=False)
        leader.tokens_S[:2] = torch.tensor([5, 6])
        chunks += [leader.decode([len(PROMPT), 2])]
        return torch.cat(chunks).float().cpu()


ONE_MODEL = pytest.mark.parametrize("folder", ["gqa"], indirect=True)  # each shape is compiled for, for seconds


@pytest.fixture(params=["our kernels", "torch's"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own kernels, where this card has them, and without."""
    if request.param == "torch's":
        monkeypatch.setattr(cuda, "available", lambda device: False)


def test_our_kernels_run_on_this_card() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card is too old for them")
    assert cuda.available(torch.device(DEVICE, 0))


@pytest.mark.usefixtures("kernels")
def test_fp32_equals_the_cpu(folder: Path, tokenizer_file: Path) -> None:
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32")
    found = logits_on(DEVICE, folder, tokenizer_file, dtype="fp32")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["tf32", "fp16", "bf16"])
def test_other_types_come_near(folder: Path, tokenizer_file: Path, dtype: str) -> None:
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card computes no bf16")
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32")
    found = logits_on(DEVICE, folder, tokenizer_file, dtype=dtype)
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_fewer_bits_are_those_of_the_cpu(folder: Path, tokenizer_file: Path, quant: str) -> None:
    """The codes to the bit, and the logits of fp32; in fp16 sums of scaled weights stay within its range."""
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32", quant=quant)
    found = logits_on(DEVICE, folder, tokenizer_file, dtype="fp32", quant=quant)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    held = []
    for device in ("cpu", DEVICE):
        with LLM(folder, tokenizer=tokenizer_file, device=device, dtype="fp32", quant=quant) as llm:
            held.append({name: parameter.cpu() for name, parameter in llm.model.named_parameters()})
    assert all(torch.equal(held[1][name], parameter) for name, parameter in held[0].items())
    half = logits_on(DEVICE, folder, tokenizer_file, dtype="fp16", quant=quant)
    assert (half - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("dtype", "quant", "bound"),
    [("fp32", "none", 1e-4), ("fp32", "int8", 1e-4), ("fp32", "int4", 1e-4), ("bf16", "none", 0.03)],
)
@pytest.mark.parametrize("size", ["7B", "llama3-8b"])
def test_our_kernels_equal_torchs_at_full_width(size: str, dtype: str, quant: str, bound: float) -> None:
    """Two layers; steps of one row, of a few and of many, each with another number of positions to see."""
    if not cuda.available(torch.device(DEVICE, 0)):
        pytest.skip("this card is too old for our kernels")
    run, found = RunConfig(size=size, dtype=dtype, device=DEVICE, quant=quant, eager=True), []
    checkpoint = replace(random_checkpoint(run), config=replace(load_size(size), num_layers=2))
    with LLM.of_checkpoint(run, checkpoint, connect(run), codec=None) as llm:
        for available in (cuda.available, lambda device: False):
            with patch.object(cuda, "available", available):
                found.append(logits_of_long_rows(llm).float())
    assert (found[0] - found[1]).abs().max() <= bound * found[1].abs().max()


def logits_of_long_rows(llm: LLM) -> torch.Tensor:
    leader, lengths = Leader(llm.prepare((20, 1600)), llm.world), [1500, 1, 129, *range(2, 19)]
    logits = [leader.prefill(list(range(n)), slot=i, start=0, all_logits=False) for i, n in enumerate(lengths)]
    leader.tokens_S[:] = torch.arange(20)
    return torch.cat([*logits, *(leader.decode(lengths[:num_rows]) for num_rows in (1, 3, 20))])


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_what_is_held_is_what_is_planned(quant: str) -> None:
    """Loading, a prompt, and steps that are recorded."""
    run = RunConfig(size="llama3.2-1b", dtype="bf16", device=DEVICE, quant=quant)
    torch.cuda.empty_cache()
    with LLM.of_checkpoint(run, random_checkpoint(run), connect(run), codec=None) as llm:
        greedy = SamplingConfig(temperature=0, max_gen_len=8)
        requests = [Request(id=str(i), prompt=list(range(600)), sampling=greedy) for i in range(4)]
        for _ in llm.serve(requests, (4, 640), frozenset()):
            pass
        assert llm.peak_memory.read() == pytest.approx(llm.planned.allocated_bytes, rel=0.02)


def test_texts_are_those_of_the_cpu(smollm2_file: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    texts = []
    for device in ("cpu", DEVICE):
        with LLM(smollm2_file, device=device, dtype="fp32") as llm:
            greedy = llm.generate([chat, "Once upon a time"], temperature=0, max_gen_len=16)
            drawn = llm.generate(["Once upon a time"] * 3, temperature=0.8, max_gen_len=16)
        texts.append([answer["completion"] for answer in greedy + drawn])
    assert texts[0] == texts[1]
    assert texts[0][0] == "The capital of France is Paris."


def over_nccl(folder: Path, tokenizer: Path, eager: bool) -> list | None:
    """Runs in a rank of its own device: logits of a prompt, and the tokens of greedy steps."""
    llm = jobs.load(jobs.connect(jobs.RunConfig(device=DEVICE)), folder, tokenizer, device=DEVICE, eager=eager)
    found = jobs.ask_one(llm, PROMPT, 8)
    llm.close()
    return [found.tokens, found.logits] if found else None


@ONE_MODEL
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two CUDA devices")
def test_two_cards_equal_one(ranks: Ranks, folder: Path, tokenizer_file: Path, eager: bool) -> None:
    arguments = {"folder": folder, "tokenizer": tokenizer_file, "eager": eager}
    one, two = (ranks.run(mp, over_nccl, **arguments)[0] for mp in (1, 2))
    assert one[0] == two[0]
    assert abs(one[1] - two[1]).max() <= 1e-4 * abs(one[1]).max()


def one_rank_of_nccl() -> list[list[float]]:
    """The collectives of a step on a real NCCL group, of one rank: what several would call."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    group = dist.new_group([0], backend="nccl")
    x = torch.arange(6.0, device=DEVICE).view(2, 3)
    parts = [torch.empty_like(x)]
    dist.all_reduce(x, group=group)
    dist.gather(x, parts, group=group, group_dst=0)
    world.close()
    return parts[0].tolist()


def test_the_collectives_of_a_step_on_nccl(ranks: Ranks) -> None:
    assert ranks.run(1, one_rank_of_nccl)[0] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def in_a_graph_of_nccl() -> list[float]:
    """The collectives of a step, recorded and launched three times; the group is left afterwards."""
    world, device = jobs.connect(jobs.RunConfig(device="cpu")), torch.device(DEVICE, 0)
    group = dist.new_group([0], backend="nccl")
    x, y = torch.ones(2, device=device), torch.zeros(2, device=device)
    parts = [torch.empty_like(x)]

    def launch() -> None:
        dist.broadcast(x, src=0, group=group)
        dist.all_reduce(x, group=group)
        dist.gather(x, parts, group=group, group_dst=0)
        y.add_(parts[0])

    recorder = Recorder(device)
    recorder.warm_up(launch)
    replay = recorder.record(launch)
    for _ in range(3):
        x.add_(1)
        replay()
    recorder.close()
    world.close()
    return y.tolist()


def test_the_collectives_of_a_step_in_a_graph(ranks: Ranks) -> None:
    assert ranks.run(1, in_a_graph_of_nccl)[0] == [10.0, 10.0]  # 1 + 2 + 3 + 4


def test_memory_is_returned(smollm2_file: Path) -> None:
    """That of graphs, too. cuBLAS keeps a workspace for each stream, from its first product on."""
    held = []
    for _ in range(2):
        with LLM(smollm2_file, device=DEVICE) as llm:
            llm.generate(["Once upon a time"] * 3, max_gen_len=6)
            assert llm.runner.steps.recorded
            assert torch.cuda.memory_allocated() >= llm.loaded.weight_bytes
        del llm
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1][0] <= held[0][0] and held[1][1] <= held[0][1]


# ---- blocks that wait elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_streamed_equals_resident_within_the_budget(
    smollm2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"device": DEVICE, "dtype": "fp32", "max_seq_len": 64, "max_batch_size": 3}
    prompts = ["The capital of France is", "Once upon a time", "Two and two are"]
    with LLM(smollm2_file, **flags) as llm:
        expected = llm.generate(prompts, temperature=0, max_gen_len=16)
    for gib in (0.185, 0.185, 0.4):  # two blocks; the same, from the disk found again; some stay
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with LLM(smollm2_file, offload=place, device_memory_gib=gib, **flags) as llm:
            assert (llm.fitting.num_staying > 0) == (gib > 0.3)
            assert llm.generate(prompts, temperature=0, max_gen_len=16) == expected
            peak, planned = llm.peak_memory.read() - before, llm.planned.allocated_bytes
        del llm
        assert planned <= gib * 2**30 and peak <= 1.1 * gib * 2**30
        assert torch.cuda.memory_allocated() <= before


# ---- steps ahead of the host, and their graphs -----------------------------------------------------------------------


class AtOnce(Recorder):
    """Launches what another one would have recorded."""

    def record(self, launch: Launch) -> Launch:
        return partial(self.warm_up, launch)


def opened(folder: Path, tokenizer: Path, **flags: object) -> LLM:
    return LLM(folder, tokenizer=tokenizer, **{"device": DEVICE, "dtype": "fp32"} | flags)


def logits_of_steps(runner: Runner, world: World) -> torch.Tensor:
    """Of three rows, whatever they would have chosen; from the second step on they come from a graph."""
    leader, found = Leader(runner, world), []
    for slot in range(3):
        leader.prefill(PROMPTS[slot], slot=slot, start=0, all_logits=False)
    for number in range(5):
        leader.tokens_S[:3] = torch.tensor([5, 6, 7]) + number
        found.append(leader.decode([len(prompt) + number for prompt in PROMPTS[:3]]).clone())
    return torch.stack(found)


@ONE_MODEL
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_graph_equals_its_kernels_to_the_bit(folder: Path, tokenizer_file: Path, quant: str) -> None:
    found = []
    with opened(folder, tokenizer_file, quant=quant) as llm:
        cache = llm.prepare((4, 64)).cache
        for kind in (AtOnce, Recorder):
            runner = GraphRunner(llm.config, llm.model, cache, kind(llm.world.device))
            found.append(logits_of_steps(runner, llm.world))
            assert [num_rows for num_rows, _ in runner.steps.recorded] == [4]
            runner.close()
    assert torch.equal(*found)


@ONE_MODEL
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_graphs_and_eager_steps_agree(folder: Path, tokenizer_file: Path, quant: str) -> None:
    found = []
    for eager in (False, True):
        with opened(folder, tokenizer_file, quant=quant, eager=eager) as llm:
            runner = llm.prepare((4, 64))
            assert isinstance(runner, GraphRunner) is not eager
            found.append(logits_of_steps(runner, llm.world).cpu())
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()


@ONE_MODEL
@pytest.mark.usefixtures("kernels")
def test_rows_that_end_at_different_times_answer_as_alone(folder: Path, tokenizer_file: Path) -> None:
    """Slots are refilled and moved, and steps of several numbers of rows recorded; the tokens are those of the CPU."""
    samplings = [SamplingConfig(temperature=0, max_gen_len=length) for length in LENGTHS]
    with opened(folder, tokenizer_file, device="cpu") as llm:
        expected = tokens_of(llm, PROMPTS, samplings, num_slots=5)
    with opened(folder, tokenizer_file) as llm:
        assert tokens_of(llm, PROMPTS, samplings, num_slots=5) == expected
        assert {num_rows for num_rows, _ in llm.runner.steps.recorded} == {1, 2, 4, 5}
        for prompt, sampling, tokens in zip(PROMPTS, samplings, expected, strict=True):
            assert tokens_of(llm, [prompt], [sampling], num_slots=1) == [tokens]


def tokens_of(llm: LLM, prompts: list[list[int]], samplings: list[SamplingConfig], num_slots: int) -> list[list[int]]:
    leader = Leader(llm.prepare((num_slots, 64)), llm.world)
    return [request.tokens for request in jobs.complete(leader, prompts, samplings, depth=llm.depth)]


@ONE_MODEL
def test_a_longer_cache_is_recorded_anew(folder: Path, tokenizer_file: Path) -> None:
    greedy = [SamplingConfig(temperature=0, max_gen_len=20)]
    with opened(folder, tokenizer_file) as llm:
        found = []
        for max_seq_len in (40, 64, 48):  # the last one fits into the one before
            leader = Leader(llm.prepare((2, max_seq_len)), llm.world)
            found += [jobs.complete(leader, PROMPTS[:1], greedy, depth=1)[0].tokens]
        assert found[0] == found[1] == found[2]


@ONE_MODEL
@pytest.mark.parametrize("depth", [0, 1])
def test_a_grown_cache_need_not_be_filled_again(folder: Path, tokenizer_file: Path, depth: int) -> None:
    """Nor is what a step ahead of the text left there in the way."""
    with opened(folder, tokenizer_file) as llm, patch.object(LLM, "depth", depth):
        found = []
        for reuse in (False, True):
            prompt, tokens = PROMPT, []
            for max_seq_len in (40, 64, 100):
                request = Request(id="0", prompt=prompt, sampling=SamplingConfig(temperature=0, max_gen_len=12))
                before = llm.stats.prefilled_tokens
                for _ in llm.serve([request], (1, max_seq_len), frozenset(), reuse=reuse):
                    if len(request.tokens) == 9:
                        request.finish_reason = "stop"
                tokens.append((request.tokens, llm.stats.prefilled_tokens - before))
                prompt = [*prompt, *request.tokens, 5, 6]
            llm.close_runner()
            found.append(tokens)
        whole, turns = found
        assert [tokens for tokens, _ in turns] == [tokens for tokens, _ in whole]
        assert [count for _, count in whole] == [7, 18, 29] and max(count for _, count in turns[1:]) <= 3


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """What makes the host wait for the device raises."""
    refuse = {"side_effect": AssertionError("the host waits for the device")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        with patch.object(torch.cuda, "synchronize", **refuse), patch.object(torch.cuda.Event, "synchronize", **refuse):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ONE_MODEL
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("eager", [False, True])
def test_a_step_waits_for_nothing(folder: Path, tokenizer_file: Path, eager: bool) -> None:
    with opened(folder, tokenizer_file, eager=eager) as llm:
        engine = Engine(Leader(llm.prepare((4, 64)), llm.world), eos_ids=frozenset(), depth=1)
        requests = [Request(id=str(i), prompt=PROMPT, sampling=sampling) for i, sampling in enumerate(SAMPLINGS)]
        for request in requests:
            engine.submit(request)
        while len(requests[-1].tokens) < 4:  # by then the steps of four rows are recorded
            engine.step()
        with never_waiting():
            engine.launch()
            engine.launch()
        while engine.has_work:
            engine.step()
    assert [len(request.tokens) for request in requests] == [24] * 4


def test_a_step_that_cannot_be_recorded_is_launched_as_it_is() -> None:
    device = torch.device(DEVICE, 0)
    x, steps, outside = torch.zeros(3, device=device), Steps(Recorder(device)), torch.cuda.current_stream()

    def launch() -> None:
        x.add_(1)
        x.sum().item()  # which a capture forbids

    for _ in range(4):
        steps.run("a key", launch)
    assert steps.recorder is None and torch.cuda.current_stream() == outside
    assert x.tolist() == [4.0, 4.0, 4.0]


def test_tokens_are_chosen_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(5)
    logits_BV = 4 * torch.randn(40, 5000, generator=generator)
    logits_BV[-1, 7] = torch.nan
    seen_BV = torch.rand(logits_BV.shape, generator=generator) < 0.1
    rows = [Row(sampling=SAMPLINGS[i % 4], uniform=i / 40) for i in range(40)]
    here, there = (sample(logits_BV.to(d), rows, seen_BV.to(d)) for d in ("cpu", DEVICE))
    assert torch.equal(here.tokens, there.tokens.cpu()) and here.tokens[-1] == -1
    torch.testing.assert_close(here.logprobs[:-1], there.logprobs[:-1].cpu())
