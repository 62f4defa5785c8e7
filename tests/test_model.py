"""What building a model must not cost. What it computes is compared with Hugging Face's in test_parity.py."""

import sys
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks

from llama_mp import quant
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig, RunConfig, load_size
from llama_mp.memory import is_quantized, run_time_shards
from llama_mp.model import Block, build, fill
from llama_mp.parallel import connect
from llama_mp.runner import Runner


def check_building() -> None:
    """In a rank in which nothing has run."""
    world = connect(RunConfig(device="cpu"))
    model = build(load_size("smollm2-135m"), world.size)
    assert all(parameter.is_meta for parameter in model.parameters())
    heavy = {"torch._dynamo", "sympy"} & set(sys.modules)
    world.close()
    assert not heavy, f"{heavy} imported: seconds and 70 MB of every rank"


@pytest.mark.parametrize("mp", [1, 2])
def test_a_model_is_built_without_torchs_compiler(mp: int) -> None:
    young = Ranks()
    young.run(mp, check_building)
    young.stop()


def logits_in_two_calls_and_one_by_one(bits: str, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """In a rank: of three steps of two rows, with each block in two calls, and by its modules."""
    world = connect(RunConfig(device="cpu"))
    shape = {"dim": 96, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "hidden_dim": 160, "vocab_size": 300}
    config, generator = ModelConfig(name="a", head_dim=32, **shape), torch.Generator().manual_seed(0)
    parameters = {}
    for name, shard in run_time_shards(config, world.rank, world.size, bits).items():
        made = (torch.randn(shard.shape, generator=generator) / 9).to(dtype)
        parameters[name] = quant.pack(made, bits) if is_quantized(shard, bits) else made
    model, found, original = build(config, world.size, bits, dtype), [], Block.halves
    fill(model, parameters)
    for halves in (original, lambda _: None):
        cache = KVCache.allocate(config, world.size, num_slots=2, max_seq_len=80, dtype=dtype, device=world.device)
        with patch.object(Block, "halves", halves):
            runner = Runner(config, model, cache)
            assert (model.layers[0].halves() is None) == (halves is not original)
            found.append([])
            for i in range(3):
                runner.tokens_S[:] = torch.tensor([5, 6 + i])
                found[-1].append(runner.decode([i, 70 + i]))
    world.close()
    return found


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize(
    ("bits", "dtype"), [("none", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)]
)
def test_a_block_in_two_calls_is_its_modules_to_the_bit(ranks: Ranks, mp: int, bits: str, dtype: torch.dtype) -> None:
    together, apart = ranks.run(mp, logits_in_two_calls_and_one_by_one, bits=bits, dtype=dtype)[0]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
