"""--deterministic: the same bits over 1, 2, 4 and 8 ranks, from any format and degree, whatever else runs."""

from functools import cache
from pathlib import Path

import gguf
import jobs
import numpy as np
import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, tiny, write_gguf, write_hf, write_meta
from ranks import Ranks
from test_activations import SMALL_CHANGE, allocated
from test_parity import PROMPT, oracle, relative_error

from llama_mp.activations import rotation_bytes
from llama_mp.config import ModelConfig, SamplingConfig
from llama_mp.deterministic import DeterministicRunner, allocate_cache, build_deterministic
from llama_mp.dtypes import DTYPES
from llama_mp.memory import Workload, pass_bytes, rank_memory
from llama_mp.model import fill
from llama_mp.offload import weight_bytes_of
from llama_mp.virtual import virtual_shards

DEGREES = (1, 2, 4, 8)
NUM_STEPS = 4
KNOWN = MODELS | {"heads-of-10": tiny("heads-of-10", 8, 8, head_dim=10)}
GGUF_KIND = gguf.GGMLQuantizationType.F32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deterministic")


@cache
def sources(name: str, root: Path) -> list[Path]:
    """The same weights in Meta's format of three degrees, in Hugging Face's and in GGUF."""
    config = KNOWN[name]
    model = hugging_face(config)
    tensors = meta_tensors(model)
    paths = [write_meta(root / name / f"mp{mp}", config, tensors, mp) for mp in (1, 2, 3)]
    return [*paths, write_hf(root / name / "hf", model), write_gguf(root / f"{name}.gguf", config, tensors, GGUF_KIND)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "rope"])
def test_the_same_bits_at_every_degree(ranks: Ranks, root: Path, tokenizer_file: Path, name: str, dtype: str) -> None:
    paths, found = sources(name, root), {}
    asked = {"tokenizer": tokenizer_file, "prompt": PROMPT, "num_steps": NUM_STEPS, "dtype": dtype}
    for mp in DEGREES:
        chosen = paths if (mp, dtype) == (1, "fp32") else paths[2:3]
        found[mp] = ranks.run(mp, jobs.every_bit, paths=chosen, **asked)[0]
    first = found[1][0]
    assert first.dtype == np.float32 and first.shape == (len(PROMPT) + NUM_STEPS, MODELS[name].vocab_size)
    for mp, logits in found.items():
        assert [one.tobytes() == first.tobytes() for one in logits] == [True] * len(logits), f"MP {mp}"
    expected, tokens = oracle(MODELS[name])
    if dtype == "fp32":
        assert relative_error(first[: len(PROMPT)], expected) <= 1e-4
        assert first[len(PROMPT) - 1 :].argmax(-1).tolist() == tokens[: NUM_STEPS + 1]


def prompt_of(length: int) -> list[int]:
    return [(7 * i * i + 3 * length) % 331 for i in range(length)]


@pytest.mark.parametrize("name", ["gqa", "heads-of-10"])
def test_the_same_bits_in_any_company(ranks: Ranks, root: Path, tokenizer_file: Path, name: str) -> None:
    """Prompts together and each alone. The cache is of 135 positions: of heads of 40 bytes each, so that slots are not
    aligned unless they are made so."""
    samplings = [SamplingConfig(temperature=0, max_gen_len=n, logprobs=True, prompt_logprobs=n > 5) for n in (9, 5, 7)]
    samplings += [SamplingConfig(temperature=0, max_gen_len=5, logprobs=True, repetition_penalty=1.3)]
    prompts = [prompt_of(length) for length in (70, 97, 1, 130)]
    asked = {"path": sources(name, root)[0], "tokenizer": tokenizer_file, "prompts": prompts, "samplings": samplings}
    done = [ranks.run(mp, jobs.batch, **asked, num_slots=3, deterministic=True)[0] for mp in (1, 2)]
    found = [[(r.tokens, r.logprobs, r.prompt_logprobs) for r in requests] for requests in done]
    assert found[0] == found[1]
    assert found[0][:4] == found[0][4:]
    assert [len(tokens) for tokens, _, _ in found[0][:4]] == [9, 5, 7, 5]


def test_scores_of_a_prompt_change_nothing_else(ranks: Ranks, root: Path, tokenizer_file: Path) -> None:
    sampling = {"temperature": 0, "max_gen_len": 6, "logprobs": True}
    samplings = [SamplingConfig(**sampling, prompt_logprobs=scored) for scored in (False, True)]
    asked = {"path": sources("gqa", root)[0], "tokenizer": tokenizer_file, "prompts": [prompt_of(150)] * 2}
    done = ranks.run(1, jobs.batch, **asked, samplings=samplings, num_slots=1, deterministic=True)[0]
    assert done[0].logprobs == done[1].logprobs and done[0].tokens == done[1].tokens
    assert len(done[1].prompt_logprobs) == 149


# ---- the real model ----------------------------------------------------------------------------------------------


def bits_of_smollm2(ranks: Ranks, path: Path, mp: int, dtype: str, num_prompt: int, num_steps: int) -> bytes:
    prompt = [(7 * i * i + 3) % 49152 for i in range(num_prompt)]
    asked = {"paths": [path], "tokenizer": path, "prompt": prompt, "num_steps": num_steps, "dtype": dtype}
    [logits] = ranks.run(mp, jobs.every_bit, **asked)[0]
    assert logits.shape == (num_prompt + num_steps, 49152)
    return logits.tobytes()


def test_the_real_model(ranks: Ranks, smollm2_file: Path) -> None:
    asked = {"dtype": "bf16", "num_prompt": 20, "num_steps": 2}
    found = [bits_of_smollm2(ranks, smollm2_file, mp, **asked) for mp in (1, 4)]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_real_model_over_a_long_prompt(ranks: Ranks, smollm2_file: Path, dtype: str) -> None:
    asked = {"dtype": dtype, "num_prompt": 200, "num_steps": 16}
    alone, *others = (bits_of_smollm2(ranks, smollm2_file, mp, **asked) for mp in DEGREES)
    assert [other == alone for other in others] == [True] * 3


# ---- the plan ----------------------------------------------------------------------------------------------------


def held_and_peaks(config: ModelConfig, dtype: torch.dtype, length: int) -> tuple[int, int, int]:
    """In a rank: bytes of its weights and its cache, and the peak of the passes over a prompt."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    torch.set_num_threads(1)
    model, cpu = build_deterministic(config, world.size, precision=dtype), torch.device("cpu")
    wanted = virtual_shards(config, world.rank, world.size)
    fill(model, {name: torch.rand(shard.shape).to(dtype) / 99 for name, shard in wanted.items()})
    cache = allocate_cache(config, world.size, num_slots=1, max_seq_len=length, dtype=dtype, device=cpu)
    runner = DeterministicRunner(config, model, cache)
    runner.prefill([1, 2], slot=0, start=0, all_logits=False)  # what is made once, by the first pass
    peak, _ = allocated(lambda: runner.prefill([7] * (length - 1), slot=0, start=0, all_logits=False))
    world.close()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.keys}
    return weight_bytes_of(model), 2 * sum(storages.values()), peak


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_held_is_what_is_planned(ranks: Ranks, dtype: str, mp: int) -> None:
    config, length = tiny("wide", 10, 5, head_dim=32, hidden_dim=1000, vocab_size=900, tied_embeddings=True), 200
    weights, cache, peak = ranks.run(mp, held_and_peaks, config=config, dtype=DTYPES[dtype], length=length)[0]
    workload = Workload(dtype=dtype, seq_len=length, device="cpu", deterministic=True)
    planned = rank_memory(config, mp, workload)
    assert (weights, cache) == planned[:2]
    passes = pass_bytes(config, mp, workload) - rotation_bytes(config, length)
    assert 0.5 * passes < peak < passes + SMALL_CHANGE
