"""From flags to a job: what is planned, and what is refused before it is submitted."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from running import INFER, ROOT, run
from slurm_jobs import empty_home, job, planned, refusal, words_after

from llama_mp.batch import Batch, InferFlags
from llama_mp.checkpoint.cut import CHUNK_ELEMENTS
from llama_mp.checkpoint.reshard import TOKENIZER_BYTES
from llama_mp.cli import parse
from llama_mp.errors import RequestError
from llama_mp.locate import locate
from llama_mp.parts import Parts
from llama_mp.slurm import cluster, report
from llama_mp.slurm.flags import JOBS
from llama_mp.slurm.work import infer_work


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


# ---- the other verbs -----------------------------------------------------------------------------------------------


def test_a_bench(home: Path) -> None:
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
        ("--ckpt_dir", "tiny", "--prompt", "x", "--mp", "3", "--deterministic"),
        ("--prompt", "x", "--prompts_file", "p.txt"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_what_infer_refuses_is_refused_in_its_words(words: tuple[str, ...], tiny: Path, home: Path) -> None:
    (home / "tiny").symlink_to(tiny)
    Path("bad.jsonl").write_text('{"id": "a"}\n')
    before = sorted(Path(".").iterdir())
    refused = refusal("infer", *words, "--gpus_per_node", "9") if "9" in words else refusal("infer", *words)
    with pytest.raises(RequestError) as caught:
        runpy.run_path(INFER)["main"](parse(InferFlags, words))
    assert refused == str(caught.value)
    assert sorted(Path(".").iterdir()) == before


def test_an_output_of_another_run_or_of_a_living_job_is_refused(tiny: Path) -> None:
    words = ["--ckpt_dir", str(tiny), "--prompt", "x", "--output", "o.jsonl"]
    flags = parse(InferFlags, words)
    with Batch.open(flags, locate(flags)) as batch:
        batch.output.write({"id": "0", "completion_tokens": 1})
    assert job("infer", *words).output == Path("o.jsonl")
    assert "o.jsonl is of another run: flags.seed was 1 there and is 2 now" in refusal("infer", *words, "--seed", "2")
    (Path("o.jsonl.parts")).mkdir()
    part = Parts(flags.output).begin("7-0")
    assert refusal("infer", *words).startswith("job 7 is writing o.jsonl too")
    assert job("infer", *words, "--after", "7").after == "7"
    part.close()
    assert job("infer", *words).nodes == 1


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


@pytest.mark.parametrize("name", ["a\\b", "100%", "%j"])
def test_folders_in_which_slurm_loses_a_log(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / name
    folder.mkdir()
    said = f"--log_dir {folder}: SLURM loses a log that has {'%' if '%' in name else name[1]} in its folder's name"
    assert refusal("infer", "--size", "65B", "--dry_run", "--log_dir", folder).startswith(said)
    monkeypatch.chdir(folder)
    assert refusal("infer", "--size", "65B", "--dry_run").startswith(said)
    assert planned("--log_dir", str(home)).log_dir == home


def test_what_the_flags_say_comes_before_what_the_site_says() -> None:
    site = {"partition": "a", "account": "b", "python": "~/venv/bin/python", "gpu": "A100", "options": ["--exclusive"]}
    asked = planned("--partition", "c", "--vram_gib", "80", **site)
    assert (asked.partition, asked.account, asked.options, asked.gpus_per_node) == ("c", "b", ("--exclusive",), 2)
    assert asked.python == f"{Path.home()}/venv/bin/python"
    assert planned("--python", "~/p", **site).python == f"{Path.home()}/p"
    assert planned().python == sys.executable


def test_the_verb_gets_its_own_flags_and_the_script_all_of_them(tiny: Path, home: Path) -> None:
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
    assert 250 < infer_work(flags, []).workload.seq_len < 400
    flags = parse(JOBS["infer"], ["--ckpt_dir", str(tiny), "--prompt", "Once upon a time", "--max_gen_len", "9"])
    work = infer_work(flags, [])
    assert 9 < work.workload.seq_len < 26 and (work.tokens, work.workload.dtype, work.num_files) == (9, "fp32", 2)


def test_what_is_piped_in_is_not_read(tiny: Path) -> None:
    program = ROOT / "launch" / "submit.py"
    words = ("infer", "--ckpt_dir", tiny, "--gpus_per_node", "1", "--dry_run")
    done = run(sys.executable, program, *words, text="a prompt")
    assert done.code == 0 and "the job continues the built-in prompts" in done.stderr, done


def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code of `launch/submit.py` in this process, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "launch" / "submit.py"), run_name="__main__")
    return left.value.code, *capsys.readouterr()


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
def test_the_verb_comes_first(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, errors = submit(monkeypatch, capsys, *words)
    assert (code, printed) == (2, "") and errors.startswith(f"error: {said}") and errors.count("\n") == 1


def test_help_is_the_verb_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, infer_help, _ = submit(monkeypatch, capsys, "infer", "--help")
    assert infer_help.startswith(f"usage: python {ROOT}/launch/submit.py infer [--name value ...]")
    assert {"--array", "--partition", "--prompts_file", "--temperature"} <= set(infer_help.split())
    assert "--array" not in submit(monkeypatch, capsys, "bench", "--help")[1]
    assert "infer, bench or reshard" in submit(monkeypatch, capsys, "--help")[1]


def test_a_job_is_submitted_as_it_is_shown_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted, waited = [], []
    monkeypatch.setattr(cluster, "submit", lambda text: submitted.append(text) or "12")
    monkeypatch.setattr(report, "wait", waited.append)
    words = ("bench", "--size", "7B", "--random_weights")
    code, printed, said = submit(monkeypatch, capsys, *words)
    assert (code, printed, waited) == (0, "12\n", []) and said.startswith("1 GPU: no card is named")
    assert submit(monkeypatch, capsys, *words, "--wait")[:2] == (0, "12\n") and waited == ["12"]
    shown = submit(monkeypatch, capsys, *words, "--dry_run")[1]
    assert [submitted[0], submitted[1].replace(" --wait", "")] == [shown, shown]


def test_what_there_is_to_be_told_of_a_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "status", lambda id, json: print("status", id, json))
    for name in ("logs", "cancel"):
        monkeypatch.setattr(report, name, lambda id, name=name: print(name, id))
    assert submit(monkeypatch, capsys, "status", "12")[1] == "status 12 False\n"
    assert submit(monkeypatch, capsys, "status", "12_3", "--json")[1] == "status 12_3 True\n"
    assert submit(monkeypatch, capsys, "logs", "--id", "12")[1] == "logs 12\n"
    assert submit(monkeypatch, capsys, "cancel", "12")[1] == "cancel 12\n"
