"""Quantized while loading, over any number of ranks: the same weights, and no rank that waits for one that failed."""

from functools import lru_cache
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, random_tensors, tiny, write_meta
from ranks import Ranks
from running import infer

from llama_mp import LLM
from llama_mp.config import ModelConfig
from llama_mp.layout import global_shapes
from llama_mp.memory import is_quantized, run_time_shards, weight_bytes
from llama_mp.quant import dequantize

# Heads are whole groups; the hidden size of 90 is none, and 5 heads in one group or three leave slots of zeros.
CONFIGS = {
    "gqa": tiny("gqa", 8, 2, head_dim=32),
    "padded": tiny("padded", 5, 5, head_dim=32, hidden_dim=200),
    "tied": tiny("tied", 9, 3, head_dim=32, tied_embeddings=True),
}
PROMPT = [1, 17, 300, 4, 250, 99, 42, 330, 5, 6, 7]
QUANTS = ["int8", "int4"]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(config.name)
    return config, write_meta(folder, config, meta_tensors(hugging_face(config)), 2)


def put_together(config: ModelConfig, held: list[dict[str, np.ndarray]], quant: str) -> dict[str, torch.Tensor]:
    """The global matrices in fp32, of the ranks' parameters. What lies on several ranks is the same on each, and what
    fills up the rows is zero."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in global_shapes(config).items() if len(shape) == 2}
    for rank, parameters in enumerate(held):
        for name, shard in run_time_shards(config, rank, len(held), quant).items():
            if not is_quantized(shard, quant):
                continue
            matrix = dequantize(torch.from_numpy(parameters[name]), shard.shape[1], torch.float32)
            empty = torch.ones(shard.shape[0], dtype=torch.bool)
            for p in shard.placements:
                part = matrix[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)]
                there = whole[p.source][slice(*p.rows), slice(*p.cols)]
                assert torch.equal(there.where(~there.isnan(), part), part)
                there.copy_(part)
                empty[p.row : p.row + len(p.rows)] = False
            assert not matrix[empty].any()
    return {name: matrix for name, matrix in whole.items() if name != "tok_embeddings.weight"}


@lru_cache(maxsize=4)
def of_ranks(ranks: Ranks, mp: int, path: Path, tokenizer: Path) -> list[list[jobs.Quantized]]:
    """By way of quantizing, then by rank."""
    found = ranks.run(mp, jobs.quantized, path=path, tokenizer=tokenizer, prompt=PROMPT, quants=QUANTS)
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("mp", [2, 3, 4])
def test_weights_and_answers_are_those_of_one_rank(
    ranks: Ranks, model: tuple[ModelConfig, Path], tokenizer_file: Path, mp: int
) -> None:
    config, path = model
    for quant, alone, several in zip(QUANTS, *(of_ranks(ranks, n, path, tokenizer_file) for n in (1, mp)), strict=True):
        expected, found = (put_together(config, [one.parameters for one in held], quant) for held in (alone, several))
        for name, matrix in expected.items():
            assert torch.equal(found[name], matrix), f"{name} in {quant} over {mp} ranks"
        for rank, one in enumerate(several):
            assert one.weight_bytes == weight_bytes(config, rank, mp, "fp32", quant)
        error = np.abs(several[0].found.logits - alone[0].found.logits).max()
        assert error <= 1e-4 * np.abs(alone[0].found.logits).max()  # sums in another order
        assert several[0].found.tokens == alone[0].found.tokens


def test_weights_come_near_the_checkpoints_and_so_do_answers(
    ranks: Ranks, model: tuple[ModelConfig, Path], tokenizer_file: Path
) -> None:
    config, path = model
    oracle = hugging_face(config)
    tensors, logits = meta_tensors(oracle), oracle(torch.tensor([PROMPT])).logits[0].detach().numpy()
    for quant, bound, [alone] in zip(QUANTS, (0.01, 0.09), of_ranks(ranks, 1, path, tokenizer_file), strict=True):
        assert alone.weight_bytes == weight_bytes(config, 0, 1, "fp32", quant)
        for name, matrix in put_together(config, [alone.parameters], quant).items():
            assert (matrix - tensors[name]).norm() <= bound * tensors[name].norm(), f"{name} in {quant}"
        # several matrices deep the errors add up
        assert np.linalg.norm(alone.found.logits - logits) <= 5 * bound * np.linalg.norm(logits)


# ---- failures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("gqa"), MODELS["gqa"], random_tensors(MODELS["gqa"]), 1)


@pytest.mark.parametrize("failing", [[0], [1], [0, 2]])
@pytest.mark.parametrize("tensor", ["tok_embeddings", "layers.0.attention.wo", "layers.1.feed_forward.w2", "norm"])
def test_a_rank_that_fails_is_not_waited_for(
    ranks: Ranks, folder: Path, tokenizer_file: Path, tensor: str, failing: list[int]
) -> None:
    """Before, at and after the reductions of the row maxima: every rank names the first that failed."""
    said = ranks.run(
        3, jobs.fails_at, tensor=f"{tensor}.weight", ranks=failing, path=folder, tokenizer=tokenizer_file, quant="int8"
    )
    first = "" if failing[0] == 0 else f"rank {failing[0]}: "
    assert said == [f"RunError: {first}{tensor}.weight is gone"] * 3


@pytest.mark.parametrize(("quant", "value"), [("int8", float("nan")), ("int8", float("inf")), ("int4", 1e5)])
def test_what_is_no_weight_is_named(
    ranks: Ranks, tmp_path: Path, tokenizer_file: Path, quant: str, value: float
) -> None:
    config = CONFIGS["gqa"]
    tensors = random_tensors(config)
    tensors["layers.1.attention.wo.weight"][3, -1] = value  # of rank 1
    path = write_meta(tmp_path, config, tensors, 1)
    said = ranks.run(2, jobs.said_while_loading, path=path, tokenizer=tokenizer_file, quant=quant)
    assert "holds NaN or infinity in layers.1.attention.wo.weight: " in said[0] and said[1] == ""
    assert "try --dtype fp32 --quant none if" in said[0]


# ---- as a user gives it ----------------------------------------------------------------------------------------


def test_the_command_answers_as_python_does(tiny: Path, tokenizer_file: Path) -> None:
    text = "Once upon a time"
    done = infer("--ckpt_dir", tiny, "--quant", "int4", "--temperature", "0", "--max_gen_len", "8", "--prompt", text)
    assert done.code == 0, done.stderr
    with LLM(tiny, quant="int4", device="cpu") as llm:
        [answer] = llm.generate([text], temperature=0, max_gen_len=8)
    assert answer["tokens"] and done.stdout == answer["completion"] + "\n"
