"""What --deterministic is refused with, how its parameters are named and shared out, and what its plan says."""

from pathlib import Path

import pytest
from factory import MODELS, tiny
from running import ROOT, infer
from test_plan import plan, planned

from llama_mp.advice import Device, advice
from llama_mp.config import RunConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.memory import (
    Workload,
    cache_bytes,
    check_layout,
    decode_read_bytes,
    padding_share,
    parameters,
    weight_bytes,
)
from llama_mp.plan import PlanFlags
from llama_mp.virtual import degrees, played_by, slot_length, virtual_shards


def test_each_rank_plays_neighbours() -> None:
    assert [list(played_by(rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(played_by(0, 1)) == list(range(8)) and list(played_by(7, 8)) == [7]


@pytest.mark.parametrize("name", MODELS)
def test_all_ranks_together_hold_the_same_pieces_at_every_degree(name: str) -> None:
    def placed(mp: int) -> list[tuple]:
        held = [shard for rank in range(mp) for shard in virtual_shards(MODELS[name], rank, mp).values()]
        return [(shard.shape, shard.placements) for shard in held if len(shard.shape) == 2]

    assert sorted(placed(1), key=repr) == sorted(placed(2), key=repr) == sorted(placed(8), key=repr)
    norms = [n for n, shard in virtual_shards(MODELS[name], 0, 1).items() if len(shard.shape) == 1]
    assert norms == [
        *(f"layers.{i}.{norm}_norm.weight" for i in range(2) for norm in ("attention", "ffn")),
        "norm.weight",
    ]


def test_slots_are_aligned() -> None:
    config = tiny("odd", 8, 8, head_dim=10)
    assert [slot_length(config, 135, size) for size in (2, 4)] == [144, 136]
    assert slot_length(load_size("7B"), 135, 2) == 135


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"quant": "int8"}, "--deterministic and --quant int8 are both given: drop one"),
        ({"offload": "disk"}, "--deterministic and --offload disk are both given: drop one"),
    ],
)
def test_what_rounds_otherwise_is_refused(flags: dict[str, str], said: str) -> None:
    for kind in (RunConfig, PlanFlags):
        with pytest.raises(RequestError, match=f"^{said}$"):
            kind(deterministic=True, **flags)


def test_other_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MP_THREADS", "1")
    RunConfig(deterministic=True)
    monkeypatch.setenv("LLAMA_MP_THREADS", "2")
    with pytest.raises(RequestError, match="one thread, and LLAMA_MP_THREADS is 2: unset it"):
        RunConfig(deterministic=True)


def test_other_degrees_are_refused() -> None:
    assert degrees(MODELS["gqa"], deterministic=True) == [1, 2, 4, 8]
    assert degrees(tiny("few", 4, 4), deterministic=True) == []
    check_layout(MODELS["heads-13-13"], 8, "none", deterministic=True)
    with pytest.raises(RequestError, match=r"over 3 ranks: .* do not divide over them; use 1, 2, 4 or 8 ranks"):
        check_layout(MODELS["gqa"], 3, "none", deterministic=True)
    with pytest.raises(RequestError, match="16 ranks for model gqa with 8 attention heads"):
        check_layout(MODELS["gqa"], 16, "none", deterministic=True)
    with pytest.raises(RequestError, match="into 8 parts, and few has 4 attention heads: leave it out"):
        check_layout(tiny("few", 4, 4), 2, "none", deterministic=True)


def test_a_run_is_refused_before_torch(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos._exit(99)\n")
    flags = ("--ckpt_dir", tiny, "--prompt", "Hi", "--deterministic")
    assert "over 3 ranks" in infer("--mp", "3", *flags, PYTHONPATH=f"{tmp_path}:{ROOT}").refusal


def test_the_plan_counts_padding_at_every_degree() -> None:
    config, of_8 = load_size("33B"), {"mp": 8, "quant": "none", "dtype": "fp16"}
    for mp in (1, 2, 4, 8):
        workload = Workload(dtype="fp16", deterministic=True)
        held, one = parameters(config, 0, mp, "none", "fp16", True), parameters(config, 0, *of_8.values())
        norms = 8 // mp - 1
        assert held.block == 8 // mp * one.block - norms * 2 * config.dim * 2
        assert cache_bytes(config, mp, workload) == 8 // mp * cache_bytes(config, 8, workload)
        assert padding_share(config, mp, "none", True) == padding_share(config, 8)
    assert weight_bytes(config, 0, 1, "fp16") < parameters(config, 0, 1, "none", "fp16", True).block * config.num_layers


def test_the_plan_reads_the_weights_for_each_row() -> None:
    config, rows = load_size("7B"), [Workload(dtype="fp16", batch_size=n, deterministic=True) for n in (1, 4)]
    assert decode_read_bytes(config, 2, rows[1]) == 4 * decode_read_bytes(config, 2, rows[0])


def test_advice_keeps_to_what_runs() -> None:
    workload = Workload(dtype="fp32", deterministic=True, batch_size=4)
    options = advice(load_size("33B"), 1, workload, Device(40_000_000_000, 1e12))
    assert options
    assert not any(flag in option.flags for option in options for flag in ("--quant", "--offload"))
    assert {option.flags.split()[1] for option in options if "--mp" in option.flags} <= {"2", "4", "8"}


def weight_bytes_of_four(size: str) -> int:
    """In fp16, of the virtual ranks of MP 2; norms once."""
    config = load_size(size)
    return 4 * weight_bytes(config, 0, 8, "fp16") - 3 * 2 * config.dim * (2 * config.num_layers + 1)


def test_the_plan_says_so() -> None:
    asked = ("--size", "33B", "--mp", "2", "--deterministic")
    told = planned(*asked)
    assert told["deterministic"] is True and told["valid_mp"] == [1, 2, 4, 8]
    assert told["per_rank"]["weights_bytes"] == weight_bytes_of_four("33B")
    said = plan(*asked).stdout
    assert "33B over 2 ranks, batch 1, length 2048, fp16, deterministic" in said
    assert "num_heads 56" in said and "ranks that work: 1, 2, 4, 8" in said
    assert "over 3 ranks" in plan(*asked[:2], "--mp", "3", asked[-1]).refusal
