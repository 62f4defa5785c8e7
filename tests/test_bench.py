"""The bench: what is refused, what is printed in which order, and whether its figures agree with each other."""

import json
import sys
from pathlib import Path

import pytest
import torch
from jobs import greedy_of_random_weights
from ranks import Ranks
from running import ROOT, Done, run, torchrun

from llama_mp.bench import BenchFlags, find_model, lines
from llama_mp.ceiling import Ceiling, duration
from llama_mp.cli import parse
from llama_mp.config import load_size
from llama_mp.errors import RequestError
from llama_mp.memory import Workload, rank_memory

BENCH = ROOT / "launch" / "bench.py"
CONTRACT = (
    "ttft_s, tpot_s, decode_tokens_per_s, prefill_tokens_per_s, achieved_gb_per_s, ceiling_gb_per_s, "
    "peak_memory_bytes, planned_memory_bytes"
)
SHORT = ("--random_weights", "--prompt_len", "16", "--gen_len", "6")


def bench(*flags: str | Path) -> Done:
    return run(sys.executable, BENCH, *flags)


def result_of(done: Done) -> dict:
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refusal(*argv: str) -> str:
    with pytest.raises(RequestError) as refused:
        flags = parse(BenchFlags, argv)
        flags.completed(find_model(flags).config)
    return str(refused.value)


def test_prints_the_ceiling_first_and_the_contract_last(tmp_path: Path) -> None:
    done = bench(*SHORT, "--batch_size", "2", "--json", tmp_path / "result.json", "--record", tmp_path / "runs")
    result = result_of(done)
    said = done.stdout.splitlines()
    assert "the ceiling is" in said[0] and not any("ceiling is" in line for line in said[1:])
    assert set(CONTRACT.split(", ")) <= set(result)
    assert all(result[key] > 0 for key in CONTRACT.split(", "))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["size"], result["weights"], result["mp"], result["dtype"]) == ("smollm2-135m", "random", 1, "bf16")
    assert (result["batch_size"], result["seq_len"], result["repetitions"]) == (2, 22, 3)
    assert result["deterministic"] is False and "tpot_to_ordinary" not in result
    assert result["cuda_graphs"] is False  # on a CPU
    (record,) = (tmp_path / "runs").iterdir()
    recorded = json.loads(record.read_text())
    assert result.items() <= recorded.items()
    assert f"recorded in {record}" in done.stderr


@pytest.mark.slow
def test_figures_agree_with_each_other() -> None:
    result = result_of(bench(*SHORT, "--dtype", "fp32"))
    assert result["decode_tokens_per_s"] * result["tpot_s"] == pytest.approx(1, rel=1e-3)
    assert result["fraction_of_ceiling"] == pytest.approx(
        result["achieved_gb_per_s"] / result["ceiling_gb_per_s"], 1e-3
    )
    assert result["prefill_tokens_per_s"] == pytest.approx(16 / result["ttft_s"], rel=0.2)
    config = load_size("smollm2-135m")
    planned = rank_memory(config, 1, Workload(dtype="fp32", seq_len=22, device="cpu"))
    assert result["planned_memory_bytes"] == planned.allocated_bytes
    read = result["achieved_gb_per_s"] * 1e9 * result["tpot_s"]  # of a step: the weights, once, and a little cache
    assert planned.weights_bytes < read < planned.weights_bytes + planned.kv_cache_bytes
    assert result["decode_tokens_per_s"] == pytest.approx(sorted(result["decode_tokens_per_s_of_each"])[1], rel=1e-3)


@pytest.mark.parametrize("start", [pytest.param("torchrun", marks=pytest.mark.slow), "--mp"])
def test_several_ranks_measure_together(start: str) -> None:
    done = torchrun(2, BENCH, *SHORT) if start == "torchrun" else bench("--mp", "2", *SHORT)
    result = result_of(done)
    assert result["mp"] == 2 and done.stdout.startswith("2 x ")
    assert [line[:1] for line in done.stdout.splitlines()].count("{") == 1
    config = load_size("smollm2-135m")
    planned = rank_memory(config, 2, Workload(dtype="bf16", seq_len=22, device="cpu"))
    assert result["planned_memory_bytes"] == planned.allocated_bytes


@pytest.mark.slow
def test_the_cost_of_the_same_bits_is_measured() -> None:
    done = bench("--mp", "2", "--deterministic", *SHORT)
    result = result_of(done)
    assert result["deterministic"] is True and ", bf16, deterministic on " in done.stdout
    assert result["ttft_to_ordinary"] > 0 and result["tpot_to_ordinary"] > 0
    ratios = (
        f"take {result['ttft_to_ordinary']:.2f} times the ordinary mode's TTFT, {result['tpot_to_ordinary']:.2f} times"
    )
    assert ratios in done.stdout
    workload = Workload(dtype="bf16", seq_len=22, device="cpu", deterministic=True)
    assert result["planned_memory_bytes"] == rank_memory(load_size("smollm2-135m"), 2, workload).allocated_bytes


@pytest.mark.slow
def test_a_checkpoint_needs_no_tokenizer(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "alone"
    folder.mkdir(parents=True)
    for file in tiny.iterdir():
        if file.name != "tokenizer.model":
            (folder / file.name).symlink_to(file)
    result = result_of(bench("--ckpt_dir", folder, "--prompt_len", "8", "--gen_len", "4"))
    assert result["weights"] == "checkpoint" and result["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gen_len", "1"], "--gen_len is 1, but must be at least 2"),
        (["--prompt_len", "0"], "--prompt_len is 0"),
        (["--random_weights", "--ckpt_dir", "x"], "--random_weights and --ckpt_dir are both given"),
        (["--max_seq_len", "200"], "--max_seq_len is 200, below --prompt_len 128 + --gen_len 128"),
        (["--random_weights", "--size", "7B", "--gen_len", "2000"], "are 2128 tokens, above 2048, the context of 7B"),
        (["--random_weights", "--size", "7b", "--max_seq_len", "3000"], "--max_seq_len is 3000, above 2048"),
        (["--json", "/no/such/folder/f.json"], "no folder /no/such/folder"),
        (["--record", "/dev/null/runs"], "is no folder that can be written"),
        (["--temperature", "0"], "unknown flag --temperature"),
    ],
)
def test_refusals(argv: list[str], said: str) -> None:
    assert said in refusal(*argv)


def test_refusals_come_before_the_ceiling() -> None:
    assert "12 ranks for model" in bench("--random_weights", "--mp", "12").refusal
    assert "no checkpoint of 65B" in bench("--size", "65B").refusal


def test_rows_wait_where_there_are_fewer_slots() -> None:
    flags = parse(BenchFlags, ["--random_weights", "--batch_size", "4", "--max_batch_size", "2"])
    assert flags.completed(load_size("7B")).max_batch_size == 2
    assert flags.completed(load_size("7B")).max_seq_len == 256
    assert parse(BenchFlags, ["--batch_size", "12"]).completed(load_size("7B")).max_batch_size == 12


def test_random_weights_give_the_same_tokens_at_every_degree_and_again(ranks: Ranks) -> None:
    alone, over_3 = (ranks.run(mp, greedy_of_random_weights, size="smollm2-135m", num_layers=3)[0] for mp in (1, 3))
    assert alone[0] == alone[1] == over_3[0] == over_3[1]
    assert len(alone[0]) == 8


def test_lines_hold_the_figures() -> None:
    keys = CONTRACT.split(", ")
    result = dict.fromkeys(keys, 2e9) | {"num_prompts": 3, "prompt_len": 5, "gen_len": 7, "repetitions": 3}
    text = "\n".join(lines(result | {"ttft_s": 0.25, "tpot_s": 0.125, "fraction_of_ceiling": 0.5}))
    for part in ("3 x (5 + 7) tokens", "TTFT 0.25 s", "TPOT 0.125 s", "50% of the ceiling", "planned 2.00 GB"):
        assert part in text


def test_ceiling_is_the_best_that_was_seen() -> None:
    assert Ceiling(stream_rate=2.0, product_rate=3.0, product="p").rate == 3.0
    assert Ceiling(stream_rate=2.0, product_rate=None, product=None).rate == 2.0


def test_ranks_that_read_in_turn_are_not_counted_as_reading_at_once() -> None:
    in_turn, at_once = [[1e9, 10.0, 11.0], [1e9, 11.0, 12.0]], [[1e9, 10.0, 11.0], [1e9, 10.0, 11.5]]
    assert duration(in_turn, torch.device("cpu")) == 2.0
    assert duration(at_once, torch.device("cpu")) == 1.5
    assert duration(in_turn, torch.device("cuda")) == 1.0
