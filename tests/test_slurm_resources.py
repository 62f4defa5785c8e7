"""What a job needs: held against the plan's own functions, and against formulas worked out here."""

from pathlib import Path
from typing import Any

import pytest
from slurm_jobs import empty_home, job, planned, refusal, words_after

from llama_mp.advice import Device, smallest_degree
from llama_mp.cli import parse
from llama_mp.config import load_size
from llama_mp.gpus import find_gpu
from llama_mp.memory import Workload, host_bytes
from llama_mp.slurm.flags import JOBS, seconds_of
from llama_mp.slurm.request import job_of

BUILT_IN_TOKENS = 44 + 128  # of the longest prompt in bytes, and of its answer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


# ---- GPUs and nodes ------------------------------------------------------------------------------------------------


def test_without_a_card_there_is_a_gpu_for_each_shard_and_it_is_said() -> None:
    asked, notes = job_of("infer", parse(JOBS["infer"], ["--size", "65B", "--dry_run"]), "launch/submit.py")
    assert (asked.nodes, asked.gpus_per_node, asked.name) == (1, 8, "infer-65B")
    assert words_after(asked) == "launch/infer.py --size 65B --device cuda --mp 8"
    assert [note.split(":")[0] for note in notes] == [
        "neither --prompt nor --prompts_file is given",
        f"no checkpoint of 65B at {Path.home()}/llama-mp/65B",
        "8 GPUs",
    ]


@pytest.mark.parametrize("name", ["RTX 3090", "A100 40GB", "A100 80GB", "H200"])
def test_as_many_gpus_as_the_plan_says(name: str) -> None:
    card = find_gpu(name)
    workload = Workload(dtype="fp16", batch_size=3, seq_len=BUILT_IN_TOKENS)
    fewest = smallest_degree(load_size("65B"), 1, workload, Device(card.usable_bytes))
    for asked in (planned("--gpu", name), planned("--vram_gib", str(card.memory_bytes / 2**30)), planned(gpu=name)):
        assert (asked.nodes, asked.gpus_per_node) == (1, fewest)


@pytest.mark.parametrize(
    ("words", "site", "expected"),
    [
        ("--gpu A100", {"gpus_per_node": 2}, (2, 2)),  # 4 of them
        ("--gpu A100 --nodes 1", {"gpus_per_node": 8}, (1, 4)),
        ("--gpu A100 --nodes 3", {}, (3, 2)),
        ("--gpu A100 --gpus_per_node 3", {}, (2, 3)),
        ("--gpu A100 --nodes 2 --gpus_per_node 4", {}, (2, 4)),
        ("--gpu A100 --nodes 2 --gpus_per_node 4 --mp 8", {}, (2, 4)),
        ("--gpu A100 --mp 8", {"gpus_per_node": 4}, (2, 4)),
        ("--gpu A100 --quant int4", {}, (1, 2)),
        ("--mp 12", {}, (2, 6)),
        ("--nodes 2", {}, (2, 4)),
        ("--gpus_per_node 16", {}, (1, 16)),
        ("--gpus_per_node 4", {}, (2, 4)),
        ("--nodes 1 --gpus_per_node 1 --device auto", {}, (1, 1)),
    ],
)
def test_nodes_and_gpus(words: str, site: dict[str, Any], expected: tuple[int, int]) -> None:
    asked = planned(*words.split(), **site)
    assert (asked.nodes, asked.gpus_per_node) == expected
    assert asked.verb[-2:] == ("--mp", str(expected[0] * expected[1])) or "--mp" in asked.verb


@pytest.mark.parametrize(
    ("words", "site", "said"),
    [
        (
            "--mp 6 --nodes 2 --gpus_per_node 4",
            {},
            "--mp 6 on 2 nodes with 4 GPUs each: 2 GPUs would be idle; give --mp 8",
        ),
        (
            "--mp 10 --nodes 2 --gpus_per_node 4",
            {},
            "--mp 10 on 2 nodes with 4 GPUs each: give --mp 8, or more of them",
        ),
        ("--mp 3 --nodes 2", {}, "1 GPU would be idle; give --mp 4"),
        ("--mp 2 --gpus_per_node 4", {}, "--mp 2 on 1 node with 4 GPUs each: 2 GPUs would be idle; give --mp 4"),
        ("--mp 11", {}, "--mp 11 on 2 nodes with 6 GPUs each: 1 GPU would be idle; give --mp 12"),
        ("--mp 32 --nodes 2", {}, "takes 16 GPUs of a node, and one has 8: give more --nodes"),
        ("--gpus_per_node 8", {"gpus_per_node": 4}, "--gpus_per_node is 8, and a node has 4 (site file)"),
        ("--mp 0", {}, "--mp is 0, but must be at least 1"),
        ("--mp 65", {"gpus_per_node": 65}, "65 ranks for model 65B with 64 attention heads"),
        ("--gpu A100 --mp 2", {}, "65B over 2 ranks in fp16 does not fit: one needs 67."),
        ("--gpu A100 --mp 2", {}, "and A100 40GB has 42.31 GB; give --quant int4 or --mp 4, or --force to try"),
        ("--vram_gib 2", {}, "does not fit: one needs"),
        ("--gpu V100 --dtype bf16", {}, "--dtype bf16, but Tesla V100 16GB computes no bf16: use --dtype fp16"),
        ("--gpu A100 --vram_gib 40", {}, "--gpu and --vram_gib are both given: drop one"),
        ("--nodes 65", {}, "no number of ranks up to 64, the heads of 65B, suits: give --mp"),
        ("--nodes 65 --gpu A100", {}, "no number of ranks up to 64, the heads of 65B, suits: give --mp"),
        ("--nodes 2 --vram_gib 2", {}, "65B over 8 ranks in fp16 does not fit"),
        ("--device cpu --gpus_per_node 2", {}, "--gpus_per_node with --device cpu: the GPUs would be idle"),
        ("--device cpu --gpu A100", {}, "--gpu with --device cpu"),
        ("--device cpu --nodes 2", {}, "1 rank over 2 nodes: give --mp 2, as many for each"),
        ("--max_seq_len 4096", {}, "--max_seq_len is 4096, above 2048, the context of 65B"),
    ],
)
def test_what_contradicts_or_does_not_fit(words: str, site: dict[str, Any], said: str) -> None:
    assert said in refusal("infer", "--size", "65B", "--dry_run", *words.split(), **site)


def test_force_submits_what_does_not_fit() -> None:
    assert planned("--gpu", "A100", "--mp", "2", "--force").gpus_per_node == 2


def test_a_checkpoint_s_own_shards_where_no_card_is_named(tiny: Path) -> None:
    asked = job("infer", "--ckpt_dir", tiny)
    assert (asked.nodes, asked.gpus_per_node, asked.verb[-2:]) == (1, 2, ("--mp", "2"))


# ---- cores, memory, time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "site", "cpus"),
    [
        ("", {}, 32),  # 8 ranks, and nothing says how many cores a node has
        ("", {"cpus_per_node": 128}, 64),
        ("", {"cpus_per_node": 36}, 32),
        ("--nodes 2", {"cpus_per_node": 36}, 32),
        ("--cpus_per_node 3", {"cpus_per_node": 36}, 3),
        ("--device cpu", {"cpus_per_node": 6}, 6),
    ],
)
def test_cores(words: str, site: dict[str, Any], cpus: int) -> None:
    assert planned(*words.split(), **site).cpus_per_node == cpus


def test_memory_is_that_of_the_ranks_of_a_node_and_a_tenth_more() -> None:
    workload = Workload(dtype="fp16", batch_size=3, seq_len=BUILT_IN_TOKENS)
    whole = host_bytes(load_size("65B"), 8, workload) * 1.1 / 2**20
    assert planned("--mp", "8").mem_mib == pytest.approx(whole, abs=1)
    assert planned("--mp", "8", "--nodes", "2").mem_mib == pytest.approx(whole / 2, abs=1)
    offloaded = planned("--mp", "8", "--offload", "cpu").mem_mib
    assert offloaded > whole + 100_000  # 130 GB wait there
    assert "must be at most 1000000" in refusal("infer", "--size", "65B", "--dry_run", "--mem_gib", "1e300")
    assert planned("--mp", "8", "--mem_gib", "1.5").mem_mib == 1536


def test_on_a_cpu_memory_holds_the_model() -> None:
    one, two = planned("--device", "cpu"), planned("--device", "cpu", "--mp", "4", "--nodes", "2")
    assert one.gpus_per_node == two.gpus_per_node == 0 and (one.nodes, two.nodes) == (1, 2)
    assert one.mem_mib * 2**20 > 130.6e9 * 1.1 and 130.6e9 * 0.55 < two.mem_mib * 2**20 < 130.6e9 * 0.6
    assert words_after(two) == "launch/infer.py --size 65B --device cpu --mp 4"
    said = refusal("infer", "--size", "65B", "--dry_run", "--device", "cpu", "--mem_gib", "100")
    assert "--mem_gib 100, but the ranks of a node need 12" in said and "or --force to try" in said


def test_more_than_a_node_has_is_refused() -> None:
    small = {"cpus_per_node": 4, "mem_gib_per_node": 8}
    words = ("--size", "65B", "--dry_run")
    assert "8 CPUs for 8 ranks of a node, and it has 4 (site file)" in refusal("infer", *words, **small)
    assert "5 CPUs for 1 rank" in refusal("infer", *words, "--device", "cpu", "--cpus_per_node", "5", **small)
    said = refusal("infer", *words, "--nodes", "2", **small | {"mem_gib_per_node": 4})
    assert "6.3 GiB of main memory for a node, and it has 4 (site file): give more --nodes" in said


def test_time_is_twice_that_of_loading_and_of_half_of_the_bandwidth() -> None:
    def minutes(*words: str) -> int:
        return planned("--mp", "8", "--gpu", "A100", *words).time_s // 60

    loading_s = 130.57e9 / 0.2e9
    assert minutes() == 30  # 2 x 653 s are 21.8 minutes, the tokens half of one
    Path("many.txt").write_text("Once upon a time\n" * 50_000)
    step_s = 130.57e9 / 8 / 1555e9  # and a little cache
    decoding_s = 50_000 * 128 / 8 * step_s / 0.5
    for share, words in ((1, []), (4, ["--array", "4", "--output", "o.jsonl"])):
        expected = 2 * (loading_s + decoding_s / share)
        assert expected < minutes("--prompts_file", "many.txt", *words) * 60 < 1.05 * expected + 600
    assert minutes("--time", "7") == 7
    assert job("bench", "--size", "smollm2-135m", "--random_weights", "--mp", "1").time_s == 600


@pytest.mark.parametrize(
    ("text", "seconds"), [("1", 60), ("90", 5400), ("00:01:00", 60), ("12:00:30", 43230), ("1-12:00:00", 129600)]
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "00:00:59", "1h", "1:00", "1-12", "-5", "12:60:00", "UNLIMITED", "1.5"])
def test_times_that_are_none(text: str) -> None:
    assert refusal("infer", f"--time={text}").startswith("--time is ")
