"""What needs a CUDA device: `pytest -m gpu` is the whole check to run when there is one."""

from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed as dist
from factory import MODELS, hugging_face, meta_tensors, write_meta
from ranks import Ranks

from llama_mp import LLM
from llama_mp.config import RunConfig
from llama_mp.locate import random_checkpoint
from llama_mp.parallel import connect
from llama_mp.runner import Leader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device answers"),
]
PROMPT = [1, 17, 300, 4, 250, 99, 42]


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


def test_fp32_equals_the_cpu(folder: Path, tokenizer_file: Path) -> None:
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32")
    found = logits_on("cuda", folder, tokenizer_file, dtype="fp32")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["tf32", "fp16", "bf16"])
def test_other_types_come_near(folder: Path, tokenizer_file: Path, dtype: str) -> None:
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card computes no bf16")
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32")
    found = logits_on("cuda", folder, tokenizer_file, dtype=dtype)
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_fewer_bits_are_those_of_the_cpu(folder: Path, tokenizer_file: Path, quant: str) -> None:
    """The codes to the bit, and the logits of fp32; in fp16 sums of scaled weights stay within its range."""
    expected = logits_on("cpu", folder, tokenizer_file, dtype="fp32", quant=quant)
    found = logits_on("cuda", folder, tokenizer_file, dtype="fp32", quant=quant)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    held = []
    for device in ("cpu", "cuda"):
        with LLM(folder, tokenizer=tokenizer_file, device=device, dtype="fp32", quant=quant) as llm:
            held.append({name: parameter.cpu() for name, parameter in llm.model.named_parameters()})
    assert all(torch.equal(held[1][name], parameter) for name, parameter in held[0].items())
    half = logits_on("cuda", folder, tokenizer_file, dtype="fp16", quant=quant)
    assert (half - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantizing_and_unpacking_hold_what_is_planned(quant: str) -> None:
    run = RunConfig(size="llama3.2-1b", dtype="fp16", device="cuda", quant=quant)
    with LLM.of_checkpoint(run, random_checkpoint(run), connect(run), codec=None) as llm:
        leader = Leader(llm.prepare([1, 600]), llm.world)
        leader.prefill(list(range(512)), slot=0, start=0, all_logits=False)
        assert llm.peak_memory.read() <= 1.02 * llm.planned.allocated_bytes


def test_texts_are_those_of_the_cpu(smollm2_file: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    texts = []
    for device in ("cpu", "cuda"):
        with LLM(smollm2_file, device=device, dtype="fp32") as llm:
            greedy = llm.generate([chat, "Once upon a time"], temperature=0, max_gen_len=16)
            drawn = llm.generate(["Once upon a time"] * 3, temperature=0.8, max_gen_len=16)
        texts.append([answer["completion"] for answer in greedy + drawn])
    assert texts[0] == texts[1]
    assert texts[0][0] == "The capital of France is Paris."


def over_nccl(folder: Path, tokenizer: Path) -> list[float] | None:
    """Runs in a rank of its own device: logits of a prompt, and of one step."""
    world = jobs.connect(jobs.RunConfig(device="cuda"))
    found = jobs.ask_one(jobs.load(world, folder, tokenizer, device="cuda"), PROMPT, 4)
    world.close()
    return [found.tokens, found.logits] if world.is_leader else None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two CUDA devices")
def test_two_cards_equal_one(ranks: Ranks, folder: Path, tokenizer_file: Path) -> None:
    one, two = (ranks.run(mp, over_nccl, folder=folder, tokenizer=tokenizer_file)[0] for mp in (1, 2))
    assert one[0] == two[0]
    assert abs(one[1] - two[1]).max() <= 1e-4 * abs(one[1]).max()


def one_rank_of_nccl() -> list[list[float]]:
    """The collectives of a step on a real NCCL group, of one rank: what several would call."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    group = dist.new_group([0], backend="nccl")
    x = torch.arange(6.0, device="cuda").view(2, 3)
    parts = [torch.empty_like(x)]
    dist.all_reduce(x, group=group)
    dist.gather(x, parts, group=group, group_dst=0)
    world.close()
    return parts[0].tolist()


def test_the_collectives_of_a_step_on_nccl(ranks: Ranks) -> None:
    assert ranks.run(1, one_rank_of_nccl)[0] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_memory_is_returned(smollm2_file: Path) -> None:
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")  # cuBLAS keeps a workspace from its first product
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with LLM(smollm2_file, device="cuda") as llm:
        llm.generate(["Once upon a time"], max_gen_len=4)
        assert torch.cuda.memory_allocated() - before >= llm.loaded.weight_bytes
    del llm
    assert torch.cuda.memory_allocated() <= before


# ---- blocks that wait elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_streamed_equals_resident_within_the_budget(
    smollm2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"device": "cuda", "dtype": "fp32", "max_seq_len": 64, "max_batch_size": 3}
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
