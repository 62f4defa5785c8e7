"""The peak of a pass as planned, against what torch's own profiler saw allocated."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jobs
import pytest
import torch
from ranks import Ranks

import llama_mp.activations
import llama_mp.kernels
import llama_mp.layers
import llama_mp.model
from llama_mp.activations import Sizes, choice_bytes, prefill_bytes, rotation_bytes, sizes_of
from llama_mp.cache import KVCache
from llama_mp.config import ModelConfig, SamplingConfig
from llama_mp.dtypes import DTYPES
from llama_mp.layout import Shard
from llama_mp.memory import hidden_unit, is_quantized, run_time_shards
from llama_mp.model import build, fill
from llama_mp.parallel import reduce
from llama_mp.quant import pack
from llama_mp.runner import Runner
from llama_mp.sampling import Row, sample

CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "vocab_size": 9000, "context_length": 1024, "embedding_axis": 0}
MODELS = {
    "mha": ModelConfig(name="mha", dim=512, num_heads=8, num_kv_heads=8, hidden_dim=1408, **SHAPE),
    "gqa": ModelConfig(name="gqa", dim=512, num_heads=16, num_kv_heads=4, hidden_dim=2048, **SHAPE),
    "narrow": ModelConfig(name="narrow", dim=1024, num_heads=16, num_kv_heads=16, hidden_dim=512, **SHAPE),
}
LENGTH = 600
SMALL_CHANGE = 200_000  # what the plan leaves out: positions, ids, a row of logits, blocks of scores of one thread


def allocated(act: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that `act` had allocated at once beside what was there, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, result


def settled_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks once nobody else holds it: gloo's threads let go of a tensor when it suits them, and what
    they keep would be counted with what the pass made."""
    own = x._use_count()
    reduce(x)
    deadline = time.monotonic() + 10
    while x._use_count() > own:
        assert time.monotonic() < deadline, "gloo keeps a tensor for ever"
        time.sleep(0.0002)
    return x


def random_weights(shard: Shard, dtype: torch.dtype, quant: str) -> torch.Tensor:
    weights = torch.rand(shard.shape).to(dtype) / 99
    return pack(weights, quant) if is_quantized(shard, quant) else weights


def peaks(name: str, dtype: str, fast_bf16: str | None, quant: str = "none") -> dict[str, int] | None:
    """In a rank: the peaks of the passes of a prompt, of the table of rotations and of a choice."""
    world = jobs.connect(jobs.RunConfig(device="cpu"))
    torch.set_num_threads(1)
    config, kind, mp = MODELS[name], DTYPES[dtype], world.size
    model = build(config, mp, quant, kind)
    shards = run_time_shards(config, world.rank, mp, quant)
    fill(model, {n: random_weights(shard, kind, quant) for n, shard in shards.items()})
    cache = KVCache.allocate(config, mp, num_slots=4, max_seq_len=LENGTH, dtype=kind, device=CPU)
    rotations, runner = allocated(lambda: Runner(config, model, cache))
    in_bf16 = patch.object(llama_mp.kernels, "fast_bf16", lambda: fast_bf16)
    settled = [patch.object(module, "reduce", settled_sum) for module in (llama_mp.model, llama_mp.layers)]
    with in_bf16, settled[0], settled[1]:
        runner.prefill([1, 2], slot=0, start=0, all_logits=False)  # what is made once, by the first pass
        first, _ = allocated(lambda: runner.prefill([7] * 400, slot=0, start=0, all_logits=False))
        second, _ = allocated(lambda: runner.prefill([7] * 200, slot=0, start=400, all_logits=False))
        runner.tokens_S[:4] = torch.tensor([1, 2, 3, 4])
        _, logits = allocated(lambda: runner.decode([10, 20, 30, 40]))
    world.close()
    if not world.is_leader:
        return None
    rows = [Row(sampling=SamplingConfig(temperature=1.0, top_p=1.0), uniform=0.5)] * 4
    chosen, _ = allocated(lambda: sample(logits, rows))
    return {"rotations": rotations, "first": first, "second": second, "choice": chosen + logits.nbytes}


@pytest.mark.parametrize(("dtype", "fast_bf16"), [("fp32", None), ("bf16", None), ("bf16", "pairs"), ("bf16", "torch")])
@pytest.mark.parametrize(
    ("name", "mp"),
    [
        *((name, 1) for name in MODELS),
        ("gqa", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("mha", "narrow")),
    ],
)
def test_a_pass_holds_what_is_planned(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, fast_bf16: str | None, mp: int
) -> None:
    """On machines whose cores multiply bf16 and on others."""
    monkeypatch.setattr(llama_mp.activations, "fast_bf16", lambda: fast_bf16)
    config = MODELS[name]
    found = ranks.run(mp, peaks, name=name, dtype=dtype, fast_bf16=fast_bf16)[0]
    sizes = sizes_of(config, mp, dtype, on_cpu=True)
    check_passes(found, sizes)
    assert found["choice"] == pytest.approx(choice_bytes(sizes, 4), rel=0.02, abs=SMALL_CHANGE)
    table = LENGTH * config.head_dim * 4
    assert rotation_bytes(config, LENGTH) == table
    assert table <= found["rotations"] <= 2 * table + SMALL_CHANGE  # the angles beside it, for a moment


def check_passes(found: dict[str, int], sizes: Sizes) -> None:
    for peak, num_tokens, length in ((found["first"], 400, 400), (found["second"], 200, 600)):
        planned = prefill_bytes(sizes, num_tokens, length)
        late = num_tokens * sizes.C * sizes.e if sizes.mp > 1 else 0  # by how long the sum stays is chance
        assert 0.98 * planned - late - SMALL_CHANGE <= peak <= 1.02 * planned + SMALL_CHANGE


@pytest.mark.parametrize(
    ("dtype", "quant", "fast_bf16"),
    [("fp16", "none", "pairs"), ("bf16", "int8", "torch"), ("fp16", "int8", "torch"), ("bf16", "int4", "pairs")],
)
def test_a_pass_with_weights_of_another_type_holds_what_is_planned(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, dtype: str, quant: str, fast_bf16: str
) -> None:
    """Our own products take no fp16, and those of a run in bf16 are torch's where cores multiply tiles."""
    monkeypatch.setattr(llama_mp.activations, "fast_bf16", lambda: fast_bf16)
    found = ranks.run(1, peaks, name="gqa", dtype=dtype, fast_bf16=fast_bf16, quant=quant)[0]
    check_passes(found, sizes_of(MODELS["gqa"], 1, dtype, hidden_unit(quant), on_cpu=True, quant=quant))
