"""From flags to a job: what is planned, and what is refused before it is submitted."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, infer, run

from llama_mp.advice import Device, smallest_degree
from llama_mp.checkpoint.cut import CHUNK_ELEMENTS
from llama_mp.checkpoint.reshard import TOKENIZER_BYTES
from llama_mp.cli import parse
from llama_mp.config import load_size
from llama_mp.errors import RequestError
from llama_mp.gpus import find_gpu
from llama_mp.memory import Workload, host_bytes
from llama_mp.slurm.flags import JOBS, seconds_of
from llama_mp.slurm.request import job_of
from llama_mp.slurm.script import Job
from llama_mp.slurm.work import infer_work

BUILT_IN_TOKENS = 44 + 128  # of the longest prompt in bytes, and of its answer


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of submission and a home in which nothing is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLAMA_MP_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(verb: str, *words: str | Path, **site: Any) -> Job:
    """The job of a command line, at a site whose file holds `site`."""
    argv = [str(word) for word in words]
    if site:
        Path("site.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in site.items()))
        argv += ["--cluster", "site.toml"]
    return job_of(verb, parse(JOBS[verb], argv), "launch/submit.py")


def planned(*words: str, **site: Any) -> Job:
    """A job of 65B, of which there are no files."""
    return job("infer", "--size", "65B", "--dry_run", *words, **site)


def refusal(verb: str, *words: str | Path, **site: Any) -> str:
    with pytest.raises(RequestError) as caught:
        job(verb, *words, **site)
    return str(caught.value)


def words_after(asked: Job) -> str:
    return " ".join(asked.verb)


# ---- GPUs and nodes ------------------------------------------------------------------------------------------------


def test_without_a_card_there_is_a_gpu_for_each_shard_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = planned()
    assert (asked.nodes, asked.gpus_per_node, asked.name) == (1, 8, "infer-65B")
    assert words_after(asked) == "launch/infer.py --size 65B --device cuda --mp 8"
    said = capsys.readouterr().err
    assert "8 GPUs: no card is named" in said and f"no checkpoint of 65B at {Path.home()}/llama-mp/65B" in said


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


# ---- the other verbs -----------------------------------------------------------------------------------------------


def test_a_bench(empty_home: Path) -> None:
    asked = job("bench", "--size", "65B", "--random_weights", "--gpu", "A100", "--json", "r.json", "--record", "runs")
    assert (asked.nodes, asked.gpus_per_node, asked.name, asked.output) == (1, 4, "bench-65B", None)
    assert words_after(asked) == (
        "launch/bench.py --record runs --size 65B --device cuda --random_weights --json r.json --mp 4"
    )
    said = refusal("bench", "--size", "65B", "--random_weights", "--prompt_len", "4000")
    assert "--prompt_len 4000 + --gen_len 128 are 4128 tokens, above 2048" in said
    assert "give --mp" in refusal("bench", "--size", "65B", "--random_weights", "--vram_gib", "2")


def test_a_resharding(tiny: Path) -> None:
    asked = job("reshard", "--input", tiny, "--output", "out", "--mp", "4", "--check")
    assert (asked.nodes, asked.gpus_per_node, asked.cpus_per_node, asked.time_s) == (1, 0, 8, 600)
    assert words_after(asked) == f"launch/reshard.py --input {tiny} --output out --mp 4 --check"
    assert asked.mem_mib * 2**20 > 2 * (TOKENIZER_BYTES + CHUNK_ELEMENTS * 4 * 8 + 300e6)
    assert job("reshard", "--input", tiny, "--output", "out", "--mp", "4", cpus_per_node=4).cpus_per_node == 4
    for flag in ("--nodes", "--gpus_per_node", "--gpu", "--array"):
        assert f"unknown flag {flag}" in refusal("reshard", "--input", tiny, "--output", "out", "--mp", "4", flag, "2")


def test_a_resharding_that_is_done_is_not_submitted(tiny: Path) -> None:
    words = ("--input", str(tiny), "--output", "out", "--mp", "4")
    assert run(sys.executable, ROOT / "launch" / "reshard.py", *words).code == 0
    assert refusal("reshard", *words) == "--output out is whole already: there is nothing to submit"
    assert job("reshard", *words, "--check").nodes == 1


# ---- jobs after others ---------------------------------------------------------------------------------------------


def test_after_a_job_that_writes_the_checkpoint() -> None:
    asked = job("infer", "--ckpt_dir", "new", "--size", "65B", "--after", "12", "--gpu", "A100")
    assert (asked.gpus_per_node, asked.after) == (4, "12")
    assert words_after(asked) == "launch/infer.py --size 65B --ckpt_dir new --device cuda --mp 4"
    said = refusal("infer", "--ckpt_dir", "new", "--after", "12", "--time", "60")
    assert said == (
        "no checkpoint at new yet, so nothing can be planned: give --size, or --nodes, --gpus_per_node, --mem_gib"
    )
    given = ("--nodes", "2", "--gpus_per_node", "4", "--mem_gib", "8", "--time", "60")
    asked = job("infer", "--ckpt_dir", "new", "--after", "12_3", *given)
    assert (asked.nodes, asked.gpus_per_node, asked.mem_mib, asked.time_s, asked.name) == (2, 4, 8192, 3600, "infer")
    words = ("--ckpt_dir", "new", "--after", "12", "--device", "cpu", "--mem_gib", "1", "--time", "1")
    assert job("infer", *words, "--mp", "2").verb[-2:] == ("--mp", "2")
    assert "give --size, or --mp" in refusal("infer", *words)
    assert "no checkpoint at new: no such folder" in refusal("infer", "--ckpt_dir", "new")


def test_a_resharding_after_another_one() -> None:
    words = ("--input", "new", "--output", "newer", "--mp", "4", "--after", "12")
    assert refusal("reshard", *words) == "no checkpoint at new yet, so nothing can be planned: give --time"
    assert job("reshard", *words, "--time", "10").time_s == 600
    Path("newer").write_text("")
    assert "newer is a file" in refusal("reshard", *words, "--time", "10")


@pytest.mark.parametrize("id", ["", "12:13", "afterok:12", "12_", "x", "-1", "12 13", "12\n"])
def test_ids_that_are_none(id: str) -> None:
    assert refusal("infer", f"--after={id}").startswith("--after is ")


# ---- what else is refused, and what is said ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--ckpt_dir", "none"),
        ("--size", "65C"),
        ("--size", "7B"),
        ("--ckpt_dir", "tiny", "--size", "7B"),
        ("--ckpt_dir", "tiny", "--tokenizer", "none.model"),
        ("--ckpt_dir", "tiny", "--prompts_file", "none.txt"),
        ("--ckpt_dir", "tiny", "--prompts_file", "bad.jsonl"),
        ("--ckpt_dir", "tiny", "--prompt", "x", "--output", "none/out.jsonl"),
        ("--ckpt_dir", "tiny", "--prompt", "x", "--output", "tiny"),
        ("--ckpt_dir", "tiny", "--prompt", "x " * 300),
        ("--ckpt_dir", "tiny", "--prompt", "x", "--mp", "9"),
        ("--ckpt_dir", "tiny", "--prompt", "x", "--chat"),
        ("--ckpt_dir", "tiny", "--prompt", "x", "--mp", "2", "--quant", "int4"),
        ("--prompt", "x", "--prompts_file", "p.txt"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_what_infer_refuses_is_refused_in_its_words(
    words: tuple[str, ...], tiny: Path, empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_home / "tiny").symlink_to(tiny)
    Path("bad.jsonl").write_text('{"id": "a"}\n')
    before = sorted(Path(".").iterdir())
    refused = refusal("infer", *words, "--gpus_per_node", "9") if "9" in words else refusal("infer", *words)
    assert refused == infer(*words, HOME=str(empty_home)).refusal
    assert sorted(Path(".").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--log_dir", "none"), "--log_dir none: there is no such folder, and SLURM makes none; make it"),
        (("--array", "2"), "--array without --output"),
        (("--array", "0", "--output", "o.jsonl"), "--array is 0, but must be at least 1"),
        (("--wait", "--dry_run"), "--wait and --dry_run are both given"),
        (("--max_restarts", "-1"), "--max_restarts is -1, but must be at least 0"),
        (("--cluster", "none.toml"), "site file none.toml cannot be read"),
        (("--parttion", "x"), "unknown flag --parttion (did you mean --partition?)"),
    ],
)
def test_cluster_flags(words: tuple[str, ...], said: str) -> None:
    assert said in refusal("infer", "--size", "65B", *words)


def test_folders_that_slurm_would_write_no_log_to(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (
        ("a\\b", "SLURM writes no log where a name has a \\"),
        ("%j", "SLURM replaces what follows a %"),
    ):
        (empty_home / name).mkdir()
        monkeypatch.chdir(empty_home / name)
        assert said in refusal("infer", "--size", "65B", "--dry_run")
    assert planned("--log_dir", str(empty_home / "%j")).log_dir == empty_home / "%j"


def test_what_the_flags_say_comes_before_what_the_site_says() -> None:
    site = {"partition": "a", "account": "b", "python": "~/venv/bin/python", "gpu": "A100", "options": ["--exclusive"]}
    asked = planned("--partition", "c", "--vram_gib", "80", **site)
    assert (asked.partition, asked.account, asked.options, asked.gpus_per_node) == ("c", "b", ("--exclusive",), 2)
    assert asked.python == f"{Path.home()}/venv/bin/python"
    assert planned("--python", "~/p", **site).python == f"{Path.home()}/p"
    assert planned().python == sys.executable


def test_the_verb_gets_its_own_flags_and_the_script_all_of_them(tiny: Path, empty_home: Path) -> None:
    shutil.copytree(tiny, "it's tiny")
    words = ["--ckpt_dir", "it's tiny", "--prompt=--x", "--stop", "a", "--stop=-b", "--temperature", "0", "--echo"]
    cluster = ["--job_name", "a job", "--array=2", "--max_restarts", "1", "--wait"]
    asked = job("infer", *words, *cluster, "--output", "o.jsonl", "--device", "auto", "--mp", "1")
    assert asked.verb == (
        *("launch/infer.py", "--temperature", "0.0", "--stop", "a", "--stop=-b", "--echo"),
        *("--ckpt_dir", "it's tiny", "--prompt=--x", "--output", "o.jsonl", "--mp", "1"),
    )
    again = parse(JOBS["infer"], asked.source[2:])
    assert again == parse(JOBS["infer"], [*words, *cluster, "--output", "o.jsonl", "--device", "auto", "--mp", "1"])
    assert (asked.name, asked.array, asked.max_restarts, asked.output) == ("a job", 2, 1, Path("o.jsonl"))


def test_prompts_are_counted_in_bytes_where_there_is_no_tokenizer_and_in_tokens_where_there_is_one(tiny: Path) -> None:
    chat = [{"role": "user", "content": "é" * 100}]
    Path("p.jsonl").write_text(json.dumps({"id": "a", "messages": chat, "max_gen_len": 50}, ensure_ascii=False))
    flags = parse(JOBS["infer"], ["--size", "65B", "--dry_run", "--prompts_file", "p.jsonl"])
    assert 250 < infer_work(flags).workload.seq_len < 400
    flags = parse(JOBS["infer"], ["--ckpt_dir", str(tiny), "--prompt", "Once upon a time", "--max_gen_len", "9"])
    work = infer_work(flags)
    assert 9 < work.workload.seq_len < 26 and (work.tokens, work.workload.dtype, work.num_files) == (9, "fp32", 2)


def test_what_is_piped_in_is_not_read(tiny: Path) -> None:
    program = ROOT / "launch" / "submit.py"
    words = ("infer", "--ckpt_dir", tiny, "--gpus_per_node", "1", "--dry_run")
    done = run(sys.executable, program, *words, text="a prompt")
    assert done.code == 0 and "the job continues the built-in prompts" in done.stderr, done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "VERB is missing"),
        (
            ("infr",),
            "VERB is 'infr', but must be one of infer, bench, reshard, status, logs, cancel (did you mean infer?)",
        ),
        (("--size", "65B"), "unknown flag --size"),
        (("--verb=infer",), "write the verb first"),
        (("status",), "ID is missing"),
        (("status", "x"), "ID is 'x', but must be a number"),
    ],
)
def test_the_verb_comes_first(words: tuple[str, ...], said: str) -> None:
    assert said in run(sys.executable, ROOT / "launch" / "submit.py", *words).refusal


def test_help_is_the_verb_s() -> None:
    program = ROOT / "launch" / "submit.py"
    done = run(sys.executable, program, "infer", "--help")
    assert done.stdout.startswith(f"usage: python {program} infer [--name value ...]")
    assert {"--array", "--partition", "--prompts_file", "--temperature"} <= set(done.stdout.split())
    assert "--array" not in run(sys.executable, program, "bench", "--help").stdout
    assert "infer, bench or reshard" in run(sys.executable, program, "--help").stdout
