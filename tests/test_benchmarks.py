"""The benchmarks, small: they run, compare equal work, and tell what they compared."""

import json
import sys
from pathlib import Path

import pytest
from running import ROOT, Done, run

from llama_mp.tokenizer_files import read_tokenizer

TINY = ("--layers", "1", "--dim", "64", "--rounds", "1", "--degrees", "3:2")


QUALITY = str(ROOT / "benchmarks" / "quality.py")


def bench(*flags: str | Path) -> Done:
    return run(sys.executable, ROOT / "benchmarks" / "reshard.py", *TINY, *flags)


@pytest.mark.slow
def test_each_way_is_measured_and_the_last_line_is_json(tmp_path):
    done = bench("--folder", tmp_path, "--cold", "false")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["degrees"]["3:2"]["cached"]
    for name in ("reshard", "plain"):
        [whole_s], [work_s] = found[f"{name}_whole_s"], found[f"{name}_work_s"]
        assert 0 < work_s < whole_s
        assert found[f"{name}_work_s_to_cp"] > 0
        assert 10**6 < found[f"{name}_memory_bytes"] < 10**9
    assert len(found["cp_s"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_stays_in_memory_is_not_called_cold():
    done = bench("--folder", "/dev/shm")  # always in memory
    assert done.code == 1
    assert "stays in memory on this file system" in done.error


def test_help_shows_the_degrees_as_they_are_given():
    assert "(default: 1:4 4:1 8:2 3:2)" in bench("--help").stdout


def test_a_folder_without_room_is_refused(tmp_path):
    refusal = run(sys.executable, ROOT / "benchmarks" / "reshard.py", "--dim", "65536", "--folder", tmp_path).refusal
    assert "GB free, and 3 x " in refusal


@pytest.mark.slow
def test_sums_over_the_ranks_are_measured_by_both_ways():
    script = ROOT / "benchmarks" / "all_reduce.py"
    done = run(sys.executable, script, "--ranks", "2", "--kib", "8", "--kib", "64", "--rounds", "1")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["ranks"]["2"]
    assert list(found) == ["8", "64"]
    for figures in found.values():
        assert figures["ratio"] == pytest.approx(figures["gloo_us"] / figures["shared_memory_us"], rel=0.1)


@pytest.mark.slow
def test_blocks_from_the_disk_are_measured_beside_the_disk(tmp_path):
    flags = ("--size", "smollm2-135m", "--layers", "12", "--budget_gib", "0.1", "--pairs", "1", "--gen_len", "2")
    done = run(sys.executable, ROOT / "benchmarks" / "offload.py", *flags, "--folder", tmp_path)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["disk_rate"]["ratio"] > 0
    for part in ("disk_written", "disk_found"):
        assert 0.5 < result[part]["peak_to_budget"] < 1.3
        assert result[part]["gb_per_token"] < result[part]["weights_gb"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fewer_bits_cost_little_quality():
    done = run(sys.executable, QUALITY, "--max_tokens", "2048")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    kinds = result["kinds"]
    assert list(kinds) == ["fp32", "bf16", "int8", "int4"] and result["tokens"] == 2048
    assert kinds["fp32"]["of_fp32"] == 1 and 10 < kinds["fp32"]["perplexity"] < 50  # of 49152 tokens
    for kind, bound in (("bf16", 0.01), ("int8", 0.01), ("int4", 0.08)):
        assert abs(kinds[kind]["of_fp32"] - 1) <= bound
    sizes = [kind["weight_bytes"] for kind in kinds.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_the_text_is_long_enough(smollm2_file):
    tokenizer, _ = read_tokenizer(smollm2_file, smollm2_file, "auto")
    text = (ROOT / "tests" / "data" / "alice.txt").read_text(encoding="utf-8")
    assert len(tokenizer.encode(text, bos=False)) >= 20_000


@pytest.mark.slow
def test_the_cpu_is_measured_beside_its_peers():
    flags = ("--model", "smollm2", "--rounds", "1", "--prompt_len", "16", "--gen_len", "4")
    done = run(sys.executable, ROOT / "benchmarks" / "cpu.py", *flags)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["models"]["smollm2"]
    ours = [f"ours {kind}{ranks}" for kind in ("bf16", "int8", "int4") for ranks in ("", " MP 2")]
    assert {"kernel", "Hugging Face bf16", *ours} <= set(found["rates"])
    rates = [found["rates"][name]["decode_tokens_per_s"] for name in ("ours bf16", "Hugging Face bf16")]
    assert found["ratios"]["decode bf16 of Hugging Face"] == pytest.approx(rates[0] / rates[1], rel=0.01)
